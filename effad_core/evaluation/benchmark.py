"""Train and evaluate scenarios over seeds, and print the paper's tables.

    effad benchmark solar-mono tray --profile laptop --seeds 0 1 2
    effad benchmark path/to/mvtec_loco --profile paper --size medium
    effad benchmark tray --teacher path/to/teacher.safetensors --iterations 300
    effad benchmark tray --methods all --profile laptop

Every run is a folder of its own; the same command goes on where it was interrupted. All images and
masks are looked at before the first training. What fails is reported with its reason, in the
tables' file too, and makes the command fail in the end. Results on the paper's datasets stand below
its own: one table for each metric of its Tables 5 to 10 that was measured.
"""

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path

from effad_core.acceleration.devices import DEVICE_HELP, choose_device
from effad_core.datasets import (
    SCENARIOS,
    Sample,
    Scenario,
    dataset_name,
    list_scenarios,
    open_pretraining,
    open_scenario,
)
from effad_core.datasets.checks import check_scenario
from effad_core.datasets.chosen import add_options, given
from effad_core.datasets.published import namesake_warning, published
from effad_core.detector import DETECTOR, EfficientAD
from effad_core.errors import DataError, RunError, command_errors
from effad_core.evaluation.methods import (
    SIZES,
    OwnRecipe,
    Recipe,
    chosen_methods,
    method_names,
    slug,
)
from effad_core.evaluation.scores import METRICS, evaluate, map_paths
from effad_core.evaluation.tables import COLUMNS, Metrics, headline, tables
from effad_core.evaluation.timing import machine
from effad_core.schedule import PROFILES, Schedule
from effad_core.storage.digests import digest, inventory
from effad_core.storage.files import as_path, check_file, check_folder, remove_parts, write_text
from effad_core.storage.runs import alone
from effad_core.storage.weights import fingerprint
from effad_core.tiles.options import add_resolution, resolution_name, resolution_of

import torch

RESULTS = "per_scenario_results.json"
TOOK = "took.json"  # in a run's folder: minutes of fitting, milliseconds an image
SHIPPED, RANDOM = "shipped", "random"  # teachers that need no file


@dataclass(frozen=True)
class Entry:
    """One scenario of a benchmark: its dataset, its name, and what `open_scenario` takes."""

    dataset: str
    name: str
    source: str | Path | None
    chosen: Mapping[str, Sequence[str]] = field(default_factory=dict)


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


def run_one(
    recipe: OwnRecipe | Recipe,
    scenario: Scenario,
    run_dir: Path,
    seed: int,
    maps: Path | None = None,
    device: str | torch.device | None = None,
) -> Metrics:
    """Fit (or take up, or load) one run and evaluate it, unless its metrics are there already.

    metrics.json counts as this run's if it holds the digests of its detector and of its test
    images, their labels and masks.
    With a folder `maps`, the run is evaluated in any case and its anomaly maps are written there.
    The device is as in `train`.
    """
    start = time.perf_counter()
    detector = recipe.fit(scenario, seed, run_dir, device)
    minutes = (time.perf_counter() - start) / 60
    identity = {
        "detector": sha256((run_dir / DETECTOR).read_bytes()).hexdigest(),
        "test_images": tested(scenario.test),
    }
    if maps is None and (known := _read_metrics(run_dir / METRICS, identity)) is not None:
        print(f"{run_dir.name}: evaluated before", flush=True)
        return known
    start = time.perf_counter()
    evaluation = evaluate(
        detector, scenario, keep_maps=None if maps is None else True, device=device
    )
    milliseconds = 1000 * (time.perf_counter() - start) / len(scenario.test)
    with warnings.catch_warnings():  # which masks are missing was said before the training
        warnings.simplefilter("ignore")
        metrics = evaluation.save(run_dir, seed=seed, **identity)
    took = {"minutes": minutes, "milliseconds": milliseconds, "machine": machine(detector.device)}
    write_text(run_dir / TOOK, json.dumps(took, indent=1) + "\n")
    if maps is not None:
        print(f"maps in {evaluation.save_maps(maps / run_dir.name)}", flush=True)
    found = headline(metrics)
    areas = "  ".join(f"{COLUMNS[n]} {found[n]:.3f}" for n in list(COLUMNS)[:3] if n in found)
    print(f"{run_dir.name}: {areas}   ({minutes:.1f} min of training in this call)", flush=True)
    return metrics


def tested(samples: Sequence[Sample]) -> str:
    """A digest of everything that metrics are computed from, beside the detector.

    Args:
        samples: the test images.

    Returns:
        16 hexadecimal digits that change with the name, content, label or type of an image, the
        content of a mask, and what defects_config.json says of the kinds of defects.

    Raises:
        DataError: if an image or a mask cannot be opened.
    """
    files = inventory(path for sample in samples for path in (sample.path, *sample.mask_paths))
    contents = iter(content for _, content in files)
    rows = []
    for s in samples:
        found = [next(contents) for _ in (s.path, *s.mask_paths)]
        rows.append((s.anomaly_type, s.path.name, s.label, s.defect_kinds, found))
    return digest(repr(rows))


def _read_metrics(path: Path, identity: Mapping[str, str]) -> Metrics | None:
    """What a metrics.json says, if it is whole and holds these entries."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        if not identity.items() <= found.items():
            return None
        metrics = {
            group: {name: float(value) for name, value in values.items()}
            for group, values in found["metrics"].items()
        }
        if math.isfinite(sum(headline(metrics).values())):
            return metrics
    except (ValueError, AttributeError, KeyError, TypeError, OverflowError, RecursionError):
        pass
    print(f"{path} is damaged and is written anew", flush=True)
    return None


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
    parser.add_argument("--runs", type=as_path, default=Path("build/runs"))
    parser.add_argument("--output", type=as_path, default=Path("build/results") / RESULTS)
    args = parser.parse_args(arguments)
    if not args.sources and not given(args):
        parser.error("give scenario names, folders, or --normal and what goes with it")
    with command_errors():
        failed = _run(args)
    if failed:
        lines = [f"  {run}: {reason}" for run, reason in failed.items()]
        print("\n".join([f"{len(failed)} of the runs FAILED:", *lines]), file=sys.stderr)
        sys.exit(1)


def _run(args: argparse.Namespace) -> dict[str, str]:
    """Run it, print its tables and write its file; returns what failed, with the reason."""
    device = choose_device(args.device)
    check_file(args.output, "--output")
    if args.maps is not None:
        check_folder(args.maps, "--maps")
    entries = plan(args.sources, given(args))
    recipes, settings = _recipes(args)
    print(f"computing on {device}")
    for entry in entries:
        if entry.source and (note := namesake_warning(entry.source)):
            print(note)
    runs = {
        (recipe, entry.name, seed): f"{entry.name}-{args.profile}-{named.format(seed=seed)}"
        for seed in args.seeds  # every scenario and method once, before any of them again
        for entry in entries
        for recipe, named in recipes.items()
    }
    scenarios: dict[str, Scenario] = {}
    results = {
        recipe.name: {entry.name: {"dataset": entry.dataset, "seeds": {}} for entry in entries}
        for recipe in recipes
    }
    failed: dict[str, str] = {}

    def write() -> None:
        content = {"settings": settings, "methods": results, "failed": failed}
        write_text(args.output, json.dumps(content, indent=1) + "\n")

    output = args.output.absolute()
    with alone(args.output, output.with_name(f".{output.name}.lock"), "--output"):
        remove_parts(output.parent, output.name)
        for entry in entries:
            own = [run for (_, name, _), run in runs.items() if name == entry.name]
            try:
                scenarios[entry.name] = _checked(entry, [args.runs / run for run in own], args.maps)
            except (DataError, RunError, ValueError, OSError) as error:
                failed |= dict.fromkeys(own, str(error))
                print(f"{entry.name} FAILED: {error}", flush=True)
        if failed:
            write()
        for (recipe, name, seed), run in runs.items():
            if run in failed:
                continue
            try:
                results[recipe.name][name]["seeds"][str(seed)] = run_one(
                    recipe, scenarios[name], args.runs / run, seed, args.maps, device
                )
            except (DataError, RunError, ValueError, OSError) as error:
                failed[run] = str(error)
                print(f"{run} FAILED: {error}", flush=True)
            write()
    print(f"\n{tables(results)}\n\nwritten to {args.output}")
    return failed


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
        build = partial(new_detector, size, args.teacher, **resolution_of(args))
        weights = fingerprint(build().teacher.state_dict())
        settings["teacher_weights"][name] = weights
        suffix = _suffix(args, schedule, weights)
        recipes[OwnRecipe(build, schedule, pretraining, name)] = f"{size}-seed{{seed}}{suffix}"
    return recipes, settings


def _checked(entry: Entry, run_dirs: Sequence[Path], maps: Path | None) -> Scenario:
    """Open a scenario and refuse what its runs would fail of; print what they will not measure."""
    for folder in run_dirs:
        check_folder(folder, "--runs")
    scenario = open_scenario(entry.source, **entry.chosen)
    for sentence in check_scenario(scenario, both_kinds=True):
        print(sentence, flush=True)
    if maps is not None:
        map_paths(maps, scenario.test)
    return scenario
