"""Several runs of a benchmark at a time, on this machine or on a cluster: the engine Ray.

Ray hands each run to a worker, a process of its own on any node. A worker opens the scenario, goes
on from the checkpoint in the run's folder, evaluates, and writes metrics.json there, as the loop
does. If the worker or its node dies, Ray gives the run to another one. So all nodes must see the
images and the runs' folder under the same paths. `docs/cluster.md` says how to start a cluster.
"""

import io
import os
import socket
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from effad_core.acceleration.threads import usable_processors
from effad_core.datasets import PretrainingImages, Scenario
from effad_core.errors import RunError, not_installed
from effad_core.evaluation.methods import SIZES, OwnRecipe, Recipe
from effad_core.evaluation.places import Place, Share, describe, is_auto, settle
from effad_core.evaluation.progress import Display, Progress
from effad_core.evaluation.tasks import EXPECTED, Entry, Outcome, Task
from effad_core.storage import files
from effad_core.storage.files import as_path, one_line
from effad_core.storage.runs import Run, precision_of, watching

import torch

RETRIES = 5  # of a run whose worker died
GRACE = 120.0  # seconds in which interrupted runs save their checkpoints
CONNECT_SECONDS = 5.0  # until a cluster's address has to answer
PATIENCE = 60.0  # seconds until a worker that died has let go of its run's folder
REPORT_EVERY = 1.0  # seconds between a worker's reports


@dataclass(frozen=True)
class Known:
    """What the command knows and a worker compares.

    Attributes:
        runs: the folder of all runs.
        mark: name of a file that lies in it while the command runs.
        images: how many images each split of the scenario has.
        precisions: the number format of training by the size of EfficientAD, where it was measured.
    """

    runs: Path
    mark: str
    images: tuple[int, ...]
    precisions: Mapping[str, str]


def on_ray(
    tasks: Sequence[Task],
    scenarios: Mapping[str, Scenario],
    share: Share | None = None,
    address: str | None = None,
    dashboard: bool = False,
) -> Iterator[Outcome]:
    """Run the tasks on a Ray cluster, in whichever order they end.

    Args:
        tasks: whatever is to be run; their folders lie in one.
        scenarios: their scenarios, by name.
        share: what one run gets; None decides it here.
        address: of the cluster: "auto" is one of this machine. None starts one here, for this call,
            unless this process is connected to one.
        dashboard: whether that one has Ray's dashboard.

    Raises:
        RunError: if Ray is not installed, or no cluster answers.
        ValueError: if no node has what a run needs.
    """
    if not tasks:
        return
    runs = tasks[0].run_dir.absolute().parent
    with _connected(address, dashboard) as ray, _marked(runs) as mark:
        place, precisions = settle(ray, tasks, share or Share())
        known = Known(runs, mark, (), precisions)
        pending, board = _submitted(ray, tasks, scenarios, place, known)
        with Display(Progress(len(tasks))) as display:
            display.write(describe(ray, place))
            try:
                while pending:
                    yield from _ended(ray, pending, display)
                    _read(ray, board, {task.name for task in pending.values()}, display)
            finally:
                if pending:
                    _stop(ray, list(pending), display)


class _Board:
    """An actor that workers tell how far their runs are."""

    def __init__(self):
        self.starts: dict[str, int] = {}
        self.steps: dict[str, tuple[int, int]] = {}

    def begin(self, name: str) -> None:
        self.starts[name] = self.starts.get(name, 0) + 1
        self.steps.pop(name, None)

    def report(self, name: str, done: int, total: int) -> None:
        self.steps[name] = (done, total)

    def read(self) -> dict[str, tuple[int, tuple[int, int] | None]]:
        """By name: how often the run was begun, and its iterations: done, of how many."""
        return {name: (count, self.steps.get(name)) for name, count in self.starts.items()}


# --- the cluster ----------------------------------------------------------------------------------


@contextmanager
def _connected(address: str | None, dashboard: bool) -> Iterator:
    """Ray, connected; what was started here ends with the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports to nobody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise RunError(not_installed("--engine ray", "ray", "cluster")) from error
    if ray.is_initialized():
        yield ray
        return
    options = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        address = "local"
        options |= {"num_cpus": usable_processors(), "include_dashboard": dashboard}
    try:
        if address not in ("local", "auto"):  # Ray itself asks for many minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        ray.init(address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(
            f"no Ray cluster answers at {address}: start one with `ray start --head`, or leave out "
            f"--address ({one_line(error)})"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _marked(runs: Path) -> Iterator[str]:
    """The name of a file that lies in the folder while the block runs."""
    name = f"seen-from-{socket.gethostname()}"
    mark = f".{name}.{os.getpid()}.part"
    runs.mkdir(parents=True, exist_ok=True)
    files.remove_parts(runs, name)  # of commands that were killed
    try:
        (runs / mark).touch()
        yield mark
    finally:
        with suppress(OSError):
            (runs / mark).unlink()


# --- a run ----------------------------------------------------------------------------------------


def _submitted(
    ray, tasks: Sequence[Task], scenarios: Mapping[str, Scenario], place: Place, known: Known
) -> tuple[dict[object, Task], object]:
    """Hand all tasks to Ray: its reference of each, and the board that hears from their workers."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()
    work = ray.remote(**place.resources(), max_retries=RETRIES)(_work)
    # put there once: it may list many images
    recipes = {recipe: ray.put(_anywhere(recipe)) for recipe in {task.recipe for task in tasks}}
    pending = {}
    for task in tasks:
        scenario = scenarios[task.entry.name]
        counts = tuple(map(len, (scenario.train, scenario.validation, scenario.test)))
        fields = {
            "entry": _absolute(task.entry),
            "seed": task.seed,
            "run_dir": task.run_dir.absolute(),
            "maps": task.maps and task.maps.absolute(),
            "device": place.device,
        }
        told = replace(known, images=counts)
        pending[work.remote(fields, recipes[task.recipe], told, place.cpus, board)] = task
    return pending, board


def _anywhere(recipe: OwnRecipe | Recipe) -> OwnRecipe | Recipe:
    """The same, for a process that runs in another folder."""
    if not isinstance(recipe, OwnRecipe):
        return recipe
    images = recipe.pretraining
    paths = [path.absolute() for path in images.paths]
    return replace(recipe, pretraining=PretrainingImages(paths, images.source, images.licence))


def _absolute(entry: Entry) -> Entry:
    """The same, for a process that runs in another folder."""
    source = entry.source if isinstance(entry.source, str | None) else entry.source.absolute()
    chosen = {
        key: [as_path(path).absolute() for path in paths] for key, paths in entry.chosen.items()
    }
    return replace(entry, source=source, chosen=chosen)


def _work(fields: Mapping, recipe, known: Known, threads: int, board) -> tuple:
    """On a worker: what `Task.run` returns or why it failed, and what it printed."""
    torch.set_num_threads(threads)
    task = Task(recipe=recipe, **fields)
    board.begin.remote(task.name)
    printed, reported = io.StringIO(), [-REPORT_EVERY]

    def report(_: Path, done: int, total: int) -> None:
        if time.monotonic() - reported[0] >= REPORT_EVERY:
            reported[0] = time.monotonic()
            board.report.remote(task.name, done, total)

    try:
        scenario = _seen(task, known)
        if isinstance(recipe, OwnRecipe):
            precision = recipe.schedule.precision
            if is_auto(task):
                precision = precision_of(task.run_dir) or known.precisions[SIZES[recipe.name]]
            task = replace(task, recipe=recipe.in_precision(precision))
        _wait_for(task.run_dir)
        with watching(report), redirect_stdout(printed):
            return task.run(scenario), "", printed.getvalue()
    except EXPECTED as error:
        return None, str(error), printed.getvalue()


def _seen(task: Task, known: Known) -> Scenario:
    """The scenario, as this node has it.

    Raises:
        RunError: if that is not what the command has.
    """
    node = socket.gethostname()
    if not (known.runs / known.mark).exists():
        raise RunError(
            f"the node {node} does not see the folder {known.runs}: put --runs on a disk that all "
            "nodes share"
        )
    try:
        scenario = task.entry.open()
    except EXPECTED as error:
        raise RunError(
            f"on the node {node}: {error} Put the images on a disk that all nodes share."
        ) from error
    counts = tuple(map(len, (scenario.train, scenario.validation, scenario.test)))
    if counts != known.images:
        raise RunError(
            f"the node {node} has other images of {task.entry.name}: {counts} in training, "
            f"validation and test, not {known.images}; put them on a disk that all nodes share"
        )
    return scenario


def _wait_for(run_dir: Path) -> None:
    """Until a worker that was killed, or lost with its node, holds the run's folder no longer."""
    if run_dir.is_dir():
        with suppress(OSError), files.locked(run_dir / Run.LOCK, wait=PATIENCE):
            pass


# --- what the command hears -----------------------------------------------------------------------


def _ended(ray, pending: dict[object, Task], display: Display) -> Iterator[Outcome]:
    """What has ended within a second or is there already; it is taken out of `pending`."""
    ready, _ = ray.wait(list(pending), num_returns=1, timeout=1.0)
    for reference in ready:
        task = pending.pop(reference)
        try:
            metrics, reason, printed = ray.get(reference)
        except ray.exceptions.RayTaskError as error:  # a defect: nothing that a user did wrong
            traceback.print_exception(error)
            metrics, reason, printed = (
                None,
                one_line(f"{type(error.cause).__name__}: {error.cause}"),
                "",
            )
        except ray.exceptions.RayError as error:
            metrics, printed = None, ""
            reason = (
                f"its worker died {RETRIES + 1} times; the usual reason is too little memory "
                f"({one_line(error)})"
            )
        if printed:
            display.write(printed)
        display.progress.end(task.name, failed=metrics is None)
        yield task, metrics, reason


def _read(ray, board, names: set[str], display: Display) -> None:
    """Let the display show how far the runs of these names are."""
    try:
        found = ray.get(board.read.remote(), timeout=5.0)
    except ray.exceptions.RayError:
        return
    progress = display.progress
    for name in names & found.keys():
        starts, steps = found[name]
        if starts > progress.starts.get(name, 0):
            if starts > 1:
                display.write(f"{name}: its worker died, another one goes on")
            progress.begin(name, starts)
        if steps is not None:
            progress.report(name, *steps)
    display.refresh()


def _stop(ray, references: list, display: Display) -> None:
    """Interrupt the runs, as Ctrl-C does, and wait until they have saved their checkpoints."""
    for reference in references:
        ray.cancel(reference)
    display.write("stopping: the runs that are under way save their checkpoints")
    ray.wait(references, num_returns=len(references), timeout=GRACE)
