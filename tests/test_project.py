"""The files around the code agree: dependencies, imports, pins, licence, what may be committed."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA_NAMES = {"pytorch": "torch"}
MODULES = {  # of a package
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
}
# The folders and modules that only an extra makes importable. Everywhere else, a module imports
# the packages of an extra inside the functions that need them.
OF_AN_EXTRA = {"effad_core/explorer": "course"}
NOT_IMPORTED = {"scikit-learn"}  # two of its files are read: effad_core/datasets/pretraining.py


def bounds(requirements, names=None):
    """Distribution name -> bound, of requirements as pip writes them."""
    parsed = [Requirement(line) for line in requirements]
    assert not [str(one) for one in parsed if one.marker or one.extras or one.url]
    found = {(names or {}).get(one.name, one.name): str(one.specifier) for one in parsed}
    assert len(found) == len(parsed)
    return found


def direct():
    """Of the core and of every extra; no package stands in two of them."""
    return bounds(sum(EXTRAS.values(), PROJECT["dependencies"]))


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return bounds(line for line in lines if not line.startswith("#"))


def test_conda_installs_what_pip_installs():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    found = bounds(conda + pip["pip"][:-1], CONDA_NAMES)
    assert pip["pip"][-1] == "-e ."
    assert found.pop("python") == PROJECT["requires-python"]
    assert found.pop("pip") == ""
    assert found == direct()


def test_every_dependency_has_a_lower_bound():
    assert [
        name for name, bound in direct().items() if not re.fullmatch(r">=[\d.]+(post\d+)?", bound)
    ] == []


def modules(packages):
    """The names that the code imports these packages by."""
    return {MODULES.get(name, name.replace("-", "_")) for name in packages}


def foreign_imports(source):
    """What a module imports of others' packages: when it is loaded, and inside of functions."""
    ours = sys.stdlib_module_names | {"baselines", "effad_core", "parts_tray"}
    at_once, later = set(), set()

    def read(node, found):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.update(alias.name.split(".")[0] for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and not child.level:
                found.add(child.module.split(".")[0])
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            read(child, later if is_function else found)

    read(ast.parse(source), at_once)
    return at_once - ours, later - ours


def imported():
    """Module of effad_core, parts_tray and baselines -> its `foreign_imports`."""
    rooms = ("effad_core", "parts_tray", "baselines")
    paths = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    assert len(paths) > 50
    return {
        path.relative_to(ROOT).as_posix(): foreign_imports(path.read_text(encoding="utf-8"))
        for path in paths
    }


def test_imports_are_told_apart():
    source = (
        "import os, a.b\nfrom .c import d\nfrom e import f\nif os:\n import g\n"
        "class C:\n import h\n async def m(self):\n  def n():\n   import i\n"
        "import effad_core.j as k\n"
    )
    assert foreign_imports(source) == ({"a", "e", "g", "h"}, {"i"})


def test_the_core_needs_no_extra_to_be_imported():
    core = modules(bounds(PROJECT["dependencies"]))
    missing = {}
    for path, (at_once, _) in imported().items():
        extras = [extra for place, extra in OF_AN_EXTRA.items() if path.startswith(place)]
        missing[path] = at_once - core.union(*(modules(bounds(EXTRAS[extra])) for extra in extras))
    assert {path: names for path, names in missing.items() if names} == {}


def test_what_is_imported_is_declared_and_the_core_holds_no_more():
    found = set().union(*(at_once | later for at_once, later in imported().values()))
    assert found - modules(direct()) == set()
    assert modules(bounds(PROJECT["dependencies"])) - found == modules(NOT_IMPORTED)


def test_constraints_are_exact_versions():
    assert len(pins()) > len(direct())
    assert {
        name: bound for name, bound in pins().items() if not re.fullmatch(r"==[^,*]+", bound)
    } == {}


@pytest.mark.parametrize(
    "line", PYPROJECT["build-system"]["requires"] + [*map("".join, direct().items())]
)
def test_constraints_pin_every_dependency_within_its_bound(line):
    pinned = {canonicalize_name(name): bound for name, bound in pins().items()}
    requirement = Requirement(line)
    version = pinned[canonicalize_name(requirement.name)].removeprefix("==")
    assert requirement.specifier.contains(version)


def test_a_wheel_built_for_the_cpu_satisfies_the_pins():
    for name in ("torch", "torchvision"):
        pin = Requirement(name + pins()[name])
        assert pin.specifier.contains(pins()[name].removeprefix("==") + "+cpu")


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert " ".join(text.split()).startswith("Apache License Version 2.0, January 2004")
    for section in range(1, 10):
        assert re.search(rf"^   {section}\. ", text, re.M), section
    assert "END OF TERMS AND CONDITIONS" in text


# Character classes keep these patterns from matching their own source.
UNWANTED = {
    "a placeholder": r"[@]@[A-Z]+@@",
    "a machine's path": r"(?<![\w.~*})>-])/(?:[w]ork|[r]oot|[t]mp|[h]ome|[U]sers)/\w",
    "a package registry's host": r"[p]ypi\.org|[p]ythonhosted|[a]naconda\.(?:org|com)|[n]pmjs\."
    r"|[d]ownload\.pytorch",
}


def committed_texts():
    """Every file that git tracks or would add, where it is text."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
    )
    if listed.returncode:
        pytest.skip("this copy is no git repository")
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (content := path.read_bytes())[:8192]:
            yield name, content.decode("utf-8")


@pytest.mark.parametrize("what", UNWANTED)
def test_no_committed_file_names(what):
    texts = dict(committed_texts())
    assert "pyproject.toml" in texts
    hits = {name: re.findall(UNWANTED[what], text) for name, text in texts.items()}
    assert {name: found for name, found in hits.items() if found} == {}


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("a placeholder", "@" + "@MEASURED@@"),
        ("a machine's path", "open('/" + "home/me/x')"),
        ("a machine's path", "cd /" + "tmp/x"),
        ("a package registry's host", "https://py" + "pi.org/simple"),
    ],
)
def test_the_patterns_find_what_they_name(what, text):
    assert re.search(UNWANTED[what], text)
    assert not re.search(UNWANTED[what], "https://example.org/home/x and build/tmp/y")
