"""Loss landscape: the loss around Θ0 in the plane of the states."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from .style import INK, MUTED, PAPER, VERMILION, legend, new_figure, plain, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LandscapePoint:
    """Weights, projected on the plane."""

    name: str
    kind: str  # state or arm
    x: float
    y: float
    loss: float | None  # of the weights themselves, not of the projection
    off_plane: float  # distance from the plane


def plot_landscape(
    x: Sequence[float],
    y: Sequence[float],
    loss: Sequence[Sequence[float | None]],
    points: Sequence[LandscapePoint],
    loss_name: str = "loss",
    explained: Sequence[float] | None = None,
) -> "Figure":
    """Plot the loss on a grid, the states joined in order, other weights as diamonds.

    Coordinates are distances in weights, Θ0 at (0, 0). `loss` is `(len(y), len(x))`, `None` where it is not finite.
    `points` are states, full data first, and arms. `explained` is the share of the states' variance along each axis.

    Raises:
        `ValueError`: if loss and grid differ in shape, or no loss is finite.
        `ImportError`: if matplotlib is not installed.
    """
    values = np.array(loss, dtype=np.float64)  # None becomes NaN
    if values.shape != (len(y), len(x)):
        raise ValueError(f"loss has shape {values.shape}, but the grid has {len(y)} × {len(x)} points")
    if not np.isfinite(values).any():
        raise ValueError("the loss is not finite at any point of the grid")
    shape = (max(y) - min(y)) / (max(x) - min(x))
    figure = new_figure(7.5, min(max(1.5 + 5.2 * shape, 3.2), 8.0))
    axes = figure.subplots()
    filled = axes.contourf(x, y, np.ma.masked_invalid(values), levels=_levels(values), cmap="cividis", extend="max")
    filled.set_edgecolor("face")  # else viewers show seams between the fills
    bar = figure.colorbar(filled, ax=axes, shrink=0.85, format="%.3g")
    bar.set_label(plain(loss_name), color=INK)
    bar.ax.tick_params(colors=MUTED)
    bar.outline.set_visible(False)
    states = [point for point in points if point.kind == "state"]
    arms = [point for point in points if point.kind != "state"]
    path = [point.x for point in states], [point.y for point in states]
    axes.plot(*path, color=PAPER, linewidth=3.2, zorder=2)
    axes.plot(*path, color=INK, marker="o", linewidth=1.2, zorder=3, label="states, in order", clip_on=False)
    xs, ys, label = [point.x for point in arms], [point.y for point in arms], "other weights, projected on the plane"
    axes.plot(xs, ys, "D", color=VERMILION, markeredgecolor=PAPER, markersize=8, zorder=4, label=label)
    legend(figure, ncols=2)
    first, second = ["", ""] if explained is None else [f" ({share:.0%} of the variance)" for share in explained]
    labels = f"first principal component of the states{first}", f"second{second}"
    style_axes(axes, "", *labels, "both")
    axes.grid(False)
    axes.set_aspect("equal")
    _label_points(axes, points)
    return figure


def _levels(values: np.ndarray) -> np.ndarray:
    """Return levels up to the 90% quantile, so that high losses at the edge do not hide the minimum."""
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(np.quantile(finite, 0.9))
    return np.linspace(low, high if high > low else low + 1e-6 + abs(low) * 1e-3, 15)


def _label_points(axes: "Axes", points: Sequence[LandscapePoint]) -> None:
    """Write each name beside its point, where it covers the least of the others."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # before it, the limits are not known
    pixels = figure.dpi / 72  # per point of 1/72 inch, the unit of the offsets
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    offsets = np.concatenate([reach * directions for reach in (9.0, 18.0, 30.0, 45.0)])
    anchors = axes.transData.transform([(point.x, point.y) for point in points])
    states = [anchor for point, anchor in zip(points, anchors, strict=True) if point.kind == "state"]
    path = [place for ends in pairwise(states) for place in np.linspace(*ends, 40)]
    taken = np.concatenate([anchors - 5 * pixels, anchors + 5 * pixels], axis=1)  # left, bottom, right, top
    taken = np.concatenate([taken, *(np.concatenate([place - pixels, place + pixels])[None] for place in path)])
    frame = np.array(axes.get_window_extent().extents)
    for point, anchor in zip(points, anchors, strict=True):
        size = pixels * np.array([5.4 * len(plain(point.name)) + 4, 12.0])
        corner = np.stack([(offsets[:, 0] < 0) * size[0], np.full(len(offsets), size[1] / 2)], 1)
        low = anchor + pixels * offsets - corner
        boxes = np.concatenate([low, low + size], axis=1)
        inner = np.minimum(boxes[:, None, 2:], taken[:, 2:]) - np.maximum(boxes[:, None, :2], taken[:, :2])
        overlap = np.maximum(inner, 0).prod(axis=2).sum(axis=1)
        outside = np.maximum(frame[:2] - boxes[:, :2], 0) + np.maximum(boxes[:, 2:] - frame[2:], 0)
        reach = np.hypot(*offsets.T)
        best = int(np.argmin(overlap + 1e4 * outside.sum(axis=1) + reach))
        taken = np.concatenate([taken, boxes[best : best + 1]])
        axes.annotate(
            plain(point.name),
            (point.x, point.y),
            xytext=tuple(offsets[best]),
            textcoords="offset points",
            ha="right" if offsets[best, 0] < 0 else "left",
            va="center",
            fontsize=8.5,
            color=INK,
            zorder=5,
            bbox={"boxstyle": "round,pad=0.12", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.82},
            arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.6} if reach[best] > 12 else None,
        )
