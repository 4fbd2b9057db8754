"""Detection metrics: numpy in, floats out. Knows no network.

So far the image-level AU-ROC and AU-PRC; the pixel-level metrics come with the evaluation.
"""

import numpy as np
from numpy.typing import ArrayLike


def image_auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve of image anomaly scores (the paper's image-level metric).

    The probability that an anomalous image scores higher than a normal one; ties count half.

    Args:
        labels: shape (n,), 0 normal, 1 anomalous.
        scores: shape (n,), higher is more anomalous.

    Raises:
        ValueError: if the shapes differ, only one class is present, or a score is not finite.
    """
    labels, scores = _checked(labels, scores)
    _, ranks, counts = np.unique(scores, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2  # mean rank, from 1, of each distinct score
    positives = int(labels.sum())
    negatives = len(labels) - positives
    rank_sum = middle[ranks][labels].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def image_auprc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Average precision of image anomaly scores: the step-wise area under precision-recall.

    Args, raises: as `image_auroc`.
    """
    labels, scores = _checked(labels, scores)
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(labels[order])
    last_of_tie = np.append(np.diff(scores[order]) != 0, True)  # equal scores are one threshold
    hits, seen = hits[last_of_tie], np.flatnonzero(last_of_tie) + 1
    return float(np.sum(np.diff(hits, prepend=0) * hits / seen) / hits[-1])


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels.shape != scores.shape or labels.ndim != 1:
        raise ValueError(f"labels {labels.shape} and scores {scores.shape} must be of one length")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 (normal) or 1 (anomalous)")
    if not np.isfinite(scores).all():
        raise ValueError("the scores contain NaN or infinite values")
    labels = labels.astype(bool)
    if labels.all() or not labels.any():
        raise ValueError("both normal and anomalous images are needed, the labels have one class")
    return labels, scores
