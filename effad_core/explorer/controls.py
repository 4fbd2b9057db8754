"""The widgets that ask for something: each has a visible description and a class to find it by."""

from collections.abc import Callable

from effad_core import thresholds
from effad_core.thresholds import OperatingPoint

import ipywidgets as widgets

from .choices import AVERAGE, CONFIDENT, PIXELS, Choices

Choose = Callable[[], OperatingPoint]
NARROW = {"layout": {"width": "auto"}, "style": {"description_width": "auto"}}
WIDE = NARROW | {"layout": {"width": "420px", "max_width": "98%"}}
GUARANTEES = [("on average", AVERAGE), ("with 95 % confidence", CONFIDENT)]


def shown(name: str, value: str = "") -> widgets.HTML:
    """A place for text and pictures, of the class te-NAME."""
    return widgets.HTML(value).add_class(f"te-{name}")


def row(*children: widgets.Widget) -> widgets.Box:
    """From left to right, in several lines where the page is narrow."""
    return widgets.Box(children, layout={"flex_flow": "row wrap", "align_items": "center"})


def button(
    text: str, tooltip: str, pressed: Callable[[], None], possible: bool = True
) -> widgets.Button:
    made = widgets.Button(description=text, tooltip=tooltip, layout={"width": "auto"})
    made.disabled = not possible
    made.on_click(lambda _: pressed())
    return made


def number(name: str, description: str, value: float, tooltip: str = "") -> widgets.FloatText:
    """A numeric field; it counts when Enter is pressed or the focus leaves it."""
    return widgets.FloatText(
        value, description=description, tooltip=tooltip or description,
        continuous_update=False, **NARROW,
    ).add_class(f"te-{name}")  # fmt: skip


def menu(name: str, description: str, options: list[tuple[str, str]]) -> widgets.Dropdown:
    return widgets.Dropdown(
        options=options, description=description, tooltip=description, **NARROW
    ).add_class(f"te-{name}")


class ThresholdControl:
    """A slider and a numeric field that show one value.

    While a slider is dragged, the page sends its next value only after the last one was answered,
    and leaves out those between: nothing stale is ever queued.

    Args:
        name: the classes are te-NAME-slider and te-NAME-number.
        limits: lowest and highest value of the slider; for one beyond them it stands at its end.
        chosen: called with the value when a person has changed it.
    """

    def __init__(self, name: str, limits: tuple[float, float], chosen: Callable[[float], None]):
        self._chosen, self._showing, (low, high) = chosen, False, limits
        self.slider = widgets.FloatSlider(
            low, min=low, max=high, step=(high - low) / 1000, readout=False,
            description=f"{name} threshold", tooltip=f"{name} threshold; the arrow keys move it",
            **WIDE,
        ).add_class(f"te-{name}-slider")  # fmt: skip
        self.number = number(f"{name}-number", "exactly", low, f"{name} threshold as a number")
        self.slider.observe(self._slid, "value")
        self.number.observe(self._typed, "value")
        self.row = row(self.slider, self.number)
        self.row.layout.margin = "10px 0 0"

    def show(self, value: float) -> None:
        """Move both, without calling `chosen`."""
        self._showing = True
        self.slider.value = self._shown = min(max(value, self.slider.min), self.slider.max)
        self.number.value = value
        self._showing = False

    def _slid(self, change) -> None:
        # the page rounds a value that it shows to the slider's steps, and sends it back rounded
        if not self._showing and abs(change["new"] - self._shown) > self.slider.step / 2:
            self._chosen(change["new"])

    def _typed(self, change) -> None:
        if not self._showing:
            self._chosen(change["new"])


def image_choices(
    choices: Choices, rate: float, choose: Callable[[Choose], None]
) -> list[widgets.Widget]:
    """Rows with a button for each kind of operating point; `choose` is called with its function."""
    asked = number("fpr-rate", "rate", rate, "highest false positive rate, between 0 and 1")
    how = menu("fpr-guarantee", "holds", GUARANTEES)
    from_normal = button(
        "FPR from normal images",
        f"the lowest threshold that keeps the rate, from {choices.source}",
        lambda: choose(lambda: choices.from_normal(asked.value, how.value)),
        possible=len(choices.normal_scores) > 0,
    )
    target = number("recall-target", "target", 0.95, "lowest recall, above 0, up to 1")
    alarm = number("cost-fp", "cost of a false alarm", 1.0)
    miss = number("cost-fn", "of a miss", 10.0, "cost of a miss")
    images = choices.labels, choices.scores
    max_f1, recall, cost = (
        button(text, tooltip, lambda made=made: choose(made), possible=choices.both)
        for text, tooltip, made in (
            ("Max F1", "the highest F1 by these labels", lambda: thresholds.max_f1(*images)),
            (
                "Recall",
                "the highest threshold that reaches the target by these labels",
                lambda: thresholds.for_recall(*images, target.value),
            ),
            (
                "Cost",
                "the lowest cost by these labels, with as many anomalies as here",
                lambda: thresholds.for_cost(*images, alarm.value, miss.value),
            ),
        )
    )
    by_labels = row(max_f1, row(target, recall), row(alarm, miss, cost))
    return [row(asked, how, from_normal), by_labels]


def pixel_choices(
    choices: Choices, rate: float, choose: Callable[[Choose], None]
) -> list[widgets.Widget]:
    """The same for pixels."""
    asked = number("pixel-fpr-rate", "rate", rate, "highest false positive rate, between 0 and 1")
    of_images = [(f"of images, {words}", guarantee) for words, guarantee in GUARANTEES]
    how = menu("pixel-guarantee", "may exceed", [*of_images, ("of all pixels", PIXELS)])
    from_normal = button(
        "Pixel threshold from normal images",
        f"the lowest threshold that keeps the rate, from {choices.source}",
        lambda: choose(lambda: choices.pixels_from_normal(asked.value, how.value)),
        possible=len(choices.normal_scores) > 0,
    )
    return [row(asked, how, from_normal)]
