"""KNOWN with fewer and smaller layers: the same function, folded exactly in float64 and rounded once.

A stream is `h = expand(x)`, `z = relu(squeeze(h))`, `y = shift(z) + scale(z) * exp(exponent(z) * h)`,
`leaky_relu(contract(y))`. Two of its layers need not be computed:

- `squeeze` follows `expand` without an activation between them: both are one layer from n inputs to 8;
- with `exp(a) = 1 + expm1(a)`, `y` is `shift(z) + scale(z)`, which is linear in `z` and folds with `contract` into one
  layer from 8 to 32, plus `scale(z) * expm1(exponent(z) * h)`.

For weights as networks have them the arguments of the exponential are of size 1e-4, so that what goes through the
64 → 32 product is small and so is its rounding: that is what the matrix units of a GPU gain from.

Differences of states are taken before the first layer, not folded into it: `D (W)` cancels in float32 where `D W` does
not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..modeling_known import KNOWNModel, KNOWNNetwork, KNOWNStream
from .chunks import in_chunks


@dataclass(frozen=True)
class FoldedLayer:
    """`x @ weight.T + bias`, weight `(outputs, inputs)` and bias `(outputs,)`."""

    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(cls, layer: nn.Linear) -> "FoldedLayer":
        """A layer in float64 on the CPU."""
        return cls(layer.weight.detach().cpu().double(), layer.bias.detach().cpu().double())

    def after(self, first: "FoldedLayer") -> "FoldedLayer":
        """The layer that does what `first` and then this one do."""
        return FoldedLayer(self.weight @ first.weight, self.weight @ first.bias + self.bias)

    def plus(self, other: "FoldedLayer") -> "FoldedLayer":
        return FoldedLayer(self.weight + other.weight, self.bias + other.bias)

    def beside(self, other: "FoldedLayer") -> "FoldedLayer":
        """One layer that has the outputs of this one and then those of `other`."""
        return FoldedLayer(torch.cat([self.weight, other.weight]), torch.cat([self.bias, other.bias]))

    def outputs(self, start: int, end: int | None = None) -> "FoldedLayer":
        return FoldedLayer(self.weight[start:end], self.bias[start:end])

    def to(self, device: torch.device, dtype: torch.dtype) -> "FoldedLayer":
        return FoldedLayer(self.weight.to(device, dtype), self.bias.to(device, dtype))

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.weight, self.bias)


@dataclass(frozen=True)
class FoldedStream:
    """
    One stream of KNOWN: `leaky_relu(shift(z) + (scale(z) * expm1(exponent(z) * expand(x))) @ contract.T)` with
    `z = relu(squeeze(x))`.

    Attributes:
        first ([`FoldedLayer`]): `expand` and `squeeze` beside each other.
        exponent, scale, shift ([`FoldedLayer`]): From the bottleneck; `shift` to the outputs of `contract`.
        contract (`torch.Tensor` of shape `(stream, hidden)`): Its bias is part of `shift`.
    """

    first: FoldedLayer
    exponent: FoldedLayer
    scale: FoldedLayer
    shift: FoldedLayer
    contract: torch.Tensor

    @property
    def expand(self) -> FoldedLayer:
        return self.first.outputs(0, self.contract.shape[1])

    @property
    def squeeze(self) -> FoldedLayer:
        return self.first.outputs(self.contract.shape[1])

    @classmethod
    def of(cls, stream: KNOWNStream) -> "FoldedStream":
        """Folds a stream in float64 on the CPU."""
        activation = stream.activation
        expand, scale, contract = map(FoldedLayer.of, (stream.expand, activation.scale, stream.contract))
        return cls(
            first=expand.beside(FoldedLayer.of(activation.squeeze).after(expand)),
            exponent=FoldedLayer.of(activation.exponent),
            scale=scale,
            shift=contract.after(FoldedLayer.of(activation.shift).plus(scale)),
            contract=contract.weight,
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> "FoldedStream":
        return FoldedStream(
            first=self.first.to(device, dtype),
            exponent=self.exponent.to(device, dtype),
            scale=self.scale.to(device, dtype),
            shift=self.shift.to(device, dtype),
            contract=self.contract.to(device, dtype),
        )

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Maps `(N, n)` to `(N, stream)`, before the LeakyReLU."""
        expanded, bottleneck = self.first(inputs).tensor_split([self.contract.shape[1]], dim=1)
        bottleneck = bottleneck.relu()
        hidden = self.exponent(bottleneck).mul_(expanded).expm1_().mul_(self.scale(bottleneck))
        return self.shift(bottleneck).addmm_(hidden, self.contract.T)


def fold(model: KNOWNModel, role: str) -> tuple[FoldedStream, FoldedStream, FoldedLayer]:
    """The streams of the history and of its differences, and the head, float64 on the CPU."""
    network = model.networks[role]
    assert isinstance(network, KNOWNNetwork)
    return (
        FoldedStream.of(network.history_stream),
        FoldedStream.of(network.difference_stream),
        FoldedLayer.of(network.head),
    )


def prepare_folded(model: KNOWNModel, role: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    Folded layers on the device of the model, in float64 for a model in float64 and in float32 for every other.

    Args:
        model ([`KNOWNModel`]):
            The networks of the three roles.
        role (`str`):
            Which of them.

    Returns:
        `Callable`: from a history `(N, S)` to the residual `(N,)`, float32, on its device.
    """
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    history_stream, difference_stream, head = (part.to(model.device, dtype) for part in fold(model, role))
    slope = model.config.leaky_slope

    def forward(chunk: torch.Tensor) -> torch.Tensor:
        inputs = chunk.to(dtype), chunk.diff(dim=1).to(dtype)
        streams = torch.cat([history_stream(inputs[0]), difference_stream(inputs[1])], dim=1)
        return head(nn.functional.leaky_relu_(streams, slope)).tanh_()[:, 0]

    return in_chunks(forward, model.device)
