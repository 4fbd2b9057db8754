"""The command `effad train`: from a folder of good images to a detector with a threshold.

    effad train path/to/my_part
    effad train path/to/part_a path/to/part_b      # several products, one training

Notebook 10 goes the same way by hand.
"""

import argparse
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from effad_core.acceleration.devices import DEVICE_HELP, choose_device
from effad_core.acceleration.precision import describe_precision
from effad_core.datasets import (
    Scenario,
    open_pretraining,
    open_scenario,
)
from effad_core.datasets.checks import check_images
from effad_core.datasets.chosen import add_options, given
from effad_core.datasets.folder_names import UNKNOWN, meanings
from effad_core.deployment.inspection import fit_thresholds
from effad_core.deployment.products import for_product, together
from effad_core.deployment.rates import RATE, add_rate, feasible_rate
from effad_core.detector import DETECTOR, EfficientAD
from effad_core.errors import command_errors
from effad_core.metrics import image_auroc
from effad_core.region import Region
from effad_core.schedule import PROFILES, Schedule
from effad_core.storage.files import as_path, check_folder
from effad_core.thresholds import (
    OperatingPoint,
    images_needed,
)
from effad_core.tiles import Tiles
from effad_core.tiles.options import add_resolution, resolution_name, resolution_of
from effad_core.training import train


def train_folder(
    scenario: Scenario,
    schedule: Schedule,
    run_dir: Path,
    *,
    size: str = "small",
    teacher: str | None = None,
    pretraining: str | None = None,
    rate: float = RATE,
    guarantee: str = "confident",
    seed: int = 0,
    device: str | None = None,
    image_size: int | tuple[int, int] = 256,
    tiles: Tiles | None = None,
    region: Region | None = None,
    start: EfficientAD | None = None,
) -> tuple[EfficientAD, tuple[OperatingPoint, OperatingPoint]]:
    """Train a detector, find its thresholds from the validation images, and save both.

    Args:
        scenario: of good images, for example `open_scenario(folder)`.
        schedule: see `Schedule`.
        run_dir: receives the run, with detector.safetensors; a second call goes on.
        size: "small" or "medium".
        teacher: a teacher's file; None takes the shipped one.
        pretraining: as in `open_pretraining`.
        rate: of false alarms; the lowest possible one where the validation images are too few.
        guarantee: as in `threshold_for_fpr`.
        seed, device: as in `train`.
        image_size, tiles, region: as in `EfficientAD`.
        start: as in `train`.

    Returns:
        The detector, and the operating points of scores and of pixels.

    Raises:
        DataError, RunError, ValueError: as `train`.
    """
    run_dir = as_path(run_dir)
    detector = EfficientAD(size, image_size=image_size, tiles=tiles, region=region)
    detector.load_teacher(teacher)
    photographs = open_pretraining(pretraining)
    train(detector, scenario, schedule, photographs, run_dir, seed=seed, device=device, start=start)
    possible = feasible_rate(len(scenario.validation), rate, guarantee)
    points = fit_thresholds(detector, scenario.validation, possible, guarantee=guarantee)
    detector.save(run_dir / DETECTOR)
    return detector, points


def train_products(
    scenarios: Sequence[Scenario],
    schedule: Schedule,
    run_dir: Path,
    *,
    rate: float = RATE,
    guarantee: str = "confident",
    **options: Any,
) -> list[tuple[EfficientAD, tuple[OperatingPoint, OperatingPoint]]]:
    """One training for several products, and for each its own quantiles and thresholds.

    Args:
        scenarios: the products.
        schedule: of the one training (`benchmarks/products.py` measures how long it should be).
        run_dir: receives the run, whose detector has one threshold for all, and for each product
            NAME/detector.safetensors with the product's.
        rate, guarantee, options: as in `train_folder`.

    Returns:
        As `train_folder`, for each product.

    Raises:
        DataError, RunError, ValueError: as `train`.
    """
    whole, options = together(scenarios), options | {"rate": rate, "guarantee": guarantee}
    detector, _ = train_folder(whole, schedule, run_dir, **options)
    found = []
    for scenario in scenarios:
        own = for_product(detector, scenario, schedule)
        possible = feasible_rate(len(scenario.validation), rate, guarantee)
        points = fit_thresholds(own, scenario.validation, possible, guarantee=guarantee)
        own.save(as_path(run_dir) / scenario.name / DETECTOR)
        found.append((own, points))
    return found


def train_main(arguments: Sequence[str] | None = None) -> None:
    """`effad train`."""
    parser = argparse.ArgumentParser(
        prog="effad train",
        description="Train a detector on a folder of good images and find its threshold.",
        epilog="examples: effad train path/to/my_part --profile laptop --rate 0.02; "
        "effad train --normal parts/ok --anomalous parts/scratch parts/dent --normal-test more/ok",
    )
    parser.add_argument(
        "images",
        nargs="*",
        help="a folder of good images, or with folders of good and bad ones, or a scenario's name; "
        "several are several products: one training, and a detector's file for each",
    )
    add_options(parser)
    parser.add_argument("--profile", default="laptop", choices=PROFILES, help="laptop without it")
    parser.add_argument("--size", choices=("small", "medium"), default="small")
    add_resolution(parser)
    parser.add_argument("--start", metavar="DETECTOR", help="go on from a trained detector")
    parser.add_argument("--region", metavar="MASK", help="an image, black where not to inspect")
    add_rate(parser)
    parser.add_argument("--run-dir", type=as_path, help="build/runs/NAME-... without it")
    parser.add_argument("--teacher", help="a teacher's file; the shipped one without it")
    parser.add_argument("--pretraining", help="a folder of photographs, or 'imagenette'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help=DEVICE_HELP)
    args = parser.parse_intermixed_args(arguments)
    if bool(args.images) == bool(given(args)):
        parser.error("give either a folder or a scenario's name, or --normal and what goes with it")
    start = time.perf_counter()
    with command_errors("the same command goes on from here"):
        device = choose_device(args.device)
        images_needed(args.rate, guarantee=args.guarantee)  # refuses what is no rate
        resolution = resolution_of(args)
        region = Region.read(args.region) if args.region else None
        begin = EfficientAD.load(args.start, "cpu") if args.start else None
        size = args.size if begin is None else begin.size
        if begin is not None:  # it looks where the old one looked, unless an option says otherwise
            own = {"image_size": begin.image_size, "tiles": begin.tiles}
            resolution = own | resolution
            region = region or begin.region
        scenarios = [open_scenario(source) for source in args.images]
        scenarios = scenarios or [open_scenario(**given(args))]
        sources = args.images or [None]
        names = [_run_name(one, s.name) for one, s in zip(sources, scenarios, strict=True)]
        if len(scenarios) > 1:
            scenarios = [replace(s, name=n) for s, n in zip(scenarios, names, strict=True)]
            together(scenarios)  # refuses what does not go together
        own = f"{'+'.join(names)}-{args.profile}-{size}"
        own += f"-seed{args.seed}{resolution_name(resolution)}"
        own += ("-region" if region else "") + ("-continued" if begin else "")
        run_dir = args.run_dir or Path(f"build/runs/{own}")
        check_folder(run_dir, "--run-dir")
        for scenario in scenarios:
            print(scenario.summary(), flush=True)
            check_images(scenario.test)  # `train` looks at the others, `summary` reads these
            _say_what_rate(scenario, args.rate, args.guarantee)
        options = {
            "size": size,
            "teacher": args.teacher,
            "pretraining": args.pretraining,
            "rate": args.rate,
            "guarantee": args.guarantee,
            "seed": args.seed,
            "device": device,
            **resolution,
            "region": region,
            "start": begin,
        }
        schedule = Schedule.named(args.profile)
        if len(scenarios) == 1:
            found = [train_folder(*scenarios, schedule, run_dir, **options)]
            paths = [run_dir / DETECTOR]
        else:
            found = train_products(scenarios, schedule, run_dir, **options)
            paths = [run_dir / scenario.name / DETECTOR for scenario in scenarios]
        for scenario, (detector, points) in zip(scenarios, found, strict=True):
            print(summary(detector, scenario, points))
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")
    print()
    for path in paths:
        print(f"the detector: {path}")
    print(f"next: effad predict {shlex.quote(str(paths[0]))} path/to/new/images")


def _say_what_rate(scenario: Scenario, rate: float, guarantee: str) -> None:
    """Say so before the training if the held-out images are too few for the rate."""
    held, needed = len(scenario.validation), images_needed(rate, guarantee=guarantee)
    if held < needed:
        print(
            f"held out: {held}, too few for a rate of {rate:g}, which needs {needed}: the "
            f"threshold will keep {feasible_rate(held, rate, guarantee):.2%}, the "
            f"lowest rate that they support (put {needed} good images into validation/good for "
            "the rate that you asked for)",
            flush=True,
        )


def _run_name(source: str | None, name: str) -> str:
    """The scenario's name; for a folder called like "good" or "train", its parent's name too."""
    if source is None or not meanings(name) - {UNKNOWN}:
        return name
    return f"{Path(os.path.abspath(as_path(source))).parent.name}-{name}"


def summary(detector: EfficientAD, scenario: Scenario, points: Sequence[OperatingPoint]) -> str:
    """What was trained on what, and what its threshold promises.

    Args:
        detector: trained.
        scenario: what it was trained on; test images of both kinds are evaluated.
        points: of scores and of pixels.
    """
    precision = detector.precision
    lines = [
        "",
        f"{scenario.name}: trained on {len(scenario.train)} good images, "
        f"{len(scenario.validation)} held out for quantiles and thresholds",
        f"computed on {detector.device} in "
        f"{describe_precision(precision, detector.device, 'training', detector.size)}",
        *([f"white in 16-bit images: {detector.full_scale}"] if detector.full_scale else []),
        *([f"inspected: {detector.region.share:.0%} of the image"] if detector.region else []),
        f"images: {points[0]}",
        f"pixels: {points[1]}",
    ]
    if len({sample.label for sample in scenario.test}) == 2:
        predictions = detector.stream([sample.path for sample in scenario.test])
        scores = [prediction.score for _, prediction in predictions]
        area = image_auroc([sample.label for sample in scenario.test], scores)
        lines.append(f"image AU-ROC on {len(scenario.test)} test images: {area:.3f}")
    else:
        lines.append("no AU-ROC: it needs normal and anomalous test images")
    return "\n".join(lines)
