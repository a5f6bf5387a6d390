"""Figures, drawn without pyplot: nothing global is touched and no display is needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _GREY = "#2a6fbb", "#8a8a8a"


def plot_forgetting(
    num_examples: Sequence[int],
    scores: Sequence[float] | Sequence[Sequence[float]] | np.ndarray,
    score_name: str = "accuracy on unseen source data",
    title: str = "Structured forgetting",
    chance: float | None = None,
) -> "Figure":
    """The forgetting curve: the score of every state against the size of the subset it was trained on last.

    Args:
        num_examples (`Sequence[int]` of length S): Sizes of the subsets, full data first.
        scores (`(S,)` or `(runs, S)`): One score a state; of several runs each is drawn, with the mean over them.
        score_name (`str`, *optional*): Label of the vertical axis.
        title (`str`, *optional*): Title.
        chance (`float`, *optional*): Score of guessing, drawn as a line.

    Returns:
        `matplotlib.figure.Figure`: to be written with [`save_figure`].

    Raises:
        `ValueError`: when there is not one score for every state.
        `ImportError`: when matplotlib is missing.
    """
    figure_class = _figure_class()
    runs = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    if runs.ndim != 2 or runs.shape[1] != len(num_examples):
        raise ValueError(
            f"scores of shape {np.shape(scores)} do not give one score to each of {len(num_examples)} states"
        )

    figure = figure_class(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    states = np.arange(len(num_examples))
    mean = runs.mean(axis=0)
    if len(runs) > 1:
        for number, run in enumerate(runs):
            label = f"{len(runs)} single runs" if number == 0 else None
            axes.plot(states, run, color=_BLUE, alpha=0.2, linewidth=1, label=label)
    label = f"mean of {len(runs)} runs" if len(runs) > 1 else "one run"
    axes.plot(states, mean, color=_BLUE, marker="o", linewidth=2.5, label=label)
    for state, score in enumerate(mean):
        axes.annotate(
            f"{score:.3f}",
            (state, score),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )
    if chance is not None:
        axes.axhline(chance, color=_GREY, linestyle="--", linewidth=1, label=f"guessing: {chance:.2f}")
    axes.set_xticks(states, [_state_label(state, size) for state, size in enumerate(num_examples)])
    axes.set_xlim(-0.4, len(num_examples) - 0.6)
    axes.margins(y=0.15)
    axes.set_xlabel("state (examples in the subset it was trained on last)")
    axes.set_ylabel(score_name)
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    return figure


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Writes a figure in the format of the path's suffix.

    Args:
        figure (`matplotlib.figure.Figure`): The figure.
        path (`str` or `Path`): Where it goes; folders are made.

    Returns:
        `Path`: the path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _state_label(state: int, size: int) -> str:
    return f"Θ{state}\n{size:,} (all)" if state == 0 else f"Θ{state}\n{size:,}"


def _figure_class() -> "type[Figure]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib, the extra 'plot': pip install 'know_hf[plot]'") from error
    return Figure
