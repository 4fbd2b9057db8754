"""A detector over a test split: scores, maps, every metric of the paper's Tables 5 to 10.

    effad benchmark solar-mono tray --profile laptop --seeds 0 1 2

trains and evaluates scenarios over seeds and prints the paper's tables (see `benchmark`).
Notebook 07 builds the metrics by hand.
"""

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from effad_core.datasets import Sample, Scenario
from effad_core.datasets.checks import without_masks
from effad_core.metrics import defect_metrics, image_auprc, image_auroc, pixel_metrics
from effad_core.prediction import MAPS, Predictor
from effad_core.storage.files import as_path, write_file, write_text

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

KINDS = ("structural_anomalies", "logical_anomalies")  # MVTec LOCO's anomaly types
METRICS = "metrics.json"
MAP_PIXELS = 2**22  # of a map that is kept: larger than any image of the paper's three datasets


@dataclass(frozen=True)
class Evaluation:
    """What a detector says of a scenario's test images.

    Attributes:
        name: the scenario's.
        samples: the images, in the order of the scores.
        scores: for each of the detector's maps (`MAPS`, or "combined" alone) the maximum of the
            normalised map at the detector's image size, shape (n,); the combined map's is the
            anomaly score (Algorithm 2, line 11).
        maps: combined anomaly maps, float32, each (H, W) at its image's own size, or smaller for
            images of more than `MAP_PIXELS` (see `map_size`); None if they were not kept.
    """

    name: str
    samples: tuple[Sample, ...]
    scores: dict[str, np.ndarray]
    maps: tuple[np.ndarray, ...] | None = None

    @property
    def labels(self) -> np.ndarray:
        """0 normal, 1 anomalous, shape (n,)."""
        return np.array([sample.label for sample in self.samples])

    def auroc(self) -> dict[str, float]:
        """AU-ROC by map.

        Raises:
            ValueError: if the samples are all normal or all anomalous.
        """
        return {name: image_auroc(self.labels, scores) for name, scores in self.scores.items()}

    def subset(self, anomaly_type: str) -> "Evaluation":
        """The normal images and the anomalous ones of one type."""
        keep = self._indices(anomaly_type)
        return Evaluation(
            self.name,
            tuple(self.samples[index] for index in keep),
            {name: scores[keep] for name, scores in self.scores.items()},
            None if self.maps is None else tuple(self.maps[index] for index in keep),
        )

    def _indices(self, anomaly_type: str) -> list[int]:
        """Of the normal images and the anomalous ones of one type."""
        return [
            index
            for index, sample in enumerate(self.samples)
            if sample.label == 0 or sample.anomaly_type == anomaly_type
        ]

    def metrics(self) -> dict[str, dict[str, float]]:
        """Every metric, by group of images.

        Groups: "all"; each anomaly type, evaluated with all normal images; and, for the structural
        and logical anomalies of MVTec LOCO's layout, "mean": the mean of these two, which is the
        number that the paper reports.

        Metrics: image_auroc, the same of each map alone, image_auprc; with maps, those of
        `pixel_metrics` for each group whose anomalous images all have masks, with saturation
        thresholds those of `defect_metrics` too. If only some anomalous images have masks, a
        warning says which groups have none.

        Raises:
            ValueError: if the samples are all normal or all anomalous.
            DataError: if a mask cannot be read.
        """
        if self.maps is not None and (sentence := without_masks(self.name, self.samples)):
            warnings.warn(sentence, stacklevel=2)
        truth = self._truth()
        groups = {"all": self._metrics(list(range(len(self.samples))), truth)}
        types = sorted({sample.anomaly_type for sample in self.samples if sample.label})
        for kind in types:
            groups[kind] = self._metrics(self._indices(kind), truth)
        if set(types) == set(KINDS):
            first, second = (groups[kind] for kind in KINDS)
            groups["mean"] = {
                name: (first[name] + second[name]) / 2 for name in first if name in second
            }
        return groups

    def _truth(self) -> list[list[tuple[np.ndarray, float]] | None]:
        """Per image its defects at its map's size; None for an anomalous image without masks, or
        without a map."""
        if self.maps is None:
            return [None] * len(self.samples)
        return [
            [reduced(*defect, m.shape) for defect in sample.load_defects()]
            if sample.mask_paths or not sample.label
            else None
            for sample, m in zip(self.samples, self.maps, strict=True)
        ]

    def _metrics(self, chosen: list[int], truth: list) -> dict[str, float]:
        labels = self.labels[chosen]
        found = {"image_auroc": image_auroc(labels, self.scores["combined"][chosen])}
        for name in [name for name in MAPS[1:] if name in self.scores]:
            key = f"image_auroc_{name.replace('-', '_')}"
            found[key] = image_auroc(labels, self.scores[name][chosen])
        found["image_auprc"] = image_auprc(labels, self.scores["combined"][chosen])
        defects = [truth[i] for i in chosen]
        if None not in defects:
            maps = [self.maps[i] for i in chosen]
            masks = [np.logical_or.reduce([m for m, _ in d]) if d else None for d in defects]
            found |= pixel_metrics(maps, masks)
            if any(self.samples[i].defect_kinds for i in chosen):
                found |= defect_metrics(maps, defects)
        return found

    def save(self, run_dir: str | os.PathLike, **details) -> dict[str, dict[str, float]]:
        """Write metrics.json into a run's folder: metrics by group, and each image's scores.

        Args:
            run_dir: created if it does not exist.
            details: JSON-able, written beside them.

        Returns:
            The metrics.
        """
        metrics = self.metrics()
        rows = [
            {"image": f"{sample.anomaly_type}/{sample.path.name}", "label": sample.label}
            | {name: float(scores[index]) for name, scores in self.scores.items()}
            for index, sample in enumerate(self.samples)
        ]
        content = {"scenario": self.name, **details, "metrics": metrics, "images": rows}
        folder = as_path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / METRICS, json.dumps(content, indent=1) + "\n")
        return metrics

    def save_maps(self, folder: str | os.PathLike) -> Path:
        """Write the maps as float32 TIFFs, in the folders that MVTec's evaluation scripts read.

        Args:
            folder: receives `<scenario>/test/<anomaly type>/<image name>.tiff`.

        Returns:
            The scenario's folder.

        Raises:
            ValueError: if the maps were not kept, or two images would share a file.
        """
        if self.maps is None:
            raise ValueError("there are no maps to save: call evaluate(..., keep_maps=True)")
        root = as_path(folder) / self.name
        for path, m in zip(map_paths(root, self.samples), self.maps, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(m.astype(np.float32))
            write_file(path, lambda part, image=image: image.save(part, format="TIFF"))
        return root


def map_size(size: tuple[int, int]) -> tuple[int, int]:
    """The size at which an image's map is kept and compared with its mask: (height, width).

    It is the image's own up to `MAP_PIXELS`; of a larger image both sides are divided by the
    smallest whole number that makes it fit, for a pixel takes 12 bytes while metrics are computed.

    Example:
        >>> map_size((1024, 1024)), map_size((4000, 6000))
        ((1024, 1024), (1334, 2000))
    """
    factor = math.ceil(math.sqrt(size[0] * size[1] / MAP_PIXELS))
    return tuple(math.ceil(side / factor) for side in size)


def reduced(mask: np.ndarray, area: float, size: tuple[int, int]) -> tuple[np.ndarray, float]:
    """A defect's mask and saturation area at the size of a map that `map_size` made smaller.

    A pixel of the smaller mask is defective if any of those that it stands for is.
    """
    if mask.shape == tuple(size):
        return mask, area
    factor = math.ceil(mask.shape[0] / size[0])
    padded = np.zeros([factor * side for side in size], bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    smaller = padded.reshape(size[0], factor, size[1], factor).any(axis=(1, 3))
    return smaller, area * smaller.sum() / mask.sum()


def map_paths(folder: Path, samples: Sequence[Sample]) -> list[Path]:
    """Where `Evaluation.save_maps` writes the map of each sample.

    Raises:
        ValueError: if two of them would share a file.
    """
    paths = [folder / "test" / s.anomaly_type / f"{s.path.stem}.tiff" for s in samples]
    for path, count in Counter(paths).items():
        if count > 1:
            raise ValueError(f"{count} images would be saved as {path}; rename them")
    return paths


def evaluate(
    detector: Predictor,
    scenario: Scenario | Sequence[Sample],
    batch_size: int = 8,
    keep_maps: bool | None = None,
    device: str | torch.device | None = None,
) -> Evaluation:
    """Score a scenario's test images (Algorithm 2).

    Args:
        detector: trained, as it is or prepared.
        scenario: its test images are scored; or the samples themselves, for a part of them.
        batch_size: images that go through the networks at once.
        keep_maps: keep the combined maps, 4 bytes a pixel, at the images' own sizes (those of very
            large images smaller, see `map_size`); None keeps them if there are masks to compare
            them with.
        device: where the detector computes, now and afterwards; None takes the GPU where there is
            one. A prepared detector stays where it was prepared for.

    Raises:
        DataError: for an image that cannot be read.
        ValueError: if there are no samples, the detector has no quantiles, or the map of an image,
            which is named, is not finite.

    Example:
        >>> evaluation = evaluate(detector, scenario, device="cpu")
        >>> list(evaluation.auroc())
        ['combined', 'student-teacher', 'autoencoder']
    """
    whole = isinstance(scenario, Scenario)
    samples = tuple(scenario.test if whole else scenario)
    if not samples:
        raise ValueError("no samples to evaluate: the scenario has no test images")
    detector.use_device(device)
    if keep_maps is None:
        keep_maps = any(sample.mask_paths for sample in samples)
    scores, maps = [], []
    predictions = detector.stream([sample.path for sample in samples], batch_size)
    for _, found in tqdm(predictions, total=len(samples), desc="evaluating", leave=False):
        scores.append((found.score, found.st_score, found.ae_score))  # Algorithm 2, line 11
        if keep_maps:
            maps.append(found.map_at(map_size(found.size)))
    return Evaluation(
        scenario.name if whole else "samples",
        samples,
        {name: np.array(scores, np.float32)[:, MAPS.index(name)] for name in detector.map_names},
        tuple(maps) if keep_maps else None,
    )
