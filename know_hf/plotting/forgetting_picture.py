"""The forgetting curve of a card."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..trajectory import WeightTrajectory

_PREFERRED = ("eval_accuracy", "eval_loss")


def forgetting_picture(trajectory: "WeightTrajectory") -> "Figure | None":
    """The metric of every state against the size of its subset.

    Args:
        trajectory ([`WeightTrajectory`]): With metrics. Of several the accuracy is drawn, or the loss, or the first by
            name.

    Returns:
        `matplotlib.figure.Figure`, to be written with [`~know_hf.plotting.save_figure`]; `None` when no metric or no
        size is known of all states, or matplotlib is not installed.
    """
    states = trajectory.states
    shared = set.intersection(*(set(state.metrics) for state in states)) if states else set()
    sizes = [state.num_examples for state in states if state.num_examples is not None]
    if not shared or len(sizes) != len(states) or find_spec("matplotlib") is None:
        return None
    from . import plot_forgetting

    metric = next((name for name in _PREFERRED if name in shared), min(shared))
    name = metric.removeprefix("eval_")
    return plot_forgetting(
        sizes,
        [state.metrics[metric] for state in states],
        score_name=name if name == metric else f"{name} on the evaluation split",
    )
