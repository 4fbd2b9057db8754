"""Which features suit the teacher: PatchCore on each of them, on the development scenarios.

    python -m benchmarks.psi solar-mono tray path/to/mvtec_ad/bottle path/to/mvtec_ad/transistor
    python -m benchmarks.psi solar-mono --teacher build/distil/small/teacher.safetensors

Features of a pretrained backbone are read as Algorithm 3 reads them, from images of 512 pixels;
those of a teacher from images of 256. Of each scenario, 120 training and 60 normal and 60 anomalous
test images take part (of each kind of anomaly, if they are structural and logical: structural comes
first). Channels are standardised, as T's are. It prints each image AU-ROC. Test images choose
nothing but the features, once for all scenarios.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

from baselines.patchcore import PatchCore
from effad_core import EfficientAD, open_scenario
from effad_core.acceleration.memory import keep_freed_memory
from effad_core.datasets import Sample, Scenario, evenly
from effad_core.datasets.transforms import normalise
from effad_core.distillation.backbones import Backbone, open_backbone
from effad_core.distillation.extractors import FeatureExtractor
from effad_core.errors import command_errors
from effad_core.evaluation.scores import KINDS, evaluate

from torch import Tensor, nn

BACKBONE = "efficientnet-lite0"
TRAINING, TEST = 120, 60  # images
CHANNELS = (16, 24, 40, 80, 112)  # of the groups of blocks of EfficientNet-Lite0
# groups that are layers, and what becomes of them
CHOICES = [
    ((2, 4), "patchcore"),
    ((2, 4), "mean"),
    ((1, 2, 4), "mean"),
    ((2, 3, 4), "mean"),
    ((3, 4), "mean"),
    ((4,), "mean"),
]


class Teacher(nn.Module):
    """A teacher's output, every second cell, as features."""

    def __init__(self, detector: EfficientAD):
        super().__init__()
        self.network = detector.teacher

    def forward(self, images: Tensor) -> Tensor:
        return self.network(normalise(images))[..., ::2, ::2]


def blocks_of(backbone: Backbone, blocks: Sequence[int], pooling: str) -> Backbone:
    """The same EfficientNet-Lite with other blocks as layers."""
    net = backbone.network
    stages, begun = [], 0
    for block in blocks:
        stages.append(nn.Sequential(*net.blocks[begun : block + 1]))
        begun = block + 1
    stages[0] = nn.Sequential(net.conv_stem, net.bn1, *stages[0])
    channels = [CHANNELS[block] for block in blocks]
    return replace(backbone, stages=stages, channels=channels, pooling=pooling)


def features(teachers: Sequence[str], size: str) -> Iterator[tuple[str, nn.Module, int]]:
    """(name, features, image size) of each row of the table."""
    for blocks, pooling in () if teachers else CHOICES:
        backbone = blocks_of(open_backbone(BACKBONE), blocks, pooling)
        extractor = FeatureExtractor(BACKBONE, backbone)
        title = f"{BACKBONE}, blocks {', '.join(map(str, blocks))}, {pooling}"
        yield f"{title}: {extractor.out_channels}", extractor, 512
    for teacher in teachers:
        detector = EfficientAD(size).load_teacher(teacher)
        yield f"teacher {teacher}: {detector.out_channels}", Teacher(detector), 256


def part(scenario: Scenario) -> Scenario:
    """The images that take part."""
    groups: dict[str, list[Sample]] = {}
    for sample in scenario.test:
        kind = sample.anomaly_type if sample.anomaly_type in KINDS else str(sample.label)
        groups.setdefault(kind, []).append(sample)
    test = [sample for group in groups.values() for sample in evenly(group, TEST)]
    return replace(scenario, train=evenly(scenario.train, TRAINING), test=tuple(test))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="+", help="names or folders")
    parser.add_argument("--teacher", nargs="*", default=[], help="measure these, not backbones")
    parser.add_argument("--size", choices=("small", "medium"), default="small", help="of these")
    args = parser.parse_args(arguments)
    keep_freed_memory()
    with command_errors():
        for source in args.scenarios:
            scenario = part(open_scenario(source))
            for name, network, image_size in features(args.teacher, args.size):
                patchcore = PatchCore(
                    features=network, image_size=image_size, share=0.04, standardise=True
                )
                found = evaluate(patchcore.fit(scenario), scenario, keep_maps=False).metrics()
                kinds = [kind for kind in KINDS if kind in found] or ["all"]
                areas = "  ".join(f"{found[kind]['image_auroc']:.3f}" for kind in kinds)
                print(f"{scenario.name:<12} {name:<48} {areas}", flush=True)


if __name__ == "__main__":
    main()
