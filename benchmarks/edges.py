"""Where a detector's maps have their maximum: how often at the border, and why.

    python benchmarks/edges.py build/runs/solar-mono-laptop/detector.safetensors solar-mono

The first table counts, over the scenario's normal test images, how many maps have their maximum
within 16 pixels of the border and within a 32-pixel square at a corner, with the cells divided by
their means over training images and without. Beside it stand the share of the area and the image
AU-ROC of all test images. The second
asks what makes the border different: the mean of the outermost two rings of cells, relative to the
cells inside, on the same images and on textures that have no edge of their own (crops of
photographs of grass, gravel and bricks). What is left on textures comes from the networks.
"""

import argparse
from collections.abc import Sequence

from effad_core import EfficientAD, open_scenario
from effad_core.datasets.resized import ResizedImages
from effad_core.datasets.transforms import to_tensor
from effad_core.errors import command_errors
from effad_core.metrics import image_auroc
from effad_core.prediction import MAPS

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor

BORDER, CORNER, RINGS = 16, 32, 2  # pixels, pixels, cells
TEXTURES, CROPS = ("brick", "grass", "gravel"), 20


def shares(maps: Tensor) -> tuple[float, float]:
    """Of maps (N, H, W): how many have their maximum at the border, and how many in a corner."""
    height, width = maps.shape[1:]
    places = maps.flatten(1).argmax(dim=1)
    y, x = places // width, places % width

    def near(length: int, places: Tensor, margin: int) -> Tensor:
        return (places < margin) | (places >= length - margin)

    border = near(height, y, BORDER) | near(width, x, BORDER)
    corner = near(height, y, CORNER) & near(width, x, CORNER)
    return border.float().mean().item(), corner.float().mean().item()


def ring_ratios(detector: EfficientAD, batches: Sequence[Tensor]) -> list[float]:
    """Mean of the outermost rings of the two maps' cells, relative to those inside."""
    total = torch.stack([detector.cells(batch).sum(dim=0).cpu() for batch in batches]).sum(dim=0)
    inside = torch.zeros(total.shape[1:], dtype=torch.bool)
    inside[RINGS:-RINGS, RINGS:-RINGS] = True
    return [(m[~inside].mean() / m[inside].mean()).item() for m in total]


def textures(size: tuple[int, int]) -> list[Tensor]:
    """Batches of random crops, uint8, (CROPS, 3, H, W)."""
    rng, batches = np.random.default_rng(0), []
    for name in TEXTURES:
        image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        crops = []
        for _ in range(CROPS):
            x = int(rng.integers(image.width - size[1]))
            y = int(rng.integers(image.height - size[0]))
            crops.append(to_tensor(image.crop((x, y, x + size[1], y + size[0]))))
        batches.append(torch.stack(crops))
    return batches


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("detector", help="a detector's file or the folder of its run")
    parser.add_argument("scenario", help="a name or a folder")
    args = parser.parse_args(arguments)
    with command_errors():
        detector, scenario = EfficientAD.load(args.detector), open_scenario(args.scenario)
    test = ResizedImages(scenario.test, detector.image_size)
    labels = np.array([sample.label for sample in scenario.test])
    validation = ResizedImages(scenario.validation, detector.image_size)
    height, width = detector.image_size
    area = 1 - (1 - 2 * BORDER / height) * (1 - 2 * BORDER / width)
    print(f"{'maxima of normal test images, AU-ROC of all':<44} border  corner  AU-ROC")
    print(f"{'share of the area':<44} {area:>6.2f}  {4 * CORNER**2 / (height * width):>6.2f}")
    for title in ("divided", "as in the paper"):
        maps = torch.cat([detector.combined_maps(batch).cpu() for batch in test.batches(8)])
        for name, found in zip(MAPS, maps.unbind(dim=1), strict=True):
            border, corner = shares(found[labels == 0])
            auroc = image_auroc(labels, found.flatten(1).amax(dim=1).numpy())
            print(f"{f'{name}, cells {title}':<44} {border:>6.2f}  {corner:>6.2f}  {auroc:>6.3f}")
        detector.cell_means.fill_(1)
        detector.find_quantiles(validation.batches(8), len(validation))
    normal = ResizedImages([s for s in scenario.test if not s.label], detector.image_size)
    print(
        f"\nmean of the outermost {RINGS} rings of cells / inside    student-teacher  autoencoder"
    )
    for title, found in (
        ("normal images", list(normal.batches(8))),
        ("textures", textures((height, width))),
    ):
        first, second = ring_ratios(detector, found)
        print(f"{title:<50} {first:>15.2f}  {second:>11.2f}")


if __name__ == "__main__":
    main()
