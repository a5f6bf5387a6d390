"""The forest plot: how each arm differs from naive, with its interval and what could have been seen at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .style import BAND, GRID, INK, MUTED, PAPER, ROLE_COLOURS, ROLE_MARKERS, new_figure, plain, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROLE_NAMES = {
    "method": "method",
    "control": "control (trivial, may be chosen)",
    "reference": "reference (not to be chosen)",
}


@dataclass(frozen=True)
class ForestRow:
    """One arm, all values in the unit of the axis.

    Attributes:
        name (`str`): The arm.
        role (`str`): `"method"`, `"control"` or `"reference"`.
        mean, low, high (`float`): Difference to naive and its interval.
        significant (`bool`): Whether it is significant after correction for the number of arms.
        detectable (`float`, *optional*): Smallest true difference that would have been found.
    """

    name: str
    role: str
    mean: float
    low: float
    high: float
    significant: bool = False
    detectable: float | None = None


def plot_forest(
    rows: Sequence[ForestRow],
    unit: str,
    title: str = "",
    higher_is_better: bool = True,
    digits: int = 1,
    level: str = "95% interval",
) -> "Figure":
    """Draws the difference of every arm to naive, best first, references below the arms that could be chosen.

    Filled markers are significant after correction for the number of arms. The grey band of a row ends at the smallest
    true difference that would have been found: within it, "no difference" means that none could be seen. What lies
    far outside of all arms that could be chosen is an arrow with its value.

    Args:
        rows (sequence of [`ForestRow`]): The arms, naive not among them.
        unit (`str`): Of the differences, such as `points`.
        title (`str`, *optional*): Title.
        higher_is_better (`bool`, *optional*, defaults to `True`): Which side is the better one.
        digits (`int`, *optional*, defaults to `1`): Decimals of the values.
        level (`str`, *optional*, defaults to `"95% interval"`): What the bars are.

    Raises:
        `ValueError`: when there is no row.
        `ImportError`: when matplotlib is missing.
    """
    if not rows:
        raise ValueError("a forest plot needs at least one arm besides naive")
    sign = -1 if higher_is_better else 1
    ordered = sorted(rows, key=lambda row: (row.role == "reference", sign * row.mean))
    figure = new_figure(7.5, 1.7 + 0.26 * len(ordered))
    axes = figure.subplots()
    left, right = _limits(ordered)
    axes.set_xlim(left, right)
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    for place, row in enumerate(ordered):
        _draw_row(axes, place, row, left, right, digits)
    choosable = sum(row.role != "reference" for row in ordered)
    if 0 < choosable < len(ordered):
        axes.axhline(choosable - 0.5, color=GRID, linewidth=1)
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    axes.set_yticks(range(len(ordered)), [plain(row.name) for row in ordered])
    better, worse = ("better →", "← worse") if higher_is_better else ("worse →", "← better")
    style_axes(axes, title, f"{worse}\u2003 difference to naive, {unit}, with {level}\u2003 {better}", "", "x")
    axes.spines[["bottom", "left"]].set_visible(False)
    for text, row in zip(axes.get_yticklabels(), ordered, strict=True):
        text.set_color(INK)
        text.set_fontweight("bold" if row.significant else "normal")
    _legend(figure, ordered)
    return figure


def _limits(rows: Sequence[ForestRow]) -> tuple[float, float]:
    """Ends of the axis: all that belongs to arms that could be chosen, and references up to 1.6 times as far."""
    choosable = [row for row in rows if row.role != "reference"] or list(rows)
    reach = max(max(abs(row.low), abs(row.high), row.detectable or 0.0) for row in choosable) or 1.0
    ends = [end for row in rows for end in (row.low, row.high) if abs(end) <= 1.6 * reach] + [-reach, reach]
    width = max(ends) - min(ends)
    return min(ends) - 0.04 * width, max(ends) + 0.04 * width


def _draw_row(axes: "Axes", place: int, row: ForestRow, left: float, right: float, digits: int) -> None:
    colour, marker = ROLE_COLOURS[row.role], ROLE_MARKERS[row.role]
    if row.detectable:
        start, end = max(-row.detectable, left), min(row.detectable, right)
        axes.barh(place, end - start, left=start, height=0.86, color=BAND, zorder=0)
    if left <= row.mean <= right:
        axes.plot([max(row.low, left), min(row.high, right)], [place, place], color=colour, linewidth=1.8, zorder=2)
        face = colour if row.significant else PAPER
        axes.plot(
            row.mean, place, marker=marker, color=colour, markerfacecolor=face, markersize=6, linewidth=0, zorder=3
        )
    else:
        inside = 0.015 * (right - left)
        edge, towards = (left + inside, "<") if row.mean < left else (right - inside, ">")
        axes.plot(edge, place, marker=towards, color=colour, markersize=7, linewidth=0, zorder=3)
    numbers = f"{row.mean:+.{digits}f} [{row.low:+.{digits}f}, {row.high:+.{digits}f}]".replace("-", "−")
    axes.annotate(
        f"{numbers} *" if row.significant else numbers,
        (1.01, place),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=8.5,
        color=INK,
        fontweight="bold" if row.significant else "normal",
    )


def _legend(figure: "Figure", rows: Sequence[ForestRow]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    roles = [role for role in _ROLE_NAMES if any(row.role == role for row in rows)]
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=ROLE_COLOURS[role], marker=ROLE_MARKERS[role], markerfacecolor=PAPER, linewidth=1.8)
        for role in roles
    ]
    labels = [_ROLE_NAMES[role] for role in roles]
    handles.append(Line2D([], [], color=MUTED, marker="o", markerfacecolor=MUTED, linewidth=1.8))
    labels.append("filled, *: significant (Holm)")
    if any(row.detectable for row in rows):
        handles.append(Patch(color=BAND))
        labels.append("differences found in fewer than 4 of 5 such comparisons")
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5, labelcolor=INK)
