"""Pixel metrics against a count of sets at each threshold, scikit-learn, and cases by hand."""

import tracemalloc
from fractions import Fraction
from itertools import pairwise

from effad_core.metrics import (
    aupro,
    auspro,
    defect_metrics,
    pixel_auprc,
    pixel_auroc,
    pixel_metrics,
    pro_curve,
    spro_curve,
)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

LIMITS = (Fraction(1, 20), Fraction(3, 10), Fraction(1, 2), Fraction(1))


def close(value):
    return pytest.approx(value, abs=1e-12)


# --- the reference: sets of pixels, exact fractions, nothing of numpy's or scipy's --------------


def pixels_of(mask, image):
    return {(image, *map(int, where)) for where in np.argwhere(mask)}


def regions_of(mask, image):
    """Flood fill over the eight neighbours."""
    left, regions = pixels_of(mask, image), []
    while left:
        region, edge = set(), [left.pop()]
        while edge:
            _, row, column = pixel = edge.pop()
            region.add(pixel)
            near = {(image, row + r, column + c) for r in (-1, 0, 1) for c in (-1, 0, 1)} & left
            left -= near
            edge += near
        regions.append(region)
    return regions


def counted_curve(maps, defects):
    """(FPR, mean of min(TP / s, 1)) at every distinct score; defects are (pixels, s)."""
    scores = {
        (image, row, column): scored[row, column].item()
        for image, scored in enumerate(maps)
        for row, column in np.ndindex(scored.shape)
    }
    free = scores.keys() - set().union(*(pixels for pixels, _ in defects))
    points = [(Fraction(0), Fraction(0))]
    for threshold in sorted(set(scores.values()), reverse=True):
        above = {pixel for pixel, score in scores.items() if score >= threshold}
        shares = [min(len(above & pixels) / Fraction(s), Fraction(1)) for pixels, s in defects]
        points.append((Fraction(len(above & free), len(free)), sum(shares) / len(shares)))
    return points


def counted_area(points, limit):
    area = Fraction(0)
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 < limit < x1:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        if x1 <= limit:
            area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def corners_of(points):
    kept = []
    for point in points:
        while kept and kept[-1] == point:
            kept.pop()
        while len(kept) > 1 and any(kept[-2][d] == kept[-1][d] == point[d] for d in (0, 1)):
            kept.pop()
        kept.append(point)
    return np.array(kept, dtype=np.float64)


def given_masks(masks):
    return [(image, mask) for image, mask in enumerate(masks) if mask is not None]


def region_defects(masks):
    regions = [r for image, mask in given_masks(masks) for r in regions_of(mask, image)]
    return [(region, len(region)) for region in regions]


# --- drawn cases --------------------------------------------------------------------------------


@st.composite
def images(draw, several=False):
    """Maps with many ties, and a mask or None for each; or up to three masks for each."""
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64, np.int64, np.uint8]))
    low = 0 if dtype == np.uint8 else -2
    high = draw(st.sampled_from([low, 1, 3, 200]))  # `low`: the maps are constant
    shapes = draw(st.lists(array_shapes(min_dims=2, max_dims=2, max_side=5), max_size=2))
    shapes.append((2, 4))
    score, marked = st.integers(low, high), st.booleans()
    maps = [draw(arrays(np.int64, shape, elements=score)).astype(dtype) for shape in shapes]
    most = 3 if several else 1
    masks = [
        draw(st.lists(arrays(bool, shape, elements=marked), max_size=most)) for shape in shapes
    ]
    masks[-1] = [np.array([[1, 0, 0, 0], [0, 0, 0, 1]], dtype=bool), *masks[-1][1:]]
    keep = np.array([[1, 1, 0, 1], [1, 1, 1, 1]], dtype=bool)  # one pixel is always defect-free
    masks[-1] = [mask & keep for mask in masks[-1]]
    return maps, masks if several else [found[0] if found else None for found in masks]


@settings(max_examples=150, deadline=None)
@given(images())
def test_pro_equals_a_count_at_every_threshold(drawn):
    maps, masks = drawn
    points = counted_curve(maps, region_defects(masks))
    for limit in LIMITS:
        assert aupro(maps, masks, float(limit)) == close(float(counted_area(points, limit)))
    np.testing.assert_allclose(np.column_stack(pro_curve(maps, masks)), corners_of(points))


@settings(max_examples=150, deadline=None)
@given(images(several=True), st.data())
def test_spro_equals_a_count_at_every_threshold(drawn, data):
    maps, masks = drawn
    share = st.sampled_from([0.01, 0.3, 0.5, 0.77, 1])
    defects = [
        [(mask, data.draw(share) * int(mask.sum())) for mask in found if mask.any()]
        for found in masks
    ]
    pairs = [(pixels_of(mask, i), s) for i, found in enumerate(defects) for mask, s in found]
    points = counted_curve(maps, pairs)
    expected = {limit: float(counted_area(points, limit)) for limit in LIMITS}
    for limit, area in expected.items():
        assert auspro(maps, defects, float(limit)) == close(area)
    names = ("auspro_0.05", "auspro_0.3", "auspro_0.5", "auspro_1")
    by_name = dict(zip(names, expected.values(), strict=True))
    assert defect_metrics(maps, defects, map(float, LIMITS)) == close(by_name)
    np.testing.assert_allclose(np.column_stack(spro_curve(maps, defects)), corners_of(points))


@settings(max_examples=100, deadline=None)
@given(images())
def test_pixels_equal_scikit_learns(drawn):
    maps, masks = drawn
    scores = np.concatenate([scored.ravel() for scored in maps])
    truth = [
        np.zeros(m.size, bool) if t is None else t.ravel() for m, t in zip(maps, masks, strict=True)
    ]
    truth = np.concatenate(truth)
    assert pixel_auroc(maps, masks) == close(roc_auc_score(truth, scores))
    assert pixel_auprc(maps, masks) == close(average_precision_score(truth, scores))
    fpr, recall, _ = roc_curve(truth, scores, drop_intermediate=False)
    for limit in (0.05, 0.3):
        x = np.append(fpr[fpr <= limit], limit)
        y = np.append(recall[fpr <= limit], np.interp(limit, fpr, recall))
        area = sum((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2)
        assert pixel_auroc(maps, masks, limit) == close(area / limit)


@settings(max_examples=50, deadline=None)
@given(images())
def test_pixel_metrics_is_all_of_them(drawn):
    expected = {
        "aupro_0.05": aupro(*drawn, 0.05),
        "aupro_1": aupro(*drawn, 1),
        "pixel_auroc_0.05": pixel_auroc(*drawn, 0.05),
        "pixel_auroc_1": pixel_auroc(*drawn),
        "pixel_auprc": pixel_auprc(*drawn),
    }
    found = pixel_metrics(*drawn, fpr_limits=(0.05, 1))
    assert found == expected
    assert list(found) == list(expected)
    assert {type(value) for value in found.values()} == {float}


@settings(max_examples=50, deadline=None)
@given(images(), st.randoms(use_true_random=False))
def test_neither_order_nor_scale_matters(drawn, random):
    maps, masks = drawn
    expected = pixel_metrics(maps, masks)
    order = random.sample(range(len(maps)), len(maps))
    shuffled = [maps[i] for i in order], [masks[i] for i in order]
    assert pixel_metrics(*shuffled) == close(expected)
    curved = [np.arctan(scored.astype(np.float64)) for scored in maps]
    assert pixel_metrics(curved, masks) == close(expected)


# --- by hand ------------------------------------------------------------------------------------

FALLING = [np.array([[8, 7, 6, 5, 4, 3, 2, 1]], dtype=np.float32)]


def test_pro_by_hand():
    # Regions {8} and {6, 5}; five free pixels: 7, 4, 3, 2, 1. At 8 PRO is 1/2 with FPR 0, at 7
    # FPR is 1/5, at 5 PRO is 1; then FPR grows to 1.
    masks = [np.array([[1, 0, 1, 1, 0, 0, 0, 0]])]
    fpr, pro = pro_curve(FALLING, masks)
    assert fpr.tolist() == [0, 0, 0.2, 0.2, 1]
    assert pro.tolist() == [0, 0.5, 0.5, 1, 1]
    assert aupro(FALLING, masks, 0.1) == close(0.5)
    assert aupro(FALLING, masks) == close((0.2 * 0.5 + 0.1) / 0.3)
    assert aupro(FALLING, masks, 1) == close(0.2 * 0.5 + 0.8)
    # One of three defect pixels up to FPR 1/5, all after it; precision 1, 2/3, 3/4 at the three.
    assert pixel_auroc(FALLING, masks, 0.2) == close(1 / 3)
    assert pixel_auroc(FALLING, masks) == close(0.2 / 3 + 0.8)
    assert pixel_auprc(FALLING, masks) == close((1 + 2 / 3 + 3 / 4) / 3)


def test_a_tie_is_one_point_and_the_limit_cuts_the_line():
    # A region of 3 and 2; two of three free pixels are 2 as well: (0, 1/2) to (2/3, 1) is a line.
    maps, masks = [np.array([[3, 2, 2, 2, 1]])], [np.array([[1, 1, 0, 0, 0]])]
    assert np.column_stack(pro_curve(maps, masks)) == close(
        np.array([[0, 0], [0, 0.5], [2 / 3, 1], [1, 1]])
    )
    assert aupro(maps, masks, 1 / 3) == close((0.5 + 0.75) / 2)
    assert aupro(maps, masks, 1) == close(2 / 3 * 0.75 + 1 / 3)


def test_spro_by_hand():
    # A = {8, 6, 5, 4} saturates at 2, B = {5, 4} inside it at 1.5; free: 7, 3, 2, 1. Up to FPR
    # 1/4 only 8 is found: 1/2 of A, none of B. There 6 fills A, 5 gives B 2/3, and 4 fills it.
    a, b = np.array([[1, 0, 1, 1, 1, 0, 0, 0]]), np.array([[0, 0, 0, 1, 1, 0, 0, 0]])
    defects = [[(a, 2), (b, 1.5)]]
    assert auspro(FALLING, defects) == close(0.25)
    assert auspro(FALLING, defects, 0.5) == close((0.25 * 0.25 + 0.25) / 0.5)
    fpr, spro = spro_curve(FALLING, defects)
    assert fpr.tolist() == [0, 0, 0.25, 0.25, 1]
    assert spro == close(np.array([0, 0.25, 0.25, 1, 1]))


def test_two_million_points():
    # Free 0, 2, 4 ... and defect 1, 3, 5 ...: with f of n free pixels found, f + 1 defect ones are.
    n = 2**20
    maps = [np.arange(2 * n, dtype=np.float32).reshape(1024, -1)]
    masks = [maps[0] % 2]
    for limit in (0.5, 1):
        found = limit * n
        area = found * (found + 1) / 2 / n**2
        assert pixel_auroc(maps, masks, limit) == close(area / limit)


def test_a_defect_in_pieces_is_one_defect():
    # 8, 7 and 3: at FPR 0 two of three pixels of the defect, but one of its two regions.
    mask = np.array([[1, 1, 0, 0, 0, 1, 0, 0]])
    assert auspro(FALLING, [[(mask, 3)]]) == close(2 / 3)
    assert auspro(FALLING, [[(mask, 2)]]) == close(1)
    assert aupro(FALLING, [mask], 0.05) == close(0.5)


@pytest.mark.parametrize("limit", [0.05, 0.3, 1])
def test_chance_is_half_the_limit_and_perfect_is_one(limit):
    masks = [np.eye(4, dtype=bool), None]
    constant = [np.full((4, 4), 0.7), np.full((3, 5), 0.7)]
    assert aupro(constant, masks, limit) == close(limit / 2)
    assert pixel_auroc(constant, masks, limit) == close(limit / 2)
    assert pixel_auprc(constant, masks) == close(4 / 31)
    perfect = [masks[0] * 1.0, np.zeros((3, 5))]
    assert set(pixel_metrics(perfect, masks, [limit]).values()) == {1}
    wrong = [-perfect[0], perfect[1]]
    assert aupro(wrong, masks, limit) == pixel_auroc(wrong, masks, limit) == 0


@pytest.mark.parametrize(
    ("drawing", "regions"),
    [
        ("x... .x.. .... ...o", 2),  # a corner joins
        (".x.. x... .... ...o", 2),
        ("x.x. .... .... ...o", 3),  # a gap parts
        ("...x x... .... ..o.", 3),  # a row's end is not the next row's neighbour
        ("x... .... .... x..o", 3),  # nor is the first row the last one's
        ("xxxxx x...x x.o.x x...x xxxxx", 2),  # a frame on the border
        ("o", 1),
    ],
)
def test_regions(drawing, regions):
    drawn = np.array([list(row) for row in drawing.split()])
    maps = [(drawn == "o") * 1.0, np.zeros((1, 1))]
    assert aupro(maps, [drawn != ".", None], 1e-9) == pytest.approx(1 / regions)


def test_regions_of_two_images_are_two_and_a_whole_image_counts():
    maps = [np.array([[9, 8]]), np.array([[7, 6]]), np.array([[5, 5]])]
    masks = [np.ones((1, 2)), np.array([[1, 0]]), None]
    # At 8 the first image is found, at 7 the second; three pixels are free.
    assert pro_curve(maps, masks)[1].tolist() == [0, 1, 1]
    assert aupro([maps[1], maps[0], maps[2]], [masks[0], masks[1], None], 1) == close(1 / 2 + 1 / 3)


def test_a_saturation_of_the_whole_area_is_pro():
    rng = np.random.default_rng(0)
    maps = list(rng.integers(0, 30, (3, 12, 12)))
    masks = [np.zeros((12, 12), dtype=bool) for _ in maps]
    masks[0][2:6, 3:9] = masks[1][0, 0] = True
    defects = [[(mask, mask.sum())] if mask.any() else [] for mask in masks]
    assert auspro(maps, defects, 0.3) == close(aupro(maps, masks, 0.3))
    halves = [[(mask, mask.sum() / 2) for mask, _ in found] for found in defects]
    assert auspro(maps, halves, 0.3) > auspro(maps, defects, 0.3) + 0.01


# --- scores as they are -------------------------------------------------------------------------


def found_at_once(defect, free):
    """AU-ROC of two one-pixel images: 1, 1/2 for a tie, or 0."""
    return pixel_auroc([np.array([[defect]]), np.array([[free]])], [[[1]], None])


@pytest.mark.parametrize("one", [np.float16(1), np.float32(1), np.float64(1), np.longdouble(1)])
def test_the_last_bit_decides(one):
    above = np.nextafter(one, type(one)(2))
    assert found_at_once(above, one) == 1
    assert found_at_once(one, one) == 0.5
    assert found_at_once(one, above) == 0


def test_integers_are_not_rounded():
    assert found_at_once(2**53 + 1, 2**53) == 1
    assert found_at_once(np.uint8(255), np.uint8(0)) == found_at_once(True, False) == 1
    assert found_at_once(np.int8(-128), np.int8(127)) == 0
    assert found_at_once(np.uint64(2**64 - 1), np.uint64(2**64 - 2)) == 1


def test_dtypes_meet_in_one_that_holds_both():
    assert found_at_once(0.1, np.float32(0.1)) == 0  # 0.1 as float32 is 0.10000000149
    assert found_at_once(np.float32(0.1), 0.1) == 1
    assert found_at_once(np.int32(2**24 + 1), np.float32(2**24)) == 1
    assert found_at_once(np.int64(2**53), 2.0**53) == 0.5


def test_zero_has_no_sign():
    assert found_at_once(0.0, -0.0) == found_at_once(-0.0, 0.0) == 0.5
    zeros = np.where(np.arange(64).reshape(8, 8) % 3 == 0, np.float32(-0.0), np.float32(0.0))
    assert aupro([zeros], [np.tri(8)], 0.3) == close(0.15)
    assert pro_curve([zeros], [np.tri(8)])[0].tolist() == [0, 1]


def test_half_precision_reaches_its_ends():
    largest = np.finfo(np.float16).max
    maps = [np.array([[largest, -largest, largest, 0]], dtype=np.float16)]
    # At the largest score half the defect, and one of two free pixels: a line to (1/2, 1/2).
    assert aupro(maps, [[[1, 1, 0, 0]]], 0.5) == close(0.25)


# --- what goes in -------------------------------------------------------------------------------


def test_inputs_are_not_changed():
    rng = np.random.default_rng(0)
    maps, masks = rng.random((2, 4, 4)), np.stack([np.zeros((4, 4)), np.eye(4)])
    before = maps.copy(), masks.copy()
    for array in (maps, masks):
        array.flags.writeable = False
    expected = pixel_metrics(maps, masks)
    auspro(maps, [None, [(masks[1], 2)]])
    assert (maps == before[0]).all() and (masks == before[1]).all()
    assert pixel_metrics(maps.tolist(), iter([None, masks[1] * 255])) == expected


def test_no_mask_is_an_empty_mask():
    maps, mask = [np.arange(6).reshape(2, 3)] * 2, np.array([[0, 1, 0], [0, 0, 1]])
    assert pixel_metrics(maps, [mask, None]) == pixel_metrics(maps, [mask, mask * 0])
    assert auspro(maps, [[(mask, 2)], None]) == auspro(maps, [[(mask, 2)], []])


def test_memory_stays_below_three_times_the_maps():
    maps = [np.random.default_rng(i).random((512, 512), dtype=np.float32) for i in range(8)]
    masks = [np.zeros((512, 512), dtype=bool) for _ in maps]
    for mask in masks:
        mask[100:200, 100:200] = True
    tracemalloc.start()
    try:
        metrics = pixel_metrics(maps, masks)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert metrics["pixel_auroc_1"] == pytest.approx(0.5, abs=0.01)
    assert peak < 3 * sum(scored.nbytes for scored in maps)


PLAIN, MARKED = np.zeros((2, 3)), np.eye(2, 3)


def with_nan(array):
    return np.where(MARKED > 0, np.nan, array)


@pytest.mark.parametrize("metric", [aupro, pixel_auroc, pixel_auprc, pixel_metrics, pro_curve])
@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        ([], [], "0 maps, 0 masks"),
        ([PLAIN], [MARKED, None], "1 maps, 2 masks"),
        ([PLAIN, with_nan(PLAIN)], [MARKED, None], "map of image 1 must be finite"),
        ([PLAIN, PLAIN - np.inf], [MARKED, None], "map of image 1 must be finite"),
        ([PLAIN, PLAIN[0]], [MARKED, None], r"map of image 1 must be \(H, W\).*not \(3,\)"),
        ([PLAIN, PLAIN[None]], [MARKED, None], r"map of image 1 must be .*not \(1, 2, 3\)"),
        ([PLAIN, PLAIN[:0]], [MARKED, None], r"map of image 1 must be .* not \(0, 3\)"),
        (PLAIN, [MARKED, None], "map of image 0 must be"),
        ([PLAIN, PLAIN + 1j], [MARKED, None], "map of image 1 must hold real .*complex128"),
        ([PLAIN, PLAIN.astype(object)], [MARKED, None], "map of image 1 must hold real .*object"),
        ([PLAIN, None], [MARKED, None], "map of image 1 must hold real"),
        ([PLAIN, PLAIN.astype(str)], [MARKED, None], "map of image 1 must hold real"),
        (
            [PLAIN, np.full((2, 3), 2**53 + 1)],
            [MARKED, None],
            "map of image 1 has integers beyond what float64",
        ),
        (
            [PLAIN, np.full((2, 3), -(2**53) - 1)],
            [MARKED, None],
            "map of image 1 has integers beyond what float64",
        ),
        ([PLAIN, PLAIN], [MARKED, PLAIN.T], r"mask of image 1 has shape \(3, 2\).*\(2, 3\)"),
        ([PLAIN, PLAIN], [MARKED, with_nan(PLAIN)], "mask of image 1 must be finite"),
        ([PLAIN, PLAIN], [MARKED, MARKED.astype(object)], "mask of image 1 must hold real"),
        ([PLAIN, PLAIN], [MARKED, MARKED * 1j], "mask of image 1 must hold real"),
        ([PLAIN, PLAIN], [None, PLAIN], "no mask marks a defect pixel"),
        ([PLAIN], [PLAIN + 1], "no defect-free pixel"),
    ],
)
def test_regions_refused(metric, maps, masks, message):
    with pytest.raises(ValueError, match=message):
        metric(maps, masks)


@pytest.mark.parametrize("metric", [auspro, defect_metrics, spro_curve])
@pytest.mark.parametrize(
    ("maps", "defects", "message"),
    [
        ([], [], "0 maps, 0 lists of defects"),
        ([PLAIN], [[], []], "1 maps, 2 lists of defects"),
        ([with_nan(PLAIN)], [[(MARKED, 1)]], "map of image 0 must be finite"),
        ([PLAIN], [[]], "no mask marks a defect pixel"),
        ([PLAIN], [None], "no mask marks a defect pixel"),
        ([PLAIN], [[(MARKED, 1), (1 - MARKED, 1)]], "no defect-free pixel"),
        ([PLAIN], [MARKED], "defect 0 of image 0 must be a pair"),
        ([PLAIN], [[MARKED]], "defect 0 of image 0 must be a pair"),
        ([PLAIN], [(MARKED, 1)], "defect 0 of image 0 must be a pair"),
        ([PLAIN], [[(MARKED, 1), (MARKED,)]], "defect 1 of image 0 must be a pair"),
        ([PLAIN], [[(MARKED, 1), (PLAIN, 1)]], "mask of defect 1 of image 0 marks no pixel"),
        ([PLAIN], [[(None, 1)]], "mask of defect 0 of image 0 marks no pixel"),
        ([PLAIN] * 2, [None, [(MARKED.T, 1)]], "mask of defect 0 of image 1 has shape"),
        ([PLAIN], [[(with_nan(PLAIN), 1)]], "mask of defect 0 of image 0 must be finite"),
        ([PLAIN], [[(MARKED, 2), (MARKED, 0)]], "area of defect 1 of image 0 .* not 0"),
        ([PLAIN], [[(MARKED, -1)]], "area of defect 0 of image 0 .* not -1"),
        ([PLAIN], [[(MARKED, 2.1)]], "at most the defect's own 2 pixels, not 2.1"),
        ([PLAIN], [[(MARKED, np.nan)]], "area of defect 0 of image 0 .* not nan"),
        ([PLAIN], [[(MARKED, np.inf)]], "area of defect 0 of image 0 .* not inf"),
        ([PLAIN], [[(MARKED, None)]], "area of defect 0 of image 0 .* not None"),
    ],
)
def test_defects_refused(metric, maps, defects, message):
    with pytest.raises(ValueError, match=message):
        metric(maps, defects)


@pytest.mark.parametrize("limit", [0, -0.1, 1.01, 30, np.nan, np.inf, None, "0.3"])
def test_limits_refused(limit):
    message = r"must be in \(0, 1\], not"
    for metric in (aupro, pixel_auroc):
        with pytest.raises(ValueError, match=message):
            metric([PLAIN], [MARKED], fpr_limit=limit)
    with pytest.raises(ValueError, match=message):
        auspro([PLAIN], [[(MARKED, 1)]], fpr_limit=limit)
    with pytest.raises(ValueError, match=message):
        pixel_metrics([PLAIN], [MARKED], fpr_limits=(0.3, limit))
    with pytest.raises(ValueError, match=message):
        defect_metrics([PLAIN], [[(MARKED, 1)]], fpr_limits=(0.3, limit))


def test_limits_that_share_a_name_are_refused():
    with pytest.raises(ValueError, match="must differ in their first six digits"):
        pixel_metrics([PLAIN], [MARKED], fpr_limits=(0.3, 0.30000001))
