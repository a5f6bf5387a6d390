"""Score against learning rate, one panel per arm with naive behind it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .style import BLUE, GREEN, INK, MUTED, ROLE_COLOURS, VERMILION, legend, new_figure, plain, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_COLUMNS = 4


@dataclass(frozen=True)
class RateCurve:
    """One setting of an arm."""

    rates: Sequence[float]  # learning rates, increasing
    values: Sequence[float]  # score at each rate, in the unit of the axis; NaN leaves a gap
    intervals: Sequence[Sequence[float]] = field(default_factory=tuple)  # of each rate
    label: str = ""  # the setting, if the arm has several


@dataclass(frozen=True)
class RatePanel:
    """An arm with its role and curves."""

    name: str
    role: str
    curves: Sequence[RateCurve]


def plot_learning_rates(
    panels: Sequence[RatePanel],
    naive: RateCurve,
    score_name: str,
    x_name: str = "learning rate",
    ticks: Sequence[int] = (),
) -> "Figure":
    """Plot the score of every arm at every learning rate, with naive in grey in each panel.

    `x_name` is what the rates of the curves are, and `ticks` replaces powers of ten on their axis.

    Raises:
        `ValueError`: if there is no panel.
        `ImportError`: if matplotlib is not installed.
    """
    if not panels:
        raise ValueError("the learning rate plot has no panels; give at least one arm besides naive")
    columns = min(_MOST_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(max(1.9 * columns, 3.2), 0.75 + 1.45 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, panel, naive)
    curves = [naive, *(curve for panel in panels for curve in panel.curves)]
    grid[0, 0].set_ylim(_limits([value for curve in curves for value in curve.values]))
    # without a finite value, the axis would not show the rates
    low, high = _limits([math.log10(rate) for curve in curves for rate in curve.rates])
    grid[0, 0].set_xlim(10**low, 10**high)
    if ticks:
        grid[0, 0].set_xticks(ticks, [str(tick) for tick in ticks])
    for number, axes in enumerate(grid.flat):
        axes.set_visible(number < len(panels))
        # label the last panel of each column, also where the last row is not full
        axes.xaxis.set_tick_params(labelbottom=number + columns >= len(panels))
    shaded = "; shaded: 95% interval" if len(naive.intervals) else ""
    figure.supxlabel(f"{x_name} (grey: naive{shaded})", fontsize=9.5, color=INK)
    figure.supylabel(plain(score_name), fontsize=9.5, color=INK)
    return figure


def _draw_panel(axes: "Axes", panel: RatePanel, naive: RateCurve) -> None:
    _draw_curve(axes, naive, MUTED, "-", 1.2)
    several = len(panel.curves) > 1
    single = INK if panel.role == "reference" else ROLE_COLOURS[panel.role]
    colours = [BLUE, VERMILION, GREEN, INK] if several else [single]
    for number, curve in enumerate(panel.curves):
        style = ("-", "--", ":", "-.")[number % 4]
        _draw_curve(axes, curve, colours[number % 4], style, 1.6, fill=not several)
    axes.set_xscale("log")
    axes.minorticks_off()
    style_axes(axes, "", "", "", "both")
    axes.set_title(plain(panel.name), fontsize=8.5 if len(panel.name) < 25 else 7, color=INK, pad=3)
    axes.tick_params(which="both", labelsize=7)
    if several:
        legend(axes, loc="best", fontsize=6, handlelength=1.9, labelspacing=0.15)


def _draw_curve(axes: "Axes", curve: RateCurve, colour: str, style: str, width: float, fill: bool = True) -> None:
    marker = "." if len(curve.rates) < 8 else ""
    axes.plot(curve.rates, curve.values, style, color=colour, linewidth=width, marker=marker, label=plain(curve.label))
    if fill and len(curve.intervals):
        lows, highs = zip(*curve.intervals, strict=True)
        axes.fill_between(curve.rates, lows, highs, color=colour, alpha=0.16, linewidth=0)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Return limits around all finite values."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room
