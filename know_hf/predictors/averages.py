"""Averages over the states of a history."""

from collections.abc import Sequence
from dataclasses import dataclass

from .combination import Combination
from .protocol import check_finite, register_predictor


@register_predictor("average")
@dataclass
class Average(Combination):
    """Mean of all states, `mean_k Θk - Θ0`, after stochastic weight averaging (arXiv 1803.05407)."""

    def weights(self, num_states: int) -> Sequence[float]:
        return [1 / num_states] * (num_states - 1)


@register_predictor("ema")
@dataclass
class MovingAverage(Combination):
    """Exponential moving average from the most forgotten state to Θ0, `e ← decay * e + (1 - decay) * Θk`, minus Θ0.

    Tarvainen and Valpola (*Mean teachers are better role models*, arXiv 1703.01780) average over steps; this averages
    over states.

    Args:
        decay (`float`, *optional*, defaults to `0.5`):
            In [0, 1). Θ0 has the weight `1 - decay`, the most forgotten of S states `decay ** (S - 1)`.
    """

    decay: float = 0.5

    def __post_init__(self) -> None:
        check_finite(decay=self.decay)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be at least 0 (Θ0 alone) and below 1, got {self.decay!r}")

    def weights(self, num_states: int) -> Sequence[float]:
        ages = range(num_states - 1, 0, -1)
        return [(1 if age == num_states - 1 else 1 - self.decay) * self.decay**age for age in ages]
