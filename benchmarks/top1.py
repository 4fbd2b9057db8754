"""Top-1 accuracy of a backbone on ImageNet photographs: its pretrained weights are in their places.

    python benchmarks/top1.py FOLDER

FOLDER holds photographs of all 1000 classes; a file's name starts with its class's WordNet id
(n01440764_tench.JPEG).
"""

import argparse
import sys
from pathlib import Path

from effad_core import RunError
from effad_core.datasets.images import list_images, read_image
from effad_core.distillation.backbones import BACKBONES, open_backbone
from effad_core.errors import DataError

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as TF

CLASSES = 1000  # ImageNet-1k


def open_classifier(
    name: str = "efficientnet-lite0", weights: str | Path | None = None
) -> nn.Module:
    """The whole backbone: images as for `FeatureExtractor` -> logits, shape (N, 1000).

    Args and errors as those of `effad_core.distillation.extractors.open_extractor`.
    """
    backbone = open_backbone(name, weights)
    net = nn.Sequential(backbone.normalise, backbone.network)
    return net.to(memory_format=torch.channels_last).requires_grad_(False).eval()


def classifier_input(image: Image.Image) -> Tensor:
    """Shorter side to 256 (bicubic), the middle 224x224: uint8, shape (3, 224, 224)."""
    image = TF.resize(image, 256, TF.InterpolationMode.BICUBIC)
    return TF.pil_to_tensor(TF.center_crop(image, 224))


@torch.no_grad()
def top1_accuracy(classifier: nn.Module, folder: str | Path, every: int = 1) -> float:
    """The share of photographs whose most likely class is their own.

    Args:
        classifier: see `open_classifier`.
        folder: photographs of all 1000 classes; a file's name starts with its class's WordNet id
            (n01440764_tench.JPEG), whose rank among all ids is the class's number.
        every: classify only every so many photographs, in the order of their names.

    Raises:
        DataError: if the folder does not show all classes, or a photograph cannot be read.
    """
    files = list_images(folder)
    ids = sorted({path.name[:9] for path in files})
    if len(ids) != CLASSES:
        raise DataError(f"{folder} shows {len(ids)} classes: photographs of {CLASSES} are needed.")
    files, correct = files[::every], 0
    for batch in (files[i : i + 50] for i in range(0, len(files), 50)):
        images = torch.stack([classifier_input(read_image(path)) for path in batch])
        classes = classifier(images).argmax(1).tolist()
        correct += sum(path.name[:9] == ids[c] for path, c in zip(batch, classes, strict=True))
    return correct / len(files)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="photographs of all 1000 classes, n01440764_tench.JPEG")
    parser.add_argument("--extractor", default="efficientnet-lite0", choices=BACKBONES)
    parser.add_argument("--weights", help="a state dict on disk")
    args = parser.parse_args(arguments)
    try:
        accuracy = top1_accuracy(open_classifier(args.extractor, args.weights), args.folder)
    except (DataError, RunError) as error:
        sys.exit(str(error))
    print(f"{args.extractor}: top-1 accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
