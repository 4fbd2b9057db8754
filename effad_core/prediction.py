"""What a detector says of one image: numpy in, a verdict out, knows no network."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Prediction:
    """What the detector says of one image. Maps are float32, (H, W), at the image's own size.

    Attributes:
        map: the combined anomaly map M, the mean of the two below.
        score: the anomaly score, the maximum of M before it is resized to the image's size.
        st_map: the normalised student-teacher map.
        ae_map: the normalised autoencoder map.
        threshold: the detector's for scores; None if it has none.
        pixel_threshold: the detector's for maps; None if it has none.
    """

    map: np.ndarray
    score: float
    st_map: np.ndarray
    ae_map: np.ndarray
    threshold: float | None = None
    pixel_threshold: float | None = None

    @property
    def is_anomalous(self) -> bool:
        """Whether the score is above the threshold.

        Raises:
            ValueError: if the detector had no threshold: none at all would read as "normal".
        """
        return self.score > _set(self.threshold, "threshold")

    @property
    def anomalous_pixels(self) -> np.ndarray:
        """Where the map is above the pixel threshold: boolean, (H, W).

        Raises:
            ValueError: if the detector had no pixel threshold.
        """
        return self.map > _set(self.pixel_threshold, "pixel_threshold")


def _set(threshold: float | None, name: str) -> float:
    if threshold is None:
        raise ValueError(
            f"the detector has no {name}: choose an operating point, for example "
            f"detector.{name} = effad_core.thresholds.threshold_for_fpr(validation_scores, 0.05)"
        )
    return threshold
