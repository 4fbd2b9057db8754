"""notebooks/run.py on small notebooks: what it passes on, what it prints, how it stops."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from PIL import Image

COURSE = Path(__file__).parents[2] / "notebooks"
PARAMETERS = 'scenario = "none"\nsteps = 1\nrate = 0.5\nreport = None'


@pytest.fixture
def course(tmp_path):
    """An empty course in a folder whose name holds a space, with a runner and one profile."""
    folder = tmp_path / "my course" / "notebooks"
    (folder / "profiles").mkdir(parents=True)
    shutil.copy(COURSE / "run.py", folder)
    (folder / "profiles" / "quick.yaml").write_text("common: {}\n")
    return folder


def add_notebook(course, name, *sources, parameters=PARAMETERS):
    cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *sources)]
    cells[0].metadata.tags = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), course / f"{name}.ipynb")


def draw_folder(folder, count):
    folder.mkdir(parents=True)
    for number in range(count):
        Image.effect_noise((40, 30), 60).save(folder / f"{number}.png")


def command(course, *arguments):
    return [sys.executable, str(course / "run.py"), *arguments]


def run(course, *arguments, **environment):
    return subprocess.run(
        command(course, *arguments),
        capture_output=True,
        text=True,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        timeout=100,
    )


def test_notebooks_run_in_order_with_their_parameters(course, tmp_path):
    (course / "profiles" / "quick.yaml").write_text(
        "common: {steps: 7, rate: 2}\n02_second: {steps: 9, depth: 3}\n"
    )
    write = "import json, os, sys\n{}\nwith open(report, 'w') as file: json.dump({}, file)"
    seen = "dict(steps=steps, rate=rate, loss=0.123456, pixels=1234567)"
    facts = "dict(depth=depth, steps=steps, scenario=scenario, cwd=os.getcwd(), exe=sys.executable)"
    order = "assert os.path.exists(report.replace('02_second', '01_first')) and figures()"
    inline = "def figures(): return os.environ['MPLBACKEND'].endswith('inline')"
    parameters = 'scenario = ""\nsteps = 1\ndepth = 1\nreport = None'
    add_notebook(course, "02_second", inline, write.format(order, facts), parameters=parameters)
    add_notebook(course, "01_first", write.format("", seen))
    (course / "notes.ipynb").write_text("not one of the course's notebooks")
    output = course.parent / "build" / "notebooks"
    output.mkdir(parents=True)
    (output / "01_first.json").write_text("stale")
    (output / "09_gone.ipynb").write_text("stale")
    images = tmp_path / "images of mine"
    draw_folder(images / "bottle", 2)
    # A kernel that the user installed under the same name must not be the one that runs.
    trap = tmp_path / "jupyter"
    (trap / "kernels" / "python3").mkdir(parents=True)
    (trap / "kernels" / "python3" / "kernel.json").write_text(
        json.dumps({"argv": ["false"], "display_name": "trap", "language": "python"})
    )
    environment = {"JUPYTER_PATH": str(trap), "JUPYTER_DATA_DIR": str(trap), "MPLBACKEND": "agg"}

    done = run(course, "--data", str(images), "--scenario", "bottle", **environment)

    assert (done.returncode, done.stderr) == (0, "")
    first, second = (
        json.loads((output / f"{name}.json").read_text()) for name in ("01_first", "02_second")
    )
    assert first == {"steps": 7, "rate": 2, "loss": 0.123456, "pixels": 1234567}
    assert second["steps"] == 9
    assert second["depth"] == 3
    assert second["scenario"] == str(images / "bottle")
    assert second["cwd"] == str(course)
    assert second["exe"] == sys.executable
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0].startswith("profile quick, scenario ")
    assert lines.pop(1).startswith("The scenario bottle has no test images: no image metrics")
    assert lines[1].startswith("01_first ... ")
    assert lines[1].endswith(" s")
    assert lines[2].startswith("02_second ... ")
    assert lines[4] == "notebook time measured"
    assert lines[5].startswith("01_first ")
    assert lines[5].endswith(" s steps 7")
    assert lines[6:9] == ["rate 2", "loss 0.1235", "pixels 1,234,567"]
    assert lines[9].startswith("02_second ")
    assert lines[-1].startswith("total ")
    assert (output / "01_first.ipynb").exists()
    assert not (output / "09_gone.ipynb").exists()


def test_a_failing_notebook_stops_the_run_and_says_where(course):
    add_notebook(course, "01_works", "x = 1")
    add_notebook(
        course, "02_breaks", "x = 1", "y = x - 1\n1 / y", "open('reached', 'w')", parameters="a = 1"
    )
    add_notebook(course, "03_never", "open('reached', 'w')")
    done = run(course, "--only", "02")
    executed = course.parent / "build" / "notebooks" / "02_breaks.ipynb"
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "failed",
        "",
        "02_breaks, cell 3: y = x - 1",
        "ZeroDivisionError: division by zero",
        f"The half-executed notebook: {executed}",
    ]
    assert "Traceback" not in done.stdout + done.stderr
    assert "01_works" not in done.stdout
    assert "03_never" not in done.stdout
    assert not (course / "reached").exists()
    assert "ZeroDivisionError" in executed.read_text()


def test_a_folder_that_cannot_be_used_is_said_before_any_kernel_starts(
    course, monkeypatch, capsys, tmp_path
):
    add_notebook(course, "01_one")
    draw_folder(tmp_path / "part", 3)
    os.truncate(tmp_path / "part" / "2.png", 500)
    (tmp_path / "empty").mkdir()
    for name, sentence in (("part", "2.png cannot be read as an image"), ("empty", "holds no im")):
        monkeypatch.setattr(sys, "argv", command(course, "--data", str(tmp_path / name))[1:])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(course / "run.py"), run_name="__main__")
        assert sentence in stop.value.code and "\n" not in stop.value.code
        assert len(capsys.readouterr().out.splitlines()) == 1  # of the profile


def test_a_kernel_that_dies_is_a_sentence(course):
    add_notebook(course, "01_dies", "import os", "os._exit(9)  # as the system does to a glutton")
    done = run(course)
    assert done.returncode == 1
    assert "01_dies, cell 4: os._exit(9)" in done.stderr
    assert "too little memory" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupt_keeps_the_half_executed_notebook(course):
    wait = "import time\nopen('started', 'w').close()\ntime.sleep(60)"
    add_notebook(course, "01_long", "print('done before')", wait)
    # A shell's background jobs ignore SIGINT, and so would the runner if the tests are such a job.
    process = subprocess.Popen(
        command(course),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (course / "started").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.strip() == "Interrupted; what was executed so far is kept."
    assert "done before" in (course.parent / "build/notebooks/01_long.ipynb").read_text()


@pytest.mark.parametrize(
    ("profile", "arguments", "sentence"),
    [
        ("", ["--profile", "fast"], "The profile 'fast' is unknown; choose one of quick."),
        ("", ["--only", "07"], "There is no notebook 07*.ipynb in "),
        ("", ["--data", "nowhere"], "nowhere is not a folder."),
        ("", ["--output", __file__], "cannot be written: " + __file__ + ": File exists; free some"),
        ("common: {stepz: 1}", [], "sets 'stepz', which no notebook's parameters cell has"),
        ("01_one: {stepz: 1}", [], "sets 'stepz', which 01_one's parameters cell lacks"),
        ("02_two: {steps: 1}", [], "has a section '02_two', but there is no such notebook"),
        ("common: {rate: 1e-3}", [], "rate is '1e-3', a str; the notebook has 0.5."),
        ("01_one: {steps: 1.5}", [], "steps is 1.5, a float; the notebook has 1."),
    ],
)
def test_a_mistake_is_one_sentence_before_any_kernel_starts(
    course, profile, arguments, sentence, monkeypatch, capsys
):
    add_notebook(course, "01_one")
    if profile:
        (course / "profiles" / "quick.yaml").write_text(profile)
    monkeypatch.setattr(sys, "argv", command(course, *arguments)[1:])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(course / "run.py"), run_name="__main__")
    assert sentence in stop.value.code
    assert "\n" not in stop.value.code
    assert capsys.readouterr() == ("", "")
