"""Image metrics against scikit-learn's, heavy ties included."""

from effad_core.metrics import image_auprc, image_auroc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

PAIRS = {image_auroc: roc_auc_score, image_auprc: average_precision_score}


@pytest.mark.parametrize("metric", PAIRS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_metric_equals_scikit_learns(metric, data):
    labels = data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=40))
    labels += [0, 1]
    levels = data.draw(st.sampled_from([1, 2, 5, 1000]))  # few levels: many ties
    scores = data.draw(
        st.lists(st.integers(-levels, levels), min_size=len(labels), max_size=len(labels))
    )
    assert metric(labels, scores) == pytest.approx(PAIRS[metric](labels, scores), abs=1e-12)


def test_by_hand():
    labels, scores = [0, 1, 0, 1], [0.1, 0.4, 0.4, 0.9]
    assert image_auroc(labels, scores) == 3.5 / 4  # of four pairs one is a tie
    assert image_auprc(labels, scores) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert image_auroc([True, False], np.float32([1, 0])) == 1


@pytest.mark.parametrize("metric", PAIRS)
def test_scores_are_compared_as_they_are(metric):
    tie = metric([0, 1], [0.0, -0.0])
    assert tie == 0.5
    assert metric([0, 1], [1.0, np.nextafter(1, 2)]) == metric([0, 1], [2**53, 2**53 + 1]) == 1
    assert metric([0, 1], np.uint8([0, 255])) == metric([0, 1], np.float16([-65504, 65504])) == 1
    assert metric([1, 0], np.uint8([0, 255])) < 1


@pytest.mark.parametrize("metric", PAIRS)
def test_scores_are_not_changed(metric):
    scores = np.array([3.0, 1, 2, 0])
    scores.flags.writeable = False
    assert metric([1, 0, 1, 0], scores) == 1
    assert scores.tolist() == [3, 1, 2, 0]


@pytest.mark.parametrize("metric", PAIRS)
@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 0], [1, 2], "both normal and anomalous"),
        ([1, 1], [1, 2], "both normal and anomalous"),
        ([], [], "both normal and anomalous"),
        ([0, 1], [1, np.nan], "NaN or infinite"),
        ([0, 1], [1, np.inf], "NaN or infinite"),
        ([0, 1], [1, 2, 3], "one length"),
        ([[0, 1]], [[1, 2]], "one length"),
        ([0, 2], [1, 2], "0 .normal. or 1"),
        ([0, np.nan], [1, 2], "0 .normal. or 1"),
        ([0, 1], [1, 2j], "real numbers, not complex128"),
        ([0, 1], [1, None], "real numbers, not object"),
        ([0, 1], ["1", "2"], "real numbers, not <U1"),
    ],
)
def test_refused(metric, labels, scores, message):
    with pytest.raises(ValueError, match=message):
        metric(labels, scores)
