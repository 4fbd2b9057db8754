"""The files around the code agree: dependencies, pins, licence, what may be committed."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
CONDA_NAMES = {"pytorch": "torch"}


def bounds(requirements, names=None):
    """Distribution name -> bound, of requirements as pip writes them."""
    parsed = [Requirement(line) for line in requirements]
    assert not [str(one) for one in parsed if one.marker or one.extras or one.url]
    found = {(names or {}).get(one.name, one.name): str(one.specifier) for one in parsed}
    assert len(found) == len(parsed)
    return found


def direct():
    return bounds(sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"]))


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
