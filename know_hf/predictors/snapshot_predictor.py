"""[`SnapshotPredictor`]: the base class of predictors that compute complete tensors from snapshots.

They read Θ0, the start and branches instead of the history of each scalar weight, and a weight may depend on the
others of its tensor. Norm weights are predicted like all others.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..known import TensorContext


@dataclass(frozen=True)
class TensorSnapshots:
    """One tensor in the snapshots that a predictor reads, float32. What it does not read may be missing.

    Of the two matrices of LoRA it is their product B A, which alone acts on the model: `R A` and `B R⁻¹` are the same
    adapter for any invertible R, but not the same factors, so the mean of the factors of two trainings means nothing.
    The product is in coordinates of its rows and columns in which the snapshots differ, which changes no norm, angle
    or singular value; [`james_stein`] counts values in these coordinates. The result is factorised at the recorded
    rank, see [`factorise`].

    Attributes:
        theta0 (`torch.Tensor`):
            After training on all data.
        start (`torch.Tensor`, *optional*):
            Before the training.
        origin (`torch.Tensor`, *optional*):
            Before the branches parted: the start, or Θ0 for branches from state 0.
        branches (sequence of `torch.Tensor`):
            In each branch.
        fraction (`float`, *optional*):
            Share of the data that each branch was trained on, if it is recorded.
        states, tail (sequence of `torch.Tensor`):
            Θ1, Θ2, …; and late in the training of Θ0, first to last.
        context ([`~know_hf.known.TensorContext`], *optional*):
            What is known about the tensor and its training besides the weights.
    """

    theta0: torch.Tensor
    start: Any = None
    origin: Any = None
    branches: Sequence[torch.Tensor] = ()
    fraction: Any = None
    states: Sequence[torch.Tensor] = ()
    tail: Sequence[torch.Tensor] = ()
    context: TensorContext | None = None


class SnapshotPredictor(ABC):
    """A predictor of complete tensors, in [`predict_overflowed_weights`] like any [`Predictor`] but with one step."""

    @property
    def num_states(self) -> int | None:
        """1: no state but Θ0 is read."""
        return 1

    @abstractmethod
    def reads(self) -> Mapping[str, int]:
        """Return what it reads besides Θ0: fields of [`TensorSnapshots`] and how many of each it needs, at least."""

    @abstractmethod
    def tensor(self, snapshots: TensorSnapshots) -> torch.Tensor:
        """Return the new tensor, float32, from what it reads. Equal snapshots must give Θ0 exactly."""

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        """Raise a `ValueError`: there are no histories of single weights."""
        raise ValueError(
            f"{type(self).__name__} computes complete tensors from snapshots, not from histories; use it in"
            " predict_overflowed_weights, a gate or an arm"
        )
