"""`make app` before Voila starts: which executed notebook will do, and a port that is taken."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_notebook

COURSE = Path(__file__).parents[2] / "notebooks"


@pytest.fixture
def app(monkeypatch):
    monkeypatch.syspath_prepend(COURSE)  # for run.py, beside it
    spec = importlib.util.spec_from_file_location("app", COURSE / "app.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def executed(app, tmp_path):
    """The notebook as executed with the profile quick, a second after it was last changed."""
    path = tmp_path / "06.ipynb"
    parameters = {"profile": "quick", "scenario": "tray", "test_images": 64, "report": "06.json"}
    nbformat.write(new_notebook(metadata={"papermill": {"parameters": parameters}}), path)
    os.utime(path, (app.NOTEBOOK.stat().st_mtime + 1,) * 2)
    return path


WANTED = {"profile": "quick", "scenario": "tray", "test_images": 64}


def test_an_executed_notebook_with_the_wanted_parameters_will_do(app, executed):
    assert app.is_current(executed, WANTED)


@pytest.mark.parametrize(
    "other", [{"profile": "laptop"}, {"scenario": "solar-mono"}, {"test_images": 0}, {"seed": 1}]
)
def test_one_with_other_parameters_will_not(app, executed, other):
    assert not app.is_current(executed, WANTED | other)


def test_one_that_is_older_than_the_notebook_or_absent_will_not(app, executed):
    os.utime(executed, (app.NOTEBOOK.stat().st_mtime - 1,) * 2)
    assert not app.is_current(executed, WANTED)
    executed.unlink()
    assert not app.is_current(executed, WANTED)


def test_a_port_that_is_taken_is_a_sentence():
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        command = [sys.executable, COURSE / "app.py", "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().startswith(f"The port {port} is taken: name another one")
