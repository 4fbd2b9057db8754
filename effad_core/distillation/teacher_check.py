"""Does a teacher suit your images? Its channels there, beside those on the pretraining images.

    effad check-teacher path/to/images --teacher path/to/teacher.safetensors

A teacher whose channels are dead, or all alike, on your images trains without an error and gives
useless maps. The report needs normal images alone, and no training.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from effad_core.acceleration.devices import DEVICE_HELP
from effad_core.datasets import SCENARIOS, Sample, Scenario, open_scenario
from effad_core.datasets.full_scale import find_full_scale
from effad_core.datasets.images import ImageLike, open_image
from effad_core.datasets.layouts import good_images, is_plain_folder
from effad_core.datasets.transforms import normalise, resize, to_tensor
from effad_core.detector import EfficientAD
from effad_core.errors import command_errors
from effad_core.statistics import ChannelMoments, never_varies
from effad_core.tiles.options import add_image_size

import numpy as np
import torch
from PIL import Image
from torch import Tensor

WEAK = 0.05  # standard deviations, in pretraining standard deviations
BLANK = 0.2  # median standard deviation, in pretraining standard deviations
SHIFTED = 3.0  # distance of means, in pretraining standard deviations
FAR = 1.0  # the same, root mean square over channels
TOLERATED = 0.01  # share of weak or shifted channels that is no finding
FEW = 3.0  # independent channels
UNTRAINED = 0.2  # as BLANK, on the pretraining images and in standard deviations of Psi
ROUNDING = 1e-6  # the digits of a teacher's card
IMPLIED = "mean 0 and standard deviation 1, which Algorithm 3 aims at"


@dataclass(frozen=True, eq=False)
class TeacherReport:
    """A teacher's output on some images, channel by channel, and what is wrong with it.

    Standard deviations are the population's; "pretraining" is what the teacher's card says of its
    output on the images that it was distilled on. A channel is listed as one of nonfinite, dead and
    weak at most. Arrays are float64, shape (C,), NaN for non-finite channels.

    Attributes:
        images: how many.
        cells: positions of the output, in all images together.
        reference: what the channels are compared with, in words.
        mean: of each channel, in units of the teacher's output.
        deviation: the same.
        deviation_ratio: standard deviation / pretraining standard deviation.
        shift: (mean - pretraining mean) / pretraining standard deviation.
        nonfinite: channels with a NaN or infinite value.
        dead: channels that never vary over these images.
        weak: channels whose deviation_ratio is below `WEAK`.
        shifted: channels whose shift is beyond `SHIFTED`, up or down.
        median_ratio: median of deviation_ratio over finite channels; NaN if there is none.
        distance: root mean square of shift over finite channels; NaN if there is none. A random
            cell of a pretraining image has 1.
        effective_channels: how many independent channels vary as these do together: the
            participation ratio of the correlation matrix's eigenvalues, (sum l)^2 / sum l^2, over
            channels that are finite and not dead; 0 if there is none.
        findings: one sentence each, with the remedy; see `teacher_report`.
    """

    images: int
    cells: int
    reference: str
    mean: np.ndarray
    deviation: np.ndarray
    deviation_ratio: np.ndarray
    shift: np.ndarray
    nonfinite: tuple[int, ...]
    dead: tuple[int, ...]
    weak: tuple[int, ...]
    shifted: tuple[int, ...]
    median_ratio: float
    distance: float
    effective_channels: float
    findings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no finding."""
        return not self.findings

    def __str__(self) -> str:
        counts = ", ".join(
            f"{len(channels)} {name}"
            for name, channels in (
                ("non-finite", self.nonfinite),
                ("dead", self.dead),
                ("weak", self.weak),
                ("shifted", self.shifted),
            )
        )
        lines = [
            f"The teacher's output on {self.images} image{'s' * (self.images != 1)} "
            f"({self.cells} cells), beside {self.reference}:",
            f"  standard deviation  {self.median_ratio:.2f} times as large (median over channels)",
            f"  mean                {self.distance:.2f} standard deviations away (RMS)",
            f"  channels            {len(self.mean)}, as varied as {self.effective_channels:.1f} "
            f"independent ones; {counts}",
            "ok: the teacher suits these images" if self.ok else "NOT OK:",
        ]
        return "\n".join([*lines, *(f"  - {finding}" for finding in self.findings)])


def teacher_report(
    detector: EfficientAD,
    images: Scenario | Sequence[Sample | ImageLike] | ImageLike,
    batch_size: int = 8,
    device: str | torch.device | None = None,
) -> TeacherReport:
    """Whether a detector's teacher suits images, before anything is trained on them.

    The findings, and why at these thresholds:

    - The teacher is random, as in a new detector (its card says so).
    - Non-finite channels: any of them makes every map NaN.
    - Dead channels: Algorithm 1 divides by their standard deviation, and `train` refuses them.
    - Weak channels, more than 1 % of all: below a twentieth of its pretraining standard deviation a
      channel says almost nothing, and Algorithm 1 magnifies that rest, noise and rounding included,
      more than 20 times. A map is the mean over channels, of which 1 % are 1 %.
    - Otherwise a median standard deviation below 0.2: so little is left of it where only a camera's
      noise (3 gray levels) varies, and more than twice as much on real images of one object, which
      a test with the shipped teacher shows.
    - Means shifted by more than 3 standard deviations in more than 1 % of all channels: at most a
      ninth of the pretraining cells lie as far out in such a channel (Chebyshev), so the teacher
      has hardly been fitted where your images lie. Or a distance above 1: then the average cell of
      your images lies further out than a single pretraining cell. Pixels of pure noise do; their
      channels vary, and nothing else tells them.
    - Fewer than 3 independent channels: a patch's mean colour alone has as many.
    - A median standard deviation below 0.2 on the pretraining images: T's standard deviation,
      squared, is about the share of Psi's variance that it predicts, here 4 %; it has learnt next
      to nothing.

    Where the card has no statistics of the output (a random teacher's has none), channels are
    compared with what Algorithm 3 aims at: features of mean 0 and standard deviation 1.
    A distilled teacher's standard deviation is smaller, so ratios and shifts then come out smaller
    too: a distant domain, or noise, may go unnoticed.

    No report can tell from its outputs that a teacher is good: random weights of the right scale,
    with their own statistics on their card, differ from a distilled teacher's only in that fewer
    of their channels are independent, and some real images have as few. The distillation's held-out
    loss tells. Nor does it look at images one by one: blank images of many different colours pass.

    Args:
        detector: only its teacher, image_size and card are used.
        images: normal images: a scenario (its training images are taken) or samples; or paths, PIL
            images and arrays (RGB) as `EfficientAD.predict` takes them, one or a sequence.
        batch_size: images that go through the teacher at once; the report does not depend on it.
        device: where the detector computes, now and afterwards; None takes the GPU where there is
            one.

    Returns:
        The report. `print` shows it.

    Raises:
        DataError: for an image that cannot be read.
        ValueError: if there are no images, or the teacher's card has damaged statistics.
    """
    if isinstance(images, Scenario):
        images = images.train
    elif isinstance(images, str | os.PathLike | Image.Image) or (
        isinstance(images, np.ndarray) and images.ndim != 4
    ):
        images = [images]
    if len(images) == 0:
        raise ValueError("there are no images to check the teacher on: give at least one")
    reference, reference_mean, reference_deviation = _reference(detector)
    detector.use_device(device)
    moments = ChannelMoments(covariance=True)
    with torch.no_grad():
        for batch in _batches(images, detector, batch_size):
            moments.add(detector.teacher(normalise(batch.to(detector.device))).float())

    finite = (torch.isfinite(moments.mean) & torch.isfinite(moments.deviation)).cpu().numpy()
    dead = never_varies(moments.mean, moments.deviation).cpu().numpy() & finite
    mean, deviation = (
        np.where(finite, values.cpu().numpy(), np.nan)
        for values in (moments.mean, moments.deviation)
    )
    ratio = deviation / reference_deviation
    shift = (mean - reference_mean) / reference_deviation
    covariance = moments.covariance.cpu().numpy()
    found = {
        "nonfinite": _indices(~finite),
        "dead": _indices(dead),
        "weak": _indices((ratio < WEAK) & ~dead),
        "shifted": _indices(np.abs(shift) > SHIFTED),
        "median_ratio": float(np.median(ratio[finite])) if finite.any() else np.nan,
        "distance": float(np.sqrt(np.mean(shift[finite] ** 2))) if finite.any() else np.nan,
        "effective_channels": _participation_ratio(covariance, deviation, finite & ~dead),
    }
    findings = _findings(len(mean), **found)
    if detector.card.get("teacher") == "random":
        findings.insert(
            0, "the teacher is random, as in a new detector: call load_teacher before anything else"
        )
    learnt = float(np.median(reference_deviation))
    if learnt < UNTRAINED:
        findings.append(
            f"even on the pretraining images the teacher's channels deviate by {learnt:.2g} "
            "(median) where Psi's deviate by 1: it has learnt next to nothing, distil it for longer"
        )
    return TeacherReport(
        images=len(images),
        cells=moments.count,
        reference=reference,
        mean=mean,
        deviation=deviation,
        deviation_ratio=ratio,
        shift=shift,
        findings=tuple(findings),
        **found,
    )


def _findings(
    count: int,
    nonfinite: Sequence[int],
    dead: Sequence[int],
    weak: Sequence[int],
    shifted: Sequence[int],
    median_ratio: float,
    distance: float,
    effective_channels: float,
) -> list[str]:
    """The sentences on a teacher of `count` channels; arguments as in `TeacherReport`."""
    findings = []
    if nonfinite:
        findings.append(
            f"{_of(nonfinite, count)} NaN or infinite on these images: the teacher's weights are "
            "damaged, load or distil it again"
        )
    if dead:
        findings.append(
            f"{_of(dead, count)} the same in every cell: use images that are not all one colour, "
            "or another teacher"
        )
    if len(weak) > TOLERATED * count:
        findings.append(
            f"{_of(weak, count)} nearly constant, they deviate by less than {WEAK:.0%} of their "
            "pretraining deviation: use images with more structure, or another teacher"
        )
    elif median_ratio < BLANK and 2 * len(dead) < count:
        findings.append(
            f"the channels deviate by {median_ratio:.0%} (median) of what they do on pretraining "
            "images, as on blank images: use sharper images with more structure, or another teacher"
        )
    if len(shifted) > TOLERATED * count or distance > FAR:
        findings.append(
            f"these images lie far from the pretraining images, {distance:.1f} standard "
            f"deviations on average and beyond {SHIFTED:.0f} in {len(shifted)} of {count} "
            "channels: check that they are no noise, or distil a teacher on images like yours"
        )
    if effective_channels < FEW and len(dead) + len(nonfinite) < count:
        findings.append(
            f"the channels vary as {effective_channels:.1f} independent ones would, a patch's mean "
            "colour has 3: use images with more structure, or another teacher"
        )
    return findings


def _reference(detector: EfficientAD) -> tuple[str, np.ndarray, np.ndarray]:
    """What to compare with, in words, and the means and standard deviations, both of shape (C,)."""
    card, shape = detector.card.get("teacher"), (detector.out_channels,)
    keys = ("output_mean", "output_deviation")
    if not isinstance(card, dict) or not any(key in card for key in keys):
        return IMPLIED, np.zeros(shape), np.ones(shape)
    try:
        mean, deviation = (np.array(card[key], dtype=np.float64) for key in keys)
        fits = mean.shape == deviation.shape == shape and (deviation >= 0).all()
        fits = fits and np.isfinite(mean).all() and np.isfinite(deviation).all()
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"the teacher's card needs {shape[0]} finite numbers each as output_mean and "
            "output_deviation: distil the teacher again, or delete both from its card"
        )
    return "the pretraining images", mean, np.maximum(deviation, ROUNDING)


def _batches(
    images: Sequence[Sample | ImageLike], detector: EfficientAD, batch_size: int
) -> Iterator[Tensor]:
    """The images as uint8 tensors (n, 3, H, W) at the detector's size, n <= batch_size."""
    paths = [item for item in images if isinstance(item, str | os.PathLike)]
    full_scale = detector.full_scale or find_full_scale(paths, "the images given")
    for start in range(0, len(images), batch_size):
        opened = (
            item.load() if isinstance(item, Sample) else open_image(item, full_scale)
            for item in images[start : start + batch_size]
        )
        yield torch.stack([to_tensor(resize(image, detector.image_size)) for image in opened])


def _participation_ratio(
    covariance: np.ndarray, deviation: np.ndarray, chosen: np.ndarray
) -> float:
    """(sum l)^2 / sum l^2 of the eigenvalues l of the chosen channels' correlation matrix R.

    The sum is R's trace, the sum of squares R's squared Frobenius norm: no eigenvalue is computed.
    """
    if not chosen.any():
        return 0.0
    scale = deviation[chosen]
    correlation = covariance[np.ix_(chosen, chosen)] / scale[:, None] / scale
    return float(np.trace(correlation) ** 2 / np.sum(correlation**2))


def _indices(channels: np.ndarray) -> tuple[int, ...]:
    return tuple(np.flatnonzero(channels).tolist())


def _of(channels: Sequence[int], count: int) -> str:
    """ "2 of 384 channels (3, 17) are" """
    shown = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
    return f"{len(channels)} of {count} channels ({shown}) are"


def _open_images(source: str) -> Scenario | list[Path]:
    """A scenario by name or folder, or all images of a folder that `open_folder` takes as good."""
    if source in SCENARIOS or not is_plain_folder(source):
        return open_scenario(source)
    return good_images(source)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with 1 if there is a finding."""
    parser = argparse.ArgumentParser(
        prog="effad check-teacher",
        description=__doc__.splitlines()[0],
        epilog="example: effad check-teacher path/to/good_images",
    )
    parser.add_argument("images", help="a folder of normal images, or a scenario's name or folder")
    parser.add_argument("--teacher", help="a teacher.safetensors; the shipped one without it")
    parser.add_argument("--size", choices=("small", "medium"), default="small")
    add_image_size(parser)
    parser.add_argument("--device", help=DEVICE_HELP)
    args = parser.parse_args(arguments)
    with command_errors("nothing was printed"):
        images = _open_images(args.images)
        detector = EfficientAD(args.size, image_size=args.image_size or 256)
        report = teacher_report(detector.load_teacher(args.teacher), images, device=args.device)
    print(report)
    sys.exit(0 if report.ok else 1)
