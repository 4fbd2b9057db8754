"""Drawings that explain the method; they show no data."""

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from .style import ANOMALOUS, BLACK, GRAY, GREEN, NORMAL, PURPLE, drawn_in_style, new_figure


@drawn_in_style
def pipeline_diagram() -> Figure:
    """How the three networks of EfficientAD turn an image into an anomaly map and a score."""
    figure, axes = new_figure(height=4.0)
    ax = axes[0, 0]
    ax.set(xlim=(0, 12), ylim=(0, 4.6))
    ax.axis("off")
    boxes = {  # name: x, y of the middle, text, colour
        "image": (1.0, 2.3, "image", GRAY),
        "T": (4.2, 3.8, "teacher T\nfixed: distilled from a\npretrained network", NORMAL),
        "S": (
            4.2,
            2.3,
            "student S\ntrained on normal images,\ntwice the teacher's channels",
            GREEN,
        ),
        "A": (4.2, 0.8, "autoencoder A\ntrained on normal images,\n64-number bottleneck", PURPLE),
        "ST": (7.9, 3.1, "T − S: local\n(structural) anomalies", ANOMALOUS),
        "AE": (7.9, 1.5, "A − S: global\n(logical) anomalies", ANOMALOUS),
        "M": (10.9, 2.3, "anomaly map:\nmean of both,\nnormalised\n\nscore: its\nmaximum", BLACK),
    }
    size = {"image": (1.5, 0.7), "T": (3.1, 1.0), "S": (3.1, 1.0), "A": (3.1, 1.0)}
    size |= {"ST": (2.6, 0.8), "AE": (2.6, 0.8), "M": (1.9, 2.0)}
    for name, (x, y, text, colour) in boxes.items():
        width, height = size[name]
        corner = (x - width / 2, y - height / 2)
        style = {"boxstyle": "round,pad=0.05", "facecolor": "white", "linewidth": 2}
        ax.add_patch(FancyBboxPatch(corner, width, height, edgecolor=colour, **style))
        ax.text(x, y, text, ha="center", va="center", fontsize=9.5, gid=name)
    arrows = "image T, image S, image A, T ST, S ST, S AE, A AE, ST M, AE M"
    for start, end in (pair.split() for pair in arrows.split(", ")):
        ends = {}
        for name, side in ((start, 1), (end, -1)):
            x, y = boxes[name][:2]
            ends[name] = (x + side * (size[name][0] / 2 + 0.08), y)
        ax.annotate("", ends[end], ends[start], arrowprops={"arrowstyle": "-|>", "color": GRAY})
    return figure
