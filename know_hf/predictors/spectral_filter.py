"""Keep the singular directions of an update that branches share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .branches import FromOrigin
from .protocol import register_predictor
from .snapshot_predictor import TensorSnapshots

_ROUNDING = 8 * torch.finfo(torch.float32).eps  # of a singular value, relative to the norm of the weights


@register_predictor("spectral_filter")
@dataclass
class SpectralFilter(FromOrigin):
    """Mean update of the branches along the singular directions that they share, see [`spectral_filter`]."""

    def tensor(self, snapshots: TensorSnapshots) -> torch.Tensor:
        return spectral_filter(snapshots.origin, snapshots.branches)


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

    Args:
        start (`torch.Tensor`):
            One tensor before the branches parted; of LoRA, the product B A. Convolution kernels
            are matrices `(out, in · taps)`. Vectors are averaged.
        branches (sequence of `torch.Tensor` of that shape):
            The tensor in each of K ≥ 2 branches.

    Returns:
        `torch.Tensor` of that shape, float32.

    Raises:
        `ValueError`: if there are fewer than two branches.
    """
    if len(branches) < 2:
        raise ValueError(f"at least 2 branches needed, got {len(branches)}")
    updates = torch.stack([branch.float() - start.float() for branch in branches])
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
