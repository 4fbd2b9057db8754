"""The Makefile on a stand-in for Python that writes down its calls: nothing is installed here."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What `make test` itself puts into the environment of these tests.
OUTER = re.compile("MAKE|MFLAGS|(PROFILE|SCENARIO|DATA|TORCH_INDEX|PYTHON|PORT|MINUTES|CHROMIUM)$")
# Logs its arguments one per line; as `-m venv` it makes a copy of itself; fails where FAIL says so.
PYTHON = """#!/bin/sh
printf '%s\\n' "<$#>" "$@" >> "$CALLS"
case "$*" in *"${FAIL:-nothing}"*) exit 1;; esac
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi
"""


@pytest.fixture
def make(tmp_path):
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    calls = tmp_path / "calls"

    def run(*arguments, **environment):
        calls.write_text("")
        outer = {name: value for name, value in os.environ.items() if not OUTER.match(name)}
        done = subprocess.run(
            ["make", f"PYTHON={tmp_path / 'python'}", *arguments],
            cwd=folder,
            env=outer | {"CALLS": str(calls)} | environment,
            capture_output=True,
            text=True,
        )
        groups = re.split(r"^<\d+>\n", calls.read_text(), flags=re.M)[1:]
        return done, [group.splitlines() for group in groups]

    run.folder = folder
    return run


def test_help_lists_every_target():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.M)
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = re.findall(r"^  make ([\w-]+) +\S", shown, re.M)
    assert sorted(listed) == sorted(set(phony.split()) - {"python", "chromium"})
    assert {"tutorial", "test", "lab", "help", "site", "app", "test-browser"} <= set(listed)


def test_the_second_call_installs_nothing(make):
    first, calls = make("tutorial")
    assert first.returncode == 0, first.stderr
    installs = [call for call in calls if "install" in call]
    assert [call[-1] for call in installs] == [
        "setuptools",
        ".[cluster,course,distill,export,serve,test]",
    ]
    assert all("--constraint" in call for call in installs)
    _, calls = make("tutorial")
    assert calls == [["notebooks/run.py", "--profile", "quick"]]


def test_new_pins_are_installed(make):
    make("tutorial")
    stamp = make.folder / ".venv" / ".installed"
    os.utime(make.folder / "constraints.txt", (stamp.stat().st_mtime + 10,) * 2)
    _, calls = make("tutorial")
    assert any("install" in call for call in calls)


def test_an_installation_that_breaks_off_is_taken_up_again(make):
    broken, _ = make("tutorial", FAIL="--editable")
    assert broken.returncode != 0
    assert not (make.folder / ".venv" / ".installed").exists()
    done, calls = make("tutorial")
    assert done.returncode == 0
    assert any("--editable" in call for call in calls)
    assert (make.folder / ".venv" / ".installed").exists()


def test_variables_reach_the_runner_unharmed(make):
    data = "/data/my 'best' \"images\""
    _, calls = make("tutorial", "PROFILE=laptop", "SCENARIO=solar-poly", f"DATA={data}")
    expected = ["--profile", "laptop", "--scenario", "solar-poly", "--data", data]
    assert calls[-1] == ["notebooks/run.py", *expected]


def test_the_soak_takes_its_minutes(make):
    for arguments, minutes in (((), "5"), (("MINUTES=0.5",), "0.5")):
        _, calls = make("soak", *arguments)
        assert calls[-5:] == [
            *(
                [f"tests/soak/{name}.py", "--minutes", minutes]
                for name in ("interruption", "files", "images", "folders")
            ),
            ["tests/soak/cluster.py"],
        ]


def test_another_index_serves_torch_alone(make):
    _, calls = make("tutorial", "TORCH_INDEX=https://wheels.example/cpu")
    indexed = [call for call in calls if "--index-url" in call]
    assert len(indexed) == 1
    assert indexed[0][-3:] == ["https://wheels.example/cpu", "torch", "torchvision"]
    assert "--constraint" in indexed[0]


@pytest.mark.parametrize(
    ("fail", "sentence"),
    [("version_info", "needs Python 3.11 or newer"), ("ensurepip", "python3-venv")],
)
def test_a_python_that_cannot_do_it_is_a_sentence(make, fail, sentence):
    done, calls = make("tutorial", FAIL=fail)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert not any("venv" in call for call in calls)


def test_a_python_that_does_not_exist_is_a_sentence(make):
    done, _ = make("tutorial", "PYTHON=python3.99")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer as 'python3.99'" in done.stderr


def test_only_what_needs_the_extras_installs_them_and_once(make):
    for target in ("tutorial", "test", "lab"):
        _, calls = make(target)
        assert not any("site" in argument for call in calls for argument in call), target
    for target, script in (("site", "docs/build.py"), ("app", "notebooks/app.py")):
        _, calls = make(target)
        assert calls[-1][0] == script
        installs = [call for call in calls if "install" in call]
        assert [call[-1] for call in installs] == [".[site,browser]"] * (target == "site")
        assert all("--constraint" in call for call in installs)
    os.utime(make.folder / "constraints.txt", (time.time() + 10,) * 2)
    _, calls = make("site")
    assert [call[-1] for call in calls if "install" in call][-2:] == [
        ".[cluster,course,distill,export,serve,test]",
        ".[site,browser]",
    ]


def test_variables_reach_the_app(make):
    data = "/data/my 'best' \"images\""
    _, calls = make("app", "PROFILE=laptop", "PORT=9000", "SCENARIO=tray", f"DATA={data}")
    expected = ["--profile", "laptop", "--port", "9000", "--scenario", "tray", "--data", data]
    assert calls[-1] == ["notebooks/app.py", *expected]


def test_the_browser_is_looked_for_before_anything_is_installed(make):
    done, calls = make("test-browser", "CHROMIUM=no-such-browser")
    assert done.returncode != 0 and calls == []
    assert "apt-get install chromium" in done.stderr
    done, calls = make("test-browser", "CHROMIUM=sh")
    assert done.returncode == 0
    assert calls[-1] == ["-m", "pytest", "-rP", "tests/browser"]
