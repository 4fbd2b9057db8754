"""Stop runs at random points, go on, and compare with runs that nobody stopped.

    python tests/soak/interruption.py --minutes 5

A stop is a kill -9, a Ctrl-C, or a disk that is full from then on; at an exact point (before and
after each change of the disk and each step of an optimiser, and in the middle of each file), or
after a random time. Every attempt is a process of its own, forked from one that has imported torch
and has computed nothing. Small networks make a whole training a second long.
"""

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

TASKS = ("training", "distillation", "sweep", "tray")
STOPS = ("kill", "ctrl-c", "full")
ENDS = {"kill": ("killed",), "ctrl-c": ("KeyboardInterrupt",), "full": ("RunError", "DataError")}
SCENARIOS = ("bolt", "clip")  # of the sweep


# ---- inside an attempt: the tasks ------------------------------------------------------------


def load_conftest():
    spec = importlib.util.spec_from_file_location(
        "conftest", Path(__file__).parents[1] / "conftest.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def prepare() -> dict:
    """Import everything once, before the first fork; small networks, a checkpoint at each step."""
    from effad_core import detector, training
    from effad_core.acceleration import precision
    from effad_core.datasets import tray
    from effad_core.distillation import algorithm
    from effad_core.evaluation import benchmark
    from effad_core.storage.runs import Run
    from parts_tray.scene import Drawing, defect_name

    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(1)
    conftest = load_conftest()
    # a machine that is timed alike in every process: another arithmetic would give other bytes
    times = {"float32": 0.3, "float32-winograd": 0.2, "bfloat16": 0.1}
    precision._measure = lambda device, work, size: precision.Measurement(work, times)

    class TinyAutoencoder(nn.Module):
        """An autoencoder's interface, and dropout; its output has the size of an unpadded PDN's."""

        def __init__(self, out_channels: int = 384, padding: bool = False):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(3, 8, 8, stride=4),
                nn.ReLU(),
                nn.Dropout(0.2),
                nn.Conv2d(8, out_channels, 8),
            )

        def forward(self, images):
            return self.layers(images)

    class Psi(nn.Module):
        """A feature extractor: eight mixtures of the colours of each 8x8 block."""

        name, out_channels = "colours", 8

        def describe(self):
            return "mixtures of colours: 8 channels"

        def input_size(self, teacher_size):
            return 2 * teacher_size

        def forward(self, images):
            mixture = torch.linspace(-1, 1, 24).reshape(8, 3, 1, 1).sin()
            return 100 + 30 * F.conv2d(F.avg_pool2d(images.float() / 255, 8), mixture)

    def draw(seed, split, index):
        """A stand-in for a drawing of a tray: noise, and where it has a defect."""
        rng = np.random.default_rng((seed, index, *split.encode()))
        image = rng.integers(0, 256, (96, 96, 3), np.uint8)
        name = defect_name(split, index)
        return Drawing(image, name, (image[..., 0] > 9,) if name else ())

    tray.draw = draw
    detector.PatchDescriptionNetwork = algorithm.PatchDescriptionNetwork = conftest.NarrowPDN
    detector.Autoencoder = TinyAutoencoder
    training.Run = algorithm.Run = functools.partial(Run, save_seconds=0)
    benchmark.new_detector = lambda *_: new_detector()
    return {"Psi": Psi, "NarrowPDN": conftest.NarrowPDN, "tray": tray}


def new_detector():
    from effad_core import EfficientAD

    import torch

    torch.manual_seed(0)
    return EfficientAD(out_channels=8)


def training(folder: Path, images: Path) -> None:
    from effad_core import Schedule, train
    from effad_core.datasets import PretrainingImages, Sample, Scenario

    paths = sorted(images.glob("*.png"))
    normal = tuple(Sample(path, 0, "good") for path in paths[:5])
    scenario = Scenario("drawn", normal[:3], normal[3:], (), "drawn", "CC0")
    schedule = Schedule.smoke(iterations=9, autoencoder_iterations=3)
    pretraining = PretrainingImages(paths[5:], "drawn images", "CC0")
    train(new_detector(), scenario, schedule, pretraining, folder / "run", log_every=5)


def distillation(folder: Path, images: Path) -> None:
    from effad_core import DistillationSchedule, distill
    from effad_core.datasets import PretrainingImages

    import torch

    parts = prepare()
    schedule = DistillationSchedule(
        iterations=8, batch_size=2, statistics_images=4, size=64, padding=False,
        scales=(0.4, 0.8), optimizer="muon", cosine=True,
    )  # fmt: skip
    source = PretrainingImages(sorted(images.glob("*.png")), "drawn images", "CC0")
    torch.manual_seed(0)
    teacher = parts["NarrowPDN"](out_channels=8)
    distill(
        teacher, parts["Psi"](), source, schedule,
        held_out=source, run_dir=folder / "run", log_every=3,
    )  # fmt: skip


def sweep(folder: Path, images: Path) -> None:
    from effad_core.evaluation import benchmark

    options = ["--seeds", "0", "--profile", "smoke", "--runs", folder / "runs"]
    sources = [images / "parts" / name for name in SCENARIOS]
    output = ["--output", folder / "results.json"]
    benchmark.main([str(part) for part in (*sources, *options, *output)])


def tray(folder: Path, images: Path) -> None:
    """A second drawing in the place of a first one."""
    write = prepare()["tray"].write_tray
    write(folder / "tray", seed=1, train=1, validation=1, test=3, workers=1)


def start(task: str, folder: Path) -> None:
    """What is in the folder before the first attempt."""
    if task == "tray":
        write = prepare()["tray"].write_tray
        write(folder / "tray", seed=0, train=1, validation=1, test=3, workers=1)


# ---- inside an attempt: the stops ------------------------------------------------------------


class Stop:
    """Counts the points of an attempt, and stops it at one of them."""

    def __init__(self, kind: str | None, at: int):
        self.kind, self.at, self.points = kind, at, 0

    def point(self) -> None:
        self.points += 1
        if self.points == self.at:
            self.happen()

    def happen(self) -> None:
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)
        if self.kind == "full":  # no file can grow beyond this
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

    def install(self) -> None:
        import torch

        changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}

        def changed(event: str, details: tuple) -> None:
            writes = event == "open" and isinstance(details[2], int) and details[2] & os.O_ACCMODE
            if (writes or event in changes) and not str(details[0]).startswith("/dev"):
                self.point()

        sys.addaudithook(changed)

        def in_the_middle(write, path: Path, *arguments, **options) -> None:
            write(*arguments, **options)
            whole = path.read_bytes()
            os.truncate(path, len(whole) // 2)
            self.point()
            write(*arguments, **options)
            self.point()

        write_bytes, write_text = Path.write_bytes, Path.write_text
        Path.write_bytes = lambda path, content: in_the_middle(write_bytes, path, path, content)
        Path.write_text = lambda path, *arguments, **options: in_the_middle(
            write_text, path, path, *arguments, **options
        )

        def around_step(step):
            @functools.wraps(step)
            def stepped(*arguments, **options):
                self.point()
                result = step(*arguments, **options)
                self.point()
                return result

            return stepped

        for optimizer in (torch.optim.Adam, torch.optim.Muon):
            optimizer.step = around_step(optimizer.step)


def attempt(job: dict) -> dict:
    """One attempt, in a process of its own: how it ended, and how many points it had."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    stop = Stop(job["stop"], job["at"])
    end, message, errors = "done", "", io.StringIO()
    folder = Path(job["folder"])
    try:
        if not folder.exists():
            folder.mkdir(parents=True)
            start(job["task"], folder)
        stop.install()
        with contextlib.redirect_stderr(errors):
            globals()[job["task"]](folder, Path(job["images"]))
    except SystemExit as error:  # of a command: 130 on Ctrl-C, else its message is printed
        message = errors.getvalue().rstrip("\n").split("\n")[-1]
        end = "KeyboardInterrupt" if error.code == 130 else "RunError"
    except BaseException as error:
        end, message = type(error).__name__, str(error)
    return {"end": end, "message": message, "points": stop.points}


# ---- the process that forks the attempts ------------------------------------------------------


def serve() -> None:
    """Reads a job a line, forks, and writes a line on how the attempt ended."""
    prepare()
    print(flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            os.write(writer, json.dumps(attempt(job)).encode())
            os._exit(0)
        os.close(writer)
        if job["seconds"] is not None:
            timer = threading.Timer(job["seconds"], os.kill, (child, signal.SIGKILL))
            timer.start()
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        if job["seconds"] is not None:
            timer.cancel()
            timer.join()
        os.waitpid(child, 0)
        print(text or '{"end": "killed", "message": "", "points": 0}', flush=True)


class Server:
    """Starts the process that forks the attempts; a context manager."""

    def __init__(self, images: Path):
        self.images = images

    def __enter__(self) -> "Server":
        command = [sys.executable, __file__, "--serve"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.process.stdout.readline()  # it is ready
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def attempt(
        self, task: str, folder: Path, stop: str | None = None, at: int = 0,
        seconds: float | None = None,
    ) -> dict:  # fmt: skip
        """Run a task in a folder, stopped at a point, or killed after some seconds."""
        job = {"task": task, "folder": str(folder), "images": str(self.images)}
        job |= {"stop": stop, "at": at, "seconds": seconds}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


# ---- what must hold --------------------------------------------------------------------------


def draw_images(folder: Path) -> None:
    """Images for every task; for the sweep two scenarios, whose anomalies are white corners."""
    from PIL import Image

    draw = load_conftest().draw
    paths = [draw(folder / f"{seed}.png", seed) for seed in range(7)]
    for name in SCENARIOS:
        scenario = folder / "parts" / name
        for split, chosen in (("train/good", paths[:3]), ("test/good", paths[3:5])):
            (scenario / split).mkdir(parents=True)
            for path in chosen:
                shutil.copy(path, scenario / split)
        (scenario / "test" / "spot").mkdir()
        for path in paths[5:]:
            image = Image.open(path)
            image.paste("white", (0, 0, 80, 80))
            image.save(scenario / "test" / "spot" / path.name)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too; config.json without the times measured for it.

    The files of locks, which filelock leaves lying, are not among them, and took.json, which holds
    times alone, neither.
    """
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith((".lock", "took.json"))
    }


def check_stopped(
    task: str, folder: Path, stop: str, result: dict, before: set, first: dict, whole: dict
):
    """What a stopped run leaves is whole, as far as it goes.

    Args:
        task, folder, stop, result: of the attempt.
        before: names of the hidden files that an earlier stop left, perhaps of a run of the sweep
            that this attempt did not come to.
        first, whole: contents before the first attempt, and of a run that was not stopped.
    """
    from effad_core.storage.weights import read_tensors

    assert result["end"] in ENDS[stop], result
    found = contents(folder)
    for name, content in found.items():
        hidden = any(part.startswith(".") for part in Path(name).parts)
        removed = {"kill": False, "ctrl-c": name.endswith(".part"), "full": hidden}
        assert not removed[stop] or name in before, f"{name} was left behind"
        if hidden or task == "tray":
            continue
        if name.endswith(".safetensors"):
            kind = Path(name).stem
            read_tensors(folder / name, kind)
        elif name.endswith(".json"):
            json.loads(content)
        elif name.endswith(".csv"):
            reference = whole[name]
            assert content == reference[: len(content)] and content.endswith(b"\n"), name
    if task == "tray" and (folder / "tray").exists():
        visible = {name: found[name] for name in found if name.startswith("tray/")}
        assert visible in (first, whole), "half a drawing"
    if stop == "full":
        assert "cannot be written" in result["message"], result
        assert str(folder) in result["message"], result
        if task != "sweep":
            assert "\n" not in result["message"] and "the disk is full" in result["message"], result


class Trial:
    """Runs of one task that are stopped again and again, compared with one that was not.

    Args:
        server: forks the attempts.
        task: one of `TASKS`.
        work: an empty folder.
    """

    def __init__(self, server: Server, task: str, work: Path):
        self.server, self.task, self.work = server, task, work
        self.first, self.stops, self.finished = {}, Counter(), 0
        if task == "tray":
            server.attempt(task, work / "reference", "kill", 1)
            self.first = contents(work / "reference")
        begun = time.monotonic()
        result = server.attempt(task, work / "reference")
        assert result["end"] == "done", result
        self.seconds, self.points = time.monotonic() - begun, result["points"]
        self.whole = contents(work / "reference")
        assert self.points > 0 and not any(Path(name).name.startswith(".") for name in self.whole)

    def stop(self, rng: random.Random, kind: str, timed: bool = False) -> bool:
        """Go on, stop, and check what is left; a run that reaches its end is compared.

        Returns:
            Whether it was stopped (a run that goes on may have fewer points than asked for).
        """
        folder = self.work / "run"
        before = {name for name in contents(folder) if Path(name).name.startswith(".")}
        if timed:
            result = self.server.attempt(self.task, folder, seconds=rng.uniform(0, self.seconds))
        else:
            result = self.server.attempt(self.task, folder, kind, rng.randint(1, self.points))
        if result["end"] == "done":
            self.compare(folder)
            return False
        check_stopped(self.task, folder, kind, result, before, self.first, self.whole)
        self.stops[f"{kind} after a random time" if timed else kind] += 1
        return True

    def finish(self) -> None:
        """Go on to the end, and compare."""
        folder = self.work / "run"
        result = self.server.attempt(self.task, folder)
        assert result["end"] == "done", result
        self.compare(folder)

    def compare(self, folder: Path) -> None:
        found = contents(folder)
        different = [name for name in self.whole if found.get(name) != self.whole[name]]
        assert found.keys() == self.whole.keys() and not different, (found.keys(), different)
        shutil.rmtree(folder)
        self.finished += 1


# ---- the command -----------------------------------------------------------------------------


def soak(minutes: float, seed: int, work: Path) -> None:
    """Stop and go on for some minutes; prints how often, and that all ended alike."""
    rng = random.Random(seed)
    images = work / "images"
    images.mkdir()
    draw_images(images)
    end = time.monotonic() + 60 * minutes
    with Server(images) as server:
        trials = []
        for task in TASKS:
            (work / task).mkdir()
            trials.append(Trial(server, task, work / task))
            print(f"{task}: {trials[-1].points} points, {trials[-1].seconds:.1f} s", flush=True)
        while time.monotonic() < end:
            trial = rng.choice(trials)
            timed = rng.random() < 0.2
            trial.stop(rng, "kill" if timed else rng.choice(STOPS), timed)
        for trial in trials:
            trial.finish()
    for trial in trials:
        counts = ", ".join(f"{count} x {stop}" for stop, count in sorted(trial.stops.items()))
        print(f"{trial.task}: {counts}; {trial.finished} runs ended like the undisturbed one")
    print(f"{sum(sum(trial.stops.values()) for trial in trials)} faults injected, all survived")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        with contextlib.suppress(KeyboardInterrupt):
            serve()
        return
    with tempfile.TemporaryDirectory() as work:
        soak(args.minutes, args.seed, Path(work))


if __name__ == "__main__":
    main()
