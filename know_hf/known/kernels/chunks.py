"""Chunked evaluation of a network of torch operations over many rows."""

from collections.abc import Callable

import torch

ResidualFunction = Callable[[torch.Tensor], torch.Tensor]
"""Function from a history `(N, S)` of any floating dtype and device to its residual `(N,)`, float32, on its device."""

CPU_ROWS = 4096
"""Fastest of 256 … 8,192 on one core, for `eager` and `folded`: the activations of one pass fit into its cache."""

GPU_ROWS = 262_144
"""Enough rows to fill a GPU; the activations of one pass take less than 1 GB."""


def in_chunks(forward: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> ResidualFunction:
    """
    Bound the memory of a forward pass by applying it to chunks of rows.

    Every chunk is padded to the same number of rows: matrix products of another height may sum in another order, so
    that the result of a row would depend on the number of rows.
    `forward` maps a history `(rows, S)`, float32, on `device` to a residual `(rows,)`.
    """
    rows = CPU_ROWS if device.type == "cpu" else GPU_ROWS

    def run(history: torch.Tensor) -> torch.Tensor:
        residual = torch.empty(len(history), dtype=torch.float32, device=history.device)
        with torch.no_grad():
            for start in range(0, len(history), rows):
                chunk = history[start : start + rows].float().to(device)
                padded = torch.nn.functional.pad(chunk, (0, 0, 0, rows - len(chunk)))
                residual[start : start + rows] = forward(padded)[: len(chunk)]
        return residual

    return run
