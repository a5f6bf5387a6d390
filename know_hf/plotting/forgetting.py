"""The forgetting curve."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .style import BLUE, INK, MUTED, PAPER, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_forgetting(
    num_examples: Sequence[int | None],
    scores: Sequence[float] | Sequence[Sequence[float]] | np.ndarray,
    score_name: str = "accuracy on unseen source data",
    title: str = "Structured forgetting",
    chance: float | None = None,
    digits: int = 3,
) -> "Figure":
    """The forgetting curve: the score of every state against the size of the subset it was trained on last.

    Args:
        num_examples (`Sequence[int | None]` of length S): Sizes of the subsets, full data first; `None` where one is
            not known.
        scores (`(S,)` or `(runs, S)`): One score a state; of several runs each is drawn, with the mean over them.
        score_name (`str`, *optional*): Label of the vertical axis.
        title (`str`, *optional*): Title.
        chance (`float`, *optional*): Score of guessing, drawn as a line.
        digits (`int`, *optional*, defaults to `3`): Decimals of the scores.

    Returns:
        `matplotlib.figure.Figure`: to be written with [`save_figure`].

    Raises:
        `ValueError`: when there is not one score for every state.
        `ImportError`: when matplotlib is missing.
    """
    runs = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    if runs.ndim != 2 or runs.shape[1] != len(num_examples):
        raise ValueError(
            f"scores of shape {np.shape(scores)} do not give one score to each of {len(num_examples)} states"
        )

    figure = new_figure(7.5, 4.5)
    axes = figure.subplots()
    states = np.arange(len(num_examples))
    mean = runs.mean(axis=0)
    if len(runs) > 1:
        for number, run in enumerate(runs):
            label = f"{len(runs)} single runs" if number == 0 else None
            axes.plot(states, run, color=BLUE, alpha=0.3, linewidth=1, label=label)
    label = f"mean of {len(runs)} runs" if len(runs) > 1 else "one run"
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
    style_axes(axes, title, "state (examples in the subset it was trained on last)", score_name, "y")
    axes.legend(frameon=False, loc="best", fontsize=8.5, labelcolor=INK)
    return figure


def _state_label(state: int, size: int | None) -> str:
    if size is None:
        return f"Θ{state}"
    return f"Θ{state}\n{size:,} (all)" if state == 0 else f"Θ{state}\n{size:,}"
