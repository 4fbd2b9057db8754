"""Methods that work on the features of a network pretrained on ImageNet: PatchCore to AST.

After the papers and the repositories amazon-science/patchcore-inspection, DonaldRR/SimpleNet,
gathierry/FastFlow (with VLL-HD/FrEIA, which anomalib's FastFlow copies) and marco-rudolph/AST.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import ResNet


def stages(network: ResNet) -> nn.ModuleList:
    """A ResNet's stem with layer1, its layer2 and its layer3, at strides 4, 8 and 16."""
    stem = (network.conv1, network.bn1, network.relu, network.maxpool)
    return nn.ModuleList(
        [nn.Sequential(*stem, network.layer1), network.layer2, network.layer3]
    )  # layer4 and fc are left behind


class PatchCore(nn.Module):
    """The extractor alone: WideResNet-101-2 to layer3. Input (N, 3, 224, 224)."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(*stages(models.wide_resnet101_2()))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


class PatchCoreEnsemble(nn.Module):
    """Its three extractors. Input (N, 3, 320, 320)."""

    def __init__(self):
        super().__init__()
        self.networks = nn.ModuleList([
            nn.Sequential(*stages(models.wide_resnet101_2())),
            nn.Sequential(*stages(models.resnext101_32x8d())),
            models.densenet201().features[:9],  # to denseblock3
        ])  # fmt: skip

    def forward(self, images: Tensor) -> list[Tensor]:
        return [network(images) for network in self.networks]


class SimpleNet(nn.Module):
    """WideResNet-50-2, whole; each cell of layer2 and layer3 is projected and judged."""

    def __init__(self):
        super().__init__()
        network = models.wide_resnet50_2()
        self.stages = stages(network)
        self.unread = nn.Sequential(network.layer4, network.avgpool, nn.Flatten(), network.fc)
        self.projection = nn.Conv2d(1536, 1536, 1)  # a linear layer at each cell
        self.discriminator = nn.Sequential(
            nn.Conv2d(1536, 1024, 1), nn.BatchNorm2d(1024), nn.Conv2d(1024, 1, 1, bias=False)
        )

    def forward(self, images: Tensor) -> Tensor:
        layer2 = self.stages[1](self.stages[0](images))  # (N, 512, h, w)
        layer3 = self.stages[2](layer2)  # (N, 1024, h / 2, w / 2)
        self.unread(layer3)
        features = torch.cat([layer2, F.interpolate(layer3, size=layer2.shape[-2:])], dim=1)
        return self.discriminator(self.projection(features))


class FlowStep(nn.Module):
    """Affine coupling, then a fixed mixing of the channels; FrEIA stores its inverse beside it."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.subnet = nn.Sequential(
            nn.Conv2d(channels // 2, channels // 2, kernel_size, padding="same"),
            nn.Conv2d(channels // 2, channels, kernel_size, padding="same"),
        )
        self.scale = nn.Parameter(torch.empty(1, channels, 1, 1))
        self.offset = nn.Parameter(torch.empty(1, channels, 1, 1))
        self.mixing = nn.Parameter(torch.empty(channels, channels, 1, 1))
        self.inverse = nn.Parameter(torch.empty(channels, channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        kept, changed = features.chunk(2, dim=1)
        log_scale, shift = self.subnet(kept).chunk(2, dim=1)
        coupled = torch.cat([kept, changed * log_scale.exp() + shift], dim=1)
        return F.conv2d(coupled * self.scale + self.offset, self.mixing)


class FastFlow(nn.Module):
    """WideResNet-50-2 to layer3; on each layer a LayerNorm and eight steps. (N, 3, 256, 256)."""

    def __init__(self):
        super().__init__()
        self.stages = stages(models.wide_resnet50_2())
        self.flows = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm([channels, side, side]),
                *(FlowStep(channels, kernel_size) for kernel_size in (3, 1) * 4),
            )
            for channels, side in ((256, 64), (512, 32), (1024, 16))
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        outputs = []
        for stage, flow in zip(self.stages, self.flows, strict=True):
            images = stage(images)
            outputs.append(flow(images))
        return outputs


class ConditionedCoupling(nn.Module):
    """Each half of the channels scales and shifts the other, seeing the positional encoding too."""

    def __init__(self, channels: int, condition: int, width: int, kernel_size: int):
        super().__init__()
        self.subnets = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels // 2 + condition, width, kernel_size, padding="same"),
                nn.Conv2d(width, channels, kernel_size, padding="same"),
            )
            for _ in range(2)
        )
        self.gain = nn.Parameter(torch.empty(2))

    def forward(self, features: Tensor, position: Tensor) -> Tensor:
        first, second = features.chunk(2, dim=1)
        for subnet, gain in zip(self.subnets, self.gain, strict=True):
            log_scale, shift = (gain * subnet(torch.cat([second, position], dim=1))).chunk(2, 1)
            first, second = second, first * log_scale.exp() + shift
        return torch.cat([first, second], dim=1)


class ResidualBlock(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__(*(
            layer
            for _ in range(2)
            for layer in (nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
        ))  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return features + super().forward(features)


class AST(nn.Module):
    """EfficientNet-B5 to block 35; a flow as teacher, a convolutional student. (N, 3, 768, 768)."""

    def __init__(self, width: int = 1024, channels: int = 304, condition: int = 32):
        super().__init__()
        self.extractor = models.efficientnet_b5().features[:7]  # 304 channels at stride 32
        self.position = nn.Buffer(torch.empty(1, condition, 24, 24))
        self.teacher = nn.ModuleList(
            ConditionedCoupling(channels, condition, width, size) for size in (3, 3, 3, 5)
        )
        self.student = nn.Sequential(
            nn.Conv2d(channels + condition, 1024, 3, padding=1),
            *(ResidualBlock(1024) for _ in range(4)),
            nn.Conv2d(1024, channels, 3, padding=1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.extractor(images)
        position = self.position.expand(len(images), -1, -1, -1)
        student = self.student(torch.cat([features, position], dim=1))
        for coupling in self.teacher:
            features = coupling(features, position)
        return features, student
