"""Projections whose output is split, such as query, key and value in one matrix: each part has its own scale."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .scale_equations import Form, ScaleEquations, add

_KEEP_CHANNELS = ("view", "_unsafe_view", "reshape", "clone")
_SPLITS = ("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")


@dataclass(frozen=True)
class TensorParts:
    """Parts of a tensor along an axis.

    Attributes:
        axis (`int`):
            The axis.
        sizes (`tuple[int]`):
            Size of each part.
        forms (`tuple[Form]`):
            Exponent of each part.
    """

    axis: int
    sizes: tuple[int, ...]
    forms: tuple[Form, ...]


@dataclass
class _Projection:
    axis: int  # of the output channels in the weight
    bias: str | None
    sizes: tuple[int, ...] = ()
    forms: tuple[Form, ...] = ()  # of the weight's parts
    is_used_whole: bool = False


class FusedProjections:
    """Watches operations for projections whose output is only ever split along its channels, always in the same way.

    Args:
        equations ([`ScaleEquations`]):
            The equations, which get a variable for each part but the first.
        names (`Mapping[int, str]`):
            Names of the tensors that may be scaled, by identity.
    """

    def __init__(self, equations: ScaleEquations, names: Mapping[int, str]) -> None:
        self._equations = equations
        self._names = names
        self._projections: dict[str, _Projection] = {}
        self._used_otherwise: set[str] = set()
        self._transposed: Any = WeakTensorKeyDictionary()  # names of weights
        self._outputs: Any = WeakTensorKeyDictionary()  # names of the weights of projections

    def watch(
        self, name: str, args: Sequence[Any], output: Any, forms: Mapping[str, Form], form: Form
    ) -> list[Form] | None:
        """Note an operation; return the exponents of its outputs if it splits a projection.

        Args:
            name (`str`):
                Name of the operation.
            args (sequence):
                Its inputs.
            output:
                Its output.
            forms (`Mapping[str, Form]`):
                Exponents of the tensors of the model.
            form (`Form`):
                Exponent of its first input.
        """
        first = args[0] if args else None
        if name == "t" and (weight := self._names.get(id(first))) is not None:
            self._transposed[output] = weight
            return None
        if name in ("mm", "addmm") and (projection := self._projection(name, args)) is not None:
            self._outputs[output] = projection
            return None
        if isinstance(first, torch.Tensor) and (weight := self._outputs.get(first)) is not None:
            if name in _KEEP_CHANNELS and output.shape[-1] == first.shape[-1]:
                self._outputs[output] = weight
                return None
            dim = args[2] if len(args) > 2 else 0
            if name in _SPLITS and dim in (-1, first.ndim - 1):
                return self._split(weight, tuple(part.shape[-1] for part in output), forms[weight], form)
        self._use_whole(args)
        return None

    def parts(self, forms: Mapping[str, Form]) -> dict[str, TensorParts]:
        """Return the parts of weights and biases by name, and require one scale of the other projections."""
        parts = {}
        for name, projection in self._projections.items():
            tensors = {name, projection.bias} - {None}
            if projection.is_used_whole or tensors & self._used_otherwise:
                for form in projection.forms:
                    self._equations.require_equal(form, forms[name])
            elif projection.sizes:
                parts[name] = TensorParts(projection.axis, projection.sizes, projection.forms)
                if projection.bias is not None:
                    rest = add(forms[projection.bias], forms[name], -1)
                    of_bias = tuple(add(rest, form) for form in projection.forms)
                    parts[projection.bias] = TensorParts(0, projection.sizes, of_bias)
        return parts

    def _projection(self, name: str, args: Sequence[Any]) -> str | None:
        """The weight of a product with a weight, with or without a bias."""
        matrix = args[-1]
        transposed = self._transposed.get(matrix)
        weight = transposed or self._names.get(id(matrix))
        bias = self._names.get(id(args[0])) if name == "addmm" else None
        if weight is None or (name == "addmm" and bias is None) or id(args[-2]) in self._names:
            return None
        new = _Projection(axis=1 if transposed is None else 0, bias=bias)
        projection = self._projections.setdefault(weight, new)
        if (projection.axis, projection.bias) != (new.axis, new.bias):
            projection.is_used_whole = True
        self._use_whole(args[-2:-1])
        return weight

    def _split(self, weight: str, sizes: tuple[int, ...], base: Form, form: Form) -> list[Form]:
        projection = self._projections[weight]
        if not projection.sizes:
            projection.sizes = sizes
            projection.forms = (base, *(self._equations.variable() for _ in sizes[1:]))
        if projection.sizes != sizes:
            projection.is_used_whole = True
            return [form] * len(sizes)
        rest = add(form, base, -1)
        return [add(rest, part) for part in projection.forms]

    def _use_whole(self, values: Any) -> None:
        if isinstance(values, torch.Tensor):
            name = self._names.get(id(values)) or self._transposed.get(values)
            if name is not None:
                self._used_otherwise.add(name)
            if (weight := self._outputs.get(values)) is not None:
                self._projections[weight].is_used_whole = True
        elif isinstance(values, tuple | list):
            for value in values:
                self._use_whole(value)
