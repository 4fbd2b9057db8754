"""The HTML that the explorer shows: pictures with alternative texts, tables, captions."""

import base64
import io
from html import escape

from effad_core.thresholds import Confusion

import numpy as np
from PIL import Image

from .choices import counted

STYLE = """<style>
.te-root .widget-html, .te-root .widget-html-content { height: auto; line-height: 1.4; }
.te-root p { margin: 2px 0; }
.te-root :is(.te-plots, .te-readout) .widget-html-content { display: flex; flex-flow: row wrap;
  align-items: flex-start; gap: 4px 16px; }
.te-root img { max-width: 100%; height: auto; background: white; }
.te-root .te-plots img { flex: 1 1 220px; max-width: min(315px, 100%); min-width: 0; }
.te-root .te-readout .widget-html-content { overflow-x: auto; }
.te-root table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.te-root caption { text-align: left; font-weight: bold; }
.te-root :is(th, td) { padding: 2px 10px 2px 0; text-align: left; font-weight: normal; }
.te-root .te-right { border-left: 3px solid #0072B2; padding-left: 8px; }
.te-root .te-wrong { border-left: 3px dashed #D55E00; padding-left: 8px; }
.te-root input[type="number"] { flex: none; width: 5.5em; }
.te-root :is(.te-image-number, .te-pixel-number) input { width: 13em; }
.te-root .te-sentence p { font-weight: bold; }
.te-root [role="status"]:not(:empty) { border-left: 3px solid #E69F00; padding: 2px 8px; }
.te-root :is(button, input, select, .noUi-handle):focus-visible { outline: 2px solid #0072B2;
  outline-offset: 1px; }
</style>"""


def picture(pixels: np.ndarray, alt: str, density: float = 1.0, kind: str = "PNG") -> str:
    """An <img> element that holds its own data.

    Args:
        pixels: uint8, shape (H, W, 3).
        alt: what the picture shows.
        density: pixels of the picture per pixel of the page.
        kind: "PNG", or "JPEG" for photographs.
    """
    options = {"compress_level": 1} if kind == "PNG" else {"quality": 90, "subsampling": 0}
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    data = base64.b64encode(file.getvalue()).decode()
    height, width = (round(side / density) for side in pixels.shape[:2])
    return (
        f'<img alt="{escape(alt)}" width="{width}" height="{height}" decoding="sync" '
        f'src="data:image/{kind.lower()};base64,{data}">'
    )


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>" if text else ""


def sentence(text: str) -> str:
    """With a full stop, and a capital unless it begins with the name of a file."""
    word = text.partition(" ")[0]
    text = text[:1].upper() + text[1:] if word.isalpha() else text
    return f"{text.rstrip('.')}." if text else ""


def status(text: str) -> str:
    """A message that screen readers read out when it changes."""
    return f'<div role="status" aria-live="polite">{escape(text)}</div>'


def readout(found: Confusion) -> str:
    """The confusion matrix, and what is computed from it with the images behind each number."""
    return _matrix(found) + _measures(found)


def _matrix(found: Confusion) -> str:
    def cell(name: str, what: str) -> str:
        right = "right" if name in ("tn", "tp") else "wrong"
        return f'<td class="te-{name} te-{right}"><b>{getattr(found, name)}</b> {what}</td>'

    return (
        "<table><caption>Verdicts</caption>"
        '<tr><td></td><th scope="col">called normal</th><th scope="col">called anomalous</th></tr>'
        f'<tr><th scope="row">normal</th>{cell("tn", "rightly")}{cell("fp", "false alarms")}</tr>'
        f'<tr><th scope="row">anomalous</th>{cell("fn", "misses")}{cell("tp", "rightly")}</tr>'
        "</table>"
    )


def _measures(found: Confusion) -> str:
    normal, anomalous, called = found.fp + found.tn, found.tp + found.fn, found.tp + found.fp
    none = "no anomalous images"
    rows = [
        ("fpr", "FPR", f"{found.fp} of {counted(normal, 'normal image')}", "no normal images"),
        ("recall", "Recall", f"{found.tp} of {counted(anomalous, 'anomalous image')}", none),
        (
            "precision",
            "Precision",
            f"{found.tp} of {counted(called, 'image')} called anomalous",
            "no image called anomalous" if anomalous else none,
        ),
        ("f1", "F1", counted(found.images, "image"), none),
    ]
    intervals, lines = found.intervals(), []
    for name, title, behind, missing in rows:
        value = getattr(found, name)
        known = not np.isnan(value) and (anomalous or name == "fpr")
        low, high = intervals.get(name, (np.nan, np.nan))
        lines.append(
            f'<tr><th scope="row">{title}</th>'
            f'<td class="te-{name}">{f"<b>{value:.3f}</b>" if known else missing}</td>'
            f"<td>{behind if known else ''}</td>"
            f"<td>{'' if np.isnan(low) else f'{low:.3f} to {high:.3f}'}</td></tr>"
        )
    return (
        "<table><caption>At this threshold</caption><tr><td></td>"
        '<th scope="col">value</th><th scope="col">images behind it</th>'
        f'<th scope="col">95 % interval*</th></tr>{"".join(lines)}'
        '<tr><td colspan="4">* Clopper–Pearson, for a threshold not chosen on these images</td>'
        "</tr></table>"
    )
