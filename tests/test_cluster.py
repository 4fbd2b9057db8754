"""The engine Ray: the loop's files, whoever is killed; what a run gets; what is said.

`soak/cluster.py` kills at as many random moments as one likes.
"""

import importlib.util
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from effad_core import Schedule
from effad_core.datasets import PretrainingImages
from effad_core.distillation.algorithm import save_teacher
from effad_core.errors import RunError
from effad_core.evaluation import benchmark, cluster, methods, places
from effad_core.evaluation.methods import OwnRecipe, Recipe
from effad_core.evaluation.places import Place, Share, settle
from effad_core.evaluation.progress import Display, Progress
from effad_core.evaluation.tasks import Entry, Task
from effad_core.storage.files import locked
from effad_core.storage.runs import Run, watching

import pytest
import torch
from torch import nn

SOAK = Path(__file__).parent / "soak" / "cluster.py"
spec = importlib.util.spec_from_file_location("soak_cluster", SOAK)
soak = importlib.util.module_from_spec(spec)
spec.loader.exec_module(soak)


# ---- a cluster of two nodes --------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return soak.draw_scenarios(tmp_path_factory.mktemp("parts"), ("bolt", "clip"))


@pytest.fixture(scope="module")
def nodes():
    with soak.Nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def of_the_loop(sources, tmp_path_factory):
    """The benchmark's files as the engine `loop` leaves them."""
    folder = tmp_path_factory.mktemp("loop")
    environment = os.environ | soak.ENVIRONMENT
    command = soak.command(sources, folder)
    subprocess.run(command, env=environment, cwd=soak.ROOT, check=True, capture_output=True)
    found = soak.contents(folder)
    assert "runs/clip-quick-slow-seed1/metrics.json" in found and "results.json" in found
    return found


@pytest.mark.timeout(600)
def test_whoever_is_killed_the_files_are_those_of_the_loop(nodes, sources, of_the_loop, tmp_path):
    kills = ["ctrl-c", "worker", "node"]
    happened, printed = soak.disturbed(nodes, sources, tmp_path, kills, random.Random(2), pause=1.0)
    assert happened == dict.fromkeys(kills, 1) and len(printed) == 2, printed
    assert "2 nodes, 2 processors, 0 GPUs; 2 runs at a time, 1 thread for each" in printed[0]
    assert "Interrupted: the same command goes on from here." in printed[0]
    assert "its worker died, another one goes on" in printed[1]
    found = soak.contents(tmp_path)
    del found["output.txt"]
    assert found.keys() == of_the_loop.keys()
    assert [name for name in found if found[name] != of_the_loop[name]] == []
    steps = soak.steps_done(tmp_path)
    assert len(steps) == 4 and min(steps.values()) >= soak.STEPS
    # a kill costs the steps since the last checkpoint, not those before
    assert sum(steps.values()) < 4 * soak.STEPS + 3 * 2 * 15


def test_what_fails_is_named_and_the_others_go_on(capsys):
    """A run of each way to end, as Ray tells it; `soak/cluster.py` lets a worker die for ever."""
    exceptions = pytest.importorskip("ray").exceptions
    defect = exceptions.RayTaskError("_work", "its traceback", ZeroDivisionError("by zero"))
    outcomes = {
        "good": ({"all": {}}, "", "good: AU-ROC"),
        "bad": (None, "its image is empty", "some lines"),
        "died": exceptions.WorkerCrashedError(),
        "defect": defect.as_instanceof_cause(),
    }

    def get(name):
        if isinstance(outcomes[name], Exception):
            raise outcomes[name]
        return outcomes[name]

    def wait(references, num_returns, timeout):
        return references[:1], references[1:]

    ray = SimpleNamespace(exceptions=exceptions, get=get, wait=wait)
    pending = {name: SimpleNamespace(name=name) for name in outcomes}
    progress, found = Progress(4), {}
    while pending:
        for run, metrics, reason in cluster._ended(ray, pending, Display(progress)):
            found[run.name] = (metrics, reason)
    assert found.pop("good") == ({"all": {}}, "")
    assert found.pop("bad") == (None, "its image is empty")
    metrics, reason = found.pop("died")
    assert metrics is None
    assert reason.startswith("its worker died 6 times; the usual reason is too little memory (")
    assert found == {"defect": (None, "ZeroDivisionError: by zero")}
    assert (progress.done, progress.failed) == (1, 3)
    printed = capsys.readouterr()
    assert printed.out == "good: AU-ROC\nsome lines\n" and "its traceback" in printed.err


# ---- what a worker sees ------------------------------------------------------------------------


@pytest.fixture
def known(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".mark").touch()
    return cluster.Known(tmp_path / "runs", ".mark", (9, 1, 4), {})


def task(folder, source):
    return Task(Entry("parts", "bolt", source), Recipe("Slow", "quick"), 0, folder / "runs" / "r")


def test_a_node_without_the_runs_or_the_images_says_so(known, sources, tmp_path):
    here = cluster.socket.gethostname()
    whole = task(tmp_path, sources[0])
    assert len(cluster._seen(whole, known).test) == 4
    with pytest.raises(RunError, match=f"the node {here} has other images of bolt: .9, 1, 4. in"):
        cluster._seen(whole, replace(known, images=(8, 1, 4)))
    absent = task(tmp_path, tmp_path / "absent")
    with pytest.raises(RunError, match=f"^on the node {here}: .*absent.* Put the images on a disk"):
        cluster._seen(absent, known)
    (known.runs / known.mark).unlink()
    with pytest.raises(RunError, match=f"the node {here} does not see the folder .*put --runs on"):
        cluster._seen(whole, known)


def test_a_worker_waits_for_the_one_that_died(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 0.2)
    cluster._wait_for(tmp_path / "absent")  # nothing to wait for
    lock = tmp_path / Run.LOCK
    asked = []
    monkeypatch.setattr(
        cluster.files, "locked", lambda path, wait: asked.append((path, wait)) or locked(path, wait)
    )
    with locked(lock):
        cluster._wait_for(tmp_path)  # it does not wait forever
    cluster._wait_for(tmp_path)
    assert asked == [(lock, 0.2)] * 2


def test_relative_paths_of_an_entry_hold_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = Entry("parts", "bolt", Path("parts/bolt"), {"normal": ["good"]})
    found = cluster._absolute(entry)
    assert found.source == tmp_path / "parts" / "bolt"
    assert found.chosen == {"normal": [tmp_path / "good"]}
    assert cluster._absolute(Entry("tray", "tray", "tray")) == Entry("tray", "tray", "tray")
    assert cluster._absolute(Entry("x", "x", None)).source is None


def test_relative_files_of_a_recipe_hold_in_another_folder(narrow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = cluster._anywhere(own()).pretraining
    assert found.paths == (tmp_path / "a.png",)
    assert (found.source, found.licence) == ("nowhere", "none")
    assert cluster._anywhere(Recipe("Slow", "quick")) == Recipe("Slow", "quick")
    save_teacher(tmp_path / "mine.safetensors", narrow().teacher, {})
    monkeypatch.setattr(benchmark, "EfficientAD", lambda size: narrow())
    words = ["tray", "--teacher", "mine.safetensors", "--engine", "ray"]
    asked = []
    monkeypatch.setattr(benchmark, "_run", lambda args: asked.append(args) or {})
    benchmark.main(words)
    recipes, settings = benchmark._recipes(asked[0])
    assert settings["teacher"] == "mine.safetensors"
    ((recipe, _),) = recipes.items()
    assert recipe.detector.args == ("small", tmp_path / "mine.safetensors")


# ---- what a run gets ---------------------------------------------------------------------------


class Ray:
    """Nodes without machines: (processors, GPUs) of each, 16 GiB of memory."""

    def __init__(self, *nodes):
        self._nodes = nodes

    def nodes(self):
        return [
            {"Alive": True, "Resources": {"CPU": c, "GPU": g, "memory": 16 * 2**30}}
            for c, g in self._nodes
        ] + [{"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0}}]


@pytest.fixture
def measured(monkeypatch):
    """What would be measured on a cluster; the calls."""
    calls = []
    monkeypatch.setattr(places, "_gpu_share", lambda ray: 0.25)
    monkeypatch.setattr(
        places, "_precisions",
        lambda ray, place, sizes: calls.append(place) or dict.fromkeys(sizes, "bfloat16"),
    )  # fmt: skip
    monkeypatch.setattr(places, "_fastest", lambda *a: calls.append(a[1:]) or 2)
    return calls


def own(precision="auto"):
    images = PretrainingImages([Path("a.png")], "nowhere", "none")
    return OwnRecipe(lambda: None, Schedule.named("smoke", precision=precision), images)


def tasks(recipe, device=None, count=2):
    return [replace(task(Path("x"), None), recipe=recipe, device=device)] * count


def test_a_run_on_a_cpu_has_as_many_threads_as_is_fastest(measured):
    place, precisions = settle(Ray((4.0, 0), (8.0, 0)), tasks(own()), Share())
    assert place == Place("cpu", 2) and precisions == {"small": "bfloat16"}
    # the precision is measured with all threads of the smallest node, then the ways to share it
    assert measured == [Place("cpu", 4), (4, 16 * 2**30, "cpu", "small", "bfloat16")]


def test_threads_that_the_user_names_are_not_measured(measured):
    assert settle(Ray((4.0, 0)), tasks(own("float32")), Share(3)) == (Place("cpu", 3), {})
    assert measured == [Place("cpu", 3)]
    with pytest.raises(ValueError, match="no node has 5 processors: --threads can be 4 at most"):
        settle(Ray((4.0, 0)), tasks(own()), Share(5))


def test_one_run_that_is_left_has_all_threads(measured, tmp_path):
    recipe = Recipe("Slow", "quick")
    done = replace(tasks(recipe)[0], run_dir=tmp_path)
    (tmp_path / "metrics.json").touch()
    both = [done, tasks(recipe)[0]]
    assert settle(Ray((4.0, 0)), both, Share()) == (Place("cpu", 4), {})
    assert settle(Ray((4.0, 0)), tasks(recipe, count=1), Share()) == (Place("cpu", 4), {})


def test_runs_share_a_gpu_by_its_memory(measured, monkeypatch):
    machines = Ray((16.0, 1.0), (4.0, 0))
    assert settle(machines, tasks(own()), Share())[0] == Place("cuda", 4, 0.25)
    assert settle(machines, tasks(own()), Share(2, 0.5))[0] == Place("cuda", 2, 0.5)
    assert settle(machines, tasks(own(), "cpu"), Share(1))[0] == Place("cpu", 1)
    with pytest.raises(ValueError, match="no node of the Ray cluster has a GPU: choose --device c"):
        settle(Ray((4.0, 0)), tasks(own(), "cuda"), Share())
    with pytest.raises(ValueError, match="Ray chooses the GPU: --device cuda, not cuda:1"):
        settle(machines, tasks(own(), "cuda:1"), Share())
    monkeypatch.undo()
    asked = SimpleNamespace(
        get=lambda memory: memory, remote=lambda **_: lambda work: SimpleNamespace(remote=work)
    )
    # a GPU sold with 32 GB tells of a little less
    for gibibytes, share in ((139, 0.25), (31, 0.25), (23, 1 / 3), (8, 1.0), (4, 1.0)):
        monkeypatch.setattr(places, "_gpu_memory", lambda g=gibibytes: g * 2**30)
        assert places._gpu_share(asked) == share


def test_the_machines_are_described():
    said = places.describe(Ray((4.0, 0), (7.0, 0)), Place("cpu", 2))
    assert said.startswith("computing on cpu with Ray: 2 nodes, 11 processors, 0 GPUs; ")
    assert said.endswith("; 5 runs at a time, 2 threads for each")
    said = places.describe(Ray((16.0, 2.0), (4.0, 0)), Place("cuda", 4, 0.25))
    assert said.endswith(
        "20 processors, 2 GPUs; 4 runs at a time, 4 threads, 0.25 of a GPU for each"
    )


def test_the_way_to_share_the_processors_that_does_most_is_taken(monkeypatch):
    """By passes a second: four alone 1 each, two pairs 3 each, one of all 5."""
    rates, killed = {1: 1.0, 2: 3.0, 4: 5.0}, []

    class Probe:
        def __init__(self, device, threads, size, precision):
            assert (device, size, precision) == ("cpu", "small", "float32")
            self.rate = rates[threads]
            self.passes = SimpleNamespace(remote=lambda seconds: self.rate)

    def remote(num_cpus):
        return lambda _: SimpleNamespace(remote=Probe)

    ray = SimpleNamespace(remote=remote, get=lambda found: found, kill=killed.append)
    arguments = ("cpu", "small", "float32")
    assert places._fastest(ray, 4, 16 * 2**30, *arguments) == 2  # 6 passes a second
    assert len(killed) == 4 + 2 + 1
    rates[4] = 7.0
    assert places._fastest(ray, 4, 16 * 2**30, *arguments) == 4
    rates[1] = 99.0
    assert places._fastest(ray, 4, 16 * 2**30, *arguments) == 1
    assert places._fastest(ray, 4, 7 * 2**30, *arguments) == 4  # memory for two: 6 against 7


def test_a_probe_counts_passes(monkeypatch):
    network = nn.Linear(2, 2)
    monkeypatch.setattr(places, "training_pass", lambda *_: lambda: network(torch.zeros(1, 2)))
    before = torch.get_num_threads()
    try:
        probe = places._Probe("cpu", before, "small", "float32")
        assert probe.passes(0.0) > 0
        clock = iter([0.0, 1.0, 2.0, 4.0])
        monkeypatch.setattr(places.time, "perf_counter", lambda: next(clock))
        assert probe.passes(1.5) == 2 / 4  # two passes, at 2.0 it is time to stop
    finally:
        torch.set_num_threads(before)


def test_a_run_keeps_the_precision_that_it_began_with(tmp_path):
    recipe = own().in_precision("float32")
    assert recipe.schedule.precision == "float32" and own().schedule.precision == "auto"
    sent = methods.PretrainingImages.__new__(PretrainingImages)
    sent.__dict__ |= own().pretraining.__getstate__()  # as another process gets it
    assert sent._cache_left == 0
    assert replace(own(), pretraining=sent).in_precision("float32").pretraining._cache_left > 0


# ---- progress ----------------------------------------------------------------------------------


def test_progress_by_hand():
    now = [0.0]
    progress = Progress(4, clock=lambda: now[0])
    assert progress.sentence() == "0 of 4 runs done, 0 running, 0 failed"
    progress.begin("a")
    progress.begin("b")
    progress.report("a", 50, 100)  # taken up in the middle
    now[0] = 60.0
    progress.report("a", 80, 100)
    # 0.3 runs in a minute; 3.2 are left
    assert progress.seconds_left() == pytest.approx(640)
    assert progress.sentence() == (
        "0 of 4 runs done, 2 running (a 80/100, 0.5 it/s; b), 0 failed, 11 min left"
    )
    progress.begin("a", 2)  # its worker died
    progress.report("a", 70, 100)
    assert progress.running["a"].rate == 0.0
    progress.end("a", failed=False)
    progress.end("b", failed=True)
    now[0] = 100.0
    assert progress.sentence().startswith("1 of 4 runs done, 0 running, 1 failed, ")


def test_a_run_reports_each_iteration(tmp_path):
    seen = []
    with Run(tmp_path, {}, {}, {}, total=3) as run, watching(lambda *args: seen.append(args)):
        run.resume()
        for iteration in (1, 2, 3):
            run.after(iteration)
    run.save(3)
    assert seen == [(tmp_path, 1, 3), (tmp_path, 2, 3), (tmp_path, 3, 3)]


# ---- the command -------------------------------------------------------------------------------


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        benchmark.main([str(a) for a in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_wrong_options_are_one_sentence(sources, tmp_path, capsys, monkeypatch):
    options = ("--methods", "patchcore", "--profile", "smoke", "--seeds", 0)
    options += ("--runs", tmp_path / "runs", "--output", tmp_path / "r.json")
    for wrong in (("--address", "auto"), ("--gpu-share", 0.5), ("--dashboard",)):
        text = said(capsys, sources[0], *options, *wrong)
        assert "--address, --gpu-share and --dashboard go with --engine ray" in text
    for share in ("0", "1.5", "half"):
        text = said(capsys, sources[0], *options, "--engine", "ray", "--gpu-share", share)
        assert f"'{share}' is no number above 0, at most 1" in text
    options += ("--engine", "ray")
    text = said(capsys, sources[0], *options, "--address", "127.0.0.1:1")
    assert text.startswith("no Ray cluster answers at 127.0.0.1:1: start one with `ray start --h")
    assert text.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    monkeypatch.setitem(sys.modules, "ray", None)
    text = said(capsys, sources[0], *options)
    assert text == ('--engine ray needs the package ray: run `pip install "effad-core[cluster]"`\n')
