"""How long a key press takes until the numbers have changed, with 1,000 images."""

import nbformat
import numpy as np
from PIL import Image
from playwright.sync_api import expect

PRESSES = 30
NOTEBOOK = """
from pathlib import Path
import numpy as np
from effad_core.datasets import Sample
from effad_core.evaluation.scores import MAPS, Evaluation
from effad_core.explorer import ThresholdExplorer

normal, anomalous = np.load("scores.npy")
samples = [Sample(Path("image.png"), 0, "good")] * len(normal)
samples += [Sample(Path("image.png"), 1, "dent")] * len(anomalous)
scores = np.concatenate([normal, anomalous])
ramp = np.linspace(0, 1, 64, dtype=np.float32)
maps = tuple(score * np.outer(ramp, ramp) for score in scores)
ThresholdExplorer(Evaluation("drawn", tuple(samples), dict.fromkeys(MAPS, scores), maps), normal)
"""
MEASURE = """() => {
    window.seconds = [];
    let pressed = null;
    document.querySelector(".te-image-slider .noUi-handle")
        .addEventListener("keydown", () => { pressed = performance.now(); }, true);
    new MutationObserver(() => {
        if (pressed === null) return;
        const start = pressed;
        pressed = null;
        requestAnimationFrame(() => requestAnimationFrame(
            () => window.seconds.push((performance.now() - start) / 1000)));
    }).observe(document.querySelector(".te-readout"),
        {subtree: true, childList: true, characterData: true});
}"""


def test_update_time_of_a_thousand_images(pages, lab, take):
    # Scores lie closer than the slider's steps, so that each step changes the numbers.
    middle = np.linspace(0.2, 0.8, 998)
    normal, anomalous = np.append(middle[::2], 0), np.append(middle[1::2], 2)
    np.save(lab.folder / "scores.npy", [normal, anomalous])
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(lab.folder / "image.png")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    with lab(pages, notebook, "thousand") as page:
        handle = page.locator(".te-image-slider .noUi-handle")
        handle.wait_for(timeout=120_000)
        number = page.locator(".te-image-number input")
        number.fill("0.5")
        number.press("Enter")
        false_alarms = page.locator(".te-readout .te-fp b")
        expect(false_alarms).to_have_text(str(np.sum(normal > 0.5)))
        page.evaluate(MEASURE)
        for count in range(1, PRESSES + 1):
            handle.press("ArrowRight")
            page.wait_for_function(f"window.seconds.length === {count}")
        seconds = np.array(page.evaluate("window.seconds"))
        threshold = float(number.input_value())
        assert threshold > 0.55
        expect(false_alarms).to_have_text(str(np.sum(normal > threshold)))
        assert page.faults == []
        take(page, "thousand-images")
    median, longest = 1000 * np.median(seconds), 1000 * seconds.max()
    images = len(normal) + len(anomalous)
    print(f"From key press to changed numbers, {images} images, {PRESSES} presses:")
    print(f"median {median:.0f} ms, longest {longest:.0f} ms")
    assert median < 2000
