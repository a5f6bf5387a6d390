"""The part of a matrix that stands out from its noise, from a few products with vectors."""

import torch

_STEPS = 12  # products with the matrix and its transpose; the largest singular values converge first
_ROUNDING = 1e-5  # of a vector of the Krylov space, relative to the squared norm of the matrix


def singular_part(matrix: torch.Tensor, norm: float) -> tuple[torch.Tensor, float]:
    """Shrink the largest singular values of a matrix by its noise, and drop the others.

    With singular values y in units of `s √n` for an m × n matrix with m ≤ n and noise of variance s² per element, and
    β = m / n, the value of least squared error is `√((y² - β - 1)² - 4β) / y`, and 0 for `y ≤ 1 + √β` (Gavish and
    Donoho, *Optimal Shrinkage of Singular Values*, arXiv 1405.7511). s² is that of what the first few singular
    directions leave. These are found by the Lanczos method with a start that does not depend on the order of rows and
    columns, in some fifty operations per element; a complete decomposition needs about twenty times the smaller side.
    The noise of a single row or column cannot be estimated, so nothing of it is kept.

    `norm` is the Frobenius norm of the matrix. Returns the shrunken matrix, and the stable rank `|matrix|² / σ₁²`, 0
    for a matrix of zeros.
    """
    rank = min(_STEPS, min(matrix.shape) // 2)
    if not norm or not rank:
        return torch.zeros_like(matrix), float(norm > 0)
    unit = matrix / norm
    right = _krylov(unit, rank)
    left, sizes, rotation = torch.linalg.svd(unit @ right, full_matrices=False)
    count, (rows, columns) = len(sizes), sorted(matrix.shape)
    energy = sizes.double().square()
    variance = float((1 - energy.sum()).clamp(min=0)) / ((rows - count) * (columns - count))
    beta, noise = rows / columns, variance * columns / energy.clamp(min=1e-30)
    factors = ((1 - (beta + 1) * noise).square() - 4 * beta * noise.square()).clamp(min=0).sqrt()
    factors[(1 + beta**0.5) ** 2 * noise >= 1] = 0
    kept = (left * (norm * sizes * factors.float())) @ (right @ rotation.T).T
    return kept, 1 / max(float(energy[0]), 1e-30)


def _krylov(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """Return an orthonormal basis `(n, ≤ count)` of v, Mv, M²v, … for `M = matrixᵀ matrix`, v the norms of columns."""
    vectors = matrix.new_empty(count, matrix.shape[1])
    new = matrix.square().sum(dim=0).sqrt()
    for index in range(count):
        size = float(torch.linalg.vector_norm(new))
        if index and size <= _ROUNDING:
            return vectors[:index].T
        torch.div(new, size, out=vectors[index])
        new, before = matrix.T @ (matrix @ vectors[index]), vectors[: index + 1]
        for _ in range(2):
            new = new - (before @ new) @ before
    return vectors.T
