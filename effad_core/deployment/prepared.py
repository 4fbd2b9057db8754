"""Fast inference: Algorithm 2 with everything that is constant computed beforehand.

    prepared = prepare(EfficientAD.load("detector.safetensors"))
    prepared.predict("image.png")

`python benchmarks/inference.py` measures what it gains over a plain implementation.
"""

import copy
from collections.abc import Iterator

from effad_core.acceleration.devices import choose_device
from effad_core.acceleration.precision import (
    PRECISIONS,
    WINOGRAD,
    number_format,
    resolve_precision,
)
from effad_core.acceleration.winograd import filter_convolutions
from effad_core.datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from effad_core.detector import EfficientAD, place_cells
from effad_core.prediction import Predictor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 8  # rows of pooled cells that the first layers compute at once, on a CPU


def prepare(
    detector: EfficientAD,
    device: str | torch.device | None = None,
    precision: str | None = None,
    compile: bool = False,
) -> "PreparedDetector":
    """A copy of a detector that can do nothing but predict, and that faster.

    Args:
        detector: trained; it stays as it is. Prepare again after you change it.
        device: for example "cpu" or "cuda"; None takes the GPU where there is one.
        precision: None takes the detector's own, in which its thresholds were found. "float32";
            "float32-winograd" on a CPU; "bfloat16" or "float16", in which the weights are then
            kept; "auto" takes the one that is fastest here (see `measure`). In another number
            format than its own the prepared detector has no thresholds: find them for it with
            `fit_thresholds`.
        compile: let torch.compile fuse the layers (it needs a C++ compiler on a CPU, and a minute
            at the first image of every batch size), on a GPU with CUDA graphs.

    Returns:
        It has `predict` as the detector has. Its maps are the detector's, within 1e-4 of their
        range in float32.

    Raises:
        ValueError: if the detector has no quantiles, for an unknown precision, or if its weights
            are not finite in it.

    Example:
        >>> prepared = prepare(detector, "cpu")
        >>> prepared.predict(scenario.test[0].path).map.shape
        (480, 480)
    """
    return PreparedDetector(detector, device, precision, compile)


class PreparedDetector(Predictor):
    """What `prepare` gives; the arguments are explained there."""

    def __init__(
        self,
        detector: EfficientAD,
        device: str | torch.device | None,
        precision: str | None,
        compile: bool,
    ):
        self.device = choose_device(device)
        allowed = (*PRECISIONS, "float16")
        if precision is None:
            own = detector.precision
            precision = own if self.device.type == "cpu" else number_format(own)
        precision = resolve_precision(precision, self.device, "inference", allowed, detector.size)
        self.precision = precision
        self.image_size, self.full_scale = detector.image_size, detector.full_scale
        self.tiles, self.padding, self.region = detector.tiles, detector.padding, detector.region
        same = number_format(precision) == number_format(detector.precision)
        self.operating_point = detector.operating_point if same else None
        self.pixel_operating_point = detector.pixel_operating_point if same else None
        dtype = getattr(torch, number_format(precision))
        graph = InferenceGraph(detector, dtype, place=detector.tiles is None)
        graph.to(self.device, memory_format=torch.channels_last)
        if precision == WINOGRAD:
            filter_convolutions(graph, torch.zeros(1, 3, *self.image_size, dtype=torch.uint8))
        self.graph = graph
        if compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.graph = torch.compile(graph, mode=mode)

    def use_device(self, device: str | torch.device | None = None) -> None:
        if device is not None and choose_device(device) != self.device:
            raise ValueError(
                f"this detector was prepared for {self.device}: prepare it anew for {device}"
            )

    @torch.inference_mode()
    def combined_maps(self, images: Tensor) -> Tensor:
        found = self.graph(images.to(self.device))
        if self.tiles is not None:  # then the graph gives cells
            return place_cells(found, self.image_size, self.padding)
        return found.clone()  # the next call may reuse the memory

    @torch.inference_mode()
    def combined_cells(self, images: Tensor) -> Tensor:
        """As `EfficientAD.combined_cells`; only with tiles."""
        return self.graph(images.to(self.device)).clone()


class InferenceGraph(nn.Module):
    """uint8 images (N, 3, H, W) -> the combined and both normalised maps, float32 (N, 3, H, W).

    The standard deviations of the images' normalisation are in the first convolutions, mu and sigma
    in the teacher's last one. The teacher's last convolution and the half of the student's that
    predicts it are one convolution of both trunks, whose result is their difference. Each map is
    scaled by its quantiles in one affine step, before it is resized.

    Args:
        detector: trained; it is copied.
        dtype: of the weights and of what passes between the layers.
        place: whether the cells are resized to the image; without, maps have shape (N, 3, h, w).

    Raises:
        ValueError: if the detector has no quantiles, or a number is not finite in this dtype.
    """

    def __init__(
        self, detector: EfficientAD, dtype: torch.dtype = torch.float32, place: bool = True
    ):
        super().__init__()
        detector.check_quantiles()
        self.place = place
        self.image_size, self.padding, self.dtype = detector.image_size, detector.padding, dtype
        teacher, student, autoencoder = (
            copy.deepcopy(network).cpu().float().requires_grad_(False)
            for network in (detector.teacher, detector.student, detector.autoencoder)
        )
        mu, sigma, quantiles = (
            value.cpu() for value in (detector.mu, detector.sigma, detector.quantiles)
        )
        for network in (teacher, student, autoencoder.encoder):  # the mean is subtracted below
            network[0].weight.div_(255 * torch.tensor(IMAGENET_STD)[:, None, None])
        half = detector.out_channels
        last_t, last_s = teacher[-1], student[-1]
        weights = last_t.weight / sigma[..., None], -last_s.weight[:half]
        bias = (last_t.bias - mu.flatten()) / sigma.flatten() - last_s.bias[:half]
        self.difference = _convolution(torch.cat(weights, dim=1), bias)  # Algorithm 2, line 4
        self.student_ae = _convolution(last_s.weight[half:], last_s.bias[half:])
        self.teacher, self.student = (
            _Trunk(list(network)[:-1], detector.padding) for network in (teacher, student)
        )
        self.autoencoder = autoencoder.eval()
        self.to(dtype)
        lower, upper = quantiles.view(2, 2).unbind(dim=1)
        scale = 0.1 / (upper - lower)  # Algorithm 2, lines 8-9
        self.register_buffer("scale", scale[:, None, None] / detector.cell_means.cpu())
        self.register_buffer("shift", (-lower * scale)[:, None, None])
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN)[:, None, None])
        if not all(torch.isfinite(value).all() for value in self.state_dict().values()):
            raise ValueError(
                f"the detector contains NaN or infinite values once it is in {dtype}: its weights "
                'are damaged, or overflow in half precision (use "float32" then)'
            )

    def forward(self, images: Tensor) -> Tensor:
        images = (images.float() - self.mean).to(self.dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        teacher, student = self.teacher(images), self.student(images)
        d_st = self.difference(torch.cat([teacher, student], dim=1))
        d_ae = self.autoencoder(images) - self.student_ae(student)  # Algorithm 2, line 5
        cells = [d.float().square().mean(dim=1) for d in (d_st, d_ae)]  # lines 4-6
        cells = torch.stack(cells, dim=1) * self.scale + self.shift  # lines 8-9
        cells = torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1)  # line 10
        return place_cells(cells, self.image_size, self.padding) if self.place else cells  # line 7


class _Trunk(nn.Module):
    """A PDN without its last convolution; on a CPU the large maps of its first three layers are
    computed a few rows at a time, so that they stay in the cache."""

    def __init__(self, layers: list[nn.Module], padding: bool):
        super().__init__()
        self.first, self.rest = layers[0], nn.Sequential(*layers[3:])
        self.pool = layers[2]
        self.in_strips = not padding

    def forward(self, images: Tensor) -> Tensor:
        if self.in_strips and images.device.type == "cpu" and not torch.compiler.is_compiling():
            return self.rest(torch.cat([*self._strips(images)], dim=2))
        return self.rest(self.pool(F.relu(self.first(images))))

    def _strips(self, images: Tensor) -> Iterator[Tensor]:
        rows = (images.shape[2] - 3) // 2  # a 4x4 convolution, then pairs of rows
        for start in range(0, rows, ROWS):
            part = images[:, :, 2 * start : 2 * min(start + ROWS, rows) + 3]
            yield self.pool(F.relu_(self.first(part)))


def _convolution(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    outputs, channels, *kernel = weight.shape
    layer = nn.Conv2d(channels, outputs, kernel).requires_grad_(False)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return layer
