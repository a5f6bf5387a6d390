"""Linear classifiers on features: many at once by Adam, or each by its optimum."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from .stacked_adam import StackedAdam

Heads = tuple[Tensor, Tensor]  # weights (D, R, C, F) and biases (D, R, C) of D sets of examples and R trials


def adam_heads(inputs: Tensor, labels: Tensor, num_labels: int, learning_rates: Sequence[float], steps: int) -> Heads:
    """Train linear layers from zero on all examples in each step, by Adam with cosine decay to 0.

    Features `(D, N, F)` of D sets of examples with classes `(D, N)` are trained on at each of R learning rates.
    Returns weights `(D, R, C, F)` and biases `(D, R, C)`.
    """
    sets, trials = len(inputs), len(learning_rates)
    weight = inputs.new_zeros(sets * trials, num_labels, inputs.shape[-1]).requires_grad_()
    bias = inputs.new_zeros(sets * trials, num_labels).requires_grad_()
    rates = inputs.new_tensor(learning_rates).repeat(sets)
    adam = StackedAdam([weight, bias], [rates, rates], steps)
    targets = labels[:, None].expand(-1, trials, -1).flatten()
    for _ in range(steps):
        heads = weight.unflatten(0, (sets, trials)), bias.unflatten(0, (sets, trials))
        loss = cross_entropy(logits(inputs, heads).flatten(0, 2), targets, reduction="sum") / inputs.shape[1]
        adam.step(torch.autograd.grad(loss, [weight, bias]))
    return weight.detach().unflatten(0, (sets, trials)), bias.detach().unflatten(0, (sets, trials))


def ridge_heads(inputs: Tensor, labels: Tensor, num_labels: int, penalties: Sequence[float]) -> Heads:
    """Fit one-hot classes by least squares with a penalty on the weights, in closed form and float64.

    The bias is not penalised. A penalty is relative to the mean variance of the features: their size does not matter.
    Arguments and values as in [`adam_heads`].
    """
    fitted = []
    for features, classes in zip(inputs.double(), labels, strict=True):
        targets = one_hot(classes, num_labels).double()
        centred, mean = features - features.mean(0), features.mean(0)
        covariance, scale = centred.T @ centred / len(features), _variance(centred)
        products = centred.T @ (targets - targets.mean(0)) / len(features)
        identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        weights = [torch.linalg.solve(covariance + penalty * scale * identity, products).T for penalty in penalties]
        fitted.append((torch.stack(weights), torch.stack([targets.mean(0) - weight @ mean for weight in weights])))
    return _stacked(fitted, inputs)


def logistic_heads(inputs: Tensor, labels: Tensor, num_labels: int, penalties: Sequence[float]) -> Heads:
    """Fit multinomial logistic regressions with a penalty on the weights, by L-BFGS in float64.

    The loss is the mean cross-entropy plus `penalty · variance / 2 · ‖W‖²`, with the mean variance of the features.
    Arguments and values as in [`adam_heads`].
    """
    fitted = []
    for features, classes in zip(inputs.double(), labels, strict=True):
        scale = _variance(features - features.mean(0))
        heads = torch.stack([_logistic(features, classes, num_labels, penalty * scale) for penalty in penalties])
        fitted.append((heads[..., :-1], heads[..., -1]))
    return _stacked(fitted, inputs)


def _logistic(features: Tensor, classes: Tensor, num_labels: int, penalty: float) -> Tensor:
    """Return weights and, in the last column, biases."""
    from scipy.optimize import minimize

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        head = torch.from_numpy(flat).to(features).view(num_labels, -1).requires_grad_()
        weight, bias = head[:, :-1], head[:, -1]
        total = cross_entropy(features @ weight.T + bias, classes) + penalty / 2 * weight.square().sum()
        (gradient,) = torch.autograd.grad(total, [head])
        return total.item(), gradient.flatten().cpu().numpy()

    start, options = np.zeros(num_labels * (features.shape[1] + 1)), {"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-8}
    optimum = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    return torch.from_numpy(optimum).to(features).view(num_labels, -1)


def logits(inputs: Tensor, heads: Heads) -> Tensor:
    """Compute logits `(D, R, N, C)` of features `(D, N, F)`."""
    weight, bias = heads
    return inputs[:, None] @ weight.mT + bias[..., None, :]


def _variance(centred: Tensor) -> float:
    return float(centred.detach().square().mean()) or 1.0  # constant features have no scale


def _stacked(fitted: Sequence[tuple[Tensor, Tensor]], inputs: Tensor) -> Heads:
    weights, biases = zip(*fitted, strict=True)
    return torch.stack(weights).to(inputs), torch.stack(biases).to(inputs)
