"""Averages of the states in the order of training, which stand in for the decay of a learning rate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from .combination import Combination
from .protocol import check_finite, register_predictor

# share of a gradient that is left at x of the way through the decay, from 1 at x = 0 to 0 at x = 1
_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "sqrt": lambda x: 1 - math.sqrt(x),
}


def decay_weights(num_states: int, shape: str = "linear") -> list[float]:
    """Weights of the last states of a training at a constant rate, with which their average is that of a decaying one.

    WSM (Tian et al., *WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM Pre-training*, arXiv
    2507.17634): with weights c of the states 0 … k, the average is `θ_0 - Σ_i w_i g_i`, where g_i leads from state i -
    1 to i and `w_i = Σ_{j ≥ i} c_j`. So `c_j = w_j - w_{j+1}` with w_0 = 1 and w_{k+1} = 0. Here
    `w_i = s(i / (k + 1))` for a shape s that falls from 1 to 0: `"linear"` (the plain average), `"cosine"` or `"sqrt"`
    (1 - √x, a fast decay first). The weights of the k + 1 states, oldest first, sum to 1.
    """
    if shape not in _SHAPES:
        raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(_SHAPES)}")
    shares = [_SHAPES[shape](i / num_states) for i in range(num_states)] + [0.0]
    return [share - after for share, after in pairwise(shares)]


@register_predictor("tail_average")
@dataclass
class TailAverage(Combination):
    """Average of the last states, with the weights of [`decay_weights`], minus Θ0.

    The states are the tail of the training of state 0 and Θ0. Without recorded tail states they are those of smaller
    and smaller subsets, of which it averages the least forgotten ones.

    Args:
        last (`int`, *optional*):
            Number of states to average, Θ0 among them; all by default.
        shape (`str`, *optional*, defaults to `"linear"`):
            Shape of the decay: `"linear"` (equal weights), `"cosine"` or `"sqrt"`.
    """

    follows_training: ClassVar[bool] = True
    last: int | None = None
    shape: str = "linear"

    def __post_init__(self) -> None:
        decay_weights(1, self.shape)
        if self.last is not None and (type(self.last) is not int or self.last < 1):
            raise ValueError(f"last must be a number of states, 1 or more, got {self.last!r}")

    def weights(self, num_states: int) -> Sequence[float]:
        last = num_states if self.last is None else self.last
        if last > num_states:
            raise ValueError(f"last={last} for a history of {num_states} states; choose 1 to {num_states}")
        return [0.0] * (num_states - last) + decay_weights(last, self.shape)[:-1]


@register_predictor("bema")
@dataclass
class BiasCorrectedAverage(Combination):
    """BEMA: exponential moving average of the states plus what it lags behind, minus Θ0.

    Block and Zhang, *EMA Without the Lag: Bias-Corrected Iterate Averaging Schemes*, arXiv 2508.00180. With states
    θ_0 … θ_T along one training, oldest first, `EMA_0 = θ_0`, `EMA_t = (1 - β_t) EMA_{t-1} + β_t θ_t` and
    `β_t = (ρ + γ t)^-κ`, the result is `EMA_T + α_T (θ_T - θ_0)` with `α_T = (ρ + γ T)^-η`. The paper counts steps of
    the optimizer; here t is the index of a state: of the tail and Θ0, or of all states without recorded tail states.

    Args:
        ema_power (`float`, *optional*, defaults to `0.5`):
            κ, 0 or more; 0 keeps θ_T.
        bias_power (`float`, *optional*, defaults to `0.2`):
            η, 0 or more; a large value gives the plain moving average.
        lag (`float`, *optional*, defaults to `1.0`):
            ρ, 1 or more.
        multiplier (`float`, *optional*, defaults to `1.0`):
            γ, positive: the number of units of t between two states.
    """

    follows_training: ClassVar[bool] = True
    ema_power: float = 0.5
    bias_power: float = 0.2
    lag: float = 1.0
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        check_finite(**vars(self))
        for name, least in (("ema_power", 0), ("bias_power", 0), ("lag", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)!r}")
        if self.multiplier <= 0:
            raise ValueError(f"multiplier must be positive, got {self.multiplier!r}")

    def weights(self, num_states: int) -> Sequence[float]:
        weights = [1.0] + [0.0] * (num_states - 1)
        for t in range(1, num_states):
            new = (self.lag + self.multiplier * t) ** -self.ema_power
            weights = [weight * (1 - new) for weight in weights]
            weights[t] += new
        weights[0] -= (self.lag + self.multiplier * (num_states - 1)) ** -self.bias_power
        return weights[:-1]
