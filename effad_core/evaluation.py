"""A detector over images it never saw: scores of the combined map and of each map alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from effad_core.datasets import ResizedImages, Sample
from effad_core.detector import EfficientAD
from effad_core.metrics import image_auroc

MAPS = ("combined", "student-teacher", "autoencoder")


@dataclass(frozen=True)
class Evaluation:
    """Scores of a list of samples.

    Attributes:
        samples: the images, in the order of the scores.
        scores: for each of `MAPS` the maximum of the normalised map at the detector's image
            size, shape (n,); the combined map's is the anomaly score (Algorithm 2, line 11).
    """

    samples: tuple[Sample, ...]
    scores: dict[str, np.ndarray]

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


def evaluate(
    detector: EfficientAD, samples: Sequence[Sample], precision: str = "auto", batch_size: int = 8
) -> Evaluation:
    """Score every sample (Algorithm 2).

    Args:
        detector: trained.
        samples: for example `scenario.test`.
        precision: as in `EfficientAD.anomaly_maps`.
        batch_size: images that go through the networks at once.

    Raises:
        DataError: for an image that cannot be read.
        ValueError: if there are no samples, or the detector has no quantiles.
    """
    if not samples:
        raise ValueError("no samples to evaluate: the scenario has no test images")
    images = ResizedImages(samples, detector.image_size, cache_megabytes=0)
    scores = {name: [] for name in MAPS}
    total = -(-len(images) // batch_size)
    for batch in tqdm(images.batches(batch_size), total=total, desc="evaluating", leave=False):
        m_st, m_ae = detector.normalise_maps(*detector.anomaly_maps(batch, precision))
        for name, m in zip(MAPS, (0.5 * m_st + 0.5 * m_ae, m_st, m_ae), strict=True):
            scores[name].append(m.flatten(1).amax(dim=1).cpu().numpy())
    return Evaluation(
        tuple(samples), {name: np.concatenate(parts) for name, parts in scores.items()}
    )
