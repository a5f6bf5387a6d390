"""Forest plot: the difference of each arm to naive, with its interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .style import BAND, GRID, INK, MUTED, PAPER, ROLE_COLOURS, ROLE_MARKERS, legend, new_figure, plain, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROLE_LABELS = {"method": "method", "control": "control (trivial)", "reference": "reference (not a candidate)"}


@dataclass(frozen=True)
class ForestRow:
    """One arm, in the unit of the axis."""

    name: str
    role: str  # method, control or reference
    mean: float  # difference from naive, and its interval
    low: float
    high: float
    significant: bool = False  # after correction for the number of arms
    detectable: float | None = None  # minimum detectable difference


def plot_forest(
    rows: Sequence[ForestRow],
    unit: str,
    title: str = "",
    higher_is_better: bool = True,
    digits: int = 1,
    level: str = "95% interval",
) -> "Figure":
    """Plot the difference of every arm to naive, best first, references below the candidates.

    Filled markers are significant. A grey band ends at the minimum detectable difference. An arrow with its value
    replaces a reference far outside the range of the candidates.

    Raises:
        `ValueError`: if there is no row.
        `ImportError`: if matplotlib is not installed.
    """
    if not rows:
        raise ValueError("the forest plot has no rows; give at least one arm besides naive")
    sign = -1 if higher_is_better else 1
    ordered = sorted(rows, key=lambda row: (row.role == "reference", sign * row.mean))
    figure = new_figure(7.5, 1.7 + 0.26 * len(ordered))
    axes = figure.subplots()
    axes.set_xlim(*_limits(ordered))
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    for index, row in enumerate(ordered):
        _draw_row(axes, index, row, digits)
    num_candidates = sum(row.role != "reference" for row in ordered)
    if 0 < num_candidates < len(ordered):
        axes.axhline(num_candidates - 0.5, color=GRID, linewidth=1)
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    axes.set_yticks(range(len(ordered)), [plain(row.name) for row in ordered])
    better, worse = ("better →", "← worse") if higher_is_better else ("worse →", "← better")
    style_axes(axes, title, f"{worse}\u2003 difference from naive, {unit}, with {level}\u2003 {better}", "", "x")
    axes.spines[["bottom", "left"]].set_visible(False)
    for text, row in zip(axes.get_yticklabels(), ordered, strict=True):
        text.set(color=INK, fontweight="bold" if row.significant else "normal")
    _draw_legend(figure, ordered)
    return figure


def _limits(rows: Sequence[ForestRow]) -> tuple[float, float]:
    """Return limits that contain all candidates, and references up to 1.6 times as far out."""
    candidates = [row for row in rows if row.role != "reference"] or list(rows)
    reach = max(max(abs(row.low), abs(row.high), row.detectable or 0.0) for row in candidates) or 1.0
    ends = [end for row in rows for end in (row.low, row.high) if abs(end) <= 1.6 * reach] + [-reach, reach]
    width = max(ends) - min(ends)
    return min(ends) - 0.04 * width, max(ends) + 0.04 * width


def _draw_row(axes: "Axes", index: int, row: ForestRow, digits: int) -> None:
    left, right = axes.get_xlim()
    colour, marker = ROLE_COLOURS[row.role], ROLE_MARKERS[row.role]
    if row.detectable:
        start, end = max(-row.detectable, left), min(row.detectable, right)
        axes.barh(index, end - start, left=start, height=0.86, color=BAND, zorder=0)
    x, face = row.mean, colour if row.significant else PAPER
    if left <= x <= right:
        axes.plot([max(row.low, left), min(row.high, right)], [index, index], color=colour, linewidth=1.8, zorder=2)
    else:
        margin, face = 0.015 * (right - left), colour
        x, marker = (left + margin, "<") if x < left else (right - margin, ">")
    axes.plot(x, index, marker=marker, color=colour, markerfacecolor=face, linewidth=0, zorder=3)
    numbers = f"{row.mean:+.{digits}f} [{row.low:+.{digits}f}, {row.high:+.{digits}f}]".replace("-", "−")
    axes.annotate(
        f"{numbers} *" if row.significant else numbers,
        (1.01, index),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=8.5,
        color=INK,
        fontweight="bold" if row.significant else "normal",
    )


def _draw_legend(figure: "Figure", rows: Sequence[ForestRow]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: dict[str, Line2D | Patch] = {}
    for role, label in _ROLE_LABELS.items():
        if any(row.role == role for row in rows):
            colour, marker = ROLE_COLOURS[role], ROLE_MARKERS[role]
            handles[label] = Line2D([], [], color=colour, marker=marker, markerfacecolor=PAPER, linewidth=1.8)
    handles["filled, *: significant (Holm)"] = Line2D([], [], color=MUTED, marker="o", linewidth=1.8)
    if any(row.detectable for row in rows):
        handles["below the minimum detectable difference (power 80%)"] = Patch(color=BAND)
    legend(figure, handles.values(), handles.keys(), ncols=2)
