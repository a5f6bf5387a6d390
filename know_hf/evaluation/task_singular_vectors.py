"""TSV-Merge (Gargiulo et al., *Task Singular Vectors: Reducing Task Interference in Model Merging*, arXiv 2412.00081).

Of T matrices that tasks have added to a weight, each gives its largest singular directions, 1/T of them, so that all
together fill the rank; the singular vectors of different tasks are then made orthogonal to each other, side by side,
and the matrix is put together again. Here the moves Θk - Θ(k+1) of the states stand for the tasks, as in the
comparison of the KNOW paper (arXiv 2508.05059), whose code for it is not public.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_SIDE = 4096


def merge_task_singular_vectors(differences: Sequence[Tensor]) -> Tensor:
    """The sum of T matrices with less interference between them: `U⊥ diag(σ) V⊥ᵀ` (arXiv 2412.00081, algorithm 1).

    With `Δt = Ut diag(σt) Vtᵀ`, U, σ and V are the first `⌊min(m, n) / T⌋` singular triplets of each t, one task
    beside the other. `U⊥ = P Qᵀ` for the thin decomposition `U = P D Qᵀ` is the nearest matrix with orthonormal
    columns (Procrustes), and V⊥ likewise. Kernels of convolutions are taken as matrices `(out, in · taps)`; the
    paper's code has none, and takes the mean of all that is no matrix. So it is here with vectors, and with matrices
    of fewer rows or columns than there are tasks, of which nothing would be left.

    Args:
        differences (sequence of `torch.Tensor`, each of shape `(m, n)` or any other): What each task has added.

    Returns:
        `torch.Tensor` of that shape, float32.

    Raises:
        `ValueError`: when the smaller side of the matrices is above 4,096: the decomposition would take hours.
    """
    stacked = torch.stack([difference.float() for difference in differences])
    matrices = stacked.flatten(2) if stacked.ndim > 2 else stacked
    rank = min(matrices.shape[1:]) // len(matrices) if matrices.ndim == 3 else 0
    if rank == 0:
        return stacked.mean(dim=0)
    if min(matrices.shape[1:]) > LARGEST_SIDE:
        raise ValueError(
            f"a matrix of {tuple(matrices.shape[1:])} is too large to merge singular vectors of; leave the arm"
            f" task-singular-vectors out, which is for matrices with a side of at most {LARGEST_SIDE}"
        )
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    left = torch.cat([u[:, :rank] for u in left], dim=1)
    right = torch.cat([v[:rank].T for v in right], dim=1)
    merged = _orthonormal(left) * values[:, :rank].flatten() @ _orthonormal(right).T
    return merged.reshape(stacked.shape[1:])


def _orthonormal(columns: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(columns, full_matrices=False)
    return left @ right
