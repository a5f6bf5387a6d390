"""The predictor `rescale`: other weights, the same function."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ...model_tensors import names_in_memory
from ..protocol import check_finite, register_predictor
from ..tensor_factor import Rescaling, TensorFactor
from .equalisation import Factors, channel_pairs, equal_channels, equal_layers
from .forward_pass import evaluated, random_batch
from .scale_symmetries import ScaleSymmetry, scale_symmetries

_STRICT = 1e-4  # of symmetries that are tried out
_FACTOR = 0.5


@register_predictor("rescale")
@dataclass
class Rescale:
    """Scale tensors so that the model stays the same function.

    What changes is how far a step of training moves the function: a layer with smaller weights and the same gradient
    learns faster. At a fixed learning rate this can help few-shot training; a tuned rate for head and body does the
    same. See [`scale_symmetries`] for which tensors change.

    Before anything is written, outputs on a batch are compared with those of Θ0. Factors that are powers of two are
    free of rounding, but the epsilon of a normalisation is not scaled, so weights in front of it cannot be made
    arbitrarily small. The comparison needs memory for the model and for a copy of the tensors that change.

    Rescaling composes: `predictor="average+rescale"`, or a list such as `[Average(), Rescale(factor=0.5)]`, predicts
    first and scales the result. The factors depend on Θ0 alone.

    Args:
        factor (`float`, *optional*, defaults to `0.5`):
            Factor of each symmetry, positive.
        equalise (`str`, *optional*):
            Instead of a factor: `"layers"` brings the root mean squares of all matrices as near to their geometric
            mean as the symmetries allow; `"channels"` equalises the range of each channel between adjacent layers
            (cross-layer equalisation, arXiv 1906.04721).
        tolerance (`float`, *optional*, defaults to `0.001`):
            Largest difference of outputs, relative to the largest output of Θ0.
        skip (sequence of `str`, *optional*):
            Tensors whose own symmetry is left out, see [`ScaleSymmetry.tensor`].
        batch (`Mapping[str, torch.Tensor]` or `torch.Tensor`, *optional*):
            Inputs for the comparison: keyword arguments of the model, or its only argument. They must use every part
            of the model that is used later. Random tokens or images by default.
        model (`nn.Module`, *optional*):
            A model of the recorded architecture for a trajectory of a plain module, or the base model of adapters.
            It is left unchanged.
    """

    num_states: ClassVar[None] = None
    factor: float | None = None
    equalise: Literal["layers", "channels"] | None = None
    tolerance: float = 1e-3
    skip: Sequence[str] = ()
    batch: Any = field(default=None, repr=False)
    model: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.equalise not in (None, "layers", "channels"):
            raise ValueError(f"equalise must be 'layers' or 'channels', got {self.equalise!r}")
        if self.factor is not None and self.equalise is not None:
            raise ValueError(f"give either factor or equalise, got {self.factor!r} and {self.equalise!r}")
        check_finite(tolerance=self.tolerance, factor=_FACTOR if self.factor is None else self.factor)
        if self.factor is not None and self.factor <= 0:
            raise ValueError(f"factor must be positive, got {self.factor!r}")

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        return torch.zeros_like(history[:, -1])

    def rescaling(self, model: nn.Module) -> Rescaling:
        """Return the factors of a model's tensors, after comparing its outputs with and without them.

        Raises:
            `ValueError`: if the outputs differ by more than `tolerance`, naming the tensor whose symmetry does it; if
                `skip` names a tensor without one; if no tensor can be rescaled; or if a batch is needed.
        """
        comparison = _Comparison(model, random_batch(model) if self.batch is None else self.batch)
        symmetries = scale_symmetries(model, comparison.batch)
        if unknown := sorted(set(self.skip) - {symmetry.tensor for symmetry in symmetries}):
            raise ValueError(f"skip names {unknown[0]!r}, which has no scale symmetry of its own; take it out of skip")
        symmetries = [symmetry for symmetry in symmetries if symmetry.tensor not in self.skip]
        moves = self._moves(model, symmetries, comparison)
        if not moves:
            raise ValueError(
                f"no tensor of {type(model).__name__} can be rescaled without changing its function"
                + (" by channels" if self.equalise == "channels" else "")
            )
        total = _product(moves)
        deviation = comparison.deviation(total)
        if not deviation <= self.tolerance:
            worst = self._first_above(moves, comparison)
            raise ValueError(
                f"rescaling would change the outputs by {deviation:.2g} of the largest one, more than"
                f" {self.tolerance:g}, because of tensor {worst!r}: most likely the epsilon of the normalisation"
                f" behind it counts. Use a factor nearer to 1, leave it out with skip=[{worst!r}], or raise tolerance"
            )
        return Rescaling(total, deviation)

    def _moves(
        self, model: nn.Module, symmetries: Sequence[ScaleSymmetry], comparison: "_Comparison"
    ) -> list[tuple[str, Factors]]:
        """Name and factors of every single change."""
        if self.equalise == "channels":
            pairs = channel_pairs(
                model, symmetries, comparison.in_memory, lambda factors: comparison.deviation(factors) <= _STRICT
            )
            factors = equal_channels(pairs, comparison.tensors)
            return [(pair.first, of_pair) for pair, of_pair in zip(pairs, factors, strict=True)]
        if self.equalise == "layers":
            bases = equal_layers(symmetries, comparison.tensors).exp().tolist()
        else:
            bases = [_FACTOR if self.factor is None else self.factor] * len(symmetries)
        return [(symmetry.tensor, symmetry.factors(base)) for symmetry, base in zip(symmetries, bases, strict=True)]

    def _first_above(self, moves: Sequence[tuple[str, Factors]], comparison: "_Comparison") -> str:
        """Bisect for the first change with which the outputs differ too much."""
        low, high = 0, len(moves)
        while high - low > 1:
            middle = (low + high) // 2
            if comparison.deviation(_product(moves[:middle])) <= self.tolerance:
                low = middle
            else:
                high = middle
        return moves[high - 1][0]


class _Comparison:
    """Outputs of a model with and without factors, on one batch."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self.model, self.batch = model, batch
        state = model.state_dict(keep_vars=True)
        self.in_memory = names_in_memory(model)
        self.tensors = {name: state[path].detach() for name, path in self.in_memory.items()}
        firsts: dict[int, str] = {}
        # functional_call takes one name of a tied tensor
        self._first = {name: firsts.setdefault(id(state[path]), name) for name, path in self.in_memory.items()}
        self._outputs = evaluated(model, batch)

    def deviation(self, factors: Mapping[str, TensorFactor]) -> float:
        """Largest difference of outputs, relative to the largest output."""
        scaled = {
            self.in_memory[name]: factor.scale(self.tensors[name])
            for name, factor in factors.items()
            if self._first[name] == name
        }
        outputs = evaluated(self.model, self.batch, tensors=scaled)
        largest = 0.0
        for old, new in zip(self._outputs, outputs, strict=True):
            scale = float(old.abs().max()) if old.numel() else 0.0
            difference = float((new - old).abs().max()) if old.numel() else 0.0
            largest = max(largest, difference / scale if scale else difference)
            if math.isnan(difference):
                return math.inf
        return largest


def _product(moves: Sequence[tuple[str, Factors]]) -> Factors:
    total: Factors = {}
    for _, factors in moves:
        for name, factor in factors.items():
            total[name] = total[name] * factor if name in total else factor
    return total
