"""Browse the images: each with its score, its verdict, its map, and the ways to the mistakes."""

from collections.abc import Callable

import ipywidgets as widgets
import numpy as np

from .choices import Choices
from .controls import button, row, shown
from .markup import paragraph
from .panels import ImagePanels

MISTAKES = {0: "false alarm", 1: "miss"}  # by label


class ImageBrowser(widgets.VBox):
    """One image at a time.

    Args:
        choices: the labels, scores and maps.
        samples: as many; with load(), load_mask(), anomaly_type and path.
        say: called with a sentence to show, "" to take the last one away.
    """

    def __init__(self, choices: Choices, samples, say: Callable[[str], None]):
        self._choices, self._samples, self._say = choices, samples, say
        self._limits = _colour_limits(choices)
        self._threshold = self._pixel_threshold = None
        self._index = self._panels = None
        self._caption, self._image = shown("caption"), shown("image")
        buttons = row(
            button("Previous", "the image before this one", lambda: self._step(-1)),
            button("Next", "the image after this one", lambda: self._step(1)),
            button("Next false alarm", "a normal image above the threshold", lambda: self._seek(0)),
            button("Next miss", "an anomalous image not above it", lambda: self._seek(1)),
        )
        super().__init__([buttons, self._caption, self._image])

    @property
    def index(self) -> int:
        """Of the image that is shown."""
        return self._index

    def follow(self, threshold: float, pixel_threshold: float | None) -> None:
        """Show the image with other thresholds."""
        moved = pixel_threshold != self._pixel_threshold
        self._threshold, self._pixel_threshold = threshold, pixel_threshold
        if self._index is None:
            self.show(0)
            return
        self._show_caption()
        if moved and self._panels is not None:
            self._image.value = self._panels.html(pixel_threshold)

    def show(self, index: int) -> None:
        """Show another image; one that cannot be read is named in a sentence.

        Raises:
            ValueError: if there is no image of that index.
        """
        if not 0 <= index < len(self._samples):
            raise ValueError(f"the index must be 0 to {len(self._samples) - 1}, not {index}")
        self._index, self._panels = index, None
        self._show_caption()
        sample, maps = self._samples[index], self._choices.maps
        scored = None if maps is None else maps[index]
        try:
            image, mask = np.asarray(sample.load()), sample.load_mask()
            panels = ImagePanels(self._name(), image, scored, mask, self._limits)
        except (OSError, ValueError) as error:
            self._image.value = paragraph("This image cannot be shown.")
            self._say(str(error))
            return
        self._panels = panels
        self._image.value = panels.html(self._pixel_threshold)

    def _step(self, by: int) -> None:
        self._say("")
        self.show((self._index + by) % len(self._samples))

    def _seek(self, label: int) -> None:
        """The next image of a label that is called wrongly, after the last one the first."""
        called = self._choices.scores.astype(np.float64) > self._threshold
        wrong = np.flatnonzero((self._choices.labels == label) & (called != label))
        if not len(wrong):
            self._say(f"there is no {MISTAKES[label]} at this threshold")
            return
        later = wrong[wrong > self._index]
        index = int(later[0] if len(later) else wrong[0])
        alone = index == self._index
        self._say(f"this is the only {MISTAKES[label]} at this threshold" if alone else "")
        if not alone:
            self.show(index)

    def _name(self) -> str:
        sample = self._samples[self._index]
        return f"{sample.anomaly_type}/{sample.path.name}"

    def _show_caption(self) -> None:
        label = int(self._choices.labels[self._index])
        score = float(self._choices.scores[self._index])
        called = score > self._threshold
        outcome = "rightly" if called == label else f"a {MISTAKES[label]}"
        self._caption.value = paragraph(
            f"Image {self._index + 1} of {len(self._samples)}: {self._name()}, score {score:.4g}, "
            f"{'anomalous' if label else 'normal'}, called {'anomalous' if called else 'normal'}: "
            f"{outcome}"
        )


def _colour_limits(choices: Choices) -> tuple[float, float]:
    """From 0 to twice the score that one normal image in twenty exceeds."""
    scores = choices.normal_scores if len(choices.normal_scores) else choices.scores
    high = 2 * float(np.quantile(scores, 0.95))
    return (0.0, high) if high > 0 else (high - 1, high)
