"""The command `effad threshold`: other thresholds for a trained detector."""

import argparse
from collections.abc import Sequence

from effad_core.acceleration.devices import DEVICE_HELP
from effad_core.acceleration.precision import PRECISIONS
from effad_core.datasets import (
    Sample,
    list_images,
)
from effad_core.datasets.layouts import good_images
from effad_core.deployment.inspection import fit_thresholds
from effad_core.deployment.rates import add_rate, feasible_rate
from effad_core.detector import EfficientAD
from effad_core.errors import command_errors
from effad_core.storage.files import as_path, check_file
from effad_core.thresholds import (
    confusion,
    for_cost,
    for_recall,
    images_needed,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """`effad threshold`."""
    parser = argparse.ArgumentParser(
        prog="effad threshold",
        description="Find a detector's thresholds anew from good images, or set one by hand.",
        epilog="example: effad threshold detector.safetensors path/to/good_images --rate 0.02",
    )
    parser.add_argument("detector", type=as_path, help="a detector.safetensors; it is replaced")
    parser.add_argument("images", nargs="?", help="a folder of good images not trained on")
    add_rate(parser)
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
