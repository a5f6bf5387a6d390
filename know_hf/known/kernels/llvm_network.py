"""The folded network of one role as machine code, compiled by LLVM for the current CPU.

A block of rows passes through the network at once, one row per vector lane. Each weight is read once per block and
broadcast over the lanes. The values of a block (inputs, bottleneck and 64 hidden values per row) stay in the L1 cache,
its sums in registers. All lanes do the same operations in the same order, so that the result of a row does not depend
on other rows.
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import llvmlite.binding as llvm
from llvmlite import ir

from .llvm_builder import INDEX, POINTER, VectorCode

TILE = 4
"""Units of the 64 → 32 layer whose sums are in registers simultaneously."""


@dataclass(frozen=True)
class NetworkSizes:
    """Constants of the compiled code; the fields are those of [`KNOWNConfig`]."""

    num_states: int
    hidden: int
    bottleneck: int
    stream: int
    leaky_slope: float

    @property
    def tiles(self) -> int:
        """Number of tiles of the stream units; the last one is padded."""
        return math.ceil(self.stream / TILE)


@dataclass(frozen=True)
class MachineCode:
    """
    Compiled network: a function of `(history, row_stride, state_stride, rows, weights, scratch, residual)`, which are
    addresses, strides in floats, and at least one row. `llvm_kernel` packs the weights. It releases the GIL.
    """

    function: Callable[..., None]
    scratch_size: int  # floats of scratch memory that a call needs
    engine: llvm.ExecutionEngine  # owner of the code


@lru_cache
def compile_network(sizes: NetworkSizes) -> MachineCode:
    """Compile the network for the current CPU, in about 0.1 s for the published sizes."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple, features = llvm.get_process_triple(), llvm.get_host_cpu_features()
    network = _Network(sizes, *vector_shape(triple, features))
    module = llvm.parse_assembly(str(network.module))
    module.verify()
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3
    )
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    arguments = [ctypes.c_void_p, *3 * [ctypes.c_int64], *3 * [ctypes.c_void_p]]
    function = ctypes.CFUNCTYPE(None, *arguments)(engine.get_function_address("residual"))
    return MachineCode(function, network.scratch_size, engine)


def vector_shape(triple: str, features: dict[str, bool]) -> tuple[int, int]:
    """Return the floats per vector register and the vectors per block: 4 for 32 registers, 2 for 16."""
    if features.get("avx512f"):
        return 16, 4
    if features.get("avx"):
        return 8, 2
    return 4, 4 if triple.startswith(("aarch64", "arm64")) else 2


class _Network:
    """Generator of the function `residual` in an LLVM module."""

    def __init__(self, sizes: NetworkSizes, lanes: int, num_vectors: int):
        self.sizes = sizes
        self.block_rows = lanes * num_vectors
        self.starts = range(0, self.block_rows, lanes)
        # Offsets into the scratch memory.
        self.inputs = 0
        self.bottleneck = sizes.num_states * self.block_rows
        self.hidden = self.bottleneck + sizes.bottleneck * self.block_rows
        self.scratch_size = self.hidden + sizes.hidden * self.block_rows
        self.module = ir.Module()
        self._write()

    def _write(self) -> None:
        arguments = [POINTER, INDEX, INDEX, INDEX, POINTER, POINTER, POINTER]
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), arguments), "residual")
        history, row_stride, state_stride, rows, weights, self.scratch, residual = function.args
        code = self.code = VectorCode(function, self.starts.step)
        builder, size = code.builder, INDEX(self.block_rows)
        with code.loop(builder.sdiv(builder.add(rows, INDEX(self.block_rows - 1)), size)) as block:
            first = builder.mul(block.index, size)
            left = builder.sub(rows, first)
            used = builder.select(builder.icmp_signed("<", left, size), left, size)
            self._read(code.address(history, builder.mul(first, row_stride)), row_stride, state_stride, used)
            self.next_weights = weights
            head = len(self.starts) * [code.broadcast(self._weights(1))]
            head = self._stream(self.sizes.num_states, head)
            self._take_differences()
            head = self._stream(self.sizes.num_states - 1, head)
            for start, vector in zip(self.starts, head, strict=True):
                code.store(code.tanh(vector), self.scratch, start)
            with code.loop(used) as row:
                result = code.load_float(code.address(self.scratch, row.index))
                builder.store(result, code.address(residual, builder.add(first, row.index)))
        builder.ret_void()

    def _weights(self, count: int) -> ir.Value:
        """Return the address of the next weights, and advance by their count."""
        weights, self.next_weights = self.next_weights, self.code.address(self.next_weights, count)
        return weights

    def _read(self, history: ir.Value, row_stride: ir.Value, state_stride: ir.Value, used: ir.Value) -> None:
        """Copy one block to the scratch memory, state by state; rows past the end repeat the last one."""
        code, builder = self.code, self.code.builder
        with code.loop(self.block_rows) as row:
            inside = builder.icmp_signed("<", row.index, used)
            source = builder.select(inside, row.index, builder.sub(used, INDEX(1)))
            source = code.address(history, builder.mul(source, row_stride))
            target = code.address(self.scratch, row.index)
            for state in range(self.sizes.num_states):
                value = code.load_float(code.address(source, state_stride, unit=state))
                builder.store(value, code.address(target, self.inputs + state * self.block_rows))

    def _take_differences(self) -> None:
        code = self.code
        for offset in range(self.inputs, self.bottleneck - self.block_rows, code.lanes):
            later = code.load(self.scratch, offset + self.block_rows)
            code.store(code.builder.fsub(later, code.load(self.scratch, offset)), self.scratch, offset)

    def _stream(self, num_inputs: int, head: list[ir.Value]) -> list[ir.Value]:
        """Add the outputs of one stream to the sums of the head."""
        self._squeeze(num_inputs)
        self._activate(num_inputs)
        return self._contract(head)

    def _squeeze(self, num_inputs: int) -> None:
        code, count = self.code, 1 + num_inputs
        all_weights = self._weights(self.sizes.bottleneck * count)
        with code.loop(self.sizes.bottleneck) as unit:
            sums = self._layer(code.address(all_weights, unit.index, count), self.inputs, num_inputs)
            target = code.address(self.scratch, unit.index, self.block_rows)
            for start, vector in zip(self.starts, sums, strict=True):
                code.store(code.at_least(vector, code.constant(0)), target, self.bottleneck + start)

    def _activate(self, num_inputs: int) -> None:
        code, builder, bottleneck = self.code, self.code.builder, self.sizes.bottleneck
        exponent_at = 1 + num_inputs
        scale_at = exponent_at + 1 + bottleneck
        count = scale_at + 1 + bottleneck
        all_weights = self._weights(self.sizes.hidden * count)
        with code.loop(self.sizes.hidden) as unit:
            weights = code.address(all_weights, unit.index, count)
            expand = self._layer(weights, self.inputs, num_inputs)
            exponent = self._layer(code.address(weights, exponent_at), self.bottleneck, bottleneck)
            scale = self._layer(code.address(weights, scale_at), self.bottleneck, bottleneck)
            target = code.address(self.scratch, unit.index, self.block_rows)
            for i, start in enumerate(self.starts):
                power = code.power_of_two_minus_one(builder.fmul(exponent[i], expand[i]))
                code.store(builder.fmul(scale[i], power), target, self.hidden + start)

    def _layer(self, weights: ir.Value, values: int, num_values: int) -> list[ir.Value]:
        """Return the sums of one unit, whose bias and weights are contiguous, over values in the scratch memory."""
        code = self.code
        sums = len(self.starts) * [code.broadcast(weights)]
        for value in range(num_values):
            weight = code.broadcast(weights, 1 + value)
            for i, start in enumerate(self.starts):
                vector = code.load(self.scratch, values + value * self.block_rows + start)
                sums[i] = code.multiply_add(weight, vector, sums[i])
        return sums

    def _contract(self, head: list[ir.Value]) -> list[ir.Value]:
        code, sizes = self.code, self.sizes
        contract_at = TILE * (1 + sizes.bottleneck)
        head_at = contract_at + TILE * sizes.hidden
        count = head_at + TILE
        all_weights = self._weights(sizes.tiles * count)
        with code.loop(sizes.tiles, head) as tile:
            weights = code.address(all_weights, tile.index, count)
            sums = [[code.broadcast(weights, unit)] * len(self.starts) for unit in range(TILE)]
            for value in range(sizes.bottleneck):
                vectors = code.address(self.scratch, self.bottleneck + value * self.block_rows)
                sums = self._add_to_tile(sums, code.address(weights, TILE * (1 + value)), vectors)
            contract = code.address(weights, contract_at)
            with code.loop(sizes.hidden, [vector for unit in sums for vector in unit]) as hidden:
                vectors = code.address(code.address(self.scratch, hidden.index, self.block_rows), self.hidden)
                sums = self._add_to_tile(
                    self._by_unit(hidden.carried), code.address(contract, hidden.index, TILE), vectors
                )
                hidden.carried = [vector for unit in sums for vector in unit]
            for unit, unit_sums in enumerate(sums):
                weight = code.broadcast(weights, head_at + unit)
                for i, vector in enumerate(unit_sums):
                    leaky = code.at_least(vector, code.builder.fmul(vector, code.constant(sizes.leaky_slope)))
                    tile.carried[i] = code.multiply_add(weight, leaky, tile.carried[i])
        return tile.carried

    def _add_to_tile(self, sums: list[list[ir.Value]], weights: ir.Value, vectors: ir.Value) -> list[list[ir.Value]]:
        """Add one value of every row, times a weight per unit of the tile."""
        code = self.code
        values = [code.load(vectors, start) for start in self.starts]
        result = []
        for unit, unit_sums in enumerate(sums):
            weight = code.broadcast(weights, unit)
            pairs = zip(values, unit_sums, strict=True)
            result.append([code.multiply_add(weight, value, total) for value, total in pairs])
        return result

    def _by_unit(self, vectors: list[ir.Value]) -> list[list[ir.Value]]:
        return [vectors[i : i + len(self.starts)] for i in range(0, len(vectors), len(self.starts))]
