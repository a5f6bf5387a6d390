"""Least-squares curves through the states, continued by one step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .combination import Combination
from .protocol import register_predictor


@register_predictor("linear")
@dataclass
class LinearFit(Combination):
    """Least-squares line through the S states, continued by one step.

    The line is over the state index. State k was trained on `r**k` of the data, so the index is, up to scale and sign,
    the logarithm of the number of examples: each doubling of the data moves a weight by the same amount. On the curve
    of [`LogarithmicFit`] it moves less each time.
    """

    def weights(self, num_states: int) -> Sequence[float]:
        return _least_squares([float(t) for t in range(1, num_states + 2)])


@register_predictor("log")
@dataclass
class LogarithmicFit(Combination):
    """Least-squares fit of `a + b * log(t)` to the S states at t = 1 … S, most forgotten first, evaluated at S + 1.

    The KNOW paper (arXiv 2508.05059) compares with a *LogFit* without published code; this is one reading of it. The
    other reading, a fit to the logarithm of the data size, is [`LinearFit`].
    """

    def weights(self, num_states: int) -> Sequence[float]:
        return _least_squares([math.log(t) for t in range(1, num_states + 2)])


def _least_squares(points: Sequence[float]) -> list[float]:
    """Weights, over all points but the last, of the value that the fitted line has at the last point.

    With mean m and variance v of the S fitted points, the line at x is `Σ_k (1/S + (x - m)(x_k - m) / (S v)) y_k`.
    The weight of Θ0 is left out: the weights sum to one.
    """
    *fitted, target = points
    mean = math.fsum(fitted) / len(fitted)
    squares = math.fsum((point - mean) ** 2 for point in fitted)
    weights = [1 / len(fitted) + (target - mean) * (point - mean) / squares for point in fitted]
    return weights[:-1]
