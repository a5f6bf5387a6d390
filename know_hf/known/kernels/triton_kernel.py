"""KNOWN on a GPU, as one Triton kernel that reads the S values of a row once and writes its residual once.

A program loads all weights and loops over tiles of 64 rows. The layers run on tensor cores: `squeeze` and `shift`,
which carry most of the residual, in TF32x3, as accurate as float32, the others in TF32. The latter only compute the
small part `scale(z) * expm1(exponent(z) * h)` (see `folded_kernel`), so that their error is small: against the network
in float64, at most 1e-7 for weights of 0.05, 1e-5 for weights of 0.3 that moved by 0.1, and 1e-2 for weights of 1 that
moved by 1. The result is NaN where an exponential exceeds float32, as in the model.

Tested in Triton's interpreter and compiled for Hopper (no spilled registers), but not yet timed on a GPU.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import nn

from ..modeling_known import KNOWNModel
from .chunks import ResidualFunction
from .folded_kernel import FoldedLayer, FoldedNetwork, FoldedStream

ROWS = 64
"""Rows of a tile: the height of one matrix operation of four warps."""

NUM_WARPS = 4

PROGRAMS_PER_PROCESSOR = 2
"""Each program loads the weights once and loops over tiles."""

# Shortest side of a matrix product that every version of Triton accepts.
_SHORTEST_SIDE = 16


def prepare_triton(model: KNOWNModel, role: str) -> ResidualFunction:
    """Pack the weights of a network in float32 on the device of the model. Triton compiles at the first call."""
    config, device = model.config, model.device
    sides = {
        "INPUTS": _side(config.num_states + 1),
        "BOTTLENECK": _side(config.bottleneck_size + 1),
        "HIDDEN": _side(config.hidden_size),
        "STREAM": _side(config.stream_size),
    }
    network = FoldedNetwork.fold(model, role)
    history_weights, difference_weights = (
        _pack(stream, head, sides).to(device, torch.float32) for stream, head in network.streams_and_heads
    )
    head_bias = float(network.head.bias)

    def run(history: torch.Tensor) -> torch.Tensor:
        rows = history.detach().to(device, torch.float32)
        residual = torch.empty(len(rows), dtype=torch.float32, device=device)
        num_tiles = triton.cdiv(len(rows), ROWS)
        # Triton launches on the current GPU, which may not be that of the tensors.
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
    Concatenate the matrices `(inputs, outputs)` of the layers, padded with zeros. A bias is the weight of one more
    input that is 1: the first padded one.
    """
    inputs, bottleneck, hidden, outputs = sides.values()
    squeeze = _pad(_with_bias(stream.squeeze), inputs, bottleneck)
    squeeze[stream.squeeze.weight.shape[1], stream.squeeze.weight.shape[0]] = 1
    matrices = [
        squeeze,
        _pad(_with_bias(stream.expand), inputs, hidden),
        _pad(_with_bias(stream.exponent.base_two()), bottleneck, hidden),
        _pad(_with_bias(stream.scale), bottleneck, hidden),
        _pad(_with_bias(stream.shift), bottleneck, outputs),
        _pad(stream.contract.T, hidden, outputs),
        _pad(head, 1, outputs),
    ]
    return torch.cat([matrix.flatten() for matrix in matrices])


def _with_bias(layer: FoldedLayer) -> torch.Tensor:
    return torch.cat([layer.weight, layer.bias[:, None]], dim=1).T


def _pad(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
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
    """Round to TF32 by adding half of its last place: tensor cores truncate their inputs."""
    return (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """Compute tanh, near 0 by Lambert's continued fraction, where the other form loses digits."""
    square = x * x
    near = x * (945 + square * (105 + square)) / (945 + square * (420 + 15 * square))
    power = tl.exp(-2 * tl.abs(x))
    far = (1 - power) / (1 + power)
    return tl.where(tl.abs(x) < 0.5, near, tl.where(x < 0, -far, far))
