"""Thresholds from held-out good images, then a verdict on any number of new ones: CSV and overlays.

    effad predict path/to/detector.safetensors path/to/images

Notebook 10 goes from a folder of good images to this command.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from effad_core.acceleration.devices import DEVICE_HELP
from effad_core.datasets import Sample, list_images
from effad_core.datasets.images import skipped_files
from effad_core.deployment.prepared import prepare
from effad_core.deployment.streams import (
    folder_frames,
    inspect_stream,
    is_video,
    video_frames,
)
from effad_core.deployment.verdicts import (
    Inspection,
    VerdictFiles,
    judged_before,
    refuse_among,
    refuse_inside,
)
from effad_core.detector import EfficientAD
from effad_core.errors import command_errors
from effad_core.prediction import Predictor
from effad_core.storage.files import as_path
from effad_core.thresholds import OperatingPoint, pixel_threshold, threshold_for_fpr

import numpy as np
import torch
from tqdm.auto import tqdm

Images = str | os.PathLike | Iterable[str | os.PathLike | Sample]


def fit_thresholds(
    detector: Predictor,
    samples: Sequence[Sample],
    rate: float,
    confidence: float = 0.95,
    guarantee: str = "confident",
    device: str | torch.device | None = None,
) -> tuple[OperatingPoint, OperatingPoint]:
    """Set a detector's two thresholds from good images, with a stated false positive rate.

    Args:
        detector: trained, as it is or prepared; gets `operating_point` and
            `pixel_operating_point`, both or, on an error, neither.
        samples: good images that no network was trained on, for example a scenario's validation
            images.
        rate, confidence, guarantee: as in `threshold_for_fpr`.
        device: where the detector computes, now and afterwards; None takes the GPU where there is
            one.

    Returns:
        The threshold of scores and that of maps; `str` of each says what it promises.

    Raises:
        DataError: for an image that cannot be read.
        ValueError: if a sample is anomalous, the detector has no quantiles, or the images are too
            few for the rate: the message says how many are needed, and the lowest rate possible.

    Example:
        >>> point, _ = fit_thresholds(detector, scenario.validation, 0.5, guarantee="average")
        >>> detector.threshold == point.threshold
        True
    """
    for sample in samples:
        if sample.label:
            raise ValueError(f"{sample.path} is anomalous: thresholds come from good images alone")
    if not samples:
        raise ValueError("there are no good images to find the thresholds from")
    threshold_for_fpr(np.zeros(len(samples)), rate, confidence, guarantee)  # refuses before scoring
    detector.use_device(device)
    scores, highest = [], []
    for _, prediction in detector.stream([sample.path for sample in samples]):
        scores.append(prediction.score)
        highest.append(prediction.map.max(keepdims=True))  # all that pixel_threshold looks at
    points = (
        threshold_for_fpr(scores, rate, confidence, guarantee),
        pixel_threshold(highest, rate, confidence, guarantee),
    )
    detector.operating_point, detector.pixel_operating_point = points
    return points


def inspect_images(
    detector: EfficientAD,
    images: Images,
    folder: str | os.PathLike,
    overlays: bool = True,
    batch_size: int = 8,
    masks: bool = False,
    boxes: bool = False,
    maps: bool = False,
) -> Inspection:
    """Predict images and write one CSV row and one picture for each, as they come.

    `folder` receives predictions.csv with the columns

    - image: the path inside the folder given, or inside the deepest folder that holds all images of
      a sequence. One that would start like a spreadsheet's formula (=, +, -, @, also of full
      width, a tab, a line break) starts with "./"; bytes that are no UTF-8 are written as backslash
      escapes.
    - score, threshold, is_anomalous (score > threshold).
    - width, height: in pixels, after the EXIF rotation, as everything below.
    - anomalous_area: share of the pixels above the pixel threshold.
    - peak_x, peak_y: the pixel of the map's maximum, counted from 0 in the upper left corner.
    - unit_score: between 0 and 1, 0.5 at the threshold (see `Prediction.unit_score`).
    - error: why the image could not be read (then the other cells are empty), or its overlay not
      written.

    and overlays/<image>.png at the image's own size: the map on a colour scale that is the same
    for all images, from 0 to twice the pixel threshold (so that its upper half is what is above),
    more opaque where the map is higher, and a contour at the pixel threshold.

    On request also masks/<image>.png, 255 where the map is above the pixel threshold, else 0;
    boxes.json, which has for each image the rectangles around these pixels (`bounding_boxes`); and
    maps/<image>.tiff, the map itself in float32.

    A call starts over: it deletes what an earlier one has written. An interrupted call leaves the
    rows and overlays that it has written.

    Args:
        detector: trained. Without threshold or pixel threshold the columns that need it stay empty.
        images: a folder, with those below it, or one image; or paths and samples.
        folder: not inside the folder of images; created if it does not exist.
        overlays: whether to draw them.
        batch_size: images that go through the networks at once, fewer if they are large.
        masks, boxes: whether to write them; the detector needs a pixel threshold then.
        maps: whether to write them.

    Returns:
        Counts and errors; an unreadable image stops nothing.

    Raises:
        DataError: if the folder of images is missing or holds no image, `folder` lies in it, or the
            CSV cannot be written (of an earlier call, nothing is deleted then).
        ValueError: if there are no images, one is given twice, the detector has no quantiles, or
            its weights are damaged; or has no pixel threshold for masks or boxes.

    Example:
        >>> inspection = inspect_images(detector, scenario.test[:2], folder)
        >>> inspection.images, sorted(path.name for path in folder.iterdir())
        (2, ['overlays', 'predictions.csv'])
    """
    folder = as_path(folder)
    names, paths = _names_and_paths(images, folder)
    detector.check_quantiles()  # before anything is deleted
    wanted = {"overlays": overlays, "masks": masks, "boxes": boxes, "maps": maps}
    pictures = {name for name, chosen in wanted.items() if chosen}
    files = VerdictFiles(folder, detector.pixel_threshold, pictures)
    predictions = detector.stream(paths, batch_size, keep_going=True)
    with files.opened():
        for name, (image, prediction) in zip(
            names, tqdm(predictions, total=len(paths), desc="inspecting", leave=False), strict=True
        ):
            files.add(name, image, prediction)
    return files.inspection(detector, _skipped(images))


def _skipped(images: Images) -> tuple[str, ...]:
    """What a folder of images holds beside them, by its path inside the folder, with the reason."""
    if not isinstance(images, str | os.PathLike) or not as_path(images).is_dir():
        return ()
    found = skipped_files(images, recursive=True)
    root = as_path(images)
    return tuple(f"{path.relative_to(root).as_posix()} ({why})" for path, why in found.items())


def _names_and_paths(images: Images, folder: Path) -> tuple[list[Path], list[Path]]:
    """Paths relative to the folder of images, and the paths; none may be among the output."""
    alone = isinstance(images, str | os.PathLike)
    root = as_path(images) if alone else None
    if alone and not root.is_file():
        paths = list_images(root, recursive=True)
        names = [path.relative_to(root) for path in paths]
        refuse_inside(folder, root)
    else:
        items = [root] if alone else images
        paths = [item.path if isinstance(item, Sample) else as_path(item) for item in items]
        if not paths:
            raise ValueError("there are no images to inspect: give at least one")
        whole = [Path(os.path.abspath(path)) for path in paths]
        if twice := [path for path, count in Counter(whole).items() if count > 1]:
            raise ValueError(f"{twice[0]} is given more than once: give each image once")
        root = os.path.commonpath([path.parent for path in whole])
        names = [path.relative_to(root) for path in whole]
    refuse_among(folder, paths)
    return names, paths


def main(arguments: Sequence[str] | None = None) -> None:
    """`effad predict`; exits with 1 if an image has an error, 2 if nothing can be inspected, and on
    request with 3 if an image is anomalous."""
    parser = argparse.ArgumentParser(
        prog="effad predict",
        description="Judge images: predictions.csv and overlays.",
        epilog="example: effad predict detector.safetensors path/to/images --output verdicts",
    )
    parser.add_argument(
        "detector", type=as_path, help="a detector.safetensors, or its run's folder"
    )
    parser.add_argument(
        "images",
        help="a folder of images, one image, a video file, camera:0, or the address of a camera",
    )
    parser.add_argument(
        "--follow", action="store_true", help="go on judging what comes into the folder"
    )
    parser.add_argument(
        "--idle",
        type=float,
        metavar="SECONDS",
        help="with --follow: end after so many seconds without a new image",
    )
    parser.add_argument(
        "--output",
        type=as_path,
        help="build/inspection without it; what an earlier call wrote there is replaced, but of a "
        "camera or with --follow, whose rows are added",
    )
    parser.add_argument("--no-overlays", action="store_true", help="write the CSV alone")
    parser.add_argument("--masks", action="store_true", help="write the anomalous pixels as PNG")
    parser.add_argument("--boxes", action="store_true", help="write rectangles around them as JSON")
    parser.add_argument("--maps", action="store_true", help="write the anomaly maps, float32 TIFF")
    parser.add_argument(
        "--fail-on-anomaly",
        action="store_true",
        help="exit with 3 if any image is anomalous (with 1 if one cannot be read)",
    )
    parser.add_argument("--device", help=DEVICE_HELP)
    args = parser.parse_args(arguments)
    video = is_video(args.images)
    if args.follow and video:
        parser.error("--follow is for a folder: a video or a camera is followed anyway")
    if args.idle is not None and not (args.follow and args.idle > 0):
        parser.error("--idle belongs to --follow, and needs a number of seconds above 0")
    output = args.output or Path("build/inspection")
    wanted = {kind for kind in ("masks", "boxes", "maps") if getattr(args, kind)}
    wanted |= set() if args.no_overlays else {"overlays"}
    with command_errors(f"what was done is in {output}"):
        detector = EfficientAD.load(args.detector, args.device)
        if args.fail_on_anomaly and detector.threshold is None:
            raise ValueError("the detector has no threshold to fail by: find one, effad threshold")
        if args.follow or video:
            inspection = _follow(detector, args, output, wanted)
        else:
            chosen = {kind: kind in wanted for kind in ("overlays", "masks", "boxes", "maps")}
            inspection = inspect_images(detector, args.images, output, **chosen)
    print(inspection)
    if inspection.errors:
        sys.exit(1)
    sys.exit(3 if args.fail_on_anomaly and inspection.anomalous else 0)


def _follow(
    detector: EfficientAD, args: argparse.Namespace, output: Path, wanted: set[str]
) -> Inspection:
    """Judge what comes, a line each."""
    if args.follow:
        refuse_inside(output, as_path(args.images))
        before = judged_before(output)
        frames = folder_frames(args.images, detector.full_scale, args.idle, before)
    else:
        frames = video_frames(args.images)
    prepared = prepare(detector, args.device)
    return inspect_stream(prepared, frames, output, wanted, partial(print, flush=True))
