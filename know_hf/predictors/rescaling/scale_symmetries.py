"""Find the ways to scale the tensors of a model that keep its function."""

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...model_tensors import memory_key, names_in_memory
from ...terminal import first_names
from ..tensor_factor import TensorFactor
from .forward_pass import evaluated
from .fused_projections import TensorParts
from .scale_trace import ScaleTrace

_VECTORS = 1  # axes of biases, of norm weights and of other vectors, which only follow the matrices


@dataclass(frozen=True)
class PartExponents:
    """Exponents of parts of a tensor, such as query, key and value in one matrix."""

    axis: int
    part_of: torch.Tensor  # (C,): part of each position along the axis
    exponents: tuple[float, ...]


@dataclass(frozen=True)
class ScaleSymmetry:
    """Factors that cancel: each tensor times `f ** exponent` keeps the function of the model, for any f > 0.

    Where a normalisation with an epsilon lies in between, it is not exact: the function changes where variances are
    not far above epsilon. A tied tensor is in the exponents under all of its names on disk.
    """

    tensor: str  # the one, or a part of it, that is multiplied by f itself
    exponents: dict[str, float]  # of every tensor that changes as a whole
    is_exact: bool
    reason: str  # for people
    parts: dict[str, PartExponents] = field(default_factory=dict)  # of tensors whose parts change differently

    def factors(self, base: float) -> dict[str, TensorFactor]:
        """Return what each tensor is multiplied by, for f = `base`."""
        factors = {name: TensorFactor(base**exponent) for name, exponent in self.exponents.items()}
        for name, part in self.parts.items():
            values = torch.tensor([base**exponent for exponent in part.exponents])
            factors[name] = TensorFactor(channels={part.axis: values[part.part_of]})
        return factors


def scale_symmetries(model: nn.Module, batch: Any = None) -> list[ScaleSymmetry]:
    """Return the scale symmetries of a model, one for each matrix, or part of one, whose scale is free.

    All of them together are a basis: any powers of them can be combined. Multiplying each by the same f gives every
    layer a factor f from the input on as far as what follows allows: through ReLU layer l has f in its weights and
    `f**l` in its bias, which the last layer undoes; weights in front of a normalisation have f; of query and key,
    value and output, up and down projection, and of LoRA's A and B, the second undoes the first. Tied weights and
    residual branches are kept consistent. Weights of normalisation layers change only where nothing else can undo a
    factor.

    The equations behind it are collected in one forward pass, see [`~know_hf.predictors.rescaling.scale_trace`]. The
    batch must use every part of the model that inputs can use. Of a list of modules, such as experts, of which it uses
    only some, none scales.

    Args:
        model (`nn.Module`):
            The model; it is run in evaluation mode and left unchanged.
        batch (`Mapping[str, torch.Tensor]` or `torch.Tensor`, *optional*):
            Keyword arguments of the model, or its only argument; random for models of transformers by default.

    Raises:
        `ValueError`: if a batch is needed.
    """
    tensors, on_disk = model.state_dict(keep_vars=True), names_in_memory(model)
    names: dict[int, str] = {}
    aliases: dict[Hashable, list[str]] = {}
    for name, in_memory in on_disk.items():
        tensor = tensors[in_memory]
        if tensor.is_floating_point():
            of_tensor = aliases.setdefault(memory_key(tensor), [])
            of_tensor.append(name)
            names[id(tensor)] = of_tensor[0]
    by_first = {of_tensor[0]: of_tensor for of_tensor in aliases.values()}
    trace = ScaleTrace(names)
    outputs = evaluated(model, batch, trace)
    trace.require_unscaled(outputs)
    # an expert that got no token, while others of its list did: what its weights would have to do is unknown
    unused = {_pattern(name) for name in by_first if name not in trace.forms}
    for name, form in trace.forms.items():
        if _pattern(name) in unused:
            trace.equations.require_zero(form)

    parts, equations = trace.parts(), trace.equations
    forms = {name: (parts[name].forms if name in parts else (form,)) for name, form in trace.forms.items()}
    reduced = {name: tuple(equations.reduced(form) for form in of_tensor) for name, of_tensor in forms.items()}
    leading = {
        next(iter(form)): name
        for name, of_tensor in reduced.items()
        if tensors[on_disk[name]].ndim > _VECTORS
        for form, before in zip(of_tensor, forms[name], strict=True)
        if form and form == before
    }
    epsilons = [equations.reduced(form) for form in trace.epsilons]
    symmetries = []
    for variable, name in leading.items():
        exponents = {
            tensor: tuple(float(f.get(variable, 0)) for f in of_tensor) for tensor, of_tensor in reduced.items()
        }
        is_exact = not any(form.get(variable) for form in epsilons)
        symmetries.append(_symmetry(name, exponents, parts, is_exact, by_first))
    return symmetries


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _symmetry(
    leading: str,
    exponents: Mapping[str, tuple[float, ...]],
    parts: Mapping[str, TensorParts],
    is_exact: bool,
    aliases: Mapping[str, list[str]],
) -> ScaleSymmetry:
    """Create a symmetry from one exponent per tensor, or one per part."""
    changed = {name: values for name, values in exponents.items() if any(values)}
    followers = [name for name, values in changed.items() if max(values) > 0 and name != leading]
    undone = [name for name, values in changed.items() if min(values) < 0]
    reason = f"{leading} scales freely"
    reason += f" with {first_names(followers, 3)}" if followers else ""
    reason += f", undone in {first_names(undone, 3)}" if undone else ""
    reason += "" if is_exact else "; a normalisation absorbs it up to its epsilon"
    whole = {alias: v[0] for name, v in changed.items() if len(set(v)) == 1 for alias in aliases[name]}
    split = {
        alias: PartExponents(parts[name].axis, parts[name].part_of, v)
        for name, v in changed.items()
        if len(set(v)) > 1
        for alias in aliases[name]
    }
    return ScaleSymmetry(leading, whole, is_exact, reason, split)
