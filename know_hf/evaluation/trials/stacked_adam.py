"""Adam for stacked parameters, each copy with its own learning rate."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8  # defaults of torch.optim.Adam


class StackedAdam:
    """Adam with cosine decay to 0, as [`fine_tune`] trains, on T copies of each parameter `(T, …)`, in place.

    `learning_rates` has, for each parameter, the rates `(T,)` of the first step.
    """

    def __init__(self, parameters: Sequence[Tensor], learning_rates: Sequence[Tensor], steps: int) -> None:
        self.parameters = parameters
        self.rates = [
            rates.view(-1, *[1] * (parameter.ndim - 1)).to(parameter)
            for parameter, rates in zip(parameters, learning_rates, strict=True)
        ]
        self.steps, self.taken = steps, 0
        self.means = [torch.zeros_like(parameter) for parameter in parameters]
        self.squares = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take a step, given the gradient of each parameter."""
        factor = 0.5 * (1 + math.cos(math.pi * self.taken / self.steps))
        self.taken += 1
        first, second = 1 - _BETA_1**self.taken, math.sqrt(1 - _BETA_2**self.taken)
        for parameter, gradient, rates, mean, square in zip(
            self.parameters, gradients, self.rates, self.means, self.squares, strict=True
        ):
            mean.lerp_(gradient, 1 - _BETA_1)
            square.mul_(_BETA_2).addcmul_(gradient, gradient, value=1 - _BETA_2)
            scale = square.sqrt().div_(second).add_(_EPSILON)
            parameter.addcmul_(rates * (-factor / first), mean.div(scale))
