"""Predictions from branches: trainings from one start on different parts of the data, or with different seeds.

The functions act on one complete tensor; the classes apply them to the snapshots of a trajectory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..markdown import quantity
from .protocol import check_finite, register_predictor
from .snapshot_predictor import SnapshotPredictor, TensorSnapshots

_ROUNDING = 8 * torch.finfo(torch.float32).eps  # of a singular value, relative to the norm of the weights


def branch_average(branches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean of K branches in float32 (Wortsman et al., *Model soups*, arXiv 2203.05482).

    With independent noise of variance σ² per weight and branch, its error is `σ² / K` per weight.
    """
    return _stacked(branches, 1).mean(dim=0)


def model_stock(start: torch.Tensor, branches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Move from the start towards the mean of the branches as far as they agree: `P + t (mean - P)`.

    Model Stock (Jang et al., *Model Stock: All we need is just a few fine-tuned models*, arXiv 2403.19522):
    `t = K c / (1 + (K - 1) c)`, where c is the mean cosine between the updates of two of the K ≥ 2 branches. A common
    update of variance τ² per weight and independent noise of variance σ² give `c = τ² / (τ² + σ²)`, so that
    `t = τ² / (τ² + σ² / K)` has the least squared error of all multiples of the mean. Where a branch did not move, or
    the updates point away from each other (c ≤ 0), the result is the start.
    """
    count, updates = len(branches), (_stacked(branches, 2) - start.float()).flatten(1).double()
    norms = updates.norm(dim=1)
    if not bool((norms > 0).all()):
        return start.float().clone()
    units = updates / norms[:, None]
    # the sum of all cosines is |Σ unit|², of which K are 1
    cosine = max(float((units.sum(dim=0).square().sum() - count) / (count * (count - 1))), 0.0)
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return start.float() + ratio * (branch_average(branches) - start.float())


def james_stein_average(start: torch.Tensor, branches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Shrink the mean update of the branches by its noise: `P + f (mean - P)` with the factor of [`james_stein`].

    The noise is the variance between K ≥ 2 branches, over K. For the expected error see [`model_stock`].
    """
    update = branch_average(branches) - start.float()
    return start.float() + james_stein(update, _noise(branches)) * update


def james_stein(values: torch.Tensor, noise: float) -> float:
    """Positive-part James–Stein factor of N noisy values: `max(0, 1 - (1 - 2 / N) noise / |values|²)`.

    James and Stein, *Estimation with Quadratic Loss*, 1961. For N > 2 values with independent Gaussian noise, the
    factor times the values has a smaller expected squared error than the values, whatever the true ones are. `noise`
    is the sum of the variances of their noise.
    """
    count, square = values.numel(), float(values.double().square().sum())
    return max(0.0, 1 - (1 - 2 / count) * noise / square) if count > 2 and square > 0 else 1.0


def jackknife(theta0: torch.Tensor, branches: Sequence[torch.Tensor], fraction: float = 0.5) -> torch.Tensor:
    """Remove the bias of training on a finite sample: `Θ0 + ρ / (1 - ρ) (Θ0 - mean of the branches)`.

    After Quenouille, *Notes on Bias in Estimation*, 1956. A bias b / n of weights trained on n examples is b / (ρ n)
    in branches on a fraction ρ of them, above 0 and below 1, and cancels exactly; for two halves the result is
    `2 Θ0 - mean`.
    """
    _check_fraction(fraction)
    return theta0.float() + fraction / (1 - fraction) * (theta0.float() - branch_average(branches))


def shrunken_jackknife(theta0: torch.Tensor, branches: Sequence[torch.Tensor], fraction: float = 0.5) -> torch.Tensor:
    """As [`jackknife`], with its correction shrunk by [`james_stein`].

    The noise of `Θ0 - mean` is taken as twice that of the mean of K ≥ 2 branches, as if Θ0 were as noisy and
    independent of it. They share data, so this errs towards Θ0.
    """
    correction = jackknife(theta0, branches, fraction) - theta0.float()
    scale = fraction / (1 - fraction)
    return theta0.float() + james_stein(correction, 2 * scale**2 * _noise(branches)) * correction


def spectral_filter(start: torch.Tensor, branches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rebuild the mean update of K branches from singular directions, with the values that the other branches have.

    For the update `Δk = Σ_i s_i u_i v_iᵀ` of each branch, the value along direction i is that of the mean update M of
    the *other* branches, `c_i = u_iᵀ M v_i`, and directions with `c_i ≤ 0` or `s_i = 0` are dropped:
    `P + 1/K Σ_k Σ_i max(c_i, 0) u_i v_iᵀ`. A direction that only fits the noise of its own branch has no part in the
    others, so `c_i` is an unbiased estimate of the true value along it; singular values themselves are inflated by
    noise. It is the idea of cross-validated eigenvalues (Bartz, *Cross-validation based Nonlinear Shrinkage*, arXiv
    1611.00798) for updates.

    With noise of variance σ² per weight in an m × n matrix and a strong common update of rank r, two branches leave an
    error of about `σ² r (m + n) / 2` instead of the `σ² m n / 2` of their mean.

    Convolution kernels are matrices `(out, in · taps)`. Vectors are averaged.
    """
    updates = _stacked(branches, 2) - start.float()
    if updates.ndim < 3:
        return start.float() + updates.mean(dim=0)
    matrices = updates.flatten(2)
    total, filtered = matrices.sum(dim=0), torch.zeros_like(matrices[0])
    for matrix, branch in zip(matrices, branches, strict=True):
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
        others = (total - matrix) / (len(branches) - 1)
        values = ((left.T @ others) * right).sum(dim=1).clamp(min=0)
        # beyond the rank of an update, as of LoRA, its singular vectors are arbitrary
        values[sizes <= _ROUNDING * (start.float().norm() + branch.float().norm())] = 0
        filtered += left * values @ right
    return start.float() + (filtered / len(branches)).reshape(start.shape)


def factorise(product: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the LoRA matrices A `(r, in)` and B `(out, r)` whose product B A is nearest to a matrix `(out, in)`.

    By singular values (Eckart and Young, *The Approximation of One Matrix by Another of Lower Rank*, 1936), with their
    square roots in both. Of a scaled adapter, divide the matrix by the scaling first.

    Raises:
        `ValueError`: if the rank is less than 1 or more than the matrix has rows or columns.
    """
    if not 1 <= rank <= min(product.shape):
        raise ValueError(f"rank must be from 1 to {min(product.shape)}, got {rank}")
    left, values, right = torch.linalg.svd(product.float(), full_matrices=False)
    roots = values[:rank].sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


@register_predictor("branch_average")
@dataclass
class BranchAverage(SnapshotPredictor):
    """Mean of the branches, see [`branch_average`]."""

    def reads(self) -> Mapping[str, int]:
        return {"branches": 1}

    def tensor(self, snapshots: TensorSnapshots) -> torch.Tensor:
        return branch_average(snapshots.branches)


class FromOrigin(SnapshotPredictor):
    """Base class of predictors that combine the updates of two branches or more."""

    def reads(self) -> Mapping[str, int]:
        return {"branches": 2, "origin": 1}


@register_predictor("model_stock")
@dataclass
class ModelStock(FromOrigin):
    """Model Stock of the branches, see [`model_stock`]."""

    def tensor(self, snapshots: TensorSnapshots) -> torch.Tensor:
        return model_stock(snapshots.origin, snapshots.branches)


@register_predictor("james_stein")
@dataclass
class JamesStein(FromOrigin):
    """Mean update of the branches, shrunk by its noise, see [`james_stein_average`]."""

    def tensor(self, snapshots: TensorSnapshots) -> torch.Tensor:
        return james_stein_average(snapshots.origin, snapshots.branches)


@register_predictor("spectral_filter")
@dataclass
class SpectralFilter(FromOrigin):
    """Mean update of the branches along the singular directions that they share, see [`spectral_filter`]."""

    def tensor(self, snapshots: TensorSnapshots) -> torch.Tensor:
        return spectral_filter(snapshots.origin, snapshots.branches)


@register_predictor("jackknife")
@dataclass
class Jackknife(SnapshotPredictor):
    """Θ0 without the bias of a finite sample, estimated from branches on parts of the data, see [`jackknife`].

    It is exact for branches that begin at the start and are trained out like Θ0. Branches from Θ0 have left only a
    part of the way to the optimum of their own data.

    Args:
        fraction (`float`, *optional*):
            Share of the data of each branch, above 0 and below 1; the recorded one by default.
    """

    fraction: float | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None:
            check_finite(fraction=self.fraction)
            _check_fraction(self.fraction)

    def reads(self) -> Mapping[str, int]:
        return {"branches": 1} | ({"fraction": 1} if self.fraction is None else {})

    def tensor(self, snapshots: TensorSnapshots) -> torch.Tensor:
        return jackknife(snapshots.theta0, snapshots.branches, self.fraction or snapshots.fraction)


@register_predictor("shrunken_jackknife")
@dataclass
class ShrunkenJackknife(Jackknife):
    """As [`Jackknife`], with its correction shrunk by its noise, see [`shrunken_jackknife`]."""

    def reads(self) -> Mapping[str, int]:
        return {**super().reads(), "branches": 2}

    def tensor(self, snapshots: TensorSnapshots) -> torch.Tensor:
        return shrunken_jackknife(snapshots.theta0, snapshots.branches, self.fraction or snapshots.fraction)


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be above 0 and below 1, got {fraction!r}")


def _noise(branches: Sequence[torch.Tensor]) -> float:
    """Sum over all weights of the variance of the mean of the branches."""
    stacked = _stacked(branches, 2).double()
    return float(stacked.var(dim=0).sum()) / len(branches)


def _stacked(branches: Sequence[torch.Tensor], least: int) -> torch.Tensor:
    if len(branches) < least:
        raise ValueError(f"at least {quantity(least, 'branch', 'branches')} needed, got {len(branches)}")
    return torch.stack([branch.float() for branch in branches])
