"""KNOWN on a CPU: the folded network as one loop of machine code, made by LLVM at the first call in about 0.1 s.

It needs llvmlite and no compiler of the system. `python recipes/benchmarks/prediction.py --sizes --peers --threads 1`,
on a core of an AMD EPYC (Zen 5) that others used too, gave as its best 7.2e-8 s a parameter and step; `folded` 3.3e-7
and `eager` 4.2e-7. That is four fifths of the 266 GFLOP/s which a loop of nothing but multiply-adds reached there:
8,460 vector instructions on the two multiply-add units, for 16 parameters. 256-bit vectors instead took 1.6e-7.

Also tried on that core, with programs that were not kept:

- numba, the same loops: 2.1e-7 and 3 s to compile, as LLVM's own vectoriser keeps few sums in registers;
- `torch.compile` of the folded layers: 2.2e-7;
- the same with the 64 → 32 product in bfloat16: 1.7e-7, and an error of 7e-5 instead of 6e-8.

Error: against the network in float64 as large as that of `eager`, below 2e-7 for weights of 0.05 and below 2e-6 for
weights of 0.3 that moved by 0.1 (`tests/test_kernels.py`). It does not shrink with the residual: where states differ
by 1e-6, the residual of the shipped fc network is 3e-6 and its error 4e-9 with either. Where an exponential exceeds
2^127.5 the result is NaN. So is that of `eager`, but for a few rows below its own overflow at 2^128.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from ..modeling_known import KNOWNModel
from .folded_kernel import FoldedLayer, FoldedStream, fold
from .llvm_network import TILE, NetworkSizes, compile_network

PIECE_ROWS = 16_384
"""What a thread takes at a time, about 1 ms of work: a multiple of every block."""


def prepare_cpu(model: KNOWNModel, role: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    Compiles the network, once for every choice of sizes, and packs its weights, in float32.

    Args:
        model ([`KNOWNModel`]):
            The networks of the three roles.
        role (`str`):
            Which of them.

    Returns:
        `Callable`: from a history `(N, S)` to the residual `(N,)`, float32, on its device; on as many threads as
        torch has.
    """
    config = model.config
    sizes = NetworkSizes(
        config.num_states, config.hidden_size, config.bottleneck_size, config.stream_size, config.leaky_slope
    )
    code = compile_network(sizes)
    weights = pack(model, role)

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
            # threads of this call only: those of a pool that stays would be missing after a fork
            with ThreadPoolExecutor(num_threads) as pool:
                list(pool.map(compute, starts))
        else:
            for start in starts:
                compute(start)
        return residual.to(history.device)

    return run


def pack(model: KNOWNModel, role: str) -> torch.Tensor:
    """
    The weights in the order that the code reads them, float32: the head's bias; then for each stream

    - for each bottleneck unit its bias and weights of `squeeze`,
    - for each hidden unit its bias and weights of `expand`, `exponent` (over ln 2, for powers of two) and `scale`,
    - for each tile of `TILE` stream units their biases, then value by value their weights of `shift` and `contract`,
      then those of the head; units that fill up the last tile are zero.
    """
    *streams, head = fold(model, role)
    weights = head.weight.chunk(2, dim=1)
    parts = [head.bias, *(_pack_stream(stream, row) for stream, row in zip(streams, weights, strict=True))]
    return torch.cat(parts).float()


def _pack_stream(stream: FoldedStream, head: torch.Tensor) -> torch.Tensor:
    in_powers_of_two = FoldedLayer(stream.exponent.weight / math.log(2), stream.exponent.bias / math.log(2))
    activation = torch.cat([_rows(layer) for layer in (stream.expand, in_powers_of_two, stream.scale)], dim=1)
    output = torch.cat([_rows(stream.shift), stream.contract, head.T], dim=1)
    output = nn.functional.pad(output, (0, 0, 0, -len(output) % TILE))
    tiles = output.unflatten(0, (-1, TILE)).transpose(1, 2)
    return torch.cat([_rows(stream.squeeze).flatten(), activation.flatten(), tiles.flatten()])


def _rows(layer: FoldedLayer) -> torch.Tensor:
    """Bias and weights of every unit, `(outputs, 1 + inputs)`."""
    return torch.cat([layer.bias[:, None], layer.weight], dim=1)
