"""KNOWN on a GPU, as one Triton kernel: it reads the S values of a row once and writes its residual once.

A program keeps all weights and takes tile after tile of 64 rows. The layers run on the matrix units: `squeeze` and
`shift`, which carry the residual, in tf32x3, as exact as float32, the others in tf32. Those give only the small part
`scale(z) * expm1(exponent(z) * h)` (see `folded_kernel`), and so their error is small: with products cut to
tf32, as a GPU cuts them, at most 1e-7 against the network in float64 for weights of 0.05, 1e-5 for weights of 0.3 that
moved by 0.1, and up to 1e-2 for weights of 1 that moved by 1 (`tests/test_kernels.py` imitates the cut). Where an
exponential exceeds float32 the result is NaN, as it is in the model.

It has run in Triton's interpreter only, and was compiled for Hopper (Triton 3.9: wgmma on all layers, no spilled
registers) but never timed. Its limits on an H200, from data sheets: 7,424 multiply-adds a stream on the matrix units,
6e-11 s a parameter at 494 TFLOP/s in tf32; 128 exponentials, 4e-11 s on the special function units; 24 bytes, 5e-12 s
at 4.8 TB/s.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import nn

from ..modeling_known import KNOWNModel
from .folded_kernel import FoldedLayer, FoldedStream, fold

ROWS = 64
"""Rows of a tile: what the matrix units of a group of four warps take at once."""

NUM_WARPS = 4

PROGRAMS_PER_PROCESSOR = 2
"""A program keeps the weights and takes tile after tile."""

# Shortest side of a matrix product that every version of Triton takes.
_SHORTEST_SIDE = 16


def prepare_triton(model: KNOWNModel, role: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    Packs the weights, in float32, on the device of the model. Triton compiles at the first call.

    Args:
        model ([`KNOWNModel`]):
            The networks of the three roles.
        role (`str`):
            Which of them.

    Returns:
        `Callable`: from a history `(N, S)` to the residual `(N,)`, float32, on its device.
    """
    config, device = model.config, model.device
    sides = {
        "INPUTS": _side(config.num_states + 1),
        "BOTTLENECK": _side(config.bottleneck_size + 1),
        "HIDDEN": _side(config.hidden_size),
        "STREAM": _side(config.stream_size),
    }
    *streams, head = fold(model, role)
    halves = head.weight.chunk(2, dim=1)
    history_weights, difference_weights = (
        _pack(stream, half, sides).to(device, torch.float32) for stream, half in zip(streams, halves, strict=True)
    )
    head_bias = float(head.bias)

    def run(history: torch.Tensor) -> torch.Tensor:
        rows = history.detach().to(device, torch.float32)
        residual = torch.empty(len(rows), dtype=torch.float32, device=device)
        num_tiles = triton.cdiv(len(rows), ROWS)
        # Triton launches on the current GPU, whichever the tensors are on
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if num_tiles:
                _known[(min(num_tiles, _num_programs(device)),)](
                    rows,
                    residual,
                    history_weights,
                    difference_weights,
                    head_bias,
                    config.leaky_slope,
                    len(rows),
                    *rows.stride(),
                    NUM_STATES=config.num_states,
                    **sides,
                    ROWS=ROWS,
                    num_warps=NUM_WARPS,
                    enable_fp_fusion=True,
                )
        return residual.to(history.device)

    return run


def _side(size: int) -> int:
    return max(_SHORTEST_SIDE, triton.next_power_of_2(size))


def _num_programs(device: torch.device) -> int:
    if device.type == "cpu":
        return PROGRAMS_PER_PROCESSOR
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def _pack(stream: FoldedStream, head: torch.Tensor, sides: dict[str, int]) -> torch.Tensor:
    """
    The matrices `(inputs, outputs)` of the layers one after another, filled up with zeros. A bias is the weight of one
    more input, which is 1: the first that is filled up.
    """
    inputs, bottleneck, hidden, outputs = sides.values()
    in_powers_of_two = FoldedLayer(stream.exponent.weight / math.log(2), stream.exponent.bias / math.log(2))
    squeeze = _filled(_with_bias(stream.squeeze), inputs, bottleneck)
    squeeze[stream.squeeze.weight.shape[1], stream.squeeze.weight.shape[0]] = 1
    matrices = [
        squeeze,
        _filled(_with_bias(stream.expand), inputs, hidden),
        _filled(_with_bias(in_powers_of_two), bottleneck, hidden),
        _filled(_with_bias(stream.scale), bottleneck, hidden),
        _filled(_with_bias(stream.shift), bottleneck, outputs),
        _filled(stream.contract.T, hidden, outputs),
        _filled(head, 1, outputs),
    ]
    return torch.cat([matrix.flatten() for matrix in matrices])


def _with_bias(layer: FoldedLayer) -> torch.Tensor:
    return torch.cat([layer.weight, layer.bias[:, None]], dim=1).T


def _filled(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return nn.functional.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


@triton.jit
def _known(
    history: tl.tensor,
    residual: tl.tensor,
    history_weights: tl.tensor,
    difference_weights: tl.tensor,
    head_bias: float,
    leaky_slope: float,
    num_rows: int,
    row_stride: int,
    state_stride: int,
    NUM_STATES: tl.constexpr,
    INPUTS: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    HIDDEN: tl.constexpr,
    STREAM: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    history_layers = _load_layers(history_weights, INPUTS, BOTTLENECK, HIDDEN, STREAM)
    difference_layers = _load_layers(difference_weights, INPUTS, BOTTLENECK, HIDDEN, STREAM)
    head: tl.constexpr = (INPUTS * (BOTTLENECK + HIDDEN) + BOTTLENECK * (2 * HIDDEN + STREAM)) + HIDDEN * STREAM
    state = tl.arange(0, INPUTS)[None, :]
    unit = tl.arange(0, STREAM)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = row < num_rows
        address = history + row[:, None] * row_stride + state * state_stride
        has_next = inside[:, None] & (state < NUM_STATES - 1)
        values = tl.load(address, mask=inside[:, None] & (state < NUM_STATES), other=1.0)
        differences = tl.where(has_next, tl.load(address + state_stride, mask=has_next, other=1.0) - values, 1.0)
        total = _stream(values, history_layers, leaky_slope, tl.load(history_weights + head + unit))
        total += _stream(differences, difference_layers, leaky_slope, tl.load(difference_weights + head + unit))
        tl.store(residual + row, _tanh(total + head_bias), mask=inside)


@triton.jit
def _load_layers(
    weights: tl.tensor, INPUTS: tl.constexpr, BOTTLENECK: tl.constexpr, HIDDEN: tl.constexpr, STREAM: tl.constexpr
) -> tl.tuple:
    squeeze = weights
    expand = squeeze + INPUTS * BOTTLENECK
    exponent = expand + INPUTS * HIDDEN
    scale = exponent + BOTTLENECK * HIDDEN
    shift = scale + BOTTLENECK * HIDDEN
    contract = shift + BOTTLENECK * STREAM
    return (
        _load_matrix(squeeze, INPUTS, BOTTLENECK),
        _round(_load_matrix(expand, INPUTS, HIDDEN)),
        _round(_load_matrix(exponent, BOTTLENECK, HIDDEN)),
        _round(_load_matrix(scale, BOTTLENECK, HIDDEN)),
        _load_matrix(shift, BOTTLENECK, STREAM),
        _round(_load_matrix(contract, HIDDEN, STREAM)),
    )


@triton.jit
def _load_matrix(weights: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    return tl.load(weights + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _stream(inputs: tl.tensor, layers: tl.tuple, leaky_slope: float, head: tl.tensor) -> tl.tensor:
    squeeze, expand, exponent, scale, shift, contract = layers
    bottleneck = tl.dot(inputs, squeeze, input_precision="tf32x3")
    bottleneck = tl.where(bottleneck < 0, 0.0, bottleneck)
    output = tl.dot(bottleneck, shift, input_precision="tf32x3")
    bottleneck = _round(bottleneck)
    power = tl.dot(_round(inputs), expand, input_precision="tf32")
    power *= tl.dot(bottleneck, exponent, input_precision="tf32")
    hidden = tl.dot(bottleneck, scale, input_precision="tf32") * (tl.exp2(power) - 1.0)
    output = tl.dot(_round(hidden), contract, output, input_precision="tf32")
    return tl.sum(tl.where(output < 0, leaky_slope * output, output) * head, axis=1)


@triton.jit
def _round(x: tl.tensor) -> tl.tensor:
    """Adds half of the last place of tf32: the matrix units cut off what is behind it."""
    return (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """A continued fraction (Lambert's) near 0, where the other form loses digits."""
    square = x * x
    near = x * (945 + square * (105 + square)) / (945 + square * (420 + 15 * square))
    power = tl.exp(-2 * tl.abs(x))
    far = (1 - power) / (1 + power)
    return tl.where(tl.abs(x) < 0.5, near, tl.where(x < 0, -far, far))
