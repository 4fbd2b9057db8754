"""Train and evaluate scenarios over seeds, and print the paper's tables.

    effad benchmark solar-mono tray --profile laptop --seeds 0 1 2
    effad benchmark path/to/mvtec_loco --profile paper --size medium
    effad benchmark tray --teacher path/to/teacher.safetensors --iterations 300
    effad benchmark tray --methods all --profile laptop
    effad benchmark path/to/visa --profile paper --engine ray --address auto

Every run is a folder of its own; the same command goes on where it was interrupted. All images and
masks are looked at before the first training. What fails is reported with its reason, in the
tables' file too, and makes the command fail in the end. Results on the paper's datasets stand below
its own: one table for each metric of its Tables 5 to 10 that was measured. `--engine ray` computes
several runs at a time, on this machine or on a cluster (`docs/cluster.md`).
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path

from effad_core.acceleration.devices import DEVICE_HELP, choose_device
from effad_core.datasets import (
    SCENARIOS,
    Scenario,
    dataset_name,
    list_scenarios,
    open_pretraining,
    open_scenario,
)
from effad_core.datasets.checks import check_scenario
from effad_core.datasets.chosen import add_options, given
from effad_core.datasets.published import namesake_warning, published
from effad_core.detector import EfficientAD
from effad_core.errors import DataError, command_errors
from effad_core.evaluation.cluster import on_ray
from effad_core.evaluation.methods import (
    SIZES,
    OwnRecipe,
    Recipe,
    chosen_methods,
    method_names,
    slug,
)
from effad_core.evaluation.places import Share
from effad_core.evaluation.scores import map_paths
from effad_core.evaluation.tables import Metrics, tables
from effad_core.evaluation.tasks import EXPECTED, Entry, Outcome, Task, in_turn
from effad_core.schedule import PROFILES, Schedule
from effad_core.storage.files import as_path, check_file, check_folder, remove_parts, write_text
from effad_core.storage.runs import alone
from effad_core.storage.weights import fingerprint
from effad_core.tiles.options import add_resolution, resolution_name, resolution_of

import torch

RESULTS = "per_scenario_results.json"
SHIPPED, RANDOM = "shipped", "random"  # teachers that need no file


def plan(sources: Sequence[str], chosen: Mapping[str, Sequence[str]] | None = None) -> list[Entry]:
    """The scenarios behind names, scenario folders and dataset folders, in that order.

    Args:
        sources: names and folders.
        chosen: folders of one more scenario, as keywords of `open_scenario`.

    Raises:
        DataError: for a source that is neither, or two scenarios of one name.
    """
    entries = []
    for source in sources:
        if source in SCENARIOS:
            entries.append(Entry(source, source, source))
            continue
        name = dataset_name(source)
        for folder in list_scenarios(source):
            own = Path(os.path.abspath(folder)).name  # "." has none
            entries.append(Entry(published(folder) or name, own, folder))
    if chosen:
        name = open_scenario(**chosen).name
        entries.append(Entry(name, name, None, chosen))
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"two scenarios are called {', '.join(twice)}: name them in two calls.")
    return entries


def new_detector(size: str, teacher: str | Path = SHIPPED, **resolution) -> EfficientAD:
    """A detector with a teacher.

    Args:
        size: "small" or "medium".
        teacher: "shipped", "random" (an untrained one, the same at every call, to see what
            distillation is worth), or a teacher's file.
        resolution: image_size and tiles, as in `EfficientAD`.

    Raises:
        RunError: if the file is missing, damaged, or of another architecture.
    """
    if str(teacher) == RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return EfficientAD(size, **resolution)  # a new detector draws its teacher first
    detector = EfficientAD(size, **resolution)
    return detector.load_teacher() if str(teacher) == SHIPPED else detector.load_teacher(teacher)


def _suffix(args: argparse.Namespace, schedule: Schedule, weights: str) -> str:
    """What a run's folder name needs in addition where an option is not the default.

    Args:
        args: the command's.
        schedule: the one to train by.
        weights: fingerprint of the teacher.
    """
    suffix = ""
    if args.teacher != SHIPPED:
        suffix += f"-teacher-{RANDOM if args.teacher == RANDOM else weights[:8]}"
    usual = Schedule.named(args.profile)
    if schedule.iterations != usual.iterations:
        suffix += f"-iterations-{schedule.iterations}"
    if schedule.autoencoder_iterations != usual.autoencoder_iterations:
        suffix += f"-autoencoder-{schedule.autoencoder_iterations}"
    return suffix + resolution_name(resolution_of(args))


def _at_least(lowest: int) -> Callable[[str], int]:
    """A type for the command's whole numbers."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {lowest}")
        return int(text)

    return number


def _share(text: str) -> float:
    """A type for a share of a GPU, or a number of whole ones."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0, at most 1")
    return share


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with 1 if a scenario failed, 130 if it was interrupted."""
    parser = argparse.ArgumentParser(
        prog="effad benchmark",
        description=__doc__.splitlines()[0],
        epilog="example: effad benchmark solar-mono tray --profile laptop --seeds 0 1 2",
    )
    parser.add_argument("sources", nargs="*", help="scenario names, or folders of one or several")
    add_options(parser)
    parser.add_argument("--profile", default="laptop", choices=PROFILES)
    parser.add_argument("--size", choices=("small", "medium"), default="small")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"all, or some of {', '.join(method_names())}; EfficientAD of --size without it",
    )
    add_resolution(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--teacher",
        default=SHIPPED,
        help="a teacher.safetensors, or 'random': an untrained one; the shipped one without it",
    )
    parser.add_argument("--iterations", type=_at_least(1), help="instead of the profile's")
    parser.add_argument(
        "--autoencoder-steps",
        type=_at_least(0),
        help="steps of the autoencoder alone, instead of the profile's",
    )
    parser.add_argument("--device", help=DEVICE_HELP)
    parser.add_argument("--pretraining", help="a folder of photographs, or 'imagenette'")
    parser.add_argument("--maps", type=as_path, help="write anomaly maps (float32 TIFFs) into this")
    parser.add_argument(
        "--threads",
        type=_at_least(1),
        help="threads of a run on a CPU; without it all, and with --engine ray what is fastest",
    )
    parser.add_argument(
        "--engine",
        choices=("loop", "ray"),
        default="loop",
        help="loop: one run after another, here; ray: several at a time, here or on a cluster",
    )
    ray = parser.add_argument_group("with --engine ray (pip install effad-core[cluster])")
    ray.add_argument("--address", help="'auto' or HOST:PORT of a Ray cluster; none without it")
    ray.add_argument(
        "--gpu-share",
        type=_share,
        metavar="SHARE",
        help="of a GPU for a run, for example 0.25: four share one; by its memory without it",
    )
    ray.add_argument("--dashboard", action="store_true", help="start Ray's dashboard here")
    parser.add_argument("--runs", type=as_path, default=Path("build/runs"))
    parser.add_argument("--output", type=as_path, default=Path("build/results") / RESULTS)
    args = parser.parse_args(arguments)
    if not args.sources and not given(args):
        parser.error("give scenario names, folders, or --normal and what goes with it")
    if args.engine == "loop" and (args.address or args.gpu_share or args.dashboard):
        parser.error("--address, --gpu-share and --dashboard go with --engine ray")
    with command_errors():
        failed = _run(args)
    if failed:
        lines = [f"  {run}: {reason}" for run, reason in failed.items()]
        print("\n".join([f"{len(failed)} of the runs FAILED:", *lines]), file=sys.stderr)
        sys.exit(1)


def _run(args: argparse.Namespace) -> dict[str, str]:
    """Run it, print its tables and write its file; returns what failed, with the reason."""
    check_file(args.output, "--output")
    if args.maps is not None:
        check_folder(args.maps, "--maps")
    if args.threads and args.engine == "loop":
        torch.set_num_threads(args.threads)
    # Ray's workers choose among their own devices
    device = choose_device(args.device) if args.engine == "loop" else args.device
    entries = plan(args.sources, given(args))
    recipes, settings = _recipes(args)
    if args.engine == "loop":
        print(f"computing on {device}")
    for entry in entries:
        if entry.source and (note := namesake_warning(entry.source)):
            print(note)
    tasks = [
        Task(
            entry,
            recipe,
            seed,
            args.runs / f"{entry.name}-{args.profile}-{named.format(seed=seed)}",
            args.maps,
            device,
        )
        for seed in args.seeds  # every scenario and method once, before any of them again
        for entry in entries
        for recipe, named in recipes.items()
    ]
    found: dict[str, Metrics] = {}  # by run
    failed: dict[str, str] = {}

    def results() -> dict[str, dict[str, dict]]:
        """In the order of the command, whichever run ended first."""
        table = {
            recipe.name: {entry.name: {"dataset": entry.dataset, "seeds": {}} for entry in entries}
            for recipe in recipes
        }
        for task in tasks:
            if task.name in found:
                seeds = table[task.recipe.name][task.entry.name]["seeds"]
                seeds[str(task.seed)] = found[task.name]
        return table

    def write() -> None:
        why = {task.name: failed[task.name] for task in tasks if task.name in failed}
        content = {"settings": settings, "methods": results(), "failed": why}
        write_text(args.output, json.dumps(content, indent=1) + "\n")

    output = args.output.absolute()
    with alone(args.output, output.with_name(f".{output.name}.lock"), "--output"):
        remove_parts(output.parent, output.name)
        scenarios: dict[str, Scenario] = {}
        for entry in entries:
            own = [task for task in tasks if task.entry == entry]
            try:
                scenarios[entry.name] = _checked(entry, own, args.maps)
            except EXPECTED as error:
                failed |= {task.name: str(error) for task in own}
                print(f"{entry.name} FAILED: {error}", flush=True)
        if failed:
            write()
        left = [task for task in tasks if task.name not in failed]
        with closing(_outcomes(left, scenarios, args)) as outcomes:
            for task, metrics, reason in outcomes:
                if metrics is None:
                    failed[task.name] = reason
                    print(f"{task.name} FAILED: {reason}", flush=True)
                else:
                    found[task.name] = metrics
                write()
    print(f"\n{tables(results())}\n\nwritten to {args.output}")
    return {task.name: failed[task.name] for task in tasks if task.name in failed}


def _outcomes(
    tasks: Sequence[Task], scenarios: Mapping[str, Scenario], args: argparse.Namespace
) -> Iterator[Outcome]:
    """The tasks' outcomes, from the engine that the user chose."""
    if args.engine == "loop":
        return in_turn(tasks, scenarios)
    share = Share(args.threads, args.gpu_share)
    return on_ray(tasks, scenarios, share, args.address, args.dashboard)


def _recipes(args: argparse.Namespace) -> tuple[dict[OwnRecipe | Recipe, str], dict]:
    """How each method is fitted, with the end of its runs' folder names, and the settings."""
    names = chosen_methods(args.methods or [f"EfficientAD-{args.size[0].upper()}"])
    settings = {"profile": args.profile, "seeds": args.seeds, "methods": names}
    recipes: dict[OwnRecipe | Recipe, str] = {}
    own = [name for name in names if name in SIZES]
    if own:
        pretraining = open_pretraining(args.pretraining)
        print(pretraining.describe())
        changes = {"iterations": args.iterations, "autoencoder_iterations": args.autoencoder_steps}
        changes = {name: value for name, value in changes.items() if value is not None}
        schedule = Schedule.named(args.profile, **changes)
        settings |= {
            "teacher": args.teacher,
            "teacher_weights": {},
            "schedule": asdict(schedule),
            "resolution": resolution_name(resolution_of(args)),
        }
    for name in names:
        if name not in own:
            recipes[Recipe(name, args.profile)] = f"{slug(name)}-seed{{seed}}"
            continue
        size = SIZES[name]
        teacher = args.teacher if args.teacher in (SHIPPED, RANDOM) else as_path(args.teacher)
        if isinstance(teacher, Path):
            teacher = teacher.absolute()  # a worker of Ray runs in another folder
        build = partial(new_detector, size, teacher, **resolution_of(args))
        weights = fingerprint(build().teacher.state_dict())
        settings["teacher_weights"][name] = weights
        suffix = _suffix(args, schedule, weights)
        recipes[OwnRecipe(build, schedule, pretraining, name)] = f"{size}-seed{{seed}}{suffix}"
    return recipes, settings


def _checked(entry: Entry, tasks: Sequence[Task], maps: Path | None) -> Scenario:
    """Open a scenario and refuse what its runs would fail of; print what they will not measure."""
    for task in tasks:
        check_folder(task.run_dir, "--runs")
    scenario = entry.open()
    for sentence in check_scenario(scenario, both_kinds=True):
        print(sentence, flush=True)
    if maps is not None:
        map_paths(maps, scenario.test)
    return scenario
