"""Find the ways to scale the tensors of a model that keep its function."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from ...model_tensors import names_in_memory
from .forward_pass import evaluated
from .scale_trace import ScaleTrace

_VECTORS = 1  # axes of biases, of norm weights and of other vectors, which only follow the matrices


@dataclass(frozen=True)
class ScaleSymmetry:
    """Factors that cancel: each tensor times `f ** exponent` keeps the function of the model, for any f > 0.

    Attributes:
        tensor (`str`):
            The tensor that is multiplied by f itself, by its name on disk.
        exponents (`dict[str, float]`):
            Exponent of every tensor that changes, by name on disk; a tied tensor has all of its names.
        is_exact (`bool`):
            Whether no normalisation with an epsilon lies in between. With one, the function changes where variances
            are not far above epsilon.
        reason (`str`):
            Explanation for people.
    """

    tensor: str
    exponents: dict[str, float]
    is_exact: bool
    reason: str


def scale_symmetries(model: nn.Module, batch: Any = None) -> list[ScaleSymmetry]:
    """Return the scale symmetries of a model, one for each matrix whose scale is free.

    All of them together are a basis: any powers of them can be combined. Multiplying each by the same f gives every
    layer a factor f from the input on as far as what follows allows: through ReLU layer l has f in its weights and
    `f**l` in its bias, which the last layer undoes; weights in front of a normalisation have f; of query and key,
    value and output, up and down projection, and of LoRA's A and B, the second undoes the first. Tied weights and
    residual branches are kept consistent. Weights of normalisation layers change only where nothing else can undo a
    factor.

    The equations behind it are collected in one forward pass, see [`~know_hf.predictors.rescaling.scale_trace`].

    Args:
        model (`nn.Module`):
            The model; it is run in evaluation mode and left unchanged.
        batch (`Mapping[str, torch.Tensor]` or `torch.Tensor`, *optional*):
            Keyword arguments of the model, or its only argument; random for models of transformers by default.

    Raises:
        `ValueError`:
            If a batch is needed.
    """
    tensors, on_disk = model.state_dict(keep_vars=True), names_in_memory(model)
    names: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, in_memory in on_disk.items():
        if tensors[in_memory].is_floating_point():
            first = names.setdefault(id(tensors[in_memory]), name)
            aliases.setdefault(first, []).append(name)
    trace = ScaleTrace(names)
    outputs = evaluated(model, batch, trace)
    trace.require_unscaled(outputs)

    free: dict[int, str] = {}
    reduced = {name: trace.equations.reduced(form) for name, form in trace.forms.items()}
    for name, form in reduced.items():
        if form == trace.forms[name] and tensors[on_disk[name]].ndim > _VECTORS:
            free[next(iter(form))] = name
    epsilons = [trace.equations.reduced(form) for form in trace.epsilons]
    symmetries = []
    for variable, name in free.items():
        exponents = {tensor: form[variable] for tensor, form in reduced.items() if form.get(variable)}
        is_exact = not any(form.get(variable) for form in epsilons)
        symmetries.append(_symmetry(name, exponents, is_exact, aliases))
    return symmetries


def _symmetry(
    name: str, exponents: Mapping[str, Fraction], is_exact: bool, aliases: Mapping[str, list[str]]
) -> ScaleSymmetry:
    undone = [tensor for tensor, exponent in exponents.items() if exponent < 0]
    followers = [tensor for tensor, exponent in exponents.items() if exponent > 0 and tensor != name]
    reason = f"{name} scales freely"
    if followers:
        reason += f" with {_some(followers)}"
    if undone:
        reason += f", undone in {_some(undone)}"
    if not is_exact:
        reason += "; a normalisation absorbs it up to its epsilon"
    every = {alias: float(exponent) for tensor, exponent in exponents.items() for alias in aliases[tensor]}
    return ScaleSymmetry(name, every, is_exact, reason)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
