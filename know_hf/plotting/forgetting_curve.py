"""The forgetting curve: the score of every state."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import BLUE, INK, MUTED, PAPER, legend, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PREFERRED_METRICS = ("eval_accuracy", "eval_loss")


def plot_forgetting(
    num_examples: Sequence[int | None],
    scores: Sequence[float] | Sequence[Sequence[float]] | np.ndarray,
    score_name: str = "accuracy on unseen source data",
    title: str = "Structured forgetting",
    chance: float | None = None,
    digits: int = 3,
) -> "Figure":
    """Plot the score of every state against the size of its subset.

    Args:
        num_examples (`Sequence[int | None]` of length S):
            Subset sizes, full data first; `None` if unknown.
        scores (`(S,)` or `(runs, S)`):
            One score per state. Several runs are drawn with their mean.
        score_name (`str`, *optional*):
            Label of the vertical axis.
        title (`str`, *optional*):
            Title of the figure.
        chance (`float`, *optional*):
            Score of guessing, drawn as a line.
        digits (`int`, *optional*, defaults to `3`):
            Decimals of the scores.

    Returns:
        `matplotlib.figure.Figure`: Write it with [`save_figure`].

    Raises:
        `ValueError`: If the scores do not match the states.
        `ImportError`: If matplotlib is not installed.
    """
    runs = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    if runs.shape[1:] != (len(num_examples),):
        raise ValueError(
            f"scores must have one column for each of the {len(num_examples)} states, got {np.shape(scores)}"
        )
    figure = new_figure(7.5, 4.5)
    axes = figure.subplots()
    states, mean, label = np.arange(len(num_examples)), runs.mean(axis=0), "one run"
    if len(runs) > 1:
        axes.plot(states, runs.T, color=BLUE, alpha=0.3, linewidth=1)[0].set_label("single runs")
        label = f"mean of {len(runs)} runs"
    axes.plot(states, mean, color=BLUE, marker="o", linewidth=2.5, label=label)
    for state, score in enumerate(mean):
        axes.annotate(
            f"{score:.{digits}f}",
            (state, score),
            color=INK,
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.8},
        )
    if chance is not None:
        axes.axhline(chance, color=MUTED, linestyle="--", linewidth=1, label=f"guessing: {chance:.2f}")
    axes.set_xticks(states, [_state_label(state, size) for state, size in enumerate(num_examples)])
    axes.set_xlim(-0.4, len(num_examples) - 0.6)
    axes.margins(y=0.15)
    style_axes(axes, title, "state (examples in its subset)", score_name, "y")
    legend(axes, loc="best")
    return figure


def forgetting_picture(trajectory: Any) -> "Figure | None":
    """Plot a recorded metric of every state, for a model card.

    Args:
        trajectory ([`WeightTrajectory`]):
            Recorded states. Accuracy is preferred to loss, loss to the first other metric.

    Returns:
        `matplotlib.figure.Figure`, *optional*: `None` if the states share no metric, a subset size is unknown, or
        matplotlib is not installed.
    """
    states = trajectory.states
    shared = set.intersection(*(set(state.metrics) for state in states)) if states else set()
    sizes = [state.num_examples for state in states if state.num_examples is not None]
    if not shared or len(sizes) != len(states) or find_spec("matplotlib") is None:
        return None
    metric = next((name for name in _PREFERRED_METRICS if name in shared), min(shared))
    name = metric.removeprefix("eval_")
    return plot_forgetting(
        sizes,
        [state.metrics[metric] for state in states],
        score_name=name if name == metric else f"{name} on the evaluation split",
    )


def _state_label(state: int, size: int | None) -> str:
    if size is None:
        return f"Θ{state}"
    return f"Θ{state}\n{size:,} (all)" if state == 0 else f"Θ{state}\n{size:,}"
