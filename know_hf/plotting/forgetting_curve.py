"""The forgetting curve: the scores of every state."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import BLUE, INK, MUTED, legend, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PREFERRED_METRICS = ("eval_accuracy", "eval_loss")
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")


@dataclass(frozen=True)
class ForgettingPanel:
    """One score of every state, full data first. Several runs are drawn with their mean and its standard error."""

    scores: Sequence[float] | Sequence[Sequence[float]] | np.ndarray  # (S,) or (runs, S)
    name: str  # label of the vertical axis
    chance: float | None = None  # score of guessing, drawn as a line
    digits: int = 3  # decimals
    min_span: float = 0.1  # of the vertical axis, so that noise does not look like forgetting


def plot_forgetting(
    num_examples: Sequence[int | None],
    scores: Sequence[float] | Sequence[Sequence[float]] | np.ndarray,
    score_name: str = "accuracy on unseen source data",
    title: str = "Forgetting",
    chance: float | None = None,
    digits: int = 3,
) -> "Figure":
    """Plot one score of every state against the size of its subset; see [`plot_forgetting_panels`]."""
    return plot_forgetting_panels(num_examples, [ForgettingPanel(scores, score_name, chance, digits)], title)


def plot_forgetting_panels(
    num_examples: Sequence[int | None], panels: Sequence[ForgettingPanel], title: str = "Forgetting"
) -> "Figure":
    """Plot several scores of every state side by side, against the sizes of the subsets (`None` if unknown).

    Raises:
        `ValueError`: if the scores do not match the states.
        `ImportError`: if matplotlib is not installed.
    """
    for panel in panels:
        if np.atleast_2d(np.asarray(panel.scores)).shape[1:] != (len(num_examples),):
            raise ValueError(
                f"scores must have one column for each of the {len(num_examples)} states, got {np.shape(panel.scores)}"
            )
    figure = new_figure(7.5 if len(panels) == 1 else 5.5 * len(panels), 4.5)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for number, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
        _draw_panel(axes, panel)
        axes.set_xticks(range(len(num_examples)), [_state_label(*item) for item in enumerate(num_examples)])
        axes.set_xlim(-0.4, len(num_examples) - 0.6)
        style_axes(axes, "" if number else title, "state (examples in its subset)", panel.name, "y")
        if any(not line.get_label().startswith("_") for line in axes.lines):
            legend(axes, loc="best")
    return figure


def forgetting_picture(trajectory: Any) -> "Figure | None":
    """Plot the recorded metrics of every state of a trajectory, for a model card.

    Accuracy and loss are drawn if recorded, otherwise the first other metric. `None` if the states share no metric, a
    subset size is unknown, or matplotlib is not installed.
    """
    states = trajectory.states
    shared = set.intersection(*(set(state.metrics) for state in states)) if states else set()
    sizes = [state.num_examples for state in states if state.num_examples is not None]
    if not shared or len(sizes) != len(states) or find_spec("matplotlib") is None:
        return None
    panels = []
    for metric in [name for name in _PREFERRED_METRICS if name in shared] or [min(shared)]:
        name = metric.removeprefix("eval_")
        chance = _chance(trajectory) if name == "accuracy" else None
        label = name if name == metric else f"{name} on the evaluation split"
        panels.append(ForgettingPanel([state.metrics[metric] for state in states], label, chance))
    return plot_forgetting_panels(sizes, panels)


def _draw_panel(axes: "Axes", panel: ForgettingPanel) -> None:
    runs = np.atleast_2d(np.asarray(panel.scores, dtype=np.float64))
    states, mean = np.arange(runs.shape[1]), runs.mean(axis=0)
    error, label = np.zeros_like(mean), "_one run"
    if len(runs) > 1:
        error = runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
        axes.plot(states, runs.T, color=BLUE, alpha=0.3, linewidth=1)[0].set_label("single runs")
        axes.errorbar(states, mean, error, color=BLUE, fmt="none", capsize=3)
        label = f"mean of {len(runs)} runs, standard error"
    axes.plot(states, mean, color=BLUE, marker="o", linewidth=2.5, label=label)
    for state, score in enumerate(mean):
        left, right = score - mean[max(state - 1, 0)], mean[min(state + 1, len(mean) - 1)] - score
        side = 1 if right <= left + 1e-9 else -1  # where the line is not
        across = -np.sign(left + right) * side if left * right > 0 else 0
        axes.annotate(
            f"{score:.{panel.digits}f}",
            (state, score + side * error[state]),
            color=INK,
            xytext=(4 * across, 8 * side),
            textcoords="offset points",
            ha={-1: "right", 0: "center", 1: "left"}[across],
            va="bottom" if side > 0 else "top",
            fontweight="bold",
        )
    if panel.chance is not None:
        guessing = f"guessing: {panel.chance:.{panel.digits}f}"
        axes.axhline(panel.chance, color=MUTED, linestyle="--", linewidth=1, label=guessing)
    axes.margins(y=0.15)
    low, high = axes.get_ylim()
    if (missing := panel.min_span - (high - low)) > 0:
        axes.set_ylim(low - missing / 2, high + missing / 2)


def _chance(trajectory: Any) -> float | None:
    """Return the accuracy of guessing of a classifier, from the labels in its config."""
    config = trajectory.path / "config.json"
    content = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    is_classifier = any(name.endswith(_CLASSIFIERS) for name in content.get("architectures") or [])
    return 1 / len(content.get("id2label") or range(2)) if is_classifier else None  # two labels are not written


def _state_label(state: int, size: int | None) -> str:
    if size is None:
        return f"Θ{state}"
    return f"Θ{state}\n{size:,} (all)" if state == 0 else f"Θ{state}\n{size:,}"
