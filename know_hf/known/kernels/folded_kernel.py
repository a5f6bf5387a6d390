"""KNOWN with fewer and smaller layers: the same function, folded exactly in float64 and rounded once.

A stream computes `h = expand(x)`, `z = relu(squeeze(h))`, `y = shift(z) + scale(z) * exp(exponent(z) * h)` and
`leaky_relu(contract(y))`. Two of its layers can be folded away:

- `squeeze` follows `expand` without an activation in between: together they are one layer from n inputs to 8;
- with `exp(a) = 1 + expm1(a)`, `y` is `shift(z) + scale(z)`, which is linear in `z` and folds with `contract` into one
  layer from 8 to 32, plus `scale(z) * expm1(exponent(z) * h)`.

For typical weights the arguments of the exponential are about 1e-4. The values that go through the 64 → 32 product are
therefore small, and so is their rounding error, which allows reduced-precision matrix units.

Differences of states are taken before the first layer, not folded into it: `D (W)` cancels in float32, `D W` does not.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from ..modeling_known import KNOWNModel, KNOWNNetwork, KNOWNStream
from .chunks import ResidualFunction, in_chunks


class _Folded:
    """Base class of the folded dataclasses, whose fields all have `to`."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        return type(self)(**{name: part.to(device, dtype) for name, part in vars(self).items()})


@dataclass(frozen=True)
class FoldedLayer(_Folded):
    """Linear layer `x @ weight.T + bias`."""

    weight: torch.Tensor  # (outputs, inputs)
    bias: torch.Tensor  # (outputs,)

    @classmethod
    def from_linear(cls, layer: nn.Linear) -> "FoldedLayer":
        """Copy a layer to the CPU in float64."""
        return cls(layer.weight.detach().cpu().double(), layer.bias.detach().cpu().double())

    def after(self, first: "FoldedLayer") -> "FoldedLayer":
        """Compose `first` and this layer into one."""
        return FoldedLayer(self.weight @ first.weight, self.weight @ first.bias + self.bias)

    def plus(self, other: "FoldedLayer") -> "FoldedLayer":
        """Add the outputs of both layers."""
        return FoldedLayer(self.weight + other.weight, self.bias + other.bias)

    def beside(self, other: "FoldedLayer") -> "FoldedLayer":
        """Concatenate the outputs of both layers."""
        return FoldedLayer(torch.cat([self.weight, other.weight]), torch.cat([self.bias, other.bias]))

    def outputs(self, start: int, end: int | None = None) -> "FoldedLayer":
        """Select a range of outputs."""
        return FoldedLayer(self.weight[start:end], self.bias[start:end])

    def base_two(self) -> "FoldedLayer":
        """Divide by ln 2, so that `exp2` of the outputs is `exp` of those of this layer."""
        return FoldedLayer(self.weight / math.log(2), self.bias / math.log(2))

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.weight, self.bias)


@dataclass(frozen=True)
class FoldedStream(_Folded):
    """
    Stream of KNOWN: `leaky_relu(shift(z) + (scale(z) * expm1(exponent(z) * expand(x))) @ contract.T)` with
    `z = relu(squeeze(x))`.
    """

    first: FoldedLayer  # `expand` and `squeeze`, concatenated
    exponent: FoldedLayer  # from the bottleneck to the hidden units
    scale: FoldedLayer  # from the bottleneck to the hidden units
    shift: FoldedLayer  # from the bottleneck to the outputs of `contract`, with the bias of `contract`
    contract: torch.Tensor  # weight of the last layer, (stream, hidden)

    @property
    def expand(self) -> FoldedLayer:
        return self.first.outputs(0, self.contract.shape[1])

    @property
    def squeeze(self) -> FoldedLayer:
        return self.first.outputs(self.contract.shape[1])

    @classmethod
    def fold(cls, stream: KNOWNStream) -> "FoldedStream":
        """Fold a stream in float64 on the CPU."""
        activation = stream.activation
        expand, scale, contract = map(FoldedLayer.from_linear, (stream.expand, activation.scale, stream.contract))
        return cls(
            first=expand.beside(FoldedLayer.from_linear(activation.squeeze).after(expand)),
            exponent=FoldedLayer.from_linear(activation.exponent),
            scale=scale,
            shift=contract.after(FoldedLayer.from_linear(activation.shift).plus(scale)),
            contract=contract.weight,
        )

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map `(N, inputs)` to `(N, stream)`, before the LeakyReLU."""
        expanded, bottleneck = self.first(inputs).tensor_split([self.contract.shape[1]], dim=1)
        bottleneck = bottleneck.relu()
        hidden = self.exponent(bottleneck).mul_(expanded).expm1_().mul_(self.scale(bottleneck))
        return self.shift(bottleneck).addmm_(hidden, self.contract.T)


@dataclass(frozen=True)
class FoldedNetwork(_Folded):
    """Network of one role."""

    history_stream: FoldedStream  # S inputs
    difference_stream: FoldedStream  # S - 1 inputs
    head: FoldedLayer  # from the outputs of both streams to the argument of the tanh

    @classmethod
    def fold(cls, model: KNOWNModel, role: str) -> "FoldedNetwork":
        """Fold the network of a role in float64 on the CPU."""
        network = model.networks[role]
        assert isinstance(network, KNOWNNetwork)
        streams = FoldedStream.fold(network.history_stream), FoldedStream.fold(network.difference_stream)
        return cls(*streams, FoldedLayer.from_linear(network.head))

    @property
    def streams_and_heads(self) -> list[tuple[FoldedStream, torch.Tensor]]:
        """Each stream with its part `(1, stream)` of the head's weight."""
        history_head, difference_head = self.head.weight.chunk(2, dim=1)
        return [(self.history_stream, history_head), (self.difference_stream, difference_head)]


def prepare_folded(model: KNOWNModel, role: str) -> ResidualFunction:
    """Fold a network for the device of the model, in float64 if the model is float64 and in float32 otherwise."""
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    network = FoldedNetwork.fold(model, role).to(model.device, dtype)
    slope = model.config.leaky_slope

    def forward(chunk: torch.Tensor) -> torch.Tensor:
        differences = chunk.diff(dim=1).to(dtype)
        streams = torch.cat([network.history_stream(chunk.to(dtype)), network.difference_stream(differences)], dim=1)
        return network.head(nn.functional.leaky_relu_(streams, slope)).tanh_()[:, 0]

    return in_chunks(forward, model.device)
