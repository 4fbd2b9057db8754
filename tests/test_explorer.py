"""ThresholdExplorer: what the page says, against numbers counted by hand; what breaks, in words."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from types import SimpleNamespace

from effad_core import thresholds
from effad_core.errors import DataError
from effad_core.explorer import ThresholdExplorer, panels
from effad_core.explorer.choices import Choices, span
from effad_core.thresholds import OperatingPoint

import numpy as np
import pytest
from ipywidgets import Box, Button, FloatSlider, FloatText
from PIL import Image
from scipy import stats

LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1])
SCORES = np.array([0.1, 0.2, 0.3, 0.6, 0.25, 0.5, 0.7, 0.9], dtype=np.float32)


class Drawn:
    """A sample without a file."""

    def __init__(self, name, label, size=(20, 12), mask=None, error=None):
        self.path = SimpleNamespace(name=name)
        self.label, self.anomaly_type = label, "scratch" if label else "good"
        self._size, self._mask, self._error = size, mask, error

    def load(self):
        if self._error:
            raise self._error
        return Image.new("RGB", self._size, (90, 120, 150))

    def load_mask(self):
        return self._mask


def evaluation(labels=LABELS, scores=SCORES, maps=True, size=(20, 12)):
    """Maps are zero but for one pixel as high as the score."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    made = None
    if maps:
        made = [np.zeros(size[::-1], np.float32) for _ in scores]
        for m, score in zip(made, scores, strict=True):
            m[size[1] // 2, size[0] // 2] = score
    samples = [Drawn(f"{i}.png", label, size) for i, label in enumerate(labels)]
    found = {"labels": labels, "scores": {"combined": scores}, "maps": made}
    return SimpleNamespace(samples=samples, **found)


def normal(count=100, maps=False):
    """Validation images with the scores 0, 0.01, 0.02 and so on."""
    return evaluation(np.zeros(count, int), np.arange(count) / 100, maps)


@pytest.fixture(scope="module")
def explored():
    """For tests that only read, or set what they need."""
    return ThresholdExplorer(evaluation(), normal())


@pytest.fixture(scope="module")
def few():
    """Likewise, with ten validation images and no maps."""
    return ThresholdExplorer(evaluation(maps=False), normal(10))


def descendants(widget):
    yield widget
    for child in widget.children if isinstance(widget, Box) else ():
        yield from descendants(child)


def find(explorer, name):
    (found,) = [w for w in descendants(explorer) if f"te-{name}" in w._dom_classes]
    return found


def button(explorer, text):
    (found,) = [w for w in descendants(explorer) if isinstance(w, Button) and w.description == text]
    return found


def press(explorer, text):
    found = button(explorer, text)
    assert not found.disabled
    found.click()


def text(explorer, name):
    """What a reader sees of a place."""
    return " ".join(unescape(re.sub("<[^>]*>", " ", find(explorer, name).value)).split())


def message(explorer):
    return text(explorer, "message")


def cell(explorer, name):
    found = re.search(rf'<td class="te-{name}[ "][^>]*>(.*?)</td>', find(explorer, "readout").value)
    return " ".join(re.sub("<[^>]*>", " ", found[1]).split())


class Pictures(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.found.append(dict(attrs))


def pictures(explorer, name):
    """Alternative texts and pixels."""
    for found in Pictures(find(explorer, name).value).found:
        data = base64.b64decode(found["src"].partition(",")[2])
        yield found["alt"], np.asarray(Image.open(io.BytesIO(data)))


def test_no_torch_is_imported():
    code = (
        "import sys; from types import SimpleNamespace as N; import numpy as np\n"
        "from PIL import Image; from effad_core.explorer import ThresholdExplorer\n"
        "s = N(anomaly_type='good', path=N(name='a'), load=lambda: Image.new('RGB', (9, 9)),"
        " load_mask=lambda: None)\n"
        "e = N(labels=[0, 1], scores={'combined': np.array([1., 2.])}, samples=[s, s],"
        " maps=[np.eye(9), 2 * np.eye(9)])\n"
        "ThresholdExplorer(e, [1., 2.]).threshold = 1.5\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'torch'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.returncode) == ("[]", 0), ran.stderr


# --- the numbers -------------------------------------------------------------------------------


def test_the_tables_by_hand(explored):
    explored.threshold = 0.4  # above: 0.6 of the normal, 0.5, 0.7, 0.9 of the anomalous
    assert [cell(explored, name).split()[0] for name in ("tn", "fp", "fn", "tp")] == [*"3113"]
    shares = [cell(explored, name) for name in ("fpr", "recall", "precision", "f1")]
    assert shares == ["0.250", "0.750", "0.750", "0.750"]
    shown = text(explored, "readout")
    for behind in ("1 of 4 normal", "3 of 4 anomalous", "3 of 4 images called", "8 images"):
        assert behind in shown
    for hits in (1, 3):
        low, high = stats.binomtest(hits, 4).proportion_ci(method="exact")
        assert f"{low:.3f} to {high:.3f}" in shown


def test_a_score_at_the_threshold_is_normal(explored):
    explored.threshold = float(SCORES[3])
    explored.index = 3
    assert explored.confusion.fp == 0
    assert text(explored, "caption").endswith("normal, called normal: rightly")


def test_the_tables_say_what_is_undefined(explored):
    explored.threshold = 2.0
    assert cell(explored, "precision") == "no image called anomalous"
    assert cell(explored, "recall") == cell(explored, "f1") == "0.000"


@pytest.mark.parametrize("threshold", [0.0, 0.4, 5.0, -3.0])
def test_plots_state_the_numbers_and_move(explored, threshold):
    explored.threshold = 0.22
    before = list(pictures(explored, "plots"))
    explored.threshold = threshold
    after, found = list(pictures(explored, "plots")), explored.confusion
    assert [alt.split()[0] for alt, _ in after] == ["Histogram", "ROC", "Precision-recall"]
    assert f"{found.fp} normal and {found.tp} anomalous" in after[0][0]
    for (alt, pixels), (_, old) in zip(after, before, strict=True):
        assert f"threshold {threshold:.4g}" in alt
        assert pixels.shape == old.shape and (pixels != old).any()
    assert f"positive rate is {found.fpr:.3f} and the recall {found.recall:.3f}" in after[1][0]


def test_what_is_moved_leaves_no_trace(explored):
    explored.threshold = 0.4
    first = list(pictures(explored, "plots"))
    for threshold in (0.1, 0.9, 0.4):
        explored.threshold = threshold
    for (_, old), (_, new) in zip(first, pictures(explored, "plots"), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_marks_lie_where_the_numbers_are(explored):
    explored.threshold = 0.4
    plots, found = explored._plots, explored.confusion
    assert plots._roc_mark.get_xydata().tolist() == [[found.fpr, found.recall]]
    assert plots._pr_mark.get_xydata().tolist() == [[found.recall, found.precision]]
    assert list(plots._line.get_xdata()) == [0.4, 0.4]
    explored.threshold = 2.0  # nothing is called anomalous: the curve begins at precision 1
    assert plots._pr_mark.get_xydata().tolist() == [[0.0, 1.0]]


# --- operating points --------------------------------------------------------------------------


def test_it_starts_at_the_rate_that_the_images_support(few):
    for count, rate in ((100, 0.05), (19, 0.05), (10, 0.091), (1, 0.5)):
        expected = thresholds.threshold_for_fpr(np.arange(count) / 100, rate, guarantee="average")
        assert Choices(evaluation(), normal(count)).first() == (rate, expected)
    assert find(few, "fpr-rate").value == 0.091
    assert find(few, "fpr-guarantee").value == "average"
    assert few.threshold == 0.09  # the highest of 0 to 0.09
    assert message(few) == ""


@pytest.mark.parametrize("guarantee", ["confident", "average"])
def test_fpr_from_normal_images(explored, guarantee):
    find(explored, "fpr-rate").value = 0.1
    find(explored, "fpr-guarantee").value = guarantee
    press(explored, "FPR from normal images")
    expected = thresholds.threshold_for_fpr(np.arange(100) / 100, 0.1, guarantee=guarantee)
    assert explored.operating_point == expected
    assert text(explored, "sentence") == f"Image {expected}."
    assert (
        explored.threshold
        == find(explored, "image-number").value
        == find(explored, "image-slider").value
    )


def test_points_from_labels(explored):
    find(explored, "recall-target").value = 0.75
    find(explored, "cost-fp").value, find(explored, "cost-fn").value = 1.0, 9.0
    for name, expected in (
        ("Max F1", thresholds.max_f1(LABELS, SCORES)),
        ("Recall", thresholds.for_recall(LABELS, SCORES, 0.75)),
        ("Cost", thresholds.for_cost(LABELS, SCORES, 1, 9)),
    ):
        press(explored, name)
        assert explored.operating_point == expected
        assert text(explored, "sentence").startswith(f"Image {expected}. Optimistic for these")


def test_too_few_images_are_a_sentence_and_change_nothing(explored):
    press(explored, "Max F1")
    before = explored.operating_point
    find(explored, "fpr-guarantee").value = "confident"
    find(explored, "fpr-rate").value = 0.01
    press(explored, "FPR from normal images")
    with pytest.raises(ValueError) as raised:
        thresholds.threshold_for_fpr(np.arange(100) / 100, 0.01)
    said = str(raised.value)
    assert message(explored) == f"{said[0].upper()}{said[1:]}."
    assert "needs 299 normal images" in message(explored)
    assert 'aria-live="polite"' in find(explored, "message").value
    assert explored.operating_point == before
    press(explored, "Max F1")
    assert message(explored) == ""


@pytest.mark.parametrize(
    ("field", "name", "wrong"),
    [
        ("fpr-rate", "FPR from normal images", [0, 1, -1, math.nan, math.inf]),
        ("recall-target", "Recall", [0, 1.5, math.nan]),
        ("cost-fp", "Cost", [0, -1, math.inf]),
        ("cost-fn", "Cost", [0, math.nan]),
    ],
)
def test_wrong_fields_are_a_sentence(explored, field, name, wrong):
    before, valid = explored.operating_point, find(explored, field).value
    for value in wrong:
        find(explored, field).value = value
        press(explored, name)
        assert "must be" in message(explored)
        assert explored.operating_point == before
    find(explored, field).value = valid


def test_without_validation_the_own_normal_images_are_named():
    explorer = ThresholdExplorer(evaluation())
    rate = find(explorer, "fpr-rate").value
    expected = thresholds.threshold_for_fpr(SCORES[:4], rate, guarantee="average")
    assert explorer.operating_point == expected
    assert text(explorer, "sentence").endswith(
        "chosen on the evaluation's own 4 normal images: the rate on them is no check of it."
    )
    page = " ".join(getattr(w, "value", "") for w in explorer.children if hasattr(w, "value"))
    assert "are stated from the evaluation&#x27;s own 4 normal images" in page


def test_scores_alone_are_a_validation():
    explorer = ThresholdExplorer(evaluation(), np.arange(100) / 100)
    assert explorer.operating_point == Choices(evaluation(), normal()).first()[1]
    assert explorer.pixel_threshold == explorer.threshold  # it holds for maps of any size
    find(explorer, "pixel-guarantee").value = "pixels"
    press(explorer, "Pixel threshold from normal images")
    assert "needs the validation maps" in message(explorer)


# --- sliders and numbers -----------------------------------------------------------------------


@pytest.mark.parametrize("which", ["slider", "number"])
def test_slider_and_number_are_linked(explored, which):
    press(explored, "Max F1")
    find(explored, f"image-{which}").value = 0.55
    assert explored.threshold == 0.55
    assert find(explored, "image-slider").value == find(explored, "image-number").value == 0.55
    assert explored.operating_point == OperatingPoint(0.55, "manual", 8)
    assert "chosen by hand" in text(explored, "sentence")
    assert cell(explored, "tp").startswith("2")


def test_a_slider_that_the_page_rounds_is_not_moved(explored):
    press(explored, "Max F1")
    point, slider = explored.operating_point, find(explored, "image-slider")
    slider.value = point.threshold + 0.49 * slider.step
    assert explored.operating_point == point
    assert find(explored, "image-number").value == point.threshold
    slider.value = point.threshold + 1.01 * slider.step  # an arrow key
    assert explored.operating_point.kind == "manual"
    assert explored.threshold == slider.value


def test_numbers_beyond_the_slider_hold(explored):
    slider = find(explored, "image-slider")
    for value, end in ((7.0, slider.max), (-7.0, slider.min)):
        find(explored, "image-number").value = value
        assert explored.threshold == value
        assert slider.value == end
        slider.value = end - 0.1 * slider.step * np.sign(value)  # the page rounds
        assert explored.threshold == value


def test_a_number_that_is_none_is_taken_back(explored):
    explored.threshold = 0.4
    find(explored, "image-number").value = math.nan
    assert explored.threshold == find(explored, "image-number").value == 0.4
    assert message(explored).startswith("Threshold must be float")
    for wrong in (math.nan, math.inf, "high", None):
        with pytest.raises(ValueError, match="threshold"):
            explored.threshold = wrong
    assert explored.threshold == 0.4


def test_every_threshold_that_matters_is_on_the_slider(explored):
    slider = find(explored, "image-slider")
    assert slider.min < min(thresholds.sweep(LABELS, SCORES)[0])
    assert slider.max > max(SCORES.max(), 0.99)
    assert slider.step < 0.002 * (slider.max - slider.min)
    for values in ([3.0], [0, 0], [-1e9, 1e9], [-5.0]):
        low, high = span(np.array(values))
        assert low < min(values) <= max(values) < high


def test_every_control_is_described(explored):
    for widget in descendants(explored):
        if isinstance(widget, Button | FloatSlider | FloatText):
            assert widget.description and widget.tooltip
    names = "image-slider image-number pixel-slider pixel-number readout plots image caption"
    names += " sentence message fpr-rate recall-target cost-fp cost-fn export-path export root"
    assert all(find(explored, name) for name in names.split())


# --- images ------------------------------------------------------------------------------------


def test_browsing(explored):
    explored.index = 0
    press(explored, "Previous")
    assert explored.index == 7
    press(explored, "Next")
    assert explored.index == 0
    assert text(explored, "caption").startswith("Image 1 of 8: good/0.png, score 0.1, normal")
    for wrong in (-1, 8):
        with pytest.raises(ValueError, match="must be 0 to 7"):
            explored.index = wrong
    assert explored.index == 0


def test_mistakes_are_found_in_a_circle(explored):
    explored.threshold, explored.index = 0.28, 0  # false alarms: 2 and 3; a miss: 4
    visited = []
    for _ in range(3):
        press(explored, "Next false alarm")
        visited.append(explored.index)
    assert visited == [2, 3, 2]
    assert text(explored, "caption").endswith("normal, called anomalous: a false alarm")
    press(explored, "Next miss")
    assert explored.index == 4
    assert text(explored, "caption").endswith("anomalous, called normal: a miss")
    press(explored, "Next miss")
    assert (explored.index, message(explored)) == (4, "This is the only miss at this threshold.")
    explored.threshold = 5.0
    press(explored, "Next false alarm")
    assert (explored.index, message(explored)) == (4, "There is no false alarm at this threshold.")
    explored.threshold = -5.0
    press(explored, "Next miss")
    assert message(explored) == "There is no miss at this threshold."


def test_the_picture_follows_the_pixel_threshold(explored):
    explored.index = 7  # one pixel of 240 is 0.9, the others are 0
    explored.pixel_threshold = 0.5
    ((alt, marked),) = pictures(explored, "image")
    assert alt.startswith("scratch/7.png. Beside it the anomaly map, highest value 0.9, colours")
    assert "0.42% of the pixels are above the pixel threshold 0.5" in alt
    explored.pixel_threshold = 0.95
    ((alt, clean),) = pictures(explored, "image")
    assert "0.00% of the pixels" in alt
    changed = np.abs(marked.astype(int) - clean).max(axis=2) > 60
    assert changed[:, : changed.shape[1] // 2].any()
    assert not changed[:, changed.shape[1] // 2 :].any()  # the map stays as it is
    explored.pixel_threshold = 0.5
    ((_, again),) = pictures(explored, "image")
    np.testing.assert_array_equal(again, marked)
    assert not explored._browser._panels._axes.collections  # no contour is left in the figure


def test_one_colour_scale_for_all_images(explored):
    high = 2 * np.quantile(np.arange(100) / 100, 0.95)
    for index in (0, 7):
        explored.index = index
        ((alt, _),) = pictures(explored, "image")
        assert f"colours from 0 to {high:.4g}" in alt


@pytest.mark.parametrize("size", [(20, 12), (12, 20), (1, 1), (70, 130)])
def test_contours_lie_where_the_map_is_high(monkeypatch, size):
    monkeypatch.setattr(panels, "FINEST", 60)
    scored = np.zeros(size[::-1])
    left = max(1, size[0] // 2)
    scored[:, :left] = 1
    image = np.zeros((*size[::-1], 3), np.uint8)
    shown = panels.ImagePanels("name", image, scored, None, (0, 1))
    lines = shown._contour(scored, 0.5, "white", "solid")[0].get_paths()[0].vertices
    if size != (1, 1):
        assert np.abs(lines[:, 0] - (left - 0.5)).max() <= 1.5  # within half a block
        assert lines[:, 1].min() <= 0 and lines[:, 1].max() >= size[1] - 2
    assert "100.00%" in shown.html(-1.0) and "0.00%" in shown.html(1.0)


def test_no_peak_is_lost_in_a_large_map(monkeypatch):
    monkeypatch.setattr(panels, "FINEST", 60)
    scored = np.zeros((130, 90), np.float32)
    scored[71, 33] = 1
    shown = panels.ImagePanels("name", np.zeros((130, 90, 3), np.uint8), scored, None, (0, 1))
    lines = shown._contour(scored, 0.5, "white", "solid")[0].get_paths()[0].vertices
    assert np.abs(lines.mean(axis=0) - (33, 71)).max() < 3


@pytest.mark.parametrize("maps", [True, False])
def test_the_ground_truth_is_outlined(maps):
    masked = evaluation(maps=maps)
    explorer = ThresholdExplorer(masked)
    explorer.index = 5
    ((plain, before),) = pictures(explorer, "image")
    mask = np.zeros((12, 20), bool)
    mask[3:9, 4:12] = True
    masked.samples[5] = Drawn("5.png", 1, mask=mask)
    explorer.index = 5
    ((alt, after),) = pictures(explorer, "image")
    assert "with the ground truth outlined" in alt and "outlined" not in plain
    assert (np.abs(after.astype(int) - before) > 60).any()


def test_an_image_that_cannot_be_read_is_named():
    broken = evaluation()
    broken.samples[1] = Drawn("1.png", 0, error=DataError("good/1.png is cut short: copy it again"))
    broken.samples[2] = Drawn("2.png", 0, error=OSError("the disk is gone."))
    broken.samples[3] = Drawn("3.png", 0, mask=np.ones((5, 5), bool))  # of another size
    explorer = ThresholdExplorer(broken)
    press(explorer, "Next")
    assert message(explorer) == "good/1.png is cut short: copy it again."
    assert text(explorer, "image") == "This image cannot be shown."
    explorer.threshold = explorer.pixel_threshold = 0.3  # still moves
    press(explorer, "Next")
    assert message(explorer) == "The disk is gone."
    press(explorer, "Next")
    press(explorer, "Next")
    assert explorer.index == 4 and message(explorer) == ""
    assert len(list(pictures(explorer, "image"))) == 1


def test_names_are_escaped():
    named = evaluation()
    named.samples[0] = Drawn('<b>"x" & y.png', 0)
    explorer = ThresholdExplorer(named)
    assert '<b>"x" & y.png' in text(explorer, "caption")
    assert "<b>" not in find(explorer, "caption").value
    ((alt, _),) = pictures(explorer, "image")
    assert alt.startswith('good/<b>"x" & y.png')


# --- pixels ------------------------------------------------------------------------------------


def test_pixel_thresholds_from_normal_maps():
    rng = np.random.default_rng(0)
    validation = normal(40)
    validation.maps = [rng.random((9, 9)) for _ in range(40)]
    explorer = ThresholdExplorer(evaluation(), validation)
    find(explorer, "pixel-fpr-rate").value = 0.1
    for guarantee in ("confident", "average", "pixels"):
        find(explorer, "pixel-guarantee").value = guarantee
        press(explorer, "Pixel threshold from normal images")
        if guarantee == "pixels":
            expected = thresholds.pixel_threshold_for_fpr(validation.maps, 0.1)
        else:
            expected = thresholds.pixel_threshold(validation.maps, 0.1, guarantee=guarantee)
        assert explorer.pixel_operating_point == expected
        assert text(explorer, "pixel-sentence").startswith(f"Pixel {expected}.")
        assert find(explorer, "pixel-number").value == expected.threshold
    find(explorer, "pixel-slider").value = 0.3
    assert explorer.pixel_operating_point == OperatingPoint(0.3, "manual", 8)
    find(explorer, "pixel-fpr-rate").value = 1e-9
    press(explorer, "Pixel threshold from normal images")
    assert "too few" in message(explorer)
    assert explorer.pixel_threshold == 0.3


def test_without_maps_there_is_no_pixel_threshold(few):
    explorer = few
    assert explorer.pixel_threshold is None and explorer.pixel_operating_point is None
    assert "evaluate(..., keep_maps=True)" in text(explorer, "pixel-sentence")
    assert not [w for w in descendants(explorer) if "te-pixel-slider" in w._dom_classes]
    with pytest.raises(ValueError, match="there are no maps"):
        explorer.pixel_threshold = 0.5
    ((alt, _),) = pictures(explorer, "image")
    assert alt == "good/0.png."


# --- one class, one image, nothing -------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "count", "validation"),
    [(0, 1, None), (0, 5, [0.1, 0.2, 0.3]), (1, 5, None), (1, 1, [0.1])],
)
def test_one_class_alone(label, count, validation):
    one = evaluation(np.full(count, label), np.full(count, 0.5, np.float32))
    explorer = ThresholdExplorer(one, validation)
    missing = ("anomalous", "normal")[label]
    assert f"No {missing} images" in text(explorer, "plots")
    assert len(list(pictures(explorer, "plots"))) == 1
    for name in ("Max F1", "Recall", "Cost"):
        assert button(explorer, name).disabled
    assert button(explorer, "FPR from normal images").disabled == (
        label == 1 and validation is None
    )
    shares = [cell(explorer, name) for name in ("fpr", "recall", "precision", "f1")]
    if label == 0:
        assert shares[1:] == ["no anomalous images"] * 3
        assert float(shares[0]) == explorer.confusion.fpr
    else:
        assert shares[0] == "no normal images"
        assert float(shares[1]) == explorer.confusion.recall
    explorer.threshold = 0.1
    press(explorer, "Next")


def test_what_does_not_fit_is_refused():
    empty = evaluation(np.zeros(0, int), np.zeros(0))
    with pytest.raises(ValueError, match="the evaluation has no images"):
        ThresholdExplorer(empty)
    with pytest.raises(ValueError, match="the validation has no images"):
        ThresholdExplorer(evaluation(), empty)
    with pytest.raises(ValueError, match="the validation has no images"):
        ThresholdExplorer(evaluation(), [])
    with pytest.raises(ValueError, match="the scores"):
        ThresholdExplorer(evaluation(), [0.1, np.nan])
    with pytest.raises(ValueError, match="4 of the 8 validation images are anomalous"):
        ThresholdExplorer(evaluation(), evaluation())
    wrong = evaluation()
    wrong.scores = {"combined": np.where(LABELS == 1, SCORES, np.nan)}
    with pytest.raises(ValueError, match="the scores"):
        ThresholdExplorer(wrong)
    wrong = evaluation()
    wrong.maps = wrong.maps[1:]
    with pytest.raises(ValueError, match="the evaluation has 8 images but 7 maps"):
        ThresholdExplorer(wrong)
    for bad in (np.full((3, 3), np.nan), np.zeros((3, 3, 3))):
        wrong = evaluation()
        wrong.maps[2] = bad
        with pytest.raises(ValueError, match="the map of image 2 of the evaluation"):
            ThresholdExplorer(wrong)
    wrong = evaluation()
    wrong.samples = wrong.samples[1:]
    with pytest.raises(ValueError, match="there are 8 scores but 7 samples"):
        ThresholdExplorer(wrong)


# --- export ------------------------------------------------------------------------------------


class Detector:
    operating_point = pixel_operating_point = None

    def save(self, path):
        points = [p and p.to_dict() for p in (self.operating_point, self.pixel_operating_point)]
        path.write_text(json.dumps(points))


def test_export_gives_the_detector_both_points_and_saves_it(tmp_path):
    detector, path = Detector(), tmp_path / "exported.safetensors"
    explorer = ThresholdExplorer(evaluation(), normal(), detector, path)
    assert find(explorer, "export-path").value == str(path)
    assert detector.operating_point is None  # looking changes nothing
    press(explorer, "Export")
    assert detector.operating_point == explorer.operating_point
    assert detector.pixel_operating_point == explorer.pixel_operating_point
    assert [OperatingPoint.from_dict(p) for p in json.loads(path.read_text())] == [
        explorer.operating_point,
        explorer.pixel_operating_point,
    ]
    assert str(path) in message(explorer)
    explorer.threshold = 0.4
    press(explorer, "Export")  # its own file
    assert json.loads(path.read_text())[0]["kind"] == "manual"


def test_export_overwrites_nothing_and_says_why(tmp_path):
    detector, path = Detector(), tmp_path / "detector.safetensors"
    path.write_text("a run's own")
    explorer = ThresholdExplorer(evaluation(), normal(), detector, path)
    press(explorer, "Export")
    assert "exists already: choose another name" in message(explorer)
    find(explorer, "export-path").value = str(tmp_path / "nowhere" / "x.safetensors")
    press(explorer, "Export")
    assert "is no folder" in message(explorer)
    find(explorer, "export-path").value = " "
    press(explorer, "Export")
    assert "is empty" in message(explorer)
    assert path.read_text() == "a run's own"
    assert detector.operating_point is None


def test_a_failed_export_leaves_the_detector_as_it_was(tmp_path):
    class Full(Detector):
        def save(self, path):
            raise OSError("no space left on device")

    detector = Full()
    explorer = ThresholdExplorer(evaluation(), normal(), detector, tmp_path / "x.safetensors")
    press(explorer, "Export")
    assert message(explorer) == "No space left on device."
    assert detector.operating_point is None and detector.pixel_operating_point is None


def test_export_without_detector_or_maps(explored, tmp_path):
    assert button(explored, "Export").disabled
    detector, path = Detector(), tmp_path / "x.safetensors"
    detector.pixel_operating_point = OperatingPoint(0.2, "manual", 3)
    explorer = ThresholdExplorer(evaluation(maps=False), normal(), detector, path)
    press(explorer, "Export")
    assert detector.operating_point == explorer.operating_point
    assert detector.pixel_operating_point == OperatingPoint(0.2, "manual", 3)


def test_a_saved_detector_predicts_with_the_chosen_points(narrow, drawn, tmp_path):
    from effad_core import EfficientAD, Evaluation, Sample, evaluate

    detector, path = narrow(), tmp_path / "exported.safetensors"
    samples = [Sample(image, index % 2, "good") for index, image in enumerate(drawn[:4])]
    found = evaluate(detector, samples, keep_maps=True)
    assert isinstance(found, Evaluation)
    explorer = ThresholdExplorer(found, None, detector, path)
    explorer.threshold = explorer.pixel_threshold = float(np.median(found.scores["combined"]))
    press(explorer, "Export")
    loaded = EfficientAD.load(path)
    assert loaded.operating_point == explorer.operating_point
    called = [one.is_anomalous for one in loaded.predict(drawn[:4])]
    assert sum(called) == explorer.confusion.tp + explorer.confusion.fp == 2


# --- in a page ---------------------------------------------------------------------------------


def test_a_page_without_a_kernel_says_the_numbers(explored):
    explored.threshold = 0.4
    assert explored._repr_mimebundle_()["text/plain"] == (
        "ThresholdExplorer at 0.4: false positive rate 0.250, recall 0.750, 8 images"
    )


def test_its_state_is_small_enough_for_a_notebook(explored):
    states = sum(len(str(widget.get_state())) for widget in descendants(explored))
    assert states < 500_000
