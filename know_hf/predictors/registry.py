"""Predictors: from the history of each scalar weight `(N, S)` to what is added to its full-data state `(N,)`.

A predictor knows no file and no model but its own; `know_hf.prediction` feeds it chunk by chunk. New ones are made
known by name with [`register_predictor`].
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch

if TYPE_CHECKING:
    from ..known.modeling_known import KNOWNModel


@runtime_checkable
class Predictor(Protocol):
    """Anything that predicts a residual from histories.

    Rows are scalar weights on their own: what comes out for one must not depend on the others, since the prediction
    hands over tensors in pieces. One that needs to know in which layer it is has [`DepthPredictor.at_depth`] as well.
    """

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


@runtime_checkable
class DepthPredictor(Predictor, Protocol):
    """A predictor that differs from layer to layer: the prediction calls [`at_depth`] once for each tensor."""

    def at_depth(self, depth: float) -> Predictor:
        """
        Args:
            depth (`float`):
                Relative depth of the tensor's layer, 0 at the input and 1 at the head; see `relative_depths`.

        Returns:
            [`Predictor`]: the one for tensors of this depth.
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
            `"known"` ([`KNOWNPredictor`]), `"task_vector"` ([`TaskVector`]), `"linear"` ([`LinearFit`]), `"log"`
            ([`LogarithmicFit`]), `"average"` ([`Average`]), `"ema"` ([`MovingAverage`]), `"shrink"` ([`Shrink`]),
            `"lines"` ([`LayerScaling`]) or a name given to [`register_predictor`].
        kwargs:
            Fields of the predictor, for instance `factor` of [`Shrink`].

    Raises:
        `ValueError`: for an unknown name, or a value that the predictor refuses.
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
        kernel (`str`, *optional*, defaults to `"auto"`):
            Which form of the networks computes, see [`know_hf.known.kernels.residual`].
    """

    model: "KNOWNModel"
    kernel: str = "auto"

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
        from ..known import kernels

        return kernels.residual(self.model, history, role, self.kernel)


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

    def __post_init__(self) -> None:
        _check_finite(factor=self.factor)

    @property
    def num_states(self) -> None:
        return None

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        return (self.factor - 1) * history[:, -1].float()


class _Combination(ABC):
    """A weighted sum of the states' differences to Θ0, `Σ_k w_k (Θk - Θ0)`: exactly zero where nothing moved."""

    @property
    def num_states(self) -> None:
        return None

    @abstractmethod
    def weights(self, num_states: int) -> Sequence[float]:
        """Weights of the states but the last, most forgotten first."""

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        full_data = history[:, -1].float()
        residual = torch.zeros_like(full_data)
        # state by state: a product with a vector of weights would round by how many rows there are
        for state, weight in enumerate(self.weights(history.shape[1])):
            if weight:
                residual += weight * (history[:, state].float() - full_data)
        return residual


@register_predictor("task_vector")
@dataclass
class TaskVector(_Combination):
    """
    Task arithmetic (Ilharco et al., *Editing Models with Task Arithmetic*, arXiv 2212.04089): a multiple of what the
    training on more data has changed, `scale * (Θ0 - Θk)`. A negative scale goes back towards Θk, and -1 arrives.

    Args:
        scale (`float`, *optional*, defaults to `1.0`):
            Multiple, of either sign.
        since (`int`, *optional*):
            Index k of the state that the change is taken from, 1 for the least forgotten; by default the most
            forgotten one of the history.
    """

    scale: float = 1.0
    since: int | None = None

    def __post_init__(self) -> None:
        _check_finite(scale=self.scale)
        if self.since is not None and (type(self.since) is not int or self.since < 1):
            raise ValueError(f"since={self.since!r}: choose the index of a state, 1 or more; 0 is Θ0 itself")

    def weights(self, num_states: int) -> Sequence[float]:
        since = num_states - 1 if self.since is None else self.since
        if since >= num_states:
            raise ValueError(
                f"since={since}, but the history has {num_states} states; choose an index from 1 to {num_states - 1}"
            )
        return [-self.scale if state == num_states - 1 - since else 0.0 for state in range(num_states - 1)]


@register_predictor("average")
@dataclass
class Average(_Combination):
    """
    The mean of all states of the history, `mean_k Θk - Θ0` (after stochastic weight averaging, arXiv 1803.05407).
    """

    def weights(self, num_states: int) -> Sequence[float]:
        return [1 / num_states] * (num_states - 1)


@register_predictor("ema")
@dataclass
class MovingAverage(_Combination):
    """
    The exponential moving average over the states, from the most forgotten one to Θ0: `e ← decay * e + (1 - decay) *
    Θk`, minus Θ0 (the average of weights of Tarvainen and Valpola, *Mean teachers are better role models*, arXiv
    1703.01780, over states instead of steps).

    Args:
        decay (`float`, *optional*, defaults to `0.5`):
            In [0, 1). Θ0 has the weight `1 - decay`, and the most forgotten of S states `decay ** (S - 1)`.
    """

    decay: float = 0.5

    def __post_init__(self) -> None:
        _check_finite(decay=self.decay)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay!r}: choose a number from 0 (Θ0 alone) to below 1")

    def weights(self, num_states: int) -> Sequence[float]:
        ages = range(num_states - 1, 0, -1)
        return [(1 if age == num_states - 1 else 1 - self.decay) * self.decay**age for age in ages]


@register_predictor("linear")
@dataclass
class LinearFit(_Combination):
    """
    The least-squares line through the S states, read one step after the last.

    The line is one against the state index. For a constant ratio r, state k has seen `r**k` of the data, so that the
    index is, up to scale and sign, the logarithm of the number of examples: on the line, every doubling of the data
    moves a weight by as much as the one before. On the curve of [`LogarithmicFit`] it moves it by less.
    """

    def weights(self, num_states: int) -> Sequence[float]:
        return _least_squares([float(t) for t in range(1, num_states + 2)])


@register_predictor("log")
@dataclass
class LogarithmicFit(_Combination):
    """
    The least-squares fit of `a + b * log(t)` to the S states at t = 1 … S, most forgotten first, read at t = S + 1.

    For a constant ratio, t grows with the logarithm of the number of examples (see [`LinearFit`]); this is then a fit
    to the log of that logarithm, of weights that move ever less as data doubles. The KNOW paper (arXiv 2508.05059)
    compares with a *LogFit* whose code is not public; this is how it is read here, and a fit to the log of the data
    size, the other reading, is [`LinearFit`].
    """

    def weights(self, num_states: int) -> Sequence[float]:
        return _least_squares([math.log(t) for t in range(1, num_states + 2)])


@register_predictor("lines")
@dataclass
class LayerScaling:
    """
    LiNeS (Wang et al., *LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging*, arXiv
    2410.17146): the residual of another predictor times `alpha + beta * depth`. Shallow layers hold what is general
    and are changed less than deep ones.

    As in the paper, block ℓ of L has the depth `(ℓ - 1) / (L - 1)` (`relative_depths`). Two things differ: its code
    scales all that is in no block with `alpha`, here that is so of embeddings, while heads are scaled like the last
    block; and it scales the change that has led to Θ0, here it is what is added to Θ0.

    Args:
        alpha (`float`, *optional*, defaults to `0.0`):
            Factor at depth 0. For one task the paper sets `beta = 1 - alpha`, which leaves the last block as it is,
            and searches `alpha` from 0 to 1 on validation data: the default is the end that differs most from a plain
            task vector, 1 is the plain one.
        beta (`float`, *optional*, defaults to `1.0`):
            Factor at depth 1 less that at depth 0.
        base (`str` or [`Predictor`], *optional*, defaults to `"task_vector"`):
            The predictor that is scaled, by name (with its own defaults) or as an object.
        depth (`float`, *optional*):
            Relative depth of the layer, set by [`at_depth`].
    """

    alpha: float = 0.0
    beta: float = 1.0
    base: str | Predictor = "task_vector"
    depth: float | None = None
    _base: Predictor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_finite(alpha=self.alpha, beta=self.beta)
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth={self.depth!r}: the relative depth of a layer is from 0 (input) to 1 (head)")
        self._base = get_predictor(self.base) if isinstance(self.base, str) else self.base
        if not isinstance(self._base, Predictor):
            raise ValueError(f"base={self.base!r}: choose a predictor, by name or as an object")

    @property
    def num_states(self) -> int | None:
        return self._base.num_states

    def at_depth(self, depth: float) -> "LayerScaling":
        base = self._base.at_depth(depth) if isinstance(self._base, DepthPredictor) else self._base
        return replace(self, base=base, depth=depth)

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        if self.depth is None:
            raise ValueError(
                "'lines' scales by the depth of the layer and was not told it; call at_depth(depth) first"
            )
        return (self.alpha + self.beta * self.depth) * self._base.residual(history, role)


def _least_squares(places: Sequence[float]) -> list[float]:
    """Weights of the values at all places but the last with which the line through them is read at the last place.

    With mean m and variance v of the S places fitted, the line at x is `Σ_k (1/S + (x - m)(x_k - m) / (S v)) y_k`.
    """
    *fitted, read_at = places
    mean = math.fsum(fitted) / len(fitted)
    squares = math.fsum((place - mean) ** 2 for place in fitted)
    weights = [1 / len(fitted) + (read_at - mean) * (place - mean) / squares for place in fitted]
    return weights[:-1]


def _check_finite(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name}={value!r}: choose a finite number")
