"""Builder of vector operations in LLVM's intermediate representation.

The exponential is computed inline: `2^a - 1` with `a = n + f`, `n` an integer and `|f| <= 1/2` exactly, `2^n`
assembled from bits and `2^f - 1` a near-minimax polynomial of degree 6, whose relative error is 2e-8 before rounding.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from llvmlite import ir
from numpy.polynomial import Chebyshev, Polynomial

FLOAT, INDEX, POINTER = ir.FloatType(), ir.IntType(64), ir.PointerType()

# Adding it to a float32 below 2^22 rounds that to an integer n and leaves n + 127, the exponent bits of 2^n, in the
# lowest bits.
_ROUNDER = 1.5 * 2**23 + 127


@dataclass
class Loop:
    """
    Loop under construction: the number of the iteration, from 0, and the values that one iteration passes to the next.

    Inside the loop, these are the values of the previous iteration until they are assigned; after it, of the last one.
    """

    index: ir.Value
    carried: list[ir.Value]


class VectorCode:
    """Builder of the body of a function, with vectors of `lanes` floats."""

    def __init__(self, function: ir.Function, lanes: int):
        self.builder = ir.IRBuilder(function.append_basic_block())
        self.lanes = lanes
        self.type = ir.VectorType(FLOAT, lanes)
        self.bits = ir.VectorType(ir.IntType(32), lanes)
        signature = ir.FunctionType(self.type, 3 * [self.type])
        self._multiply_add = ir.Function(function.module, signature, f"llvm.fmuladd.v{lanes}f32")

    def address(self, base: ir.Value, offset: int | ir.Value, unit: int = 1) -> ir.Value:
        """Return the address `offset * unit` floats after `base`."""
        if isinstance(offset, int):
            return self.builder.gep(base, [INDEX(offset * unit)], source_etype=FLOAT)
        return self.builder.gep(base, [self.builder.mul(offset, INDEX(unit))], source_etype=FLOAT)

    def load(self, base: ir.Value, offset: int = 0) -> ir.Value:
        return self.builder.load(self.address(base, offset), align=4, typ=self.type)

    def store(self, vector: ir.Value, base: ir.Value, offset: int = 0) -> None:
        self.builder.store(vector, self.address(base, offset), align=4)

    def load_float(self, base: ir.Value, offset: int = 0) -> ir.Value:
        return self.builder.load(self.address(base, offset), typ=FLOAT)

    def broadcast(self, base: ir.Value, offset: int = 0) -> ir.Value:
        """Load one float into all lanes."""
        empty = ir.Constant(self.type, ir.Undefined)
        vector = self.builder.insert_element(empty, self.load_float(base, offset), INDEX(0))
        return self.builder.shuffle_vector(vector, empty, ir.Constant(self.bits, self.lanes * [0]))

    def constant(self, value: float) -> ir.Value:
        return ir.Constant(self.type, self.lanes * [value])

    def multiply_add(self, factor: ir.Value, other: ir.Value, addend: ir.Value) -> ir.Value:
        return self.builder.call(self._multiply_add, [factor, other, addend])

    def at_least(self, vector: ir.Value, limit: ir.Value) -> ir.Value:
        """Return the larger value; NaN where `vector` is NaN."""
        return self.builder.select(self.builder.fcmp_ordered("<", vector, limit), limit, vector)

    def at_most(self, vector: ir.Value, limit: ir.Value) -> ir.Value:
        """Return the smaller value; NaN where `vector` is NaN."""
        return self.builder.select(self.builder.fcmp_ordered(">", vector, limit), limit, vector)

    def power_of_two_minus_one(self, exponent: ir.Value) -> ir.Value:
        """Compute `2^a - 1`; NaN from a = 127.5 on, so that an overflow never yields a wrong finite number."""
        builder = self.builder
        exponent = self.at_most(self.at_least(exponent, self.constant(-126)), self.constant(128))
        rounded = builder.fadd(exponent, self.constant(_ROUNDER))
        fraction = builder.fsub(exponent, builder.fsub(rounded, self.constant(_ROUNDER)))
        *lower, highest = _power_coefficients()
        slope = self.constant(highest)
        for coefficient in reversed(lower):
            slope = self.multiply_add(slope, fraction, self.constant(coefficient))
        exponent_bits = builder.shl(builder.bitcast(rounded, self.bits), ir.Constant(self.bits, self.lanes * [23]))
        power = builder.bitcast(exponent_bits, self.type)
        # With p = 2^f - 1 and q = 2^n: p q + (q - 1), which is exactly p where n is 0.
        return self.multiply_add(builder.fmul(slope, fraction), power, builder.fsub(power, self.constant(1)))

    def tanh(self, vector: ir.Value) -> ir.Value:
        """Compute `p / (p + 2)` with `p = exp(2 x) - 1`, which is equally accurate for small and large x."""
        doubled = self.builder.fmul(vector, self.constant(2 / math.log(2)))
        power = self.power_of_two_minus_one(self.at_most(doubled, self.constant(64)))
        return self.builder.fdiv(power, self.builder.fadd(power, self.constant(2)))

    @contextmanager
    def loop(self, count: int | ir.Value, carried: Sequence[ir.Value] = ()) -> Iterator[Loop]:
        """Run the code of the `with` block `count` times, at least once."""
        builder = self.builder
        before, body, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(body)
        builder.position_at_end(body)
        index = builder.phi(INDEX)
        index.add_incoming(INDEX(0), before)
        entering = [builder.phi(value.type) for value in carried]
        loop = Loop(index, list(entering))
        yield loop
        following = builder.add(index, INDEX(1))
        index.add_incoming(following, builder.block)
        for phi, first, later in zip(entering, carried, loop.carried, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(later, builder.block)
        end = INDEX(count) if isinstance(count, int) else count
        builder.cbranch(builder.icmp_signed("<", following, end), body, after)
        builder.position_at_end(after)


@lru_cache
def _power_coefficients() -> tuple[float, ...]:
    """Coefficients of `(2^f - 1) / f` for `|f| <= 1/2`, constant first, interpolated at Chebyshev nodes."""
    slope = Chebyshev.interpolate(lambda f: np.expm1(f * math.log(2)) / f, deg=5, domain=[-0.5, 0.5])
    return tuple(slope.convert(kind=Polynomial).coef.tolist())
