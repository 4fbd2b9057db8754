"""EfficientAD: teacher, student, autoencoder and every number found on data, in one module.

`predict` (see `Predictor`) is Algorithm 2. Notebook 05 builds its normalisation by hand.
"""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from numbers import Integral

from effad_core.acceleration.devices import choose_device
from effad_core.acceleration.precision import (
    PRECISIONS,
    SLOW,
    computing_in,
    number_format,
    resolve_precision,
    slowdown,
)
from effad_core.datasets.images import ImageLike, open_image
from effad_core.datasets.transforms import normalise
from effad_core.errors import RunError
from effad_core.networks import (
    MIN_IMAGE_SIZE,
    PATCH_SIZE,
    STRIDE,
    Autoencoder,
    PatchDescriptionNetwork,
)
from effad_core.prediction import Predictor, image_name
from effad_core.region import Region
from effad_core.statistics import StreamQuantiles
from effad_core.storage.files import as_path, one_line
from effad_core.storage.shipped import shipped
from effad_core.storage.teachers import read_teacher
from effad_core.storage.weights import load_weights, read_tensors, write_tensors
from effad_core.thresholds import OperatingPoint
from effad_core.tiles import Tiles

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DETECTOR = "detector.safetensors"  # in the folder of a run
POINTS = {"threshold": "operating_point", "pixel_threshold": "pixel_operating_point"}  # in a file
QUANTILES = (0.9, 0.995)  # a and b (Algorithm 1, lines 59-60)
EVEN_SHARE = 0.3  # of the map's mean that is added to each cell's: no cell is magnified much
MAX_PIXELS, MAX_CHANNELS = 4096**2, 4096  # what a damaged file may make a detector ask for


def points_of(predictor: Predictor) -> dict[str, dict]:
    """The operating points that a predictor has, as a file's header holds them."""
    found = {name: getattr(predictor, attribute) for name, attribute in POINTS.items()}
    return {name: point.to_dict() for name, point in found.items() if point is not None}


def set_points(predictor: Predictor, points: Mapping[str, dict]) -> None:
    """Give a predictor the operating points that `points_of` wrote.

    Raises:
        ValueError: for one that is damaged.
    """
    for name in points.keys() & POINTS.keys():
        setattr(predictor, POINTS[name], OperatingPoint.from_dict(points[name]))


class EfficientAD(nn.Module, Predictor):
    """The three networks, the teacher's channel statistics, the quantiles, the thresholds.

    A new detector has random networks: `load_teacher` gives it a distilled teacher, `train` (in
    `effad_core.training`) fits the rest.

    Args:
        size: "small" (EfficientAD-S) or "medium" (EfficientAD-M).
        padding: pad the PDN (64x64 cells at 256 pixels) or not (56x56, as in the paper's results).
        image_size: images are resized to this before they enter; a side of a square, or
            (height, width), in pixels, at least 256 each and 4096 x 4096 together.
        out_channels: channels of the teacher, 384 in the paper; `load_teacher` sets its teacher's.
        tiles: how large images are cut, each tile then resized to image_size; None, as in the
            paper, resizes the whole image. Quantiles, scores and thresholds are those of the map
            that is put together from the tiles'.
        region: the part of the image that is inspected; None inspects all of it.

    Attributes:
        teacher, student, autoencoder: T, S and A.
        mu, sigma: the teacher's channel statistics, shape (C, 1, 1).
        cell_means: what each cell of the student-teacher and the autoencoder map is divided by,
            shape (2, h, w): 1 as in the paper, unless `find_cell_means` sets them.
        quantiles: q_a^ST, q_b^ST, q_a^AE, q_b^AE, shape (4,); NaN until they are found.
        operating_point, pixel_operating_point: the thresholds above which a score and a map's pixel
            are anomalous, with what is known of them; None until you choose them. New quantiles
            take them away.
        threshold, pixel_threshold: the numbers themselves, to be read or set by hand.
        full_scale: the white of 16-bit images, 4095 for a camera of 12 bits; `train` sets the
            scenario's. None if it was trained on 8-bit images.
        precision: in which it computes, saved with the weights: "float32", "float32-winograd" or
            "bfloat16"; `train` sets what it trained in. Set it before you look for thresholds:
            another number format takes them away, for they hold in the one they were found in.
        card: provenance of the teacher and the training, JSON-able, saved with the weights.

    Raises:
        ValueError: for an unknown size, a number of another type, or one that is too small or too
            large.

    Example:
        >>> detector = EfficientAD("small").load_teacher()
        >>> detector.teacher.out_channels, detector.student.out_channels
        (192, 384)
    """

    mu: Tensor
    sigma: Tensor
    cell_means: Tensor
    quantiles: Tensor

    def __init__(
        self,
        size: str = "small",
        padding: bool = False,
        image_size: int | tuple[int, int] = 256,
        out_channels: int = 384,
        tiles: Tiles | None = None,
        region: Region | None = None,
    ):
        super().__init__()
        if not isinstance(padding, bool):
            raise ValueError(f"padding must be True or False, not {padding!r}")
        if not _is_whole(out_channels) or not 0 < out_channels <= MAX_CHANNELS:
            raise ValueError(f"out_channels must be 1 to {MAX_CHANNELS}, not {out_channels!r}")
        self.size, self.padding, self.image_size = size, padding, checked_image_size(image_size)
        self.tiles, self.region = tiles, region
        if tiles is not None:
            tiles.check(self.image_size, padding)
        elif region is not None and not region.cells(self.image_size, padding).any():
            raise ValueError("the region is so small that no cell of the map has its centre in it")
        self._build(int(out_channels))
        self._precision = "float32"
        self.card: dict = {"teacher": "random"}

    def _build(self, out_channels: int) -> None:
        """Random networks with a teacher of so many channels, and nothing found on data."""
        self.out_channels = out_channels
        self.teacher = PatchDescriptionNetwork(self.size, out_channels, self.padding)
        self.teacher.requires_grad_(False)
        self.initialise_student()
        self.register_buffer("mu", torch.zeros(out_channels, 1, 1))
        self.register_buffer("sigma", torch.ones(out_channels, 1, 1))
        self.register_buffer(
            "cell_means", torch.ones(2, *self.teacher.output_size(self.image_size))
        )
        self.register_buffer("quantiles", torch.full((4,), torch.nan))
        self.operating_point = self.pixel_operating_point = None
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.mu.device

    @property
    def precision(self) -> str:
        return self._precision

    @precision.setter
    def precision(self, precision: str) -> None:
        precision = resolve_precision(precision, self.device, size=self.size)
        if number_format(precision) != number_format(self._precision):
            self.operating_point = self.pixel_operating_point = None
        self._precision = precision

    def use_device(self, device: str | torch.device | None = None) -> None:
        self.to(choose_device(device, now=self.device))

    def initialise_student(self) -> None:
        """Give the detector a new random student and autoencoder, from torch's generator."""
        # Algorithm 1, line 1: twice the channels; the second half predicts the autoencoder
        self.student = PatchDescriptionNetwork(self.size, 2 * self.out_channels, self.padding)
        self.autoencoder = Autoencoder(self.out_channels, self.padding)  # Algorithm 1, line 2

    # --- the teacher ---------------------------------------------------------------------------

    def load_teacher(self, path: str | os.PathLike | None = None) -> "EfficientAD":
        """Load a distilled teacher; None takes the one shipped for this size.

        The detector then has as many channels as the teacher. If that is another number than
        before, it is as if it was new: train it.

        Teachers that others published load too: the state dict (.pth, .pt or .safetensors) of
        nelson1425/EfficientAD, of anomalib, and of whoever keeps its layers by the same names.

        Raises:
            RunError: if the file is missing, damaged, or of another architecture.
        """
        path = shipped(f"teachers/pdn_{self.size}.safetensors") if path is None else as_path(path)
        if not path.is_file():
            raise RunError(
                f"there is no teacher {path}: distil one (effad distill PHOTOGRAPHS --size "
                f"{self.size} --run-dir RUN) and give its path (--teacher RUN/teacher.safetensors)"
            )
        weights, card = read_teacher(path, self.teacher)
        teacher, channels = self.teacher, _channels(weights, len(self.teacher) - 1)
        if channels not in (None, self.out_channels):
            teacher = PatchDescriptionNetwork(self.size, channels, self.padding)
        load_weights(teacher, weights, path)
        if teacher is not self.teacher:
            device = self.device
            self._build(channels)
            self.teacher.load_state_dict(teacher.state_dict())
            self.to(device)
            self.card.pop("training", None)
        self.card["teacher"] = card
        return self

    # --- maps ----------------------------------------------------------------------------------

    def normalised_teacher(self, images: Tensor) -> Tensor:
        """The normalised teacher output, shape (N, C, h, w), of normalised images (N, 3, H, W)."""
        # Algorithm 1, lines 14-15 and 33-34; Algorithm 2, line 2
        return (self.teacher(images) - self.mu) / self.sigma

    def squared_differences(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """D^ST and D^STAE, both (N, C, h, w), of uint8 images (N, 3, H, W)."""
        images = normalise(images)
        teacher = self.normalised_teacher(images)  # Algorithm 1, lines 49-50; Algorithm 2, line 1
        student = self.student(images)
        autoencoder = self.autoencoder(images)
        # Algorithm 1, line 51; Algorithm 2, line 3
        student_st, student_ae = student.chunk(2, dim=1)
        d_st = (teacher - student_st).square()  # Algorithm 1, line 52; Algorithm 2, line 4
        d_stae = (autoencoder - student_ae).square()  # Algorithm 1, line 53; Algorithm 2, line 5
        return d_st, d_stae

    @torch.inference_mode()
    def anomaly_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The raw maps M_ST and M_AE at the detector's image size, before normalisation.

        Args:
            images: uint8, shape (N, 3, H, W), already at image_size.

        Returns:
            Two float32 tensors of shape (N, H, W).
        """
        return self.place(self.cells(images))

    @torch.inference_mode()
    def place(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """The raw maps of `cells`, as `anomaly_maps` gives them.

        Args:
            cells: shape (N, 2, h, w), as `cells` gives them.
        """
        return tuple(  # Algorithm 1, lines 54-55; Algorithm 2, lines 6-7
            place_cells(m[:, None], self.image_size, self.padding)[:, 0]
            for m in (cells / self.cell_means).unbind(dim=1)
        )

    @torch.inference_mode()
    def divided_cells(self, images: Tensor) -> Tensor:
        """As `cells`, each divided by its usual value (see `find_cell_means`)."""
        return self.cells(images) / self.cell_means

    @torch.inference_mode()
    def cells(self, images: Tensor) -> Tensor:
        """The means over channels of D^ST and D^STAE, before they are divided or resized.

        Args:
            images: as in `anomaly_maps`.

        Returns:
            float32, shape (N, 2, h, w).
        """
        with computing_in(self.precision, self.device):
            images = images.to(self.device).contiguous(memory_format=torch.channels_last)
            differences = self.squared_differences(images)
        return torch.stack([d.float().mean(dim=1) for d in differences], dim=1)

    @torch.inference_mode()
    def find_cell_means(self, batches: Iterable[Tensor]) -> None:
        """Set what each cell is divided by: its mean over normal images, relative to the map's.

        Some cells are always harder to predict: the autoencoder knows where in the image a cell
        lies, the student does not, and at an image's border the autoencoder's convolutions see
        zeros. Their high values are no anomalies. A part of the map's mean (`EVEN_SHARE`) is added
        to each cell's, or a cell that is always easy would be magnified too much. This step is not
        in the paper; without it Algorithm 2 is as it stands there. New means take quantiles and
        thresholds away.

        Args:
            batches: uint8 images at image_size, each (N, 3, H, W); training images, for validation
                images would no longer be new to the detector when it finds its quantiles.

        Raises:
            ValueError: for no images, or a map that is not finite.
        """
        total, count = torch.zeros_like(self.cell_means), 0
        for batch in batches:
            total += self.cells(batch).sum(dim=0)
            count += len(batch)
        means = total / count if count else total
        means /= means.mean(dim=(1, 2), keepdim=True)
        if not torch.isfinite(means).all():
            raise ValueError(
                "the cells have no finite means: there are no images, or the detector's weights "
                "are damaged"
            )
        self.cell_means.copy_((means + EVEN_SHARE) / (1 + EVEN_SHARE))
        self.quantiles.fill_(torch.nan)
        self.operating_point = self.pixel_operating_point = None

    def check_quantiles(self) -> None:
        """Raise ValueError if the quantiles have not been found, or are equal."""
        if not torch.isfinite(self.quantiles).all():
            raise ValueError("the detector has no quantiles yet: train it, or call find_quantiles")
        qa_st, qb_st, qa_ae, qb_ae = self.quantiles
        if not (qb_st > qa_st and qb_ae > qa_ae):
            raise ValueError("the quantiles q_b must lie above q_a: call find_quantiles")

    def normalise_maps(self, m_st: Tensor, m_ae: Tensor) -> tuple[Tensor, Tensor]:
        """Scale each map so that q_a becomes 0 and q_b becomes 0.1 (Algorithm 2, lines 8-9).

        Raises:
            ValueError: as `check_quantiles`.
        """
        self.check_quantiles()
        qa_st, qb_st, qa_ae, qb_ae = self.quantiles
        return (  # Algorithm 2, lines 8 and 9
            0.1 * (m_st - qa_st) / (qb_st - qa_st),
            0.1 * (m_ae - qa_ae) / (qb_ae - qa_ae),
        )

    def find_quantiles(
        self, batches: Iterable[Tensor], count: int, precision: str | None = None
    ) -> None:
        """Set the quantiles from validation images (Algorithm 1, lines 47-60).

        Args:
            batches: uint8 images at image_size, each (N, 3, H, W).
            count: number of images in all batches together.
            precision: becomes the detector's, if it is given.

        Raises:
            ValueError: for no images, NaN maps, or a map whose two quantiles are equal.
        """
        self.precision = precision or self.precision
        inside = self._inside(self.image_size)
        total = count * int(inside.sum())
        streams = [StreamQuantiles(total, QUANTILES) for _ in range(2)]  # Algorithm 1, line 47
        for batch in batches:  # Algorithm 1, line 48
            for stream, m in zip(streams, self.anomaly_maps(batch), strict=True):
                stream.add(m.cpu().numpy()[:, inside])  # Algorithm 1, lines 56-57
        self._set_quantiles(streams)

    def find_tile_quantiles(
        self, images: Sequence[ImageLike], precision: str | None = None
    ) -> None:
        """As `find_quantiles`, for a detector with tiles: of all values of the stitched maps.

        Args:
            images: validation images at their own size, as `predict` takes them.
            precision: becomes the detector's, if it is given.

        Raises:
            DataError: for an image that cannot be read, or is smaller than a tile.
            ValueError: as `find_quantiles`.
        """
        self.precision = precision or self.precision
        sizes = (open_image(image, self.full_scale).size for image in images)
        grids = [self.tiles.map_size(size, self.image_size) for size in sizes]
        total = sum(int(self._inside(grid).sum()) for grid in grids)
        streams = [StreamQuantiles(total, QUANTILES) for _ in range(2)]
        for index, image in enumerate(images):
            opened, name = open_image(image, self.full_scale), image_name(image, index)
            maps, _ = self.tiles.stitched(
                opened, self.image_size, self.padding, self.divided_cells, name
            )
            for stream, m in zip(streams, maps.numpy(), strict=True):
                stream.add(m[self._inside(m.shape)])
        self._set_quantiles(streams)

    def _inside(self, size: tuple[int, int]) -> np.ndarray:
        """The region at the size of a map, boolean (height, width); True everywhere without one."""
        return np.ones(size, bool) if self.region is None else self.region.at(size)

    def _set_quantiles(self, streams: Sequence[StreamQuantiles]) -> None:
        found = torch.tensor([stream.result() for stream in streams])  # Algorithm 1, lines 59-60
        for name, (q_a, q_b) in zip(("student-teacher", "autoencoder"), found, strict=True):
            if not q_b - q_a > 1e-6 * q_a:  # in float32, as they are kept; the rest is rounding
                raise ValueError(
                    f"the 0.9- and 0.995-quantiles of the {name} map are equal ({q_a:.3g}) on the "
                    "validation images; are they constant?"
                )
        self.quantiles.copy_(found.flatten())
        self.operating_point = self.pixel_operating_point = None  # they were on another scale

    # --- Algorithm 2 ---------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """The three maps of images: as `combined_maps`."""
        return self.combined_maps(images)

    def combined_maps(self, images: Tensor) -> Tensor:
        """M and the two normalised maps that it is the mean of (Algorithm 2, lines 1-10).

        Args:
            images: as in `anomaly_maps`.

        Returns:
            float32, shape (N, 3, H, W): combined, student-teacher, autoencoder.

        Raises:
            ValueError: as `normalise_maps`.
        """
        return self.combine(*self.anomaly_maps(images))

    def combined_cells(self, images: Tensor) -> Tensor:
        """As `combined_maps`, of the cells, (N, 3, h, w): before they are resized to the image."""
        return self.combine(*self.divided_cells(images).unbind(dim=1))

    def combine(self, m_st: Tensor, m_ae: Tensor) -> Tensor:
        """M and the two normalised maps of raw ones, shape (N, 3, H, W) (Algorithm 2, lines 8-10).

        Raises:
            ValueError: as `normalise_maps`.
        """
        m_st, m_ae = self.normalise_maps(m_st, m_ae)
        m = 0.5 * m_st + 0.5 * m_ae  # Algorithm 2, line 10
        return torch.stack([m, m_st, m_ae], dim=1)

    # --- disk ----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write everything that `load` needs to one safetensors file, atomically.

        Args:
            path: the file; its folder is made if it is missing.

        Raises:
            RunError: if it cannot be written.
        """
        header = {
            "kind": "detector",
            "size": self.size,
            "padding": self.padding,
            "image_size": self.image_size,
            "out_channels": self.out_channels,
            "tiles": self.tiles and asdict(self.tiles),
            "region": self.region and self.region.to_text(),
            "precision": self.precision,
            "full_scale": self.full_scale,
            "operating_points": points_of(self),
            "card": self.card,
        }
        write_tensors(as_path(path), self.state_dict(), header)

    @classmethod
    def load(
        cls, path: str | os.PathLike, device: str | torch.device | None = None
    ) -> "EfficientAD":
        """Load a detector that `save` wrote.

        Args:
            path: the file, or the folder of its run.
            device: where it computes from now on; None takes the GPU where there is one.

        Raises:
            RunError: if the file is missing, cut short, foreign, or its tensors do not fit.
        """
        path = as_path(path)
        path = path / DETECTOR if path.is_dir() else path
        tensors, header = read_tensors(
            path, "detector", card=dict, operating_points=dict, precision=str
        )
        try:
            names = ("size", "padding", "image_size", "out_channels")
            tiles = header.get("tiles")  # older files have none
            tiles = Tiles(**_entries(tiles, "size", "overlap")) if tiles else None
            region = header.get("region")
            region = Region.from_text(region) if region else None
            numbers = {name: header.get(name) for name in names}
            detector = cls(**numbers, tiles=tiles, region=region)
            if header["precision"] not in PRECISIONS[1:]:  # "auto" is none to have
                raise ValueError(f"the precision {header['precision']!r} is unknown")
            detector.precision = header["precision"]
            detector.full_scale = _checked_full_scale(header.get("full_scale"))
            set_points(detector, header["operating_points"])
        except ValueError as error:
            raise RunError(
                f"{path} has a header that does not describe a detector: {one_line(error)}"
            ) from None
        tensors.setdefault("cell_means", detector.cell_means)  # older files have none
        load_weights(detector, tensors, path, may_be_nan=["quantiles"])
        if not (detector.cell_means > 0).all():
            raise RunError(f"{path} has a cell mean that is not above 0; train again")
        if not (detector.sigma > 0).all():
            raise RunError(
                f"{path} has a standard deviation (sigma) that is not above 0; train again"
            )
        if not detector.quantiles.isnan().all():  # they are, until they are found
            try:
                detector.check_quantiles()
            except ValueError as error:
                raise RunError(f"{path} has damaged quantiles: {error}") from None
        detector.card = {"teacher": "unknown"} | header["card"]
        detector.use_device(device)
        if detector.precision == "bfloat16":
            times = slowdown(detector.precision, detector.device, detector.size)
            if times > SLOW:
                warnings.warn(
                    f"{path} computes in bfloat16, for which this machine takes {times:.0f} times "
                    'as long as for float32: set detector.precision = "float32" and find its '
                    "thresholds anew (effad threshold DETECTOR GOOD_IMAGES --precision float32)",
                    stacklevel=2,
                )
        return detector.eval()


def _entries(content: object, *names: str) -> dict:
    """A part of a header; ValueError if it has not exactly these entries."""
    if not isinstance(content, Mapping) or content.keys() != set(names):
        raise ValueError(f"{content!r} does not have the entries {', '.join(names)}")
    return dict(content)


def _channels(weights: Mapping[str, Tensor], last: int) -> int | None:
    """Output channels of the layer `last` of a PDN, if a detector may have as many."""
    bias = weights.get(f"{last}.bias")
    found = bias.shape[0] if bias is not None and bias.ndim == 1 else 0
    return found if 0 < found <= MAX_CHANNELS else None


def checked_image_size(image_size: int | Iterable[int]) -> tuple[int, int]:
    """(height, width) in pixels, of a square's side or of both; ValueError for no such size."""
    sides = tuple(image_size) if isinstance(image_size, Iterable) else (image_size,) * 2
    if len(sides) != 2 or not all(map(_is_whole, sides)):
        raise ValueError(f"image_size must be pixels, or (height, width), not {image_size!r}")
    height, width = map(int, sides)
    if min(height, width) < MIN_IMAGE_SIZE:
        raise ValueError(
            f"image_size must be at least {MIN_IMAGE_SIZE} pixels (the autoencoder's "
            f"bottleneck needs them), not {height}x{width}"
        )
    if height * width > MAX_PIXELS:
        raise ValueError(f"image_size must be at most {MAX_PIXELS} pixels, not {height}x{width}")
    return height, width


def _checked_full_scale(value: int | None) -> int | None:
    if value is not None and not (_is_whole(value) and 255 <= value <= 65535):
        raise ValueError(f"full_scale must be 255 to 65535, not {value!r}")
    return value


def _is_whole(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def place_cells(cells: Tensor, image_size: tuple[int, int], padding: bool) -> Tensor:
    """Resize a map of cells to the image it belongs to (Algorithm 1, line 55).

    With padding the cells span the whole image. Without, the outermost cells are the centres of the
    outermost whole patches: the map is resized to 4 pixels a cell, placed 16 pixels from the upper
    left corner, and its edge is replicated outward. No zeros enter, so quantiles see only maps.

    Args:
        cells: shape (N, 1, h, w).
        image_size: (H, W) in pixels.
        padding: whether the PDN was padded.

    Returns:
        shape (N, 1, H, W).
    """
    if padding:
        return F.interpolate(cells, size=image_size, mode="bilinear")
    h, w = STRIDE * cells.shape[-2], STRIDE * cells.shape[-1]
    margin = (PATCH_SIZE - 1) // 2
    inner = F.interpolate(cells, size=(h, w), mode="bilinear")
    borders = (margin, image_size[1] - w - margin, margin, image_size[0] - h - margin)
    return F.pad(inner, borders, mode="replicate")
