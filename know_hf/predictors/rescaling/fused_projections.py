"""Projections whose output is split, such as query, key and value in one matrix: each part has its own scale."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .scale_equations import Form, ScaleEquations, add

# operations that only arrange elements, so that they can be applied to the numbers of channels too
_ARRANGING = frozenset(
    "view _unsafe_view reshape clone detach alias t transpose permute unsqueeze squeeze expand select slice split"
    " split_with_sizes unsafe_split unsafe_split_with_sizes unbind".split()
)


@dataclass(frozen=True)
class TensorParts:
    """Parts of a tensor along an axis."""

    axis: int
    part_of: torch.Tensor  # (C,): part of each position
    forms: tuple[Form, ...]  # exponent of each part


@dataclass
class _Projection:
    axis: int  # of the output channels in the weight
    bias: str | None
    num_channels: int
    parts: dict[tuple[int, ...], Form] = field(default_factory=dict)  # exponents of the weight, by channels
    is_used_whole: bool = False


class FusedProjections:
    """Watches operations for projections whose output is only ever used in parts, always the same ones.

    Which channels a part has is found by applying the same views to the numbers of the channels. The equations get a
    variable for each part but the first. `names` are those of the tensors that may be scaled, by identity.
    """

    def __init__(self, equations: ScaleEquations, names: Mapping[int, str]) -> None:
        self._equations = equations
        self._names = names
        self._projections: dict[str, _Projection] = {}
        self._used_otherwise: set[str] = set()
        self._transposed: Any = WeakTensorKeyDictionary()  # names of weights
        # names of weights and numbers of channels, of complete outputs
        self._channels: Any = WeakTensorKeyDictionary()

    def watch(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Any,
        forms: Mapping[str, Form],
        form: Form,
    ) -> list[Form] | None:
        """Note an operation; return the exponents of its outputs if it takes parts of a projection.

        `forms` are the exponents of the tensors of the model, `form` is that of the first input.
        """
        name, first = func.overloadpacket.__name__, args[0] if args else None
        if name == "t" and (weight := self._names.get(id(first))) is not None:
            self._transposed[output] = weight
            return None
        if name in ("mm", "addmm") and (projected := self._projection(name, args)) is not None:
            channels = torch.arange(output.shape[-1], device=output.device)
            self._channels[output] = (projected, channels.expand(output.shape).clone())  # with the same strides
            return None
        is_arranging = name in _ARRANGING and not any(isinstance(value, torch.dtype) for value in args)
        if is_arranging and isinstance(first, torch.Tensor) and first in self._channels:
            weight, channels = self._channels[first]
            views = func(channels, *args[1:], **kwargs)
            pairs = [(output, views)] if isinstance(output, torch.Tensor) else zip(output, views, strict=True)
            return [self._view(weight, view, of_view, forms[weight], form) for view, of_view in pairs]
        self._use_whole((*args, *kwargs.values()))
        return None

    def parts(self, forms: Mapping[str, Form]) -> dict[str, TensorParts]:
        """Return the parts of weights and biases by name, and require one scale of the other projections."""
        parts = {}
        for name, projection in self._projections.items():
            of_weight = tuple(projection.parts.values())
            if projection.is_used_whole or {name, projection.bias} & self._used_otherwise:
                for form in of_weight:
                    self._equations.require_equal(form, forms[name])
            elif of_weight:
                part_of = torch.zeros(projection.num_channels, dtype=torch.long)
                for part, channels in enumerate(projection.parts):
                    part_of[list(channels)] = part
                parts[name] = TensorParts(projection.axis, part_of, of_weight)
                if projection.bias is not None:
                    rest = add(forms[projection.bias], forms[name], -1)
                    parts[projection.bias] = TensorParts(0, part_of, tuple(add(rest, form) for form in of_weight))
        return parts

    def _projection(self, name: str, args: Sequence[Any]) -> str | None:
        """The weight of a product with a weight, with or without a bias."""
        matrix = args[-1]
        transposed = self._transposed.get(matrix)
        weight = transposed or self._names.get(id(matrix))
        bias = self._names.get(id(args[0])) if name == "addmm" else None
        if weight is None or (name == "addmm" and bias is None) or id(args[-2]) in self._names:
            return None
        new = _Projection(1 if transposed is None else 0, bias, matrix.shape[1])
        projection = self._projections.setdefault(weight, new)
        if (projection.axis, projection.bias) != (new.axis, new.bias):
            projection.is_used_whole = True
        self._use_whole(args[-2])
        return weight

    def _view(self, weight: str, view: torch.Tensor, channels: torch.Tensor, base: Form, form: Form) -> Form:
        """Exponent of a view of a complete output: that of a part, unless it has all channels too."""
        projection = self._projections[weight]
        used = tuple(channels.unique().tolist())
        if len(used) == projection.num_channels:
            self._channels[view] = (weight, channels)
            return form
        if used not in projection.parts:
            if set(used) & {channel for part in projection.parts for channel in part}:
                projection.is_used_whole = True
                return form
            projection.parts[used] = self._equations.variable() if projection.parts else base
        return add(form, add(projection.parts[used], base, -1))

    def _use_whole(self, values: Any) -> None:
        if isinstance(values, torch.Tensor):
            name = self._names.get(id(values)) or self._transposed.get(values)
            if name is not None:
                self._used_otherwise.add(name)
            if values in self._channels:
                self._projections[self._channels[values][0]].is_used_whole = True
        elif isinstance(values, tuple | list):
            for value in values:
                self._use_whole(value)
