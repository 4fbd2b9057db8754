"""ThresholdExplorer: look at images and numbers while a threshold moves."""

import os
from collections.abc import Callable
from pathlib import Path

from effad_core.thresholds import Confusion, OperatingPoint

import ipywidgets as widgets

from .browser import ImageBrowser
from .choices import Choices, span
from .controls import WIDE, ThresholdControl, button, image_choices, pixel_choices, row, shown
from .markup import STYLE, paragraph, readout, sentence, status
from .plots import ScorePlots

NO_MAPS = "there are no maps, so there is no pixel threshold: evaluate(..., keep_maps=True)"


class ThresholdExplorer(widgets.VBox):
    """Choose an operating point by looking at what it does to the images of an evaluation.

    It starts at a false positive rate of 0.05 on average on normal images, or the lowest that their
    number supports. A threshold that is set by hand is an operating point of the kind "manual".

    Args:
        evaluation: an `Evaluation`; with maps there is a pixel threshold too.
        validation: an `Evaluation`, or an array of scores, of normal images that no network was
            trained on: false positive rates are stated from them. None takes the evaluation's own
            normal images, and the page says so.
        detector: what Export gives both operating points and saves.
        export_path: what the field beside Export holds at first. Export overwrites a file only if
            this explorer has written it.

    Raises:
        ValueError: if the evaluation has no images, or its parts or the validation do not fit (see
            `Choices`).
    """

    def __init__(
        self,
        evaluation,
        validation=None,
        detector=None,
        export_path: str | os.PathLike = "exported.safetensors",
    ):
        self._choices = choices = Choices(evaluation, validation)
        if len(evaluation.samples) != len(choices.labels):
            raise ValueError(
                f"there are {len(choices.labels)} scores but {len(evaluation.samples)} samples"
            )
        self._detector, self._written = detector, None
        self._plots, self._plots_shown = ScorePlots(choices), shown("plots")
        self._readout, self._message = shown("readout"), shown("message", status(""))
        self._sentence, self._pixel_sentence = shown("sentence"), shown("pixel-sentence")
        self._browser = ImageBrowser(choices, evaluation.samples, self._say)
        self._control = ThresholdControl(
            "image",
            span(choices.scores, choices.normal_scores),
            lambda value: self._choose(lambda: choices.by_hand(value)),
        )
        rate, self._point = choices.first()
        self._pixel_point = None
        source = f"False positive rates are stated from {choices.source}."
        if not choices.both:
            source += " Choices by labels need normal and anomalous images."
        super().__init__(
            [
                widgets.HTML(STYLE),
                self._plots_shown,
                self._readout,
                self._control.row,
                self._sentence,
                widgets.HTML(paragraph(source)),
                *image_choices(choices, rate, self._choose),
                *self._pixel_rows(rate),
                self._export_row(str(export_path)),
                self._message,
                self._browser,
            ]
        )
        self.add_class("te-root")
        self._show()
        if self._pixel_point is not None:
            self._show_pixels()

    @property
    def operating_point(self) -> OperatingPoint:
        return self._point

    @property
    def pixel_operating_point(self) -> OperatingPoint | None:
        """None without maps."""
        return self._pixel_point

    @property
    def threshold(self) -> float:
        """A score above it is anomalous. Setting it is choosing by hand."""
        return self._point.threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._point = self._choices.by_hand(value)
        self._show()

    @property
    def pixel_threshold(self) -> float | None:
        """A pixel above it is anomalous; None without maps. Setting it is choosing by hand."""
        return None if self._pixel_point is None else self._pixel_point.threshold

    @pixel_threshold.setter
    def pixel_threshold(self, value: float) -> None:
        if self._pixel_point is None:
            raise ValueError(NO_MAPS)
        self._pixel_point = self._choices.by_hand(value)
        self._show_pixels()

    @property
    def confusion(self) -> Confusion:
        """Of the evaluation's images at the threshold."""
        return self._choices.confusion(self.threshold)

    @property
    def index(self) -> int:
        """Of the image that is shown; it can be set."""
        return self._browser.index

    @index.setter
    def index(self, value: int) -> None:
        self._browser.show(value)

    def __repr__(self) -> str:
        """What is left of the widget in a page without a kernel."""
        found = self.confusion
        return (
            f"ThresholdExplorer at {self.threshold:.4g}: false positive rate {found.fpr:.3f}, "
            f"recall {found.recall:.3f}, {found.images} images"
        )

    def _pixel_rows(self, rate: float) -> list[widgets.Widget]:
        """What chooses and describes the pixel threshold; without maps a sentence alone."""
        choices = self._choices
        if choices.maps is None:
            self._pixel_sentence.value = paragraph(sentence(NO_MAPS))
            return [self._pixel_sentence]
        self._pixel_point = choices.first_of_pixels(rate)
        self._pixel_control = ThresholdControl(
            "pixel",
            span(*([m.min(), m.max()] for m in choices.maps), choices.normal_scores),
            lambda value: self._choose_pixels(lambda: choices.by_hand(value)),
        )
        chosen = pixel_choices(choices, rate, self._choose_pixels)
        return [self._pixel_control.row, self._pixel_sentence, *chosen]

    def _show(self) -> None:
        found = self.confusion
        self._control.show(self.threshold)
        self._readout.value = readout(found)
        self._plots_shown.value = self._plots.html(self.threshold, found)
        self._sentence.value = paragraph(self._choices.sentence(self._point))
        self._browser.follow(self.threshold, self.pixel_threshold)

    def _show_pixels(self) -> None:
        self._pixel_control.show(self.pixel_threshold)
        said = self._choices.sentence(self._pixel_point, of_pixels=True)
        self._pixel_sentence.value = paragraph(said)
        self._browser.follow(self.threshold, self.pixel_threshold)

    def _say(self, text: str) -> None:
        """Show a sentence in the page; "" takes the last one away."""
        self._message.value = status(sentence(text))

    def _attempt(self, action: Callable[[], None]) -> None:
        """Do it, or say why it cannot be done."""
        self._say("")
        try:
            action()
        except (ValueError, OSError) as error:
            self._say(str(error))

    def _choose(self, make: Callable[[], OperatingPoint]) -> None:
        def choose() -> None:
            self._point = make()

        self._attempt(choose)
        self._show()  # a value that was refused is taken back

    def _choose_pixels(self, make: Callable[[], OperatingPoint]) -> None:
        def choose() -> None:
            self._pixel_point = make()

        self._attempt(choose)
        self._show_pixels()

    def _export_row(self, path: str) -> widgets.Widget:
        given = self._detector is not None
        self._path = widgets.Text(
            path, description="file", tooltip="where Export saves the detector",
            disabled=not given, **WIDE,
        ).add_class("te-export-path")  # fmt: skip
        made = button(
            "Export",
            "give the detector these operating points, and save it",
            lambda: self._attempt(self._export),
            possible=given,
        ).add_class("te-export")
        missing = "" if given else paragraph("No detector was given, so there is none to export.")
        return row(self._path, made, widgets.HTML(missing))

    def _export(self) -> None:
        """Set the detector's thresholds and save it; if it cannot be saved, set nothing."""
        if not self._path.value.strip():
            raise ValueError("the field beside Export is empty: write a file's name into it")
        path = Path(self._path.value.strip()).expanduser()
        if path.exists() and path.resolve() != self._written:
            raise ValueError(f"{path} exists already: choose another name, or remove it first")
        if not path.parent.is_dir():
            raise ValueError(f"{path.parent} is no folder: choose another one, or create it first")
        detector = self._detector
        before = detector.operating_point, detector.pixel_operating_point
        detector.operating_point = self._point
        if self._pixel_point is not None:
            detector.pixel_operating_point = self._pixel_point
        try:
            detector.save(path)
        except Exception:
            detector.operating_point, detector.pixel_operating_point = before
            raise
        self._written = path.resolve()
        self._say(f"saved as {path}, with the {self._point}")
