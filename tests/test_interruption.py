"""Kills, Ctrl-C, full disks and second runs: what is written stays whole, and runs go on exactly.

`soak/interruption.py` does the same with as many random points as time allows.
"""

import errno
import importlib.util
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from effad_core import RunError, Schedule, train
from effad_core.datasets import open_pretraining, tray
from effad_core.distillation.algorithm import main as distil
from effad_core.errors import DataError
from effad_core.evaluation import benchmark
from effad_core.storage import files
from effad_core.storage.files import locked, remove_parts
from effad_core.storage.runs import Run
from effad_core.storage.weights import read_tensors

import pytest
import torch
import torchvision
from PIL import Image

SOAK = Path(__file__).parent / "soak" / "interruption.py"
spec = importlib.util.spec_from_file_location("interruption", SOAK)
interruption = importlib.util.module_from_spec(spec)
spec.loader.exec_module(interruption)


@pytest.fixture(autouse=True)
def ctrl_c():
    """SIGINT raises KeyboardInterrupt, also where whoever started the tests had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    images = tmp_path_factory.mktemp("images")
    interruption.draw_images(images)
    with interruption.Server(images) as server:
        yield server


@pytest.fixture
def trial(server, tmp_path):
    return lambda task: interruption.Trial(server, task, tmp_path)


# ---- stopped at random points ------------------------------------------------------------------


def stop_often(trial, stops):
    rng = random.Random(3)
    for kind, timed in stops:
        while not trial.stop(rng, kind, timed):
            pass
    trial.finish()


def test_a_training_killed_at_12_points_ends_with_the_same_bytes(trial):
    trial = trial("training")
    assert sorted(trial.whole) == [
        f"run/{name}"
        for name in ("checkpoint.safetensors", "config.json", "detector.safetensors", "log.csv")
    ]
    assert [line.split(b",")[0] for line in trial.whole["run/log.csv"].splitlines()] == [
        b"step", b"3", b"5", b"10", b"12"  # some of them sums over a resumed stretch
    ]  # fmt: skip
    stop_often(trial, [("kill", False)] * 10 + [("kill", True)] * 2)
    assert trial.stops.total() == 12


@pytest.mark.parametrize("task", ["distillation", "sweep", "tray"])
def test_other_long_work_killed_ends_with_the_same_bytes(trial, task):
    stop_often(trial(task), [("kill", False)] * 4)


@pytest.mark.parametrize("task", interruption.TASKS)
def test_ctrl_c_and_a_full_disk_leave_nothing_half_written(trial, task):
    stop_often(trial(task), [("ctrl-c", False), ("full", False)])


def test_the_same_checks_find_a_changed_byte_and_a_file_left_behind(trial):
    trial = trial("distillation")
    for name in ("run/log.csv", "run/.log.csv.1.part"):
        folder = trial.work / name.replace("/", "")
        for path, content in trial.whole.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        with (folder / name).open("ab") as file:
            file.write(b" ")
        with pytest.raises(AssertionError, match=r"log\.csv"):
            trial.compare(folder)


# ---- Ctrl-C --------------------------------------------------------------------------------------


def new_run(folder):
    network = torch.nn.Linear(2, 2)
    return Run(folder, {}, {"net": network}, {"adam": torch.optim.Adam(network.parameters())}, 3)


def test_ctrl_c_lets_an_iteration_end_and_saves_it(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="2 iterations are in"), new_run(tmp_path) as run:
        run.resume()
        run.after(1)
        signal.raise_signal(signal.SIGINT)
        assert not (tmp_path / run.CHECKPOINT).exists()
        run.after(2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    _, header = read_tensors(tmp_path / "checkpoint.safetensors", "checkpoint")
    assert header["iteration"] == 2


@pytest.mark.parametrize("done", [0, 1, 3])
def test_ctrl_c_is_immediate_outside_of_iterations_and_the_second_time(tmp_path, done):
    with pytest.raises(KeyboardInterrupt), new_run(tmp_path) as run:
        run.resume()
        if done:
            run.after(done)
        if done == 1:  # the second iteration of three is in progress
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")


# ---- two at once ---------------------------------------------------------------------------------


def names_in(folder):
    """What lies in a folder, without the files of locks: they stay, or go, as filelock likes."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_a_lock_is_held_once_and_goes_with_its_block(tmp_path):
    path = tmp_path / ".lock"
    with locked(path):
        with pytest.raises(BlockingIOError), locked(path):
            pytest.fail("both hold it")
        assert path.exists()
    with pytest.raises(ZeroDivisionError), locked(path):
        raise ZeroDivisionError
    with locked(path):
        pass


def test_a_lock_goes_with_its_process(tmp_path):
    """The holder is killed while this process waits for it."""
    path = tmp_path / ".lock"
    code = (
        "import pathlib, sys, time; from effad_core.storage.files import locked\n"
        f"with locked(pathlib.Path({str(path)!r})): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError), locked(path):
            pytest.fail("both hold it")
        killed = threading.Timer(0.5, holder.kill)  # while this process waits
        killed.start()
        with locked(path, wait=math.inf):
            assert path.exists()
        killed.join()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)
    with (
        pytest.warns(UserWarning, match="has no locks: start nothing else"),
        locked(tmp_path / "x"),
    ):
        pass


def test_a_second_run_in_a_folder_is_refused(
    narrow, scenario, pretraining, tmp_path, drawn, refusal
):
    message = f"^{tmp_path} is in use by another run: wait for its end, or choose another run_dir$"
    arguments = scenario, Schedule.paper(iterations=1), pretraining, tmp_path
    with new_run(tmp_path) as first:
        with pytest.raises(RunError, match=message):
            train(narrow(), *arguments)
        options = ["--profile", "smoke", "--hold-out", "1", "--run-dir", str(tmp_path)]
        assert re.search(message, refusal(distil, drawn[0].parent, *options))
        second = Run(tmp_path, {}, first.modules, first.optimizers, total=3, writes=False)
        with second:  # another process of the same training
            assert second.resume() == (0, {})
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    train(narrow(), *arguments)
    assert (tmp_path / "detector.safetensors").exists()


def test_two_sweeps_with_one_output_are_refused(narrow, tmp_path, monkeypatch, drawn, refusal):
    monkeypatch.setattr(benchmark, "new_detector", lambda *_: narrow())
    for name in ("train", "test"):
        (tmp_path / "images" / name / "good").mkdir(parents=True)
    for path in drawn[:3]:
        (tmp_path / "images/train/good" / path.name).symlink_to(path)
    output = tmp_path / "results.json"
    with locked(tmp_path / ".results.json.lock"):
        options = ("--output", output, "--runs", tmp_path)
        said = refusal(benchmark.main, tmp_path / "images", *options)
    assert (
        said == f"{output} is in use by another run: wait for its end, or choose another --output"
    )
    assert not output.exists()


def test_a_second_drawing_waits_for_the_first(tmp_path):
    """And takes its result: nothing is drawn twice."""
    folder = tmp_path / "tray"
    with ThreadPoolExecutor(1) as pool:
        with locked(tmp_path / ".tray.lock"):
            second = pool.submit(tray.tray_folder, tmp_path)
            time.sleep(0.3)  # now it waits for the lock, or draws
            assert not second.done() and not list(tmp_path.rglob("*.png"))
            tray._replace(folder, 0, 1, 1, 3)
        assert second.result() == folder
    assert len(list(folder.glob("train/good/*.png"))) == 1  # not the 200 of a drawing of its own
    assert names_in(tmp_path) == {"tray"}


# ---- what killed processes leave -----------------------------------------------------------------


def test_parts_of_dead_processes_are_removed_and_no_others(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    kept = [f".log.csv.{os.getppid()}.part", ".log.csv.x.part", ".log.csv", f"log.{dead.pid}.part"]
    gone = [f".{name}.{dead.pid}.part" for name in ("log.csv", "checkpoint.safetensors")]
    for name in kept + gone:
        (tmp_path / name).touch()
    remove_parts(tmp_path, "log.csv")
    assert names_in(tmp_path) == {*kept, gone[1]}
    with new_run(tmp_path):
        pass
    assert names_in(tmp_path) == set(kept)


def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file.run cannot be written: Not a directory; check"):
        new_run(tmp_path / "file" / "run").__enter__()


def test_imagenette_unpacked_by_half_is_unpacked_again(tmp_path, monkeypatch):
    """torchvision takes the folder for whole as soon as it exists."""
    calls, archive = [], tmp_path / "imagenette2-320.tgz"

    def imagenette(root, **options):
        assert options == {"split": "train", "size": "320px", "download": True}
        calls.append((root / archive.name).exists())
        (root / archive.name).write_bytes(b"archive")
        folder = root / "imagenette2-320" / "train" / "n01440764"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(folder / "0.JPEG")
        if len(calls) == 1:
            raise KeyboardInterrupt
        if len(calls) == 2:
            raise RuntimeError("no space")
        Image.new("RGB", (8, 6)).save(folder / "1.JPEG")

    monkeypatch.setattr(torchvision.datasets, "Imagenette", imagenette)
    with pytest.raises(KeyboardInterrupt):
        open_pretraining("imagenette", root=tmp_path)
    with pytest.raises(DataError, match="no space"):
        open_pretraining("imagenette", root=tmp_path)
    assert names_in(tmp_path) == {archive.name}
    half = tmp_path / ".imagenette2-320.unpacking" / "imagenette2-320" / "train" / "n01440764"
    half.mkdir(parents=True)  # what a kill leaves
    (half / "2.JPEG").write_bytes(b"half")
    for _ in range(2):
        assert len(open_pretraining("imagenette", root=tmp_path)) == 2
    assert calls == [False, True, True]
    assert names_in(tmp_path) == {"imagenette2-320", archive.name}


def test_files_reach_the_disk_before_they_are_moved(tmp_path, monkeypatch):
    """After a power cut a name leads to the old content or to the new one."""
    calls = []
    fsync, move = os.fsync, os.replace

    def record(number):
        paths = [*tmp_path.iterdir(), tmp_path]
        calls.extend(p.name for p in paths if os.path.samestat(p.stat(), os.fstat(number)))
        fsync(number)

    monkeypatch.setattr(files.os, "fsync", record)
    monkeypatch.setattr(files.os, "replace", lambda *paths: calls.append("move") or move(*paths))
    files.replace(tmp_path / "x", lambda part: part.write_text("new"))
    assert calls == [f".x.{os.getpid()}.part", "move", tmp_path.name]
