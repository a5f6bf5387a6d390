"""Predictors: from the history of each scalar weight `(N, S)` to what is added to its full-data state `(N,)`.

A predictor knows no file and no model but its own; `know_hf.prediction` feeds it chunk by chunk. New ones are made
known by name with [`register_predictor`].
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch

if TYPE_CHECKING:
    from .modeling_known import KNOWNModel


@runtime_checkable
class Predictor(Protocol):
    """Anything that predicts a residual from histories."""

    @property
    def num_states(self) -> int | None:
        """Exact length S of the history it takes; `None` for any length from 2 on."""

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        """
        Args:
            history (`torch.Tensor` of shape `(N, S)`, float32):
                One row a scalar weight, most forgotten state first, full data last.
            role (`str`):
                `"conv"`, `"fc"` or `"bias"`.

        Returns:
            `torch.Tensor` of shape `(N,)`, float32, on the device of `history`: what is added to `history[:, -1]`.
        """


_PREDICTORS: dict[str, Callable[..., Predictor]] = {}
_PredictorClass = TypeVar("_PredictorClass", bound=Callable[..., Predictor])


def register_predictor(name: str) -> Callable[[_PredictorClass], _PredictorClass]:
    """
    Class decorator that makes a predictor known to [`get_predictor`].

    Args:
        name (`str`):
            Name to find it by.

    Raises:
        `ValueError`: when another class has this name already.
    """

    def register(predictor_class: _PredictorClass) -> _PredictorClass:
        known_class = _PREDICTORS.setdefault(name, predictor_class)
        if known_class is not predictor_class:
            raise ValueError(f"the name {name!r} belongs to {known_class!r} already; choose another")
        return predictor_class

    return register


def get_predictor(name: str, **kwargs: Any) -> Predictor:
    """
    Makes a registered predictor.

    Args:
        name (`str`):
            `"known"`, `"shrink"`, `"average"`, `"linear"` or a name given to [`register_predictor`].
        kwargs:
            Fields of the predictor, for instance `factor` of [`Shrink`].

    Raises:
        `ValueError`: for an unknown name.
        `TypeError`: for fields the predictor does not have, or one it needs and did not get.
    """
    if name not in _PREDICTORS:
        raise ValueError(f"unknown predictor {name!r}; choose one of {', '.join(sorted(_PREDICTORS))}")
    signature = inspect.signature(_PREDICTORS[name])
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise TypeError(f"predictor {name!r} takes {signature}: {error}") from error
    return _PREDICTORS[name](**kwargs)


@register_predictor("known")
@dataclass
class KNOWNPredictor:
    """
    The residual of [`KNOWNModel`] (arXiv 2508.05059).

    Args:
        model ([`KNOWNModel`]):
            The networks of the three roles.
        chunk_size (`int`, *optional*, defaults to `4096`):
            Rows a forward pass. The default was the fastest of 256 … 524,288 on a CPU core (about 0.4 µs a row); from
            65,536 on, one pass is 4 to 13 times slower, as its activations leave the cache.
        kernel (`str`, *optional*, defaults to `"auto"`):
            Which form of the network computes.
    """

    model: "KNOWNModel"
    chunk_size: int = 4096
    kernel: str = "auto"

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size}: choose at least 1 row")

    @property
    def num_states(self) -> int:
        return self.model.config.num_states

    @property
    def device(self) -> torch.device:
        """Where histories are best handed over."""
        return self.model.device

    @property
    def trained_on(self) -> dict[str, Any] | None:
        """What the weights were meta-trained on, see [`KNOWNConfig`]."""
        return self.model.config.trained_on

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        residual = torch.empty(len(history), dtype=torch.float32, device=history.device)
        with torch.inference_mode():
            for start in range(0, len(history), self.chunk_size):
                chunk = history[start : start + self.chunk_size].to(self.model.device)
                residual[start : start + self.chunk_size] = self.model(history=chunk, role=role).residual
        return residual


@register_predictor("shrink")
@dataclass
class Shrink:
    """
    Every weight times a constant, `(factor - 1) * Θ0`: the control for a predictor that only shrinks (after Ash and
    Adams, *On Warm-Starting Neural Network Training*, arXiv 1910.08475, without their noise).

    Args:
        factor (`float`, *optional*, defaults to `0.8`):
            What each weight is multiplied by.
    """

    factor: float = 0.8

    @property
    def num_states(self) -> None:
        return None

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        return (self.factor - 1) * history[:, -1].float()


@register_predictor("average")
@dataclass
class Average:
    """
    The mean of all states of the history, `mean_k Θk - Θ0` (after stochastic weight averaging, arXiv 1803.05407).
    """

    @property
    def num_states(self) -> None:
        return None

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        return (history - history[:, -1:]).float().mean(dim=1)


@register_predictor("linear")
@dataclass
class LinearFit:
    """
    The least-squares line through the S states, read one step after the last; against the state index, which for a
    constant ratio r is the logarithm of the number of examples (the counterpart of a fit to the log of the data size).

    With t = 0 … S - 1 the fitted value at t = S is `mean(W) + (S + 1) / 2 * slope`.
    """

    @property
    def num_states(self) -> None:
        return None

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        num_states = history.shape[1]
        offsets = (history - history[:, -1:]).float()
        steps = torch.arange(num_states, dtype=torch.float32, device=history.device) - (num_states - 1) / 2
        slope = offsets @ (steps / steps.square().sum())
        return offsets.mean(dim=1) + (num_states + 1) / 2 * slope
