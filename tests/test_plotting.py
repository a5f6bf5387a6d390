import sys
from xml.dom import minidom

import numpy as np
import pytest

from know_hf.plotting import (
    ForestRow,
    ForgettingPanel,
    LandscapePoint,
    RateCurve,
    RatePanel,
    adaptive_svg,
    figure_svg,
    plot_forest,
    plot_forgetting,
    plot_forgetting_panels,
    plot_landscape,
    plot_learning_rates,
    save_figure,
)

SIZES = [1600, 800, 400]
ROWS = [
    ForestRow("random", "reference", -9.0, -10.0, -8.0),
    ForestRow("shrink", "control", 0.2, -0.4, 0.8, detectable=1.0),
    ForestRow("known", "method", 1.5, 0.9, 2.1, significant=True, detectable=1.2),
    ForestRow("oracle", "reference", 3.0, 2.0, 4.0),
]
GRID = [-1.0, 0.0, 1.0, 2.0]
LOSS = [[float(x * x + y * y) for x in GRID] for y in GRID]
POINTS = [
    LandscapePoint("Θ0", "state", 0, 0, 0.1, 0),
    LandscapePoint("Θ1", "state", 1, 0.5, 0.2, 0),
    LandscapePoint("known-1", "arm", 0.05, 0.02, 0.1, 0.3),
]


def texts(labels):
    return [label.get_text() for label in labels]


def test_forgetting_curve():
    runs = np.array([[0.9, 0.8, 0.6], [0.7, 0.6, 0.4]])
    axes = plot_forgetting(SIZES, runs, title="Forgetting here", chance=0.1).axes[0]
    mean = next(line for line in axes.lines if line.get_label().startswith("mean of 2 runs"))
    assert mean.get_ydata() == pytest.approx([0.8, 0.7, 0.5])
    assert texts(axes.get_xticklabels()) == ["Θ0\n1,600 (all)", "Θ1\n800", "Θ2\n400"]
    assert texts(axes.texts) == ["0.800", "0.700", "0.500"] and axes.get_title() == "Forgetting here"
    assert len(axes.get_legend().get_texts()) == 3
    single = plot_forgetting([None, 5], [0.9, 0.8], digits=1).axes[0]
    assert len(single.lines) == 1
    assert texts(single.get_xticklabels()) == ["Θ0", "Θ1\n5"] and texts(single.texts) == ["0.9", "0.8"]


def test_forgetting_in_two_panels():
    """The standard error is drawn, noise does not fill the axis, and labels keep off the line."""
    runs = np.array([[0.9, 0.8, 0.6], [0.7, 0.6, 0.4]])
    accuracy, loss = plot_forgetting_panels(
        SIZES, [ForgettingPanel(runs, "accuracy", 0.5), ForgettingPanel([0.31, 0.32, 0.33], "loss")]
    ).axes
    (bars,) = [collection for collection in accuracy.collections if hasattr(collection, "get_segments")]
    assert bars.get_segments()[0][:, 1] == pytest.approx([0.7, 0.9])  # mean 0.8, deviation 0.141, two runs
    assert "guessing: 0.500" in texts(accuracy.get_legend().get_texts())
    low, high = loss.get_ylim()
    assert high - low == pytest.approx(0.1) and (high + low) / 2 == pytest.approx(0.32)
    assert [text.get_va() for text in loss.texts] == ["top", "bottom", "bottom"] and loss.get_legend() is None
    assert [text.get_ha() for text in loss.texts] == ["center", "right", "center"]  # beside a rising line
    assert [text.get_va() for text in accuracy.texts] == ["bottom", "bottom", "top"]


def test_forest_plot():
    figure = plot_forest(ROWS, "points", "accuracy")
    axes = figure.axes[0]
    assert texts(axes.get_yticklabels()) == ["known", "shrink", "oracle", "random"]
    assert [label.get_fontweight() for label in axes.get_yticklabels()] == ["bold", *["normal"] * 3]
    values = ["+1.5 [+0.9, +2.1] *", "+0.2 [−0.4, +0.8]", "+3.0 [+2.0, +4.0]", "−9.0 [−10.0, −8.0]"]
    assert texts(axes.texts) == values
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is at the top
    assert "naive, points" in axes.get_xlabel() and axes.get_xlabel().endswith("better →")
    assert len(figure.legends[0].get_texts()) == 5
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(-1.2, 2.4), (-1.0, 2.0)]
    faces = {line.get_marker(): line.get_markerfacecolor() == line.get_color() for line in axes.lines}
    assert faces["o"] is True and faces["s"] is False
    left, right = axes.get_xlim()
    assert -3 < left < -2 and 2.1 < right < 4
    markers = {line.get_marker(): line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1}
    assert left < markers["<"] < left + 0.1 and markers["o"] == 1.5


def test_forest_where_lower_is_better():
    axes = plot_forest(ROWS, "loss", higher_is_better=False, digits=3).axes[0]
    assert texts(axes.get_yticklabels()) == ["shrink", "known", "random", "oracle"]
    assert axes.get_xlabel().startswith("← better")
    assert axes.texts[0].get_text() == "+0.200 [−0.400, +0.800]"


def test_every_arm_has_a_panel_with_naive_behind():
    naive = RateCurve([0.1, 1], [0.5, 0.6], [[0.4, 0.6], [0.5, 0.7]])
    single = RatePanel("known", "method", [RateCurve([0.1, 1], [0.6, 0.5])])
    several = RatePanel(
        "shrink", "control", [RateCurve([0.1], [0.3], label="factor 1"), RateCurve([1], [0.8], label="factor 2")]
    )
    figure = plot_learning_rates([single, several, *[single] * 3], naive, "accuracy")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == ["known", "shrink", "known", "known", "known"]
    assert all(list(axes.lines[0].get_ydata()) == [0.5, 0.6] and axes.get_xscale() == "log" for axes in shown)
    assert texts(shown[1].get_legend().get_texts()) == ["factor 1", "factor 2"]
    assert len({line.get_linestyle() for line in shown[1].lines[1:]}) == 2
    assert shown[0].get_ylim() == pytest.approx((0.3 - 0.03, 0.8 + 0.03))


def test_landscape_labels_every_point_without_overlap():
    loss = [[None if x == 2 else value for x, value in zip(GRID, row, strict=True)] for row in LOSS]
    figure = plot_landscape(GRID, GRID, loss, POINTS, "validation loss", (0.7, 0.2))
    axes = figure.axes[0]
    assert texts(axes.texts) == ["Θ0", "Θ1", "known-1"]
    assert [text.xy for text in axes.texts] == [(0, 0), (1, 0.5), (0.05, 0.02)]
    assert "70%" in axes.get_xlabel() and "20%" in axes.get_ylabel()
    assert figure.axes[1].get_ylabel() == "validation loss"
    assert [list(line.get_xdata()) for line in axes.lines] == [[0, 1], [0, 1], [0.05]]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for number, a in enumerate(boxes) for b in boxes[:number])


def test_figures_are_written_without_pyplot(tmp_path):
    before = set(sys.modules)
    path = save_figure(plot_forgetting(SIZES, [0.9, 0.8, 0.6]), tmp_path / "new" / "forgetting.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    text = figure_svg(plot_forest(ROWS, "points"))
    assert text.startswith("<svg") and text.rstrip().endswith("</svg>") and "metadata" not in text
    assert save_figure(plot_forest(ROWS, "points"), tmp_path / "forest.svg").read_text("utf-8") == text
    assert ">known</text>" in text  # text, not outlines
    minidom.parseString(text)
    assert "matplotlib.pyplot" not in set(sys.modules) - before


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot_forest(ROWS, "points"),
        lambda: plot_forgetting(SIZES, [0.9, 0.8, 0.6], chance=0.1),
        lambda: plot_learning_rates(
            [RatePanel("a", "method", [RateCurve([1, 9], [1, 2])])], RateCurve([1, 9], [2, 1]), "x"
        ),
        lambda: plot_landscape(GRID, GRID, LOSS, POINTS),
    ],
    ids=["forest", "forgetting", "rates", "landscape"],
)
def test_all_text_changes_its_colour_on_a_dark_page(draw):
    svg = adaptive_svg(figure_svg(draw()))
    texts = minidom.parseString(svg).getElementsByTagName("text")
    assert len(texts) > 5
    for text in texts:  # a power of ten is a group with the colour
        assert "fill: var(--c" in text.getAttribute("style") + text.parentNode.getAttribute("style"), text.toxml()
    assert svg.count("--c0:") == 2  # light and dark


def test_names_are_drawn_as_literal_text():
    rows = [
        ForestRow("$x_{$ <b>&", "method", 1.0, 0.5, 1.5),
        ForestRow("\\frac$", "control", 0.5, 0.1, 0.9),
        ForestRow("学习\x07\ud800", "control", 0.4, 0.1, 0.9),
        ForestRow("x" * 100, "control", 0.3, 0.1, 0.9),
    ]
    document = minidom.parseString(figure_svg(plot_forest(rows, "$", "$a$ $b$")))
    texts = [text.firstChild.data for text in document.getElementsByTagName("text")]
    assert {"$x_{$ <b>&", "\\frac$", "学习", "x" * 31 + "…", "$a$ $b$"} <= set(texts)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_forest([], "points"), "naive"),
        (lambda: plot_learning_rates([], RateCurve([1], [1]), "loss"), "naive"),
        (lambda: plot_landscape(GRID, GRID[:2], LOSS, []), r"\(4, 4\).*2 × 4"),
        (lambda: plot_landscape([0, 1], [0, 1], [[None] * 2] * 2, []), "finite"),
        (lambda: plot_forgetting(SIZES, [0.9, 0.8]), r"3 states, got \(2,\)"),
    ],
)
def test_invalid_input_raises(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
