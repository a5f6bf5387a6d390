"""What a tensor is multiplied by: a number, or numbers per channel along some of its axes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from ..markdown import quantity


@dataclass(frozen=True)
class TensorFactor:
    """A factor of all elements, and others `(C,)` float32 along axes of size C, by axis."""

    scalar: float = 1.0
    channels: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def __mul__(self, other: "TensorFactor") -> "TensorFactor":
        channels = dict(self.channels)
        for axis, values in other.channels.items():
            channels[axis] = channels[axis] * values if axis in channels else values
        return TensorFactor(self.scalar * other.scalar, channels)

    def mean(self) -> float:
        """Return the geometric mean over all elements."""
        return self.scalar * math.exp(math.fsum(float(values.log().mean()) for values in self.channels.values()))

    def scale(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor, times the factor."""
        result = tensor * self.scalar
        for axis, values in self.channels.items():
            result = result * values.to(result).reshape(-1, *[1] * (tensor.ndim - axis - 1))
        return result

    def scale_piece(self, values: torch.Tensor, shape: torch.Size, start: int) -> torch.Tensor:
        """Scale elements `(N,)` of a tensor of a shape, from position `start` on, in row-major order."""
        result = values * self.scalar
        if self.channels:
            position = torch.arange(start, start + len(values))
            for axis, factors in self.channels.items():
                result *= factors.to(result)[position // shape[axis + 1 :].numel() % shape[axis]]
        return result


@dataclass(frozen=True)
class Rescaling:
    """Factors that keep the function of a model."""

    factors: Mapping[str, TensorFactor] = field(default_factory=dict)  # by name on disk, tied tensors by all
    deviation: float = 0.0  # largest difference between outputs of Θ0 with and without them, over the largest output

    def __mul__(self, other: "Rescaling") -> "Rescaling":
        names = [*self.factors, *(name for name in other.factors if name not in self.factors)]
        one = TensorFactor()
        factors = {name: self.factors.get(name, one) * other.factors.get(name, one) for name in names}
        return Rescaling(factors, self.deviation + other.deviation)

    def __str__(self) -> str:
        return f"{quantity(len(self.factors), 'tensor')}; outputs of Θ0 differ by {self.deviation:.2g} of the largest"

    def to_dict(self) -> dict[str, Any]:
        """Return deviation and factors as JSON values; of channels, the geometric mean of their factors."""
        return {"deviation": self.deviation, "factors": {name: f.mean() for name, f in self.factors.items()}}


@runtime_checkable
class Rescaler(Protocol):
    """Multiplies tensors by factors that depend on Θ0 alone, after a predictor."""

    @property
    def model(self) -> Any:
        """A model of the recorded architecture, or the base model of adapters; `None` to build it from the config."""

    def rescaling(self, model: torch.nn.Module) -> Rescaling:
        """Return the factors, for a model with the weights of Θ0 in float32."""
