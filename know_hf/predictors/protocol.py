"""What a predictor is, and the registry of predictors by name.

A predictor maps the history of each scalar weight `(N, S)` to the residual that is added to Θ0 `(N,)`. It reads no
files: `know_hf.prediction` passes histories to it in chunks.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from .tensor_factor import Rescaler


@runtime_checkable
class Predictor(Protocol):
    """Predicts a residual from histories.

    Tensors arrive in chunks, so the residual of a row must not depend on the other rows. A predictor that depends on
    the layer also implements [`DepthPredictor.at_depth`]. A predictor with the attribute `follows_training = True`
    reads states along one training: if the trajectory has a tail, its history is the tail states and Θ0. For complete
    tensors and other snapshots, see [`SnapshotPredictor`].
    """

    @property
    def num_states(self) -> int | None:
        """Required length S of the history, or `None` for any length of at least 2."""

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        """
        Args:
            history (`torch.Tensor` of shape `(N, S)`, float32):
                One row per scalar weight, most forgotten state first, Θ0 last.
            role (`str`):
                `"conv"`, `"fc"` or `"bias"`.

        Returns:
            `torch.Tensor` of shape `(N,)`, float32, on the device of `history`: what is added to `history[:, -1]`.
        """


@runtime_checkable
class DepthPredictor(Predictor, Protocol):
    """A predictor that differs between layers. [`at_depth`] is called once per tensor."""

    def at_depth(self, depth: float) -> Predictor:
        """Return the predictor for a relative depth, 0 at the input and 1 at the head; see [`relative_depths`]."""


@dataclass
class Composition:
    """A predictor whose result is rescaled.

    Args:
        members (sequence of [`Predictor`]):
            At most one predictor that adds a residual, which comes first, and any number of [`Rescaler`]s.

    Raises:
        `ValueError`: if there is no member, or a member after the first is not a rescaler.
    """

    members: Sequence[Predictor]

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("a composition needs at least one predictor, got none")
        for member in self.members[1:]:
            if not isinstance(member, Rescaler):
                raise ValueError(
                    f"{type(member).__name__} cannot follow another predictor: it would need the histories of the"
                    " predicted weights. Give one predictor first, then 'rescale'"
                )

    @property
    def predictor(self) -> Predictor:
        """The first member. A rescaler predicts a residual of zero."""
        return self.members[0]

    @property
    def rescalers(self) -> list[Rescaler]:
        """The members that rescale, in order."""
        return [member for member in self.members if isinstance(member, Rescaler)]

    @property
    def num_states(self) -> int | None:
        return self.predictor.num_states

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        return self.predictor.residual(history, role)


_PREDICTORS: dict[str, Callable[..., Predictor]] = {}
_PredictorClass = TypeVar("_PredictorClass", bound=Callable[..., Predictor])


def register_predictor(name: str) -> Callable[[_PredictorClass], _PredictorClass]:
    """Register a class with the members of [`Predictor`] for [`get_predictor`]; used as a class decorator.

    Args:
        name (`str`):
            Name of the predictor.

    Raises:
        `TypeError`: if it is not a class, or lacks `residual(self, history, role)` or `num_states`.
        `ValueError`: if another class has this name.
    """

    def register(predictor_class: _PredictorClass) -> _PredictorClass:
        _check_class(name, predictor_class)
        registered = _PREDICTORS.setdefault(name, predictor_class)
        if registered is not predictor_class:
            raise ValueError(f"the name {name!r} is already registered for {registered!r}; choose another name")
        return predictor_class

    return register


def get_predictor(name: str, **kwargs: Any) -> Predictor:
    """Create a registered predictor.

    Args:
        name (`str`):
            `"known"` ([`KNOWNPredictor`]), `"task_vector"` ([`TaskVector`]), `"linear"` ([`LinearFit`]), `"log"`
            ([`LogarithmicFit`]), `"average"` ([`Average`]), `"ema"` ([`MovingAverage`]), `"shrink"` ([`Shrink`]),
            `"lines"` ([`LayerScaling`]), `"tail_average"` ([`TailAverage`]), `"bema"` ([`BiasCorrectedAverage`]),
            `"start_interpolation"` ([`StartInterpolation`]), `"branch_average"` ([`BranchAverage`]), `"model_stock"`
            ([`ModelStock`]), `"james_stein"` ([`JamesStein`]), `"spectral_filter"` ([`SpectralFilter`]),
            `"jackknife"` ([`Jackknife`]), `"shrunken_jackknife"` ([`ShrunkenJackknife`]), `"rescale"` ([`Rescale`])
            or a name given to [`register_predictor`]. Names joined by `+`, such as `"average+rescale"`, give a
            [`Composition`].
        kwargs:
            Fields of the predictor, for example `factor` of [`Shrink`]. For joined names, the fields of each
            predictor by name, for example `rescale={"factor": 0.25}`.

    Raises:
        `ValueError`: if the name is unknown or a field has an invalid value.
        `TypeError`: if a field is unknown or a required field is missing.
    """
    if "+" in name:
        names = name.split("+")
        if unknown := kwargs.keys() - set(names):
            raise TypeError(f"unknown option {min(unknown)!r}; {name!r} takes the options of each by its name")
        return Composition([get_predictor(part, **kwargs.get(part, {})) for part in names])
    if name not in _PREDICTORS:
        raise ValueError(f"unknown predictor {name!r}; choose one of {', '.join(sorted(_PREDICTORS))}")
    signature = inspect.signature(_PREDICTORS[name])
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        for option in kwargs:
            if option not in signature.parameters:
                raise TypeError(f"unknown option {option!r}; {name!r} takes {_options(signature)}") from error
        raise TypeError(f"predictor {name!r} takes {signature}: {error}") from error
    return _PREDICTORS[name](**kwargs)


def _check_class(name: str, predictor_class: Any) -> None:
    """Raise a `TypeError` that says which member of a [`Predictor`] a class lacks."""
    if not isinstance(predictor_class, type):
        raise TypeError(f"predictor {name!r} must be a class, got {predictor_class!r}; decorate the class itself")
    what, residual = f"predictor {name!r} ({predictor_class.__name__})", getattr(predictor_class, "residual", None)
    expected = "def residual(self, history, role), which returns what is added to Θ0, (N,), from histories (N, S)"
    if not callable(residual):
        raise TypeError(f"{what} has no method residual; add {expected}")
    try:
        inspect.signature(residual).bind("self", "history", "role")
    except TypeError:
        raise TypeError(f"{what} has residual{inspect.signature(residual)}; change it to {expected}") from None
    declared = [vars(ancestor).get("__annotations__", {}) for ancestor in predictor_class.__mro__]
    if not hasattr(predictor_class, "num_states") and not any("num_states" in names for names in declared):
        raise TypeError(
            f"{what} has no num_states; add num_states = None to the class for histories of any length, the length"
            " S that it needs, or a property"
        )


def _options(signature: inspect.Signature) -> str:
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    options = [
        name if default is inspect.Parameter.empty else f"{name} (default {default!r})"
        for name, default in defaults.items()
    ]
    return ", ".join(options) or "no options"


def check_finite(**values: float) -> None:
    """Raise a `ValueError` that names the first value that is not a finite number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
