"""Movement along a line through Θ0: towards another state, away from it, or towards zero."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .combination import Combination
from .protocol import check_finite, register_predictor


@register_predictor("task_vector")
@dataclass
class TaskVector(Combination):
    """Task arithmetic: a multiple of the change between two states, `scale * (Θ0 - Θk)`.

    After Ilharco et al., *Editing Models with Task Arithmetic*, arXiv 2212.04089.

    Args:
        scale (`float`, *optional*, defaults to `1.0`):
            Multiple of either sign. Negative values move back towards Θk; -1 gives Θk.
        since (`int`, *optional*):
            Index k of the other state, 1 for the least forgotten. Defaults to the most forgotten state.
    """

    scale: float = 1.0
    since: int | None = None

    def __post_init__(self) -> None:
        check_finite(scale=self.scale)
        if self.since is not None and (type(self.since) is not int or self.since < 1):
            raise ValueError(f"since must be the index of a state, 1 or more (0 is Θ0 itself), got {self.since!r}")

    def weights(self, num_states: int) -> Sequence[float]:
        since = num_states - 1 if self.since is None else self.since
        if since >= num_states:
            raise ValueError(f"since={since} for a history of {num_states} states; choose 1 to {num_states - 1}")
        return [-self.scale if state == num_states - 1 - since else 0.0 for state in range(num_states - 1)]


@register_predictor("shrink")
@dataclass
class Shrink:
    """Every weight times a constant, `(factor - 1) * Θ0`: a control for predictors that only shrink weights.

    After Ash and Adams, *On Warm-Starting Neural Network Training*, arXiv 1910.08475, without their noise.

    Args:
        factor (`float`, *optional*, defaults to `0.8`):
            Factor of each weight.
    """

    num_states: ClassVar[None] = None
    reads_theta0_alone: ClassVar[bool] = True
    factor: float = 0.8

    def __post_init__(self) -> None:
        check_finite(factor=self.factor)

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        return (self.factor - 1) * history[:, -1].float()
