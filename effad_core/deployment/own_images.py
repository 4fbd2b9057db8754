"""From a folder of good images to a detector with a threshold; a threshold or an ONNX file later.

    effad train path/to/my_part
    effad threshold build/runs/my_part-laptop-small-seed0/detector.safetensors more/good/images

Notebook 10 goes the same way by hand.
"""

import argparse
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from effad_core.acceleration.devices import DEVICE_HELP, choose_device
from effad_core.acceleration.precision import PRECISIONS, describe_precision
from effad_core.datasets import (
    Sample,
    Scenario,
    list_images,
    open_pretraining,
    open_scenario,
)
from effad_core.datasets.checks import check_images
from effad_core.datasets.chosen import add_options, given
from effad_core.datasets.folder_names import UNKNOWN, meanings
from effad_core.datasets.layouts import good_images
from effad_core.deployment.inspection import fit_thresholds
from effad_core.deployment.int8 import export_int8
from effad_core.deployment.onnx import export
from effad_core.detector import DETECTOR, EfficientAD
from effad_core.errors import command_errors
from effad_core.metrics import image_auroc
from effad_core.region import Region
from effad_core.schedule import PROFILES, Schedule
from effad_core.storage.files import as_path, check_file, check_folder
from effad_core.thresholds import (
    OperatingPoint,
    confusion,
    for_cost,
    for_recall,
    images_needed,
    lowest_rate,
)
from effad_core.tiles import Tiles
from effad_core.tiles.options import add_resolution, resolution_name, resolution_of
from effad_core.training import train

RATE = 0.05
GUARANTEES = ("confident", "average")
GUARANTEE_HELP = "the rate is kept with 95 %% confidence, or on average (fewer images needed)"


def feasible_rate(count: int, rate: float, guarantee: str) -> float:
    """The rate of false alarms, or the lowest that so few images support.

    Args:
        count: normal images for the threshold.
        rate, guarantee: as in `threshold_for_fpr`.
    """
    if count >= images_needed(rate, guarantee=guarantee):
        return rate
    return min(1.0005 * lowest_rate(count, guarantee=guarantee), 0.999)


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
        nargs="?",
        help="a folder of good images, or with folders of good and bad ones, or a scenario's name",
    )
    add_options(parser)
    parser.add_argument("--profile", default="laptop", choices=PROFILES, help="laptop without it")
    parser.add_argument("--size", choices=("small", "medium"), default="small")
    add_resolution(parser)
    parser.add_argument("--start", metavar="DETECTOR", help="go on from a trained detector")
    parser.add_argument("--region", metavar="MASK", help="an image, black where not to inspect")
    parser.add_argument("--rate", type=float, default=RATE, help=f"of false alarms ({RATE})")
    parser.add_argument("--guarantee", choices=GUARANTEES, default="confident", help=GUARANTEE_HELP)
    parser.add_argument("--run-dir", type=as_path, help="build/runs/NAME-... without it")
    parser.add_argument("--teacher", help="a teacher's file; the shipped one without it")
    parser.add_argument("--pretraining", help="a folder of photographs, or 'imagenette'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help=DEVICE_HELP)
    args = parser.parse_intermixed_args(arguments)
    if (args.images is None) != bool(given(args)):
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
        scenario = open_scenario(args.images, **given(args))
        print(scenario.summary(), flush=True)
        own = f"{_run_name(args.images, scenario.name)}-{args.profile}-{size}"
        own += f"-seed{args.seed}{resolution_name(resolution)}"
        own += ("-region" if region else "") + ("-continued" if begin else "")
        run_dir = args.run_dir or Path(f"build/runs/{own}")
        check_folder(run_dir, "--run-dir")
        check_images(scenario.test)  # `train` looks at the others, `summary` reads these
        held, needed = len(scenario.validation), images_needed(args.rate, guarantee=args.guarantee)
        if held < needed:
            print(
                f"held out: {held}, too few for a rate of {args.rate:g}, which needs {needed}: the "
                f"threshold will keep {feasible_rate(held, args.rate, args.guarantee):.2%}, the "
                f"lowest rate that they support (put {needed} good images into validation/good for "
                "the rate that you asked for)",
                flush=True,
            )
        detector, points = train_folder(
            scenario,
            Schedule.named(args.profile),
            run_dir,
            size=size,
            teacher=args.teacher,
            pretraining=args.pretraining,
            rate=args.rate,
            guarantee=args.guarantee,
            seed=args.seed,
            device=device,
            **resolution,
            region=region,
            start=begin,
        )
        print(summary(detector, scenario, points))
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")
    print(f"\nthe detector: {run_dir / DETECTOR}")
    print(f"next: effad predict {shlex.quote(str(run_dir / DETECTOR))} path/to/new/images")


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


def threshold_main(arguments: Sequence[str] | None = None) -> None:
    """`effad threshold`."""
    parser = argparse.ArgumentParser(
        prog="effad threshold",
        description="Find a detector's thresholds anew from good images, or set one by hand.",
        epilog="example: effad threshold detector.safetensors path/to/good_images --rate 0.02",
    )
    parser.add_argument("detector", type=as_path, help="a detector.safetensors; it is replaced")
    parser.add_argument("images", nargs="?", help="a folder of good images not trained on")
    parser.add_argument("--rate", type=float, default=RATE, help=f"of false alarms ({RATE})")
    parser.add_argument("--guarantee", choices=GUARANTEES, default="confident", help=GUARANTEE_HELP)
    parser.add_argument("--value", type=float, help="a threshold of scores, chosen by hand")
    labelled = parser.add_argument_group("from a few known defects")
    labelled.add_argument("--anomalous", metavar="FOLDER", help="images of defects")
    labelled.add_argument("--recall", type=float, help="find at least this share of them")
    labelled.add_argument(
        "--cost", type=float, nargs=2, metavar=("FALSE_ALARM", "MISS"), help="of one error each"
    )
    labelled.add_argument(
        "--prevalence", type=float, help="share of defects in use; as in the folders without it"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="compute in it from now on; its own without it"
    )
    parser.add_argument("--output", type=as_path, help="write this file instead of replacing it")
    parser.add_argument("--device", help=DEVICE_HELP)
    args = parser.parse_intermixed_args(arguments)
    if (args.images is None) == (args.value is None):
        parser.error("give either a folder of good images or --value")
    by_label = (args.recall is not None) + (args.cost is not None)
    if by_label != (args.anomalous is not None):
        parser.error("--anomalous needs either --recall or --cost, and these need --anomalous")
    if args.anomalous is not None and args.images is None:
        parser.error("--anomalous needs a folder of good images beside it")
    with command_errors("nothing was changed"):
        check_file(args.output or args.detector, "--output")
        detector = EfficientAD.load(args.detector, args.device)
        detector.precision = args.precision or detector.precision
        if args.value is not None:
            detector.threshold = args.value
        elif args.anomalous is not None:
            print(_threshold_from_labels(detector, args))
        else:
            samples = [Sample(path, 0, "good") for path in good_images(args.images)]
            count, needed = len(samples), images_needed(args.rate, guarantee=args.guarantee)
            if count < needed:
                lowest = feasible_rate(count, args.rate, args.guarantee)
                raise ValueError(
                    f"{count} good images are too few for a rate of {args.rate:g}, which needs "
                    f"{needed}: give more of them, or --rate {lowest:.4g}"
                )
            fit_thresholds(detector, samples, args.rate, guarantee=args.guarantee)
        detector.save(args.output or args.detector)
        print(f"images: {detector.operating_point}")
        print(f"pixels: {detector.pixel_operating_point or 'no threshold'}")
        if args.images is not None:
            print("this holds if the detector was trained on none of these images")
        print(f"written to {args.output or args.detector}")


def _threshold_from_labels(detector: EfficientAD, args: argparse.Namespace) -> str:
    """Set the threshold of scores from labelled images, beside what normal images alone promise.

    The threshold of pixels is that of the normal images. No weight changes.

    Returns:
        How many of the images are on either side, and the promise of the threshold that was not
        taken.
    """
    normal = [Sample(path, 0, "good") for path in good_images(args.images)]
    anomalous = [Sample(path, 1, "anomalous") for path in list_images(args.anomalous, True)]
    rate = feasible_rate(len(normal), args.rate, args.guarantee)
    promised, _ = fit_thresholds(detector, normal, rate, guarantee=args.guarantee)
    both = [*normal, *anomalous]
    scores = [found.score for _, found in detector.stream([sample.path for sample in both])]
    labels = [sample.label for sample in both]
    if args.recall is not None:
        detector.operating_point = for_recall(labels, scores, args.recall)
    else:
        detector.operating_point = for_cost(labels, scores, *args.cost, args.prevalence)
    counted = confusion(labels, scores, detector.threshold)
    return (
        f"of these images: {counted.tp} of {len(anomalous)} defects found, {counted.fp} of "
        f"{len(normal)} good ones called anomalous (they chose the threshold: expect less of "
        f"others)\nfrom the good images alone it would be: {promised}"
    )


def export_main(arguments: Sequence[str] | None = None) -> None:
    """`effad export`."""
    parser = argparse.ArgumentParser(
        prog="effad export",
        description="Write a detector as ONNX, for ONNX Runtime or OpenVINO, without PyTorch; or "
        "as an INT8 model for OpenVINO, with thresholds found anew.",
        epilog="examples: effad export detector.safetensors my_part.onnx; "
        "effad export detector.safetensors my_part.xml --int8 path/to/my_part",
    )
    parser.add_argument("detector", type=as_path, help="a detector.safetensors")
    parser.add_argument("output", type=as_path, help="the .onnx file to write, or the .xml file")
    parser.add_argument(
        "--int8",
        metavar="FOLDER",
        help="the folder, or the scenario's name, that the detector was trained on: its training "
        "images give the ranges of the numbers, its validation images the thresholds",
    )
    parser.add_argument("--rate", type=float, default=RATE, help=f"of false alarms ({RATE})")
    parser.add_argument("--guarantee", choices=GUARANTEES, default="confident", help=GUARANTEE_HELP)
    args = parser.parse_args(arguments)
    with command_errors("nothing was written"):
        detector = EfficientAD.load(args.detector, "cpu")
        if args.int8 is None:
            export(detector, args.output)
        else:
            scenario = open_scenario(args.int8)
            rate = feasible_rate(len(scenario.validation), args.rate, args.guarantee)
            parts = scenario.train, scenario.validation
            found = export_int8(detector, *parts, args.output, rate, args.guarantee)
            print(f"images: {found.operating_point}")
            print(f"pixels: {found.pixel_operating_point}")
    print(f"written to {args.output}")
