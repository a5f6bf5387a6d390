"""The loss around Θ0 in the plane of the states, with the states and the predicted weights on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .style import INK, MUTED, PAPER, VERMILION, new_figure, plain, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LandscapePoint:
    """Weights in the plane.

    Attributes:
        name (`str`): What they are.
        kind (`str`): `"state"` or `"arm"`.
        x, y (`float`): Their projection on the plane.
        loss (`float`, *optional*): Their own loss, not that of the projection.
        off_plane (`float`): Their distance from the plane.
    """

    name: str
    kind: str
    x: float
    y: float
    loss: float | None
    off_plane: float


def plot_landscape(
    x: Sequence[float],
    y: Sequence[float],
    loss: Sequence[Sequence[float | None]],
    points: Sequence[LandscapePoint],
    loss_name: str = "loss",
    explained: Sequence[float] | None = None,
    title: str = "",
) -> "Figure":
    """Draws the loss on a grid of the plane, states joined in their order, other weights as diamonds.

    Args:
        x, y (`Sequence[float]`): Coordinates of the grid, distances in weights with Θ0 at (0, 0).
        loss (`(len(y), len(x))`): Loss at the grid's points; `None` where it is not finite.
        points (sequence of [`LandscapePoint`]): States in their order, full data first, and arms.
        loss_name (`str`, *optional*, defaults to `"loss"`): Label of the colours.
        explained (`Sequence[float]` of length 2, *optional*): Shares of the axes.
        title (`str`, *optional*): Title.

    Raises:
        `ValueError`: when loss and grid differ in shape, or no loss is finite.
        `ImportError`: when matplotlib is missing.
    """
    values = np.array([[np.nan if value is None else value for value in row] for row in loss], dtype=np.float64)
    if values.shape != (len(y), len(x)):
        raise ValueError(f"loss of shape {values.shape} does not fit a grid of {len(y)} times {len(x)} points")
    if not np.isfinite(values).any():
        raise ValueError("no loss of the grid is finite: there is nothing to draw")
    shape = (max(y) - min(y)) / (max(x) - min(x))
    figure = new_figure(7.5, min(max(1.5 + 5.2 * shape, 3.2), 8.0))
    axes = figure.subplots()
    levels = _levels(values)
    filled = axes.contourf(x, y, np.ma.masked_invalid(values), levels=levels, cmap="cividis", extend="max")
    filled.set_edgecolor("face")  # else viewers show seams between the fills
    bar = figure.colorbar(filled, ax=axes, shrink=0.85, format="%.3g")
    bar.set_label(plain(loss_name), color=INK)
    bar.ax.tick_params(colors=MUTED)
    bar.outline.set_visible(False)
    states = [point for point in points if point.kind == "state"]
    way = [p.x for p in states], [p.y for p in states]
    axes.plot(*way, color=PAPER, linewidth=3.2, zorder=2)
    axes.plot(*way, color=INK, marker="o", linewidth=1.2, zorder=3, label="states, in their order")
    arms = [point for point in points if point.kind != "state"]
    axes.plot(
        [p.x for p in arms],
        [p.y for p in arms],
        marker="D",
        color=VERMILION,
        markeredgecolor=PAPER,
        markersize=8,
        linewidth=0,
        zorder=4,
        label="other weights, projected on the plane",
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5, labelcolor=INK)
    first, second = ("", "") if explained is None else (f"{share:.0%}" for share in explained)
    below = f"first principal direction of the states{f' ({first} of their squared distances to Θ0)' if first else ''}"
    style_axes(axes, title, below, f"second{f' ({second})' if second else ''}", "both")
    axes.grid(False)
    axes.set_aspect("equal")
    _label(axes, points)
    return figure


def _levels(values: np.ndarray) -> np.ndarray:
    """Levels from the lowest loss to where nine of ten points lie below: a bowl's edge is not to hide its floor."""
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(np.quantile(finite, 0.9))
    return np.linspace(low, high if high > low else low + 1e-6 + abs(low) * 1e-3, 15)


def _label(axes: "Axes", points: Sequence[LandscapePoint]) -> None:
    """Names beside the points, each where it covers the fewest others."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # else the limits are not known yet
    inch = figure.dpi / 72  # pixels of a point of 1/72 inch
    places = axes.transData.transform([(point.x, point.y) for point in points])
    taken = [np.concatenate([place - 5 * inch, place + 5 * inch]) for place in places]
    frame = np.array(axes.get_window_extent().extents)
    for point, place in zip(points, places, strict=True):
        size = inch * np.array([5.4 * len(plain(point.name)) + 4, 12.0])
        offsets = [
            reach * np.array([np.cos(angle), np.sin(angle)])
            for reach in (9.0, 18.0, 30.0, 45.0)
            for angle in np.linspace(0, 2 * np.pi, 24, endpoint=False)
        ]
        boxes = [_box(place + inch * offset, size, offset[0] < 0) for offset in offsets]
        costs = [
            sum(_overlap(box, other) for other in taken) + 1e4 * _outside(box, frame) + float(np.hypot(*offset))
            for box, offset in zip(boxes, offsets, strict=True)
        ]
        best = int(np.argmin(costs))
        taken.append(boxes[best])
        x, y = offsets[best]
        axes.annotate(
            plain(point.name),
            (point.x, point.y),
            xytext=(x, y),
            textcoords="offset points",
            ha="right" if x < 0 else "left",
            va="center",
            fontsize=8.5,
            color=INK,
            zorder=5,
            bbox={"boxstyle": "round,pad=0.12", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.82},
            arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.6} if np.hypot(x, y) > 12 else None,
        )


def _box(anchor: np.ndarray, size: np.ndarray, is_left: bool) -> np.ndarray:
    low = anchor - [size[0] if is_left else 0.0, size[1] / 2]
    return np.concatenate([low, low + size])


def _outside(box: np.ndarray, frame: np.ndarray) -> float:
    return float(np.maximum(frame[:2] - box[:2], 0).sum() + np.maximum(box[2:] - frame[2:], 0).sum())


def _overlap(box: np.ndarray, other: np.ndarray) -> float:
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return float(max(width, 0) * max(height, 0))
