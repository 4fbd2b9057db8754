"""What a public repository has agrees with the code: workflows, container, hooks, citation."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
BIN = ".venv/bin/python"


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


PROJECT = tomllib.loads(text("pyproject.toml"))["project"]


def targets():
    """The targets that the Makefile has."""
    return set(re.findall(r"^([\w./-]+):(?!=)", text("Makefile"), re.M)) - {".PHONY"}


def jobs(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()


def commands(path):
    """What the steps of a workflow run, a line each."""
    runs = [step["run"] for job in jobs(path) for step in job["steps"] if "run" in step]
    return "\n".join(runs)


def made(script):
    """The targets that a shell script's commands make."""
    lines = [line.split("#")[0] for line in script.splitlines()]
    calls = [re.match(r"\s*(?:(?:RUN )?(?:\w+=\S* )*|phase )make\s+(.*)", line) for line in lines]
    words = [word for call in calls if call for word in shlex.split(call[1])]
    return {word for word in words if "=" not in word}


def described():
    """What tells people and machines to call make -> the targets that it names."""
    container = json.loads(text(".devcontainer/devcontainer.json"))
    comments = "\n".join(re.findall(r"docker run --rm effad (make .*)", text("Dockerfile")))
    fenced = "\n".join(re.findall(r"^```\n(.*?)^```", text("CONTRIBUTING.md"), re.M | re.S))
    inline = "\n".join(re.findall(r"`(make [^`]*)`", text("CONTRIBUTING.md")))
    return {path.name: made(commands(path)) for path in WORKFLOWS} | {
        ".ci/run": made(text(".ci/run")),
        "devcontainer.json": made(container["postCreateCommand"]),
        "Dockerfile": made(text("Dockerfile")),
        "Dockerfile's comments": made(comments),
        "CONTRIBUTING.md": made(f"{fenced}\n{inline}"),
    }


@pytest.mark.parametrize("where", described())
def test_every_target_that_is_called_exists(where):
    called = described()[where]
    assert called, where
    assert called <= targets(), where


def test_calls_of_make_are_found():
    script = (
        "phase make a-b X=1\nRUN P=1 make .venv/.c V='d e'\nmake f # make g\n# make h\nremake i"
    )
    assert made(script) == {"a-b", ".venv/.c", "f"}
    assert "no-such-target" not in targets() and {"test", ".venv/.installed"} <= targets()


def test_the_workflows_make_what_ci_makes():
    installed = {".venv/.installed"}  # a step of its own there, for its time and its environment
    by_workflows = set().union(*(made(commands(path)) for path in WORKFLOWS))
    assert by_workflows - installed == made(text(".ci/run"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_only_read_and_ends(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["permissions"] == {"contents": "read"}
    assert content["concurrency"]["cancel-in-progress"] is True
    for job in jobs(path):
        assert 0 < job["timeout-minutes"] <= 120
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)


def test_the_extras_that_are_installed_exist():
    named = {}
    for name in ("Makefile", "README.md", "data/README.md", ".github/workflows/tests.yml"):
        named[name] = re.findall(r"\.\[([a-z,]+)\]", text(name))
        assert named[name], name
        assert set(",".join(named[name]).split(",")) <= PROJECT["optional-dependencies"].keys()
    tested, pinned, _ = named["Makefile"]
    assert set(pinned.split(",")) == PROJECT["optional-dependencies"].keys()
    assert named[".github/workflows/tests.yml"] == [tested]  # on Windows, as `make` elsewhere
    (loop,) = re.findall(r"for extra in \((.*)\):", text("tests/oldest.py"))
    assert loop.replace('"', "").split(", ") == tested.split(",")


def test_there_are_two_workflows_for_three_systems():
    assert [path.name for path in WORKFLOWS] == ["tests.yml", "tutorial.yml"]
    systems = []
    for job in jobs(WORKFLOWS[0]):
        systems += job.get("strategy", {}).get("matrix", {}).get("os", [job["runs-on"]])
    assert sorted(systems) == ["macos-latest", "ubuntu-latest", "windows-latest"]


def test_pythons_start_at_the_oldest_admitted_one():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    for job in jobs(WORKFLOWS[0]):
        versions = job["strategy"]["matrix"]["python"]
        assert all(isinstance(version, str) for version in versions)  # YAML reads 3.10 as 3.1
        assert versions == sorted(versions, key=lambda v: [*map(int, v.split("."))])
        assert versions[0] == oldest and len(versions) > 1


def test_the_container_has_the_newest_python_of_the_workflows():
    newest = {job["strategy"]["matrix"]["python"][-1] for job in jobs(WORKFLOWS[0])}
    (tutorial,) = jobs(WORKFLOWS[1])
    assert {tutorial["container"]["image"].removeprefix("python:")} == newest
    assert set(re.findall(r"^FROM python:([\d.]+)", text("Dockerfile"), re.M)) == newest


def test_the_tests_that_windows_runs_exist():
    named = re.findall(r"tests/\S+\.py", commands(WORKFLOWS[0]))
    assert len(named) >= 10
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_what_is_uploaded_is_what_the_targets_write():
    uploads = [
        step["with"]["path"]
        for job in jobs(WORKFLOWS[1])
        for step in job["steps"]
        if step.get("uses", "").startswith("actions/upload-artifact@")
    ]
    assert uploads == ["build/notebooks", "build/site/html"]
    assert '"build" / "notebooks"' in text("notebooks/run.py")
    assert '"build" / "site"' in text("docs/build.py") and 'SITE / "html"' in text("docs/build.py")


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Batzner", "Heckler", "König"]
    for said in (names[0], paper["url"]):
        assert said in text("README.md")


def test_the_changelog_starts_with_this_version():
    versions = re.findall(
        r"^## \[(.+?)\] - (\d{4}-\d\d-\d\d|unreleased)$", text("CHANGELOG.md"), re.M
    )
    assert len(versions) == len(re.findall(r"^## ", text("CHANGELOG.md"), re.M)) > 0
    assert versions[0][0] == PROJECT["version"]


def hooks():
    content = yaml.safe_load(text(".pre-commit-config.yaml"))
    assert [repo["repo"] for repo in content["repos"]] == ["local"]  # nothing is fetched
    return content["repos"][0]["hooks"]


@pytest.mark.parametrize("hook", hooks(), ids=lambda hook: hook["id"])
def test_a_hook_names_a_command_that_exists(hook):
    program, *arguments = shlex.split(hook["entry"])
    assert program == BIN and BIN in text("Makefile")
    assert hook["language"] == "system"
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), arguments[1]
    else:
        assert (ROOT / arguments[0]).is_file()
    helped = subprocess.run([sys.executable, *arguments, "--help"], cwd=ROOT, capture_output=True)
    assert helped.returncode == 0, helped.stderr.decode()


def test_the_hooks_cover_python_and_every_notebook():
    assert [hook["id"] for hook in hooks()] == ["ruff-check", "ruff-format", "tidy"]
    pattern = hooks()[-1]["files"]
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert re.search(pattern, f"notebooks/{notebook.name}")
    assert not re.search(pattern, "docs/07_x.ipynb")


def test_the_guide_names_only_files_that_exist():
    guide = text("CONTRIBUTING.md")
    folders = r"tests|notebooks|benchmarks|effad_core|data|\.github|\.devcontainer"
    names = re.findall(rf"(?<![\w/])((?:{folders})/[\w./-]*)(?![\w*])", guide)
    names += re.findall(r"\]\(([^):#]+)\)", guide)
    to_write = {"benchmarks/name.py", "notebooks/NN_name.ipynb"}
    assert len(names) >= 20 and to_write <= set(names)
    assert {name for name in names if not (ROOT / name).exists()} == to_write


def test_the_guides_mutation_is_one_of_the_table():
    (example,) = re.findall(
        r"^```\n(\[\[mutation\]\]\n.*?)^```", text("CONTRIBUTING.md"), re.M | re.S
    )
    assert example in text("tests/mutations/algorithms.toml")


def test_the_image_takes_no_environment_of_the_machine_along():
    ignored = text(".dockerignore").splitlines()
    assert {".venv", "build", "data/*"} <= set(ignored)
    shipped = re.findall(r"^!/(data/.*?)/?$", text(".gitignore"), re.M)
    assert shipped and {f"!{name}" for name in shipped} <= set(ignored)
