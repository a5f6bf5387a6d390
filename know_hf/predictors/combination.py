"""The base class of predictors that are weighted sums of states, and layer scaling of any predictor."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from .protocol import DepthPredictor, Predictor, check_finite, get_predictor, register_predictor
from .snapshot_predictor import SnapshotPredictor


class Combination(ABC):
    """Weighted sum of differences to Θ0, `Σ_k w_k (Θk - Θ0)`, which is exactly zero where no state moved."""

    num_states = None  # any number

    @abstractmethod
    def weights(self, num_states: int) -> Sequence[float]:
        """Weights of all states except Θ0, most forgotten first."""

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        full_data = history[:, -1].float()
        residual = torch.zeros_like(full_data)
        # state by state: the rounding of a matrix product depends on the number of rows
        for state, weight in enumerate(self.weights(history.shape[1])):
            if weight:
                residual += weight * (history[:, state].float() - full_data)
        return residual


@register_predictor("lines")
@dataclass
class LayerScaling:
    """LiNeS: the residual of another predictor, times `alpha + beta * depth`.

    Shallow layers hold general features and change less than deep ones (Wang et al., *LiNeS: Post-training Layer
    Scaling Prevents Forgetting and Enhances Model Merging*, arXiv 2410.17146). As in the paper, block ℓ of L has depth
    `(ℓ - 1) / (L - 1)`, see [`relative_depths`]. Two details differ from its code: heads are scaled like the last
    block, not by `alpha`, and the factor applies to what is added to Θ0, not to the change that led to Θ0.

    Args:
        alpha (`float`, *optional*, defaults to `0.0`):
            Factor at depth 0. For a single task the paper sets `beta = 1 - alpha` and searches `alpha` from 0 to 1; 1
            is the unscaled predictor.
        beta (`float`, *optional*, defaults to `1.0`):
            Factor at depth 1 minus factor at depth 0.
        base (`str` or [`Predictor`], *optional*, defaults to `"task_vector"`):
            The predictor to scale, by name (with its default fields) or as an object.
        depth (`float`, *optional*):
            Relative depth of the layer, set by [`at_depth`].
    """

    alpha: float = 0.0
    beta: float = 1.0
    base: str | Predictor = "task_vector"
    depth: float | None = None
    _base: Predictor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_finite(alpha=self.alpha, beta=self.beta)
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth must be from 0 (input) to 1 (head), got {self.depth!r}")
        self._base = get_predictor(self.base) if isinstance(self.base, str) else self.base
        if not isinstance(self._base, Predictor):
            raise ValueError(f"base must be a predictor or its name, got {self.base!r}")
        if isinstance(self._base, SnapshotPredictor):
            raise ValueError(
                f"base={self.base!r} computes complete tensors; give one that adds residuals, or 'start_interpolation'"
                " with a slope instead of 'lines'"
            )

    @property
    def num_states(self) -> int | None:
        return self._base.num_states

    @property
    def follows_training(self) -> bool:
        return getattr(self._base, "follows_training", False)

    def at_depth(self, depth: float) -> "LayerScaling":
        base = self._base.at_depth(depth) if isinstance(self._base, DepthPredictor) else self._base
        return replace(self, base=base, depth=depth)

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        if self.depth is None:
            raise ValueError("'lines' needs the depth of the layer; call at_depth(depth) first")
        return (self.alpha + self.beta * self.depth) * self._base.residual(history, role)
