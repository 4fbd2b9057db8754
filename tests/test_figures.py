"""Figures: what a reader would check with the eye, checked on the figure's own objects."""

import ast
from pathlib import Path

from effad_core import figures
from effad_core.metrics import image_auroc

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)


def row(title="cell", names=("st", "ae"), mask=None):
    return {
        "title": title,
        "image": IMAGE,
        "maps": {name: RNG.normal(size=(10, 15)) for name in names},
        "mask": mask,
    }


def visible(figure):
    return [ax for ax in figure.axes if ax.axison]


def texts(ax):
    return [text.get_text() for text in ax.texts]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_the_figures_import_no_torch():
    for path in Path(figures.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", [])]
            assert not any("torch" in name for name in [*names, getattr(node, "module", "") or ""])


def test_pyplot_holds_no_figure_and_its_settings_stay():
    before = dict(plt.rcParams)
    assert figures.bars({"a": 1.0}, "title", "x").axes
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before


def test_use_style_sets_the_style_for_other_plots():
    with plt.rc_context():
        figures.use_style()
        assert plt.rcParams["image.cmap"] == figures.MAP_COLOURS
        assert next(iter(plt.rcParams["axes.prop_cycle"]))["color"] == figures.NORMAL


# --- images and maps -----------------------------------------------------------------------------


def test_image_grid_shows_every_image_unscaled():
    dim = np.full((8, 8), 7, np.uint8)
    figure = figures.image_grid([IMAGE, dim, IMAGE], ["a", "b", "c"], columns=2, suptitle="see")
    shown = visible(figure)
    assert len(figure.axes) == 4 and len(shown) == 3
    assert [ax.get_title() for ax in shown] == ["a", "b", "c"]
    assert np.array_equal(shown[0].images[0].get_array(), IMAGE)
    assert shown[1].images[0].get_clim() == (0, 255)
    assert figure.get_suptitle() == "see"


def test_image_grid_frames_in_the_given_colours():
    colours = [figures.NORMAL, figures.ANOMALOUS]
    figure = figures.image_grid([IMAGE, IMAGE], colours=colours)
    edges = [to_hex(ax.spines["left"].get_edgecolor()) for ax in figure.axes]
    assert edges == [colour.lower() for colour in colours]


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        ([], {}, "no images"),
        ([IMAGE], {"titles": ["a", "b"]}, "1 images but 2 titles"),
        ([IMAGE], {"colours": []}, "1 images but 0 colours"),
        ([IMAGE / 255], {}, "uint8 of shape"),
        ([IMAGE[..., :2]], {}, "uint8 of shape"),
    ],
)
def test_image_grid_refuses(images, options, words):
    with pytest.raises(ValueError, match=words):
        figures.image_grid(images, **options)


def test_map_panel_has_one_colour_scale_and_one_bar_per_map():
    limits = {"st": (0.0, 2.0), "ae": (-1.0, 1.0), "unused": (0.0, 1.0)}
    rows = [row("first"), row("second"), row("third")]
    figure = figures.map_panel(rows, ["st", "ae"], limits)
    grid = np.array(figure.axes).reshape(4, 3)
    for column, name in ((1, "st"), (2, "ae")):
        assert grid[0, column].get_title() == name
        for line, content in zip(grid[:-1], rows, strict=True):
            image = line[column].images[0]
            assert image.get_clim() == limits[name]
            assert image.get_cmap().name == figures.MAP_COLOURS
            assert np.array_equal(image.get_array(), content["maps"][name])
    assert len(visible(figure)) == 3 * 3 + 2  # and one colour bar for each map
    assert [tuple(ax.get_xlim()) for ax in grid[-1, 1:]] == [limits["st"], limits["ae"]]
    assert [line[0].get_ylabel() for line in grid[:-1]] == ["first", "second", "third"]


def test_map_panel_outlines_the_mask_where_it_is():
    mask = np.zeros((40, 60), bool)
    mask[10:20, 30:50] = True
    figure = figures.map_panel([row(mask=mask), row()], ["st"], {"st": (0, 1)})
    image, without = figure.axes[0], figure.axes[2]
    assert len(without.collections) == 0
    (outline,) = {tuple(c.get_paths()[0].get_extents().extents) for c in image.collections}
    assert outline == (29.5, 9.5, 49.5, 19.5)  # left, top, right, bottom: between the pixels
    assert image.get_xlim() == (-0.5, 59.5) and image.get_ylim() == (39.5, -0.5)


def test_map_panel_shows_the_truth_in_a_column_of_its_own():
    mask = np.zeros((40, 60), bool)
    mask[10:20, 30:50] = True
    rows = [row(mask=mask), row(mask=np.zeros((40, 60), bool)), row()]
    figure = figures.map_panel(rows, ["st", "ae"], {"st": (0, 1), "ae": (0, 2)}, truth=True)
    grid = np.array(figure.axes).reshape(4, 4)
    assert [ax.get_title() for ax in grid[0]] == ["image", "ground truth", "st", "ae"]
    assert [len(line[0].collections) for line in grid[:-1]] == [0, 0, 0]  # no outlines
    shown = [line[1].images[0].get_array() for line in grid[:-1]]
    assert np.array_equal(shown[0], mask)
    assert shown[1].shape == shown[2].shape == (40, 60) and not np.any(shown[1:])
    assert [texts(line[1]) for line in grid[:-1]] == [[""], ["no defect"], ["no mask"]]
    assert [line[3].images[0].get_clim() for line in grid[:-1]] == [(0, 2)] * 3
    assert [ax.axison for ax in grid[-1]] == [False, False, True, True]


def test_map_panel_keeps_the_lines_of_a_title_and_wraps_each():
    title = "swapped nuts and washers\nscore 0.19: found"
    figure = figures.map_panel([row(title)], ["st"], {"st": (0, 1)})
    assert figure.axes[0].get_ylabel() == "swapped nuts and\nwashers\nscore 0.19: found"


@pytest.mark.parametrize("full", [True, False])
def test_map_panel_takes_a_mask_of_everything_or_nothing(full):
    rows = [row(mask=np.full((40, 60), full))]
    figure = figures.map_panel(rows, ["st"], {"st": (0, 1)})
    assert bool(figure.axes[0].collections) == full


@pytest.mark.parametrize(
    ("rows", "columns", "limits", "words"),
    [
        ([row("cell")], ["st", "x"], {"st": (0, 1), "x": (0, 1)}, "'cell' has no map 'x'"),
        ([row()], ["st"], {"ae": (0, 1)}, "'st' has no limits; there are ae"),
        ([row()], ["st"], {"st": (1, 1)}, "lowest, highest"),
        ([], ["st"], {"st": (0, 1)}, "at least one row"),
        ([row()], [], {}, "at least one row"),
    ],
)
def test_map_panel_refuses(rows, columns, limits, words):
    with pytest.raises(ValueError, match=words):
        figures.map_panel(rows, columns, limits)


def test_matrix_symmetric_puts_zero_in_the_middle():
    values = np.array([[-1.0, 0.5], [0.0, 3.0]])
    image = figures.matrix(values, "title", symmetric=True, label="r").axes[0].images[0]
    assert image.get_clim() == (-3, 3)
    assert figures.matrix(values, "title").axes[0].images[0].get_clim() == (-1, 3)
    assert figures.matrix(values, "title", limits=(0, 9)).axes[0].images[0].get_clim() == (0, 9)
    with pytest.raises(ValueError, match="two axes"):
        figures.matrix(values.ravel(), "title")


def test_patches_are_drawn_around_their_centres():
    centres = np.array([[16.0, 16.0], [16.0, 20.0]])
    ax = figures.patches_on_image(IMAGE, centres, [1], side=33, title="patches").axes[0]
    (patch,) = ax.patches
    assert patch.get_bbox().extents.tolist() == [3.5, -0.5, 36.5, 32.5]
    assert ax.lines[0].get_xydata().tolist() == centres[:, ::-1].tolist()


# --- distributions and curves --------------------------------------------------------------------


def test_score_histogram_shares_bins_and_adds_up_to_one():
    groups = {"normal": RNG.normal(size=50), "anomalous": RNG.normal(3, 1, size=9)}
    ax = figures.score_histogram(groups, "title", threshold=1.25).axes[0]
    heights = np.array([[bar.get_height() for bar in group] for group in ax.containers])
    assert np.allclose(heights.sum(axis=1), 1)
    left, right = ([bar.get_x() for bar in group] for group in ax.containers)
    assert left == right
    assert legend(ax) == ["normal (50 images)", "anomalous (9 images)", "threshold 1.25"]
    colours = [to_hex(container[0].get_facecolor()) for container in ax.containers]
    assert colours == [figures.NORMAL.lower(), figures.ANOMALOUS.lower()]


def test_groups_of_other_names_get_other_colours():
    groups = {name: [0.0, 1.0] for name in ("crack", "normal", "stain", "anomalous")}
    ax = figures.score_histogram(groups, "title").axes[0]
    colours = [to_hex(container[0].get_facecolor()) for container in ax.containers]
    assert len(set(colours)) == 4
    assert colours[1] == figures.NORMAL.lower() and colours[3] == figures.ANOMALOUS.lower()


@pytest.mark.parametrize("scores", [[], [np.nan], [1.0, np.inf]])
def test_score_histogram_refuses_scores_that_are_none(scores):
    with pytest.raises(ValueError, match="the scores of 'normal' must be finite"):
        figures.score_histogram({"normal": scores}, "title")


def test_map_distributions_share_both_axes():
    values = {"st": RNG.exponential(size=400), "ae": RNG.exponential(9, size=300)}
    lines = {"st": {"$q_a$": 1.0, "$q_b$": 2.0}}
    figure = figures.map_distributions(values, lines, title="title")
    left, right = figure.axes
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
    assert left.get_yscale() == "log"
    assert [line.get_xdata()[0] for line in left.lines] == [1.0, 2.0] and not right.lines
    assert legend(left) == ["$q_a$ = 1", "$q_b$ = 2"]
    for ax in figure.axes:
        assert np.isclose(sum(bar.get_height() for bar in ax.patches), 1)


def test_map_distributions_may_have_their_own_ranges():
    values = {"st": [0.0, 1.0], "ae": [0.0, 90.0]}
    left, right = figures.map_distributions(values, log=False, share_x=False).axes
    assert left.get_xlim()[1] < 2 and right.get_xlim()[1] > 80
    assert left.get_yscale() == "linear"
    with pytest.raises(ValueError, match="lines for 'x'"):
        figures.map_distributions(values, {"x": {"q": 1}})


def test_curves_leave_nan_out():
    x = np.arange(20)
    y = np.where(x % 4 == 3, x / 2.0, np.nan)
    figure = figures.curves({"loss": (x, x + 1.0), "held out": (x, y)}, "x", "y", "t", log=True)
    ax = figure.axes[0]
    assert ax.lines[1].get_xdata().tolist() == [3, 7, 11, 15, 19]
    assert ax.get_yscale() == "log" and legend(ax) == ["loss", "held out"]
    with pytest.raises(ValueError, match="'a' has x of shape"):
        figures.curves({"a": ([1, 2], [1])}, "x", "y", "t")


def test_curves_with_errors_reach_from_mean_minus_to_mean_plus():
    series = {"a": ([1, 2], [0.5, 0.75]), "b": ([1, 2], [0.25, 0.5])}
    ax = figures.curves(series, "x", "y", "t", errors={"a": [0.125, 0.25]}).axes[0]
    (bars,) = [c for c in ax.collections if hasattr(c, "get_segments")]
    assert [[*segment[:, 1]] for segment in bars.get_segments()] == [[0.375, 0.625], [0.5, 1.0]]
    with pytest.raises(ValueError, match="errors of .'c'., which have no curve"):
        figures.curves(series, "x", "y", "t", errors={"c": [0, 0]})
    with pytest.raises(ValueError, match="'b' has 2 values and 1 errors"):
        figures.curves(series, "x", "y", "t", errors={"b": [0.1]})


def test_roc_curves_enclose_the_areas_of_their_legend():
    labels = np.repeat([0, 1], [40, 25])
    scores = {
        "good": RNG.normal(labels * 2.0),
        "ties": np.round(RNG.normal(labels)),
        "constant": np.zeros(65),
    }
    ax = figures.roc_curves(labels, scores, "title").axes[0]
    for (name, values), line, text in zip(scores.items(), ax.lines, legend(ax), strict=False):
        area = image_auroc(labels, values)
        assert text == f"{name}: {area:.3f}"
        x, y = line.get_data()
        assert np.isclose(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2), area)
    with pytest.raises(ValueError, match="one class"):
        figures.roc_curves(np.zeros(3), {"a": np.arange(3)}, "title")


def test_bars_write_their_numbers():
    ax = figures.bars({"a": 0.91, "b": 0.5}, "t", "x", errors={"a": 0.02}, baseline=0.5).axes[0]
    assert texts(ax) == ["0.910 ± 0.020", "0.500"]
    assert [bar.get_width() for bar in ax.patches] == [0.91, 0.5]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first at the top
    assert any(line.get_xdata()[0] == 0.5 and line.get_ls() == "--" for line in ax.lines)


def test_bars_of_counts_and_on_a_logarithmic_axis():
    ax = figures.bars({"T": 2_694_144, "bottleneck": 64}, "t", "x", log=True).axes[0]
    assert texts(ax) == ["2,694,144", "64"] and ax.get_xscale() == "log"
    assert 1 < ax.get_xlim()[0] < 64


@pytest.mark.parametrize(
    ("values", "errors", "words"),
    [
        ({}, None, "no values"),
        ({"a": 1.0}, {"b": 1.0}, "errors of"),
        ({"a": np.nan}, None, "must be finite"),
    ],
)
def test_bars_refuse(values, errors, words):
    with pytest.raises(ValueError, match=words):
        figures.bars(values, "t", "x", errors=errors)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.score_histogram({}, "t"),
        lambda: figures.map_distributions({}),
        lambda: figures.curves({}, "x", "y", "t"),
        lambda: figures.roc_curves([0, 1], {}, "t"),
    ],
)
def test_nothing_to_show_is_an_error(draw):
    with pytest.raises(ValueError, match="there are no"):
        draw()


# --- the method ----------------------------------------------------------------------------------


def test_the_texts_of_the_diagram_fit_into_their_boxes():
    figure = figures.pipeline_diagram()
    figure.canvas.draw()
    ax = figure.axes[0]
    named = [text for text in ax.texts if text.get_text()]
    boxes = [patch.get_window_extent() for patch in ax.patches]
    assert len(named) == len(boxes) == 7
    for text, box in zip(named, boxes, strict=True):
        inside = text.get_window_extent()
        assert box.x0 < inside.x0 and inside.x1 < box.x1
        assert box.y0 < inside.y0 and inside.y1 < box.y1


def test_matrices_share_one_scale():
    values = {"a": np.eye(4), "b": -np.ones((3, 5))}
    figure = figures.matrices(values, "title", xlabel="x", ylabel="y", label="r")
    *panels, bar = figure.axes
    assert [ax.get_title() for ax in panels] == ["a", "b"] and bar.get_ylabel() == "r"
    for ax, matrix in zip(panels, values.values(), strict=True):
        assert ax.images[0].get_clim() == (-1, 1)
        np.testing.assert_array_equal(ax.images[0].get_array(), matrix)
    for bad in ({}, {"a": np.full((2, 2), 1.1)}, {"a": np.full((2, 2), np.nan)}):
        with pytest.raises(ValueError, match="no matrices|no correlations"):
            figures.matrices(bad, "title")
