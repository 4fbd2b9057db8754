"""Scores are those of `predict`, in the samples' order."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from effad_core.datasets import Sample
from effad_core.evaluation import evaluate


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_scores_are_those_of_predict(narrow, drawn, batch_size):
    ad = narrow()
    samples = [Sample(path, i % 2, "x") for i, path in enumerate(drawn[:3])]
    result = evaluate(ad, samples, precision="float32", batch_size=batch_size)
    assert result.labels.tolist() == [0, 1, 0] and result.samples == tuple(samples)
    single = [ad.predict(path) for path in drawn[:3]]
    expected = [p.score for p in single]
    np.testing.assert_allclose(result.scores["combined"], expected, rtol=1e-5)
    assert len(set(expected)) == 3
    for name, scores in result.scores.items():
        assert result.auroc()[name] == roc_auc_score([0, 1, 0], scores)


def test_each_map_has_its_own_score(narrow, drawn):
    ad = narrow()
    result = evaluate(ad, [Sample(drawn[0], 0, "good")], precision="float32")
    ad.quantiles[2:] += 10  # only the autoencoder's map changes
    moved = evaluate(ad, [Sample(drawn[0], 0, "good")], precision="float32")
    assert moved.scores["student-teacher"] == result.scores["student-teacher"]
    assert moved.scores["autoencoder"] < result.scores["autoencoder"]
    assert moved.scores["combined"] < result.scores["combined"]


def test_refused(narrow, drawn):
    with pytest.raises(ValueError, match="no test images"):
        evaluate(narrow(), [])
    with pytest.raises(ValueError, match="one class"):
        evaluate(narrow(), [Sample(drawn[0], 0, "good")]).auroc()
