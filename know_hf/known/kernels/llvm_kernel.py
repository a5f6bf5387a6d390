"""KNOWN on a CPU: the folded network as one machine-code loop, compiled by LLVM on first use in about 0.1 s.

It needs llvmlite, but no system compiler. `recipes/benchmarks/prediction.py` measures it: on one core with AVX-512 it
took 7.2e-8 s per parameter, `folded` 3.3e-7 and `eager` 4.2e-7, which is four fifths of the core's multiply-add rate.
On the same core, numba compiled the same loops to 2.1e-7 (in 3 s) and `torch.compile` the folded layers to 2.2e-7;
bfloat16 for the 64 → 32 product gave 1.7e-7 with an error of 7e-5 instead of 6e-8.

Error against the network in float64: as for `eager`, below 2e-7 for weights of 0.05 and below 2e-6 for weights of 0.3
that moved by 0.1. The result is NaN where an exponential exceeds 2^127.5; `eager` overflows at 2^128.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from ..modeling_known import KNOWNModel
from .chunks import ResidualFunction
from .folded_kernel import FoldedLayer, FoldedNetwork, FoldedStream
from .llvm_network import TILE, NetworkSizes, compile_network

PIECE_ROWS = 16_384
"""Rows that a thread processes at a time, about 1 ms of work: a multiple of every block size."""


def prepare_cpu(model: KNOWNModel, role: str) -> ResidualFunction:
    """Compile a network, once for all models of the same sizes, and pack its weights in float32. The kernel runs on
    `torch.get_num_threads()` threads.
    """
    config = model.config
    sizes = NetworkSizes(
        config.num_states, config.hidden_size, config.bottleneck_size, config.stream_size, config.leaky_slope
    )
    code = compile_network(sizes)
    weights = _pack(FoldedNetwork.fold(model, role))

    def run(history: torch.Tensor) -> torch.Tensor:
        rows = history.detach().to("cpu", torch.float32)
        residual = torch.empty(len(rows))

        def compute(start: int) -> None:
            piece, scratch = rows[start : start + PIECE_ROWS], torch.empty(code.scratch_size)
            addresses = weights.data_ptr(), scratch.data_ptr(), residual[start:].data_ptr()
            code.function(piece.data_ptr(), *piece.stride(), len(piece), *addresses)

        starts = range(0, len(rows), PIECE_ROWS)
        num_threads = min(torch.get_num_threads(), len(starts))
        if num_threads > 1:
            # A pool per call: the threads of a longer-lived pool would be missing after a fork.
            with ThreadPoolExecutor(num_threads) as pool:
                list(pool.map(compute, starts))
        else:
            for start in starts:
                compute(start)
        return residual.to(history.device)

    return run


def _pack(network: FoldedNetwork) -> torch.Tensor:
    """
    Concatenate the weights in the order in which the code reads them, float32: the bias of the head; then per stream

    - for each bottleneck unit, its bias and weights of `squeeze`;
    - for each hidden unit, its bias and weights of `expand`, `exponent` (to base two) and `scale`;
    - for each tile of `TILE` stream units, their biases, then value by value their weights of `shift` and `contract`,
      then those of the head. Units that pad the last tile are zero.
    """
    parts = [_pack_stream(stream, head) for stream, head in network.streams_and_heads]
    return torch.cat([network.head.bias, *parts]).float()


def _pack_stream(stream: FoldedStream, head: torch.Tensor) -> torch.Tensor:
    hidden_layers = (stream.expand, stream.exponent.base_two(), stream.scale)
    activation = torch.cat([_unit_rows(layer) for layer in hidden_layers], dim=1)
    output = torch.cat([_unit_rows(stream.shift), stream.contract, head.T], dim=1)
    output = nn.functional.pad(output, (0, 0, 0, -len(output) % TILE))
    tiles = output.unflatten(0, (-1, TILE)).transpose(1, 2)
    return torch.cat([_unit_rows(stream.squeeze).flatten(), activation.flatten(), tiles.flatten()])


def _unit_rows(layer: FoldedLayer) -> torch.Tensor:
    """Bias and weights of each unit, `(outputs, 1 + inputs)`."""
    return torch.cat([layer.bias[:, None], layer.weight], dim=1)
