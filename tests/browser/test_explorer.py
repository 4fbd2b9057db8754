"""The explorer as a person uses it, in JupyterLab and as the page of `make app`.

The numbers that a page shows are compared with scikit-learn's and scipy's, computed here from the
scores that the notebook's evaluation has.
"""

import re

from effad_core import EfficientAD

import numpy as np
import pytest
from playwright.sync_api import expect
from scipy.stats import binom
from sklearn.metrics import confusion_matrix, f1_score, precision_score, recall_score

pytestmark = pytest.mark.timeout(600)  # the first test of each page waits for the notebook
WHERE = pytest.mark.parametrize("where", ["lab", "app"])


@pytest.fixture
def explorer(where, request):
    return request.getfixturevalue(f"in_{where}")


def check(explorer, truth):
    """The readout against scikit-learn at the threshold that the page shows."""
    labels, called = truth["labels"], truth["scores"] > explorer.threshold
    tn, fp, fn, tp = (int(n) for n in confusion_matrix(labels, called, labels=[0, 1]).ravel())
    for name, count in {"tn": tn, "fp": fp, "fn": fn, "tp": tp}.items():
        expect(explorer.number(name).locator("b")).to_have_text(str(count))
    expect(explorer.number("fpr")).to_have_text(f"{fp / (fp + tn):.3f}")
    expect(explorer.number("recall")).to_have_text(f"{recall_score(labels, called):.3f}")
    expect(explorer.number("f1")).to_have_text(f"{f1_score(labels, called):.3f}")
    precision = f"{precision_score(labels, called):.3f}" if called.any() else "no image"
    expect(explorer.number("precision")).to_contain_text(precision)


def splits(truth):
    """Labels and verdicts of every way in which a threshold can split the images, highest first."""
    values = np.unique(truth["scores"])[::-1]
    for threshold in [values[0], *values[1:], values[-1] - 1]:
        yield truth["labels"], truth["scores"] > threshold


@WHERE
def test_arrow_keys_move_the_threshold_and_every_number(explorer, truth, where, take):
    low = explorer.key("Home")
    check(explorer, truth)
    high = explorer.key("End")
    check(explorer, truth)
    assert low < high
    step = (high - low) / 1000
    explorer.press("Max F1")
    expect(explorer.sentence).to_contain_text("highest F1")
    seen = [explorer.threshold]
    for key in ["ArrowLeft"] * 6 + ["ArrowRight"] * 3 + ["PageUp", "PageDown", "PageDown"]:
        seen.append(explorer.key(key))
        expect(explorer.sentence).to_contain_text("by hand")
        check(explorer, truth)
    moves = np.diff(seen)
    assert (moves[1:6] < 0).all() and np.allclose(moves[1:6], -step, rtol=0.05)
    assert (moves[6:9] > 0).all() and moves[9] > 2 * step and moves[10] < -2 * step
    take(explorer.page, f"explorer-{where}")


@WHERE
def test_a_typed_threshold_counts(explorer, truth):
    middle = float(np.median(truth["scores"]))
    explorer.set("image-number", middle)
    expect(explorer.sentence).to_contain_text(f"{middle:.4g}")
    assert explorer.threshold == middle
    check(explorer, truth)


def ranks_that_keep(rate, n, guarantee):
    """Every k for which the k-th largest of n normal scores keeps the rate."""
    if guarantee == "on average":
        return [k for k in range(1, n + 1) if k <= rate * (n + 1)]
    # At most 5 % of all sets of n images have fewer than k above the score of that rate.
    return [k for k in range(1, n + 1) if binom.cdf(k - 1, n, rate) <= 0.05]


@WHERE
@pytest.mark.parametrize("guarantee", ["on average", "with 95 % confidence"])
@pytest.mark.parametrize("rate", [0.1, 0.2])
def test_a_false_positive_rate_from_normal_images(explorer, truth, rate, guarantee):
    explorer.set("fpr-rate", rate)
    explorer.page.locator(".te-fpr-guarantee select").select_option(guarantee)
    explorer.press("FPR from normal images")
    said = f"average at most {100 * rate:g} %" if "average" in guarantee else "(95 % confidence"
    expect(explorer.sentence).to_contain_text(said)
    expect(explorer.sentence).to_contain_text(f"at most {100 * rate:g} % of normal images")
    k = max(ranks_that_keep(rate, len(truth["normal"]), guarantee))
    assert explorer.threshold == np.sort(truth["normal"])[-k]
    check(explorer, truth)


@WHERE
def test_the_highest_f1(explorer, truth):
    explorer.press("Max F1")
    expect(explorer.sentence).to_contain_text("highest F1")
    best = max(f1_score(labels, called, zero_division=0) for labels, called in splits(truth))
    expect(explorer.number("f1")).to_have_text(f"{best:.3f}")
    check(explorer, truth)


@WHERE
@pytest.mark.parametrize("target", [0.5, 0.9])
def test_the_highest_threshold_of_a_recall(explorer, truth, target):
    explorer.set("recall-target", target)
    explorer.press("Recall")
    expect(explorer.sentence).to_contain_text(f"{100 * target:.4g} % of the anomalous")
    recalls = [recall_score(labels, called) for labels, called in splits(truth)]
    expect(explorer.number("recall")).to_have_text(f"{min(r for r in recalls if r >= target):.3f}")
    check(explorer, truth)


@WHERE
@pytest.mark.parametrize(("alarm", "miss"), [(1, 1), (5, 1), (1, 5)])
def test_the_lowest_cost(explorer, truth, alarm, miss):
    explorer.press("Max F1")
    expect(explorer.sentence).to_contain_text("highest F1")
    explorer.set("cost-fp", alarm)
    explorer.set("cost-fn", miss)
    explorer.press("Cost")
    expect(explorer.sentence).to_contain_text("lowest cost")

    def cost(labels, called):
        return alarm * np.sum(called & (labels == 0)) + miss * np.sum(~called & (labels == 1))

    reached = cost(truth["labels"], truth["scores"] > explorer.threshold)
    assert reached == min(cost(*split) for split in splits(truth))
    check(explorer, truth)


@WHERE
def test_the_images_and_the_ways_to_the_mistakes(explorer, truth, where, take):
    count = len(truth["labels"])

    def shown():
        return int(re.search(r"Image (\d+) of", explorer.caption.inner_text())[1])

    first = shown()
    explorer.press("Next")
    expect(explorer.caption).to_contain_text(f"Image {first % count + 1} of {count}")
    explorer.press("Previous")
    expect(explorer.caption).to_contain_text(f"Image {first} of {count}")
    for key, name, label in (("Home", "false alarm", 0), ("End", "miss", 1)):
        explorer.key(key)
        check(explorer, truth)
        wrong = (truth["labels"] == label) & ((truth["scores"] > explorer.threshold) != label)
        for _ in range(3):
            at = shown()  # counted from 1: the index of the image after it
            later = [*np.flatnonzero(wrong[at:]) + at, *np.flatnonzero(wrong)]
            explorer.press(f"Next {name}")
            expect(explorer.caption).to_contain_text(f"Image {later[0] + 1} of {count}")
            expect(explorer.caption).to_contain_text(f"score {truth['scores'][later[0]]:.4g}")
            expect(explorer.caption).to_contain_text(f"a {name}")
            expect(explorer.page.locator(".te-image img").first).to_be_visible()
    explorer.caption.scroll_into_view_if_needed()
    take(explorer.page, f"image-{where}")


@WHERE
def test_export_saves_a_detector_with_the_threshold(explorer, truth, tmp_path):
    explorer.press("Max F1")
    expect(explorer.sentence).to_contain_text("highest F1")
    file = tmp_path / "exported.safetensors"
    explorer.set("export-path", file)
    explorer.press("Export")
    expect(explorer.message).to_contain_text("saved as", ignore_case=True)
    assert EfficientAD.load(file).threshold == explorer.threshold
    explorer.set("export-path", tmp_path / "absent" / "exported.safetensors")
    explorer.press("Export")
    expect(explorer.message).to_contain_text("is no folder")


@WHERE
def test_nothing_went_wrong_in_the_page(explorer):
    assert explorer.page.faults == []
    for image in explorer.page.locator(".te-root img").all():
        assert image.get_attribute("alt").strip()
