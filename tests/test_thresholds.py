"""Operating points against scipy, scikit-learn, brute force, and simulated normal images."""

import ast
import json
import math
from pathlib import Path

from effad_core import thresholds
from effad_core.thresholds import (
    Confusion,
    OperatingPoint,
    confusion,
    for_cost,
    for_recall,
    images_needed,
    lowest_rate,
    max_f1,
    pixel_threshold,
    pixel_threshold_for_fpr,
    precision_recall_curve,
    roc_curve,
    sweep,
    threshold_for_fpr,
)

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

SHARES = st.floats(0.01, 0.99)
GUARANTEES = ("confident", "average")


def test_the_thresholds_import_no_torch():
    for node in ast.walk(ast.parse(Path(thresholds.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            assert not any("torch" in name or "statistics" in name for name in names)


# --- from normal images -----------------------------------------------------------------------


def test_known_numbers_of_images():
    # Wilks: 59 images for 95 % / 95 %, 93 to leave one of them out; 29 for 90 % / 95 %
    assert images_needed(0.05) == 59
    assert images_needed(0.1) == 29
    assert images_needed(0.01, 0.99) == 459
    assert images_needed(0.5, 0.5) == 1
    assert images_needed(0.05, guarantee="average") == 19
    assert images_needed(0.01, guarantee="average") == 99
    assert images_needed(0.9, guarantee="average") == 1
    scores = np.arange(100.0)
    for n, k in ((59, 1), (92, 1), (93, 2)):
        point = threshold_for_fpr(scores[:n], 0.05)
        assert point.threshold == n - k
        assert point.expected_fpr == k / (n + 1)


def test_average_by_hand():
    scores = [5, 1, 4, 2, 3, 9, 7, 8, 6]  # 10 (1 - 0.2) = 8: the eighth smallest
    point = threshold_for_fpr(scores, 0.2, guarantee="average")
    assert (point.threshold, point.expected_fpr, point.images) == (8, 0.2, 9)
    assert threshold_for_fpr(scores, 0.29, guarantee="average").threshold == 8
    assert threshold_for_fpr(scores, 0.3, guarantee="average").threshold == 7
    # 0.29 * 100 is below 29 in floating point
    assert threshold_for_fpr(range(99), 0.29, guarantee="average").expected_fpr == 0.29
    assert threshold_for_fpr([1, 2], 1 - 1e-16, guarantee="average").threshold == 1


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 400), rate=SHARES, confidence=SHARES)
def test_confident_is_the_lowest_threshold_that_binomials_allow(n, rate, confidence):
    # the k-th largest keeps the rate unless fewer than k of n images exceed the true quantile
    failing = stats.binom.cdf(np.arange(n), n, rate)  # of the 1st, 2nd, ... largest
    allowed = np.count_nonzero(failing <= (1 - confidence) * (1 + 1e-8))
    scores = np.random.default_rng(n).permutation(n).astype(float)
    if not allowed:
        with pytest.raises(ValueError, match=f"needs {images_needed(rate, confidence)} normal"):
            threshold_for_fpr(scores, rate, confidence)
        return
    point = threshold_for_fpr(scores, rate, confidence)
    assert point.threshold == n - allowed
    # Clopper and Pearson's upper bound for the images that lie above
    above = stats.binomtest(allowed - 1, n, alternative="less")
    upper = above.proportion_ci(confidence, method="exact").high
    assert point.upper_fpr == pytest.approx(upper, rel=1e-8)
    assert point.upper_fpr <= rate * (1 + 1e-6)


@settings(max_examples=150, deadline=None)
@given(rate=st.floats(0.001, 0.999), confidence=SHARES, guarantee=st.sampled_from(GUARANTEES))
def test_fewest_images_and_lowest_rate_are_sharp(rate, confidence, guarantee):
    n = images_needed(rate, confidence, guarantee)
    assert lowest_rate(n, confidence, guarantee) <= rate * (1 + 1e-8)
    assert n == 1 or lowest_rate(n - 1, confidence, guarantee) > rate
    if n < 2000:
        assert threshold_for_fpr(range(n), rate, confidence, guarantee).threshold >= 0
    if 1 < n < 2000:
        with pytest.raises(ValueError, match=rf"the {n - 1} given support"):
            threshold_for_fpr(range(n - 1), rate, confidence, guarantee)


@pytest.mark.parametrize("guarantee", GUARANTEES)
@pytest.mark.parametrize("n", [1, 2, 7, 58, 59, 1000, 12345])
def test_the_lowest_rate_can_be_had_as_computed_and_as_printed(n, guarantee):
    lowest = lowest_rate(n, 0.95, guarantee)
    assert images_needed(lowest, 0.95, guarantee) == n
    assert threshold_for_fpr(range(n), lowest, 0.95, guarantee).threshold == n - 1
    with pytest.raises(ValueError, match="at the lowest$") as raised:
        threshold_for_fpr(range(n), lowest / 2, 0.95, guarantee)
    printed = float(str(raised.value).split()[-4])
    assert lowest <= printed < 1.002 * lowest
    assert threshold_for_fpr(range(n), printed, 0.95, guarantee).threshold == n - 1


def test_the_sentence_for_too_few_images():
    with pytest.raises(ValueError) as raised:
        threshold_for_fpr(range(50), 0.05)
    assert str(raised.value) == (
        "a false positive rate of 0.05 at a confidence of 0.95 needs 59 normal images, the 50 "
        "given support 0.05818 at the lowest"
    )
    with pytest.raises(ValueError, match="0.05 on average needs 19 normal images, the 10 given"):
        threshold_for_fpr(range(10), 0.05, guarantee="average")


def odd_scores(rng, size):
    """Two bumps and a tail so heavy that it has no mean."""
    bump = rng.random(size)
    scores = np.where(bump < 0.7, rng.normal(0, 1, size), rng.normal(8, 0.1, size))
    return np.where(bump > 0.97, rng.standard_cauchy(size), scores)


def odd_fpr(threshold):
    return (
        0.7 * stats.norm.sf(threshold)
        + 0.27 * stats.norm.sf(threshold, 8, 0.1)
        + 0.03 * stats.cauchy.sf(threshold)
    )


def tied_scores(rng, size):
    """Scores of five values, one of them with half of all images."""
    return rng.choice(5, size, p=[0.3, 0.5, 0.1, 0.07, 0.03]).astype(float)


def tied_fpr(threshold):
    return np.array([0.7, 0.2, 0.1, 0.03, 0.0])[threshold.astype(int)]


SETS = 4000


@pytest.mark.parametrize(("draw", "true_fpr"), [(odd_scores, odd_fpr), (tied_scores, tied_fpr)])
@pytest.mark.parametrize(("n", "rate", "confidence"), [(93, 0.05, 0.95), (60, 0.15, 0.9)])
def test_confident_keeps_its_confidence(draw, true_fpr, n, rate, confidence):
    sets = draw(np.random.default_rng(n), (SETS, n))
    points = [threshold_for_fpr(scores, rate, confidence) for scores in sets]
    fpr = true_fpr(np.array([point.threshold for point in points]))
    missed = (fpr > rate).mean()
    margin = 3.5 * math.sqrt(confidence * (1 - confidence) / SETS)
    assert missed <= 1 - confidence + margin
    assert (fpr > [point.upper_fpr for point in points]).mean() <= 1 - confidence + margin
    if draw is odd_scores:  # exact: the bound itself is missed as often as stated
        k = round(points[0].expected_fpr * (n + 1))
        assert missed == pytest.approx(stats.beta.sf(rate, k, n - k + 1), abs=margin)
        over = (fpr > [point.upper_fpr for point in points]).mean()
        assert over == pytest.approx(1 - confidence, abs=margin)
        assert missed > (1 - confidence) / 2  # not far below what was allowed


@pytest.mark.parametrize(("draw", "true_fpr"), [(odd_scores, odd_fpr), (tied_scores, tied_fpr)])
@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (45, 0.22)])
def test_average_keeps_the_rate_on_average(draw, true_fpr, n, rate):
    sets = draw(np.random.default_rng(n), (SETS, n))
    points = [threshold_for_fpr(scores, rate, guarantee="average") for scores in sets]
    fpr = true_fpr(np.array([point.threshold for point in points]))
    expected = points[0].expected_fpr
    margin = 4 * fpr.std() / math.sqrt(SETS)
    assert fpr.mean() <= expected + margin <= rate + margin
    assert (fpr > [point.upper_fpr for point in points]).mean() < 0.065
    if draw is odd_scores:
        assert fpr.mean() == pytest.approx(expected, abs=margin)


def test_a_tie_with_the_threshold_is_normal():
    scores = np.repeat([1.0, 2.0], [10, 90])
    point = threshold_for_fpr(scores, 0.05)
    assert point.threshold == 2
    assert confusion(np.zeros(100), scores, point.threshold).fp == 0


# --- from labelled images ---------------------------------------------------------------------


def labelled(draw, bound=1000):
    """Labels of both classes, and scores with few or many ties."""
    labels = [0, 1, *draw(st.lists(st.integers(0, 1), max_size=40))]
    levels = draw(st.sampled_from([0, 1, 4, bound]))
    n = len(labels)
    scores = draw(st.lists(st.integers(-levels, levels), min_size=n, max_size=n))
    return np.array(labels), np.array(scores) / draw(st.sampled_from([1, 7]))


def every_split(labels, scores):
    """All confusions by brute force, from the highest threshold to the lowest."""
    levels = sorted(set(scores.tolist()), reverse=True)
    rows = []
    for called in [scores > levels[0], *(scores >= level for level in levels)]:
        tp, fp = sum(called & (labels == 1)), sum(called & (labels == 0))
        rows.append(Confusion(tp, fp, sum(labels == 0) - fp, sum(labels == 1) - tp))
    return rows


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_sweep_equals_brute_force(data):
    labels, scores = labelled(data.draw)
    found, tp, fp = sweep(labels, scores)
    splits = every_split(labels, scores)
    assert [(split.tp, split.fp) for split in splits] == list(zip(tp, fp, strict=True))
    assert [confusion(labels, scores, threshold) for threshold in found] == splits
    assert (np.diff(found) < 0).all()
    assert found.dtype == np.float64
    assert np.isfinite(found).all()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_curves_equal_scikit_learns(data):
    labels, scores = labelled(data.draw)
    fpr, recall, cuts = roc_curve(labels, scores)
    expected = sklearn.metrics.roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose([fpr, recall], expected[:2], atol=1e-15)
    assert len(cuts) == len(expected[2])
    assert (cuts[1:] < expected[2][1:]).all()  # there scores >= the threshold are anomalous
    precision, recall, cuts = precision_recall_curve(labels, scores)
    expected = sklearn.metrics.precision_recall_curve(labels, scores)
    np.testing.assert_allclose([precision[::-1], recall[::-1]], expected[:2], atol=1e-15)
    assert len(cuts) == len(precision)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_points_from_labels_equal_brute_force(data):
    labels, scores = labelled(data.draw)
    splits, found = every_split(labels, scores), sweep(labels, scores)[0]
    point = max_f1(labels, scores)
    best = max(split.f1 for split in splits)
    assert point.threshold == next(
        t for t, split in zip(found, splits, strict=True) if split.f1 == best
    )
    assert confusion(labels, scores, point.threshold).f1 == best
    target = data.draw(st.floats(0.01, 1))
    point = for_recall(labels, scores, target)
    reached = confusion(labels, scores, point.threshold)
    assert reached.recall >= target - 1e-8
    assert point.threshold == max(
        t for t, split in zip(found, splits, strict=True) if split.recall >= target - 1e-8
    )
    costs = data.draw(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)))
    prevalence = data.draw(st.none() | SHARES)
    point = for_cost(labels, scores, *costs, prevalence)
    share = labels.mean() if prevalence is None else prevalence

    def cost(split):
        return (1 - share) * costs[0] * split.fpr + share * costs[1] * (1 - split.recall)

    lowest = min(map(cost, splits))
    chosen = confusion(labels, scores, point.threshold)
    assert cost(chosen) == pytest.approx(lowest, rel=1e-9, abs=1e-13)
    higher = [cost(split) for t, split in zip(found, splits, strict=True) if t > point.threshold]
    assert all(value > lowest for value in higher)


def test_points_from_labels_by_hand():
    labels, scores = [0, 0, 1, 0, 1, 1], [1, 2, 3, 4, 5, 6]
    assert sweep(labels, scores)[0].tolist() == [6, 5.5, 4.5, 3.5, 2.5, 1.5, np.nextafter(1, 0)]
    assert max_f1(labels, scores).threshold == 2.5  # F1 6/7, above 4.5 only 4/5
    assert for_recall(labels, scores, 0.01).threshold == 5.5  # one of them, not two
    assert for_recall(labels, scores, 2 / 3).threshold == 4.5
    assert for_recall(labels, scores, 0.67).threshold == 2.5
    assert for_recall(labels, scores, 1).threshold == 2.5
    assert for_cost(labels, scores, 1, 1).threshold == 4.5  # 2.5 costs as much: the higher one
    assert for_cost(labels, scores, 1, 2).threshold == 2.5
    assert for_cost(labels, scores, 1000, 1).threshold == 4.5
    assert for_cost(labels, scores, 1, 2, prevalence=0.01).threshold == 4.5
    assert for_cost([1, 0], [1, 2], 9, 1).threshold == 2  # nothing is called anomalous
    assert for_cost([1, 0], [1, 2], 1, 9).threshold == np.nextafter(1, 0)  # everything is
    perfect = [0, 0, 1, 1], [1, 2, 6, 7]
    points = max_f1(*perfect), for_recall(*perfect, 1), for_cost(*perfect, 3, 1)
    assert [point.threshold for point in points] == [4, 4, 4]
    assert [point.kind for point in points] == ["labels-f1", "labels-recall", "labels-cost"]
    assert {point.images for point in points} == {4}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_neighbouring_numbers_are_told_apart(dtype):
    for low in dtype([0.3, -0.3, 0, 1, 1e-7, -2]):
        high = np.nextafter(low, dtype(np.inf))
        found = sweep([0, 1], np.array([low, high]))[0]
        assert found.astype(dtype).tolist() == found.tolist()
        assert found.tolist() == [high, low, np.nextafter(low, dtype(-np.inf))]
    largest = np.array([np.finfo(dtype).max, 0.5 * np.finfo(dtype).max], dtype)
    assert np.isfinite(sweep([0, 1], largest)[0]).all()  # their sum would not be


def test_confusion_by_hand():
    found = confusion([0, 0, 0, 1, 1], [0.1, 0.5, 0.6, 0.5, 0.9], 0.5)
    assert found == Confusion(tp=1, fp=1, tn=2, fn=1)
    shares = (found.fpr, found.recall, found.precision, found.f1, found.accuracy)
    assert shares == (1 / 3, 1 / 2, 1 / 2, 1 / 2, 3 / 5)
    assert found.images == 5
    normal = confusion([0, 0], [1, 2], 3)
    assert normal == Confusion(0, 0, 2, 0)
    assert (normal.fpr, normal.accuracy) == (0, 1)
    assert all(map(math.isnan, (normal.recall, normal.precision, normal.f1)))
    assert math.isnan(confusion([1], [1], 0).fpr)


@settings(max_examples=100, deadline=None)
@given(
    counts=st.tuples(*[st.integers(0, 60)] * 4).filter(lambda c: c[1] + c[2] and c[0] + c[3]),
    confidence=SHARES,
)
def test_intervals_equal_scipys(counts, confidence):
    tp, fp, tn, fn = counts
    found = Confusion(tp, fp, tn, fn).intervals(confidence)
    for name, hits, misses in (("fpr", fp, tn), ("recall", tp, fn)):
        expected = stats.binomtest(hits, hits + misses).proportion_ci(confidence, method="exact")
        assert found[name] == pytest.approx(tuple(expected), rel=1e-8, abs=1e-12)
        assert [type(end) for end in found[name]] == [float, float]


def test_no_interval_without_images():
    assert all(map(math.isnan, Confusion(0, 1, 2, 0).intervals()["recall"]))
    assert all(map(math.isnan, Confusion(1, 0, 0, 2).intervals()["fpr"]))
    with pytest.raises(ValueError, match="the confidence must be"):
        Confusion(1, 1, 1, 1).intervals(1)


# --- pixels -----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=8),
    levels=st.sampled_from([1, 3, 1000]),
    percent=st.integers(1, 99),
    seed=st.integers(0, 99),
)
def test_pixel_threshold_equals_the_pooled_quantile(sizes, levels, percent, seed):
    rng = np.random.default_rng(seed)
    maps = [rng.integers(-levels, levels, size).astype(rng.choice(["f2", "f4"])) for size in sizes]
    pooled = np.sort(np.concatenate([m.ravel() for m in maps]).astype(float))[::-1]
    allowed = percent * pooled.size // 100
    if not allowed:
        with pytest.raises(ValueError, match="too few for a rate"):
            pixel_threshold_for_fpr(maps, percent / 100)
        return
    point = pixel_threshold_for_fpr(maps, percent / 100)
    assert point.threshold == pooled[allowed]
    assert point.expected_fpr == (pooled > pooled[allowed]).mean() <= percent / 100
    assert (pooled >= pooled[allowed]).mean() > percent / 100  # no lower pixel would do
    assert point.images == len(maps)


def test_pixel_threshold_equals_numpys_quantile():
    rng = np.random.default_rng(0)
    maps = [rng.gamma(2, size=(20 + i, 30)).astype(np.float32) for i in range(40)]
    pooled = np.concatenate([m.ravel() for m in maps]).astype(float)  # numpy rounds 1 - rate too
    for rate in (0.001, 0.01, 0.3, 0.9):
        expected = np.quantile(pooled, 1 - rate, method="inverted_cdf")
        assert pixel_threshold_for_fpr(maps, rate).threshold == expected
        assert pixel_threshold_for_fpr(maps[::-1], rate).threshold == expected


def test_pixel_interval_is_over_images():
    rng = np.random.default_rng(3)
    # one brightness per image: its pixels lie above or below together
    maps = [rng.normal() + 0.1 * rng.normal(size=(16, 16 + i % 3)) for i in range(60)]
    point = pixel_threshold_for_fpr(maps, 0.1, seed=1)
    above = np.array([(m > point.threshold).sum() for m in maps])
    sizes = np.array([m.size for m in maps])
    drawn = rng.multinomial(60, np.full(60, 1 / 60), size=4000)  # how often each image comes
    expected = np.quantile((drawn @ above) / (drawn @ sizes), [0.025, 0.975])
    assert (point.lower_fpr, point.upper_fpr) == pytest.approx(tuple(expected), abs=0.012)
    of_pixels = stats.binomtest(int(above.sum()), int(sizes.sum())).proportion_ci(method="exact")
    assert point.upper_fpr - point.lower_fpr > 4 * (of_pixels.high - of_pixels.low)
    assert pixel_threshold_for_fpr(maps, 0.1, seed=1) == point
    assert pixel_threshold_for_fpr(maps, 0.1, seed=2) != point
    narrower = pixel_threshold_for_fpr(maps, 0.1, confidence=0.5, seed=1)
    assert point.lower_fpr < narrower.lower_fpr < narrower.upper_fpr < point.upper_fpr


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_pixel_threshold_is_the_image_threshold(guarantee):
    rng = np.random.default_rng(4)
    maps = [rng.normal(size=rng.integers(3, 9, 2)) for _ in range(80)]
    scores = [m.max() for m in maps]
    point = pixel_threshold(maps, 0.1, 0.9, guarantee)
    assert point == threshold_for_fpr(scores, 0.1, 0.9, guarantee)
    assert sum((m > point.threshold).any() for m in maps) <= 0.1 * 80


class OnDisk(list):
    """Maps that are made anew at every reading, as files would be."""

    def __iter__(self):
        return (np.full((4, 4), value) + np.eye(4) for value in super().__iter__())


def test_maps_may_be_read_lazily():
    assert pixel_threshold_for_fpr(OnDisk([0.0, 1.0, 2.0]), 0.1).threshold == 2
    assert pixel_threshold(OnDisk(range(40)), 0.1).threshold == 40
    assert pixel_threshold_for_fpr(np.arange(24.0).reshape(2, 3, 4), 0.5).threshold == 11


# --- the record -------------------------------------------------------------------------------


def points():
    rng = np.random.default_rng(5)
    labels, scores = rng.integers(0, 2, 80), rng.normal(size=80).astype(np.float32)
    return [
        threshold_for_fpr(scores, 0.05),
        threshold_for_fpr(scores, 0.05, guarantee="average"),
        pixel_threshold_for_fpr(scores.reshape(5, 4, 4), 0.1),
        max_f1(labels, scores),
        for_recall(labels, scores, 1),
        for_cost(labels, scores, 1, 5, 0.02),
        OperatingPoint(0.5, "manual", 80),
    ]


@pytest.mark.parametrize("point", points(), ids=lambda point: point.kind)
def test_a_point_survives_json(point):
    described = point.to_dict()
    assert OperatingPoint.from_dict(json.loads(json.dumps(described, allow_nan=False))) == point
    assert None not in described.values()
    for name in described:
        damaged = {key: value for key, value in described.items() if key != name}
        with pytest.raises(ValueError, match="kind" if name == "kind" else f"needs {name}"):
            OperatingPoint.from_dict(damaged)
        for value in ("high", [1], math.nan, None, -math.inf, 10**400):
            with pytest.raises(ValueError, match=r"must be|needs"):
                OperatingPoint.from_dict(described | {name: value})
        if name not in ("kind", "threshold"):
            with pytest.raises(ValueError, match=f"{name} must be"):
                OperatingPoint.from_dict(described | {name: -1})


def test_other_descriptions_are_refused():
    described = {"threshold": 1, "kind": "labels-f1", "images": 3}
    assert OperatingPoint.from_dict(described) == OperatingPoint(1.0, "labels-f1", 3)
    for wrong, message in [
        (["threshold"], "other entries than"),
        (None, "other entries than"),
        (described | {"name": "x"}, "other entries than"),
        (described | {"rate": 0.1}, "does not know rate"),
        (described | {"images": 2.5}, "images must be int"),
        (described | {"kind": "best"}, "the kind must be one of"),
        (described | {"kind": ["labels-f1"]}, "the kind must be one of"),
        ({}, "the kind must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            OperatingPoint.from_dict(wrong)


def test_a_point_is_a_sentence():
    scores = np.arange(120) / 120
    confident, average, pixel, f1, recall, cost, manual = points()
    assert str(threshold_for_fpr(scores, 0.05)) == (
        "threshold 0.9833: at most 5 % of normal images are called anomalous (95 % confidence, "
        "120 normal images; 1.653 % on average, bound 3.892 %)"
    )
    assert "at most 5 % of normal images are called anomalous (95 % confidence, 80 " in str(
        confident
    )
    assert "on average at most 5 % of normal images are called anomalous (80 " in str(average)
    assert "of the pixels of 5 normal images lie above, 10 % may (95 % interval" in str(pixel)
    assert str(f1).endswith("the highest F1 on 80 labelled images")
    assert str(recall).endswith("finds at least 100 % of the anomalous ones of 80 labelled images")
    assert str(cost).endswith("the lowest cost on 80 labelled images")
    assert str(manual) == ("threshold 0.5: chosen by hand, looking at 80 images; no rate is stated")


# --- what is refused --------------------------------------------------------------------------

SCORES = np.arange(100.0)
MAPS = np.arange(400.0).reshape(4, 10, 10)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, math.nan, math.inf, "0.1", None, True])
@pytest.mark.parametrize(
    "call",
    [
        lambda rate: threshold_for_fpr(SCORES, rate),
        lambda rate: threshold_for_fpr(SCORES, 0.5, rate),
        lambda rate: threshold_for_fpr(SCORES, 0.5, rate, "average"),
        lambda rate: images_needed(rate),
        lambda rate: images_needed(0.5, rate),
        lambda rate: lowest_rate(9, rate),
        lambda rate: pixel_threshold(MAPS, rate),
        lambda rate: pixel_threshold_for_fpr(MAPS, rate),
        lambda rate: pixel_threshold_for_fpr(MAPS, 0.5, rate),
        lambda rate: for_cost([0, 1], [1, 2], 1, 1, rate or 0),
    ],
)
def test_rates_outside_0_to_1_are_refused(call, rate):
    with pytest.raises(ValueError, match="must be float, 0 to 1, not"):
        call(rate)


@pytest.mark.parametrize("scores", [[], [[1.0, 2.0]], 1.0, [1, math.nan], [math.inf], ["a"], [1j]])
def test_scores_are_checked(scores):
    labels = np.zeros(np.shape(scores))
    for call in (
        lambda: threshold_for_fpr(scores, 0.5),
        lambda: confusion(labels, scores, 0),
        lambda: sweep(labels, scores),
    ):
        with pytest.raises(ValueError, match=r"the (scores|labels) must"):
            call()


@pytest.mark.parametrize(
    "call", [sweep, roc_curve, precision_recall_curve, max_f1, lambda y, s: for_cost(y, s, 1, 1)]
)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 0], "both normal and anomalous"),
        ([1, 1], "both normal and anomalous"),
        ([0, 2], "labels must be 0 or 1"),
        ([0, 1, 1], "as many as the 2 scores"),
        ([0, math.nan], "labels must be finite"),
        (["0", "1"], "labels must hold real numbers"),
    ],
)
def test_labels_are_checked(call, labels, message):
    with pytest.raises(ValueError, match=message):
        call(labels, [1, 2])


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([], "sequence of at least one"),
        (iter(MAPS), "sequence of at least one"),
        ([MAPS[0], MAPS], "the map of image 1 must have 2 dimension"),
        ([MAPS[0], np.empty((0, 3))], "the map of image 1 must have 2 dimension"),
        ([MAPS[0], MAPS[1] * math.nan], "the map of image 1 must be finite"),
        ([MAPS[0], MAPS[1].astype(str)], "the map of image 1 must hold real numbers"),
    ],
)
def test_maps_are_checked(maps, message):
    for call in (pixel_threshold, pixel_threshold_for_fpr):
        with pytest.raises(ValueError, match=message):
            call(maps, 0.5)
    with pytest.raises(ValueError, match="1 maps of 100 pixels are too few"):
        pixel_threshold_for_fpr(MAPS[:1], 0.5)


def test_the_rest_is_checked():
    for call in (threshold_for_fpr, pixel_threshold):
        with pytest.raises(ValueError, match='"confident" or "average", not \'sure\''):
            call(MAPS if call is pixel_threshold else SCORES, 0.5, 0.5, "sure")
    for n in (0, -1, 1.0, None):
        with pytest.raises(ValueError, match="number of images must be int"):
            lowest_rate(n)
    for costs in ((0, 1), (1, -1), (math.inf, 1), (1, None)):
        with pytest.raises(ValueError, match="a cost must be float"):
            for_cost([0, 1], [1, 2], *costs)
    for recall in (0, 1.01, None):
        with pytest.raises(ValueError, match="the recall must be"):
            for_recall([0, 1], [1, 2], recall)
    with pytest.raises(ValueError, match="the threshold must be"):
        confusion([0, 1], [1, 2], math.inf)
    with pytest.raises(ValueError, match="does not know confidence"):
        OperatingPoint(1.0, "labels-f1", 3, confidence=0.5)
