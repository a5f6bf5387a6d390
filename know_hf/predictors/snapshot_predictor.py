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
    """

    theta0: torch.Tensor  # after training on all data
    start: Any = None  # before the training
    origin: Any = None  # before the branches parted: the start, or Θ0 for branches from state 0
    branches: Sequence[torch.Tensor] = ()
    fraction: Any = None  # share of the data that each branch was trained on, if it is recorded
    states: Sequence[torch.Tensor] = ()  # Θ1, Θ2, …
    tail: Sequence[torch.Tensor] = ()  # late in the training of Θ0, first to last
    context: TensorContext | None = None  # what is known about it besides the weights


class SnapshotPredictor(ABC):
    """A predictor of complete tensors, in [`predict_overflowed_weights`] like any [`Predictor`] but with one step."""

    num_states = 1  # no state but Θ0 is read

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
