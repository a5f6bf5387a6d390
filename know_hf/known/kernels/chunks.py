"""Running a network of torch operations over many rows, chunk by chunk."""

from collections.abc import Callable

import torch

CPU_ROWS = 4096
"""Fastest of 256 … 8,192 on a core, eager and folded: the activations of one pass stay in its cache."""

GPU_ROWS = 262_144
"""Enough to fill a GPU; the activations of one pass are below 1 GB."""


def in_chunks(
    forward: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    Wraps a forward pass that takes the memory of many activations a row.

    Every pass has the same number of rows, the last one filled up: matrix products of another height may sum in
    another order, and a row's result would depend on how many there are beside it.

    Args:
        forward (`Callable`):
            From a history `(rows, S)`, float32, on `device` to a residual `(rows,)`.
        device (`torch.device`):
            Where `forward` computes.

    Returns:
        `Callable`: from a history `(N, S)` of any dtype and device to the residual `(N,)`, float32, on its device.
    """
    rows = CPU_ROWS if device.type == "cpu" else GPU_ROWS

    def run(history: torch.Tensor) -> torch.Tensor:
        residual = torch.empty(len(history), dtype=torch.float32, device=history.device)
        with torch.no_grad():
            for start in range(0, len(history), rows):
                chunk = history[start : start + rows].float().to(device)
                filled = torch.nn.functional.pad(chunk, (0, 0, 0, rows - len(chunk)))
                residual[start : start + rows] = forward(filled)[: len(chunk)]
        return residual

    return run
