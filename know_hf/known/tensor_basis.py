"""The basis and the statistics of one tensor, which the variant "combination" of KNOWN combines and reads."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from .combination_network import STATE_FEATURES, TENSOR_FEATURES
from .singular_part import singular_part

_CHUNK = 2**18  # elements that are float64 at a time
Values = tuple[float | None, ...]


@dataclass(frozen=True)
class TensorContext:
    """What is known about a tensor and its training besides the weights. What is unknown may be left out.

    Attributes:
        role (`str`):
            `"conv"`, `"fc"`, `"bias"` or `"norm"`.
        depth (`float`):
            Relative depth of its layer, 0 at the input and 1 at the head.
        is_normalised (`bool`):
            Whether a normalisation layer follows.
        fractions (`tuple[float]`):
            Share of the data of each state, Θ0 first.
        steps (`tuple[int]`):
            Optimizer steps of each state.
        train_losses, eval_losses (`tuple[float]`):
            Recorded losses of each state.
    """

    role: str = "fc"
    depth: float = 0.5
    is_normalised: bool = False
    fractions: Values = ()
    steps: tuple[int, ...] = ()
    train_losses: Values = ()
    eval_losses: Values = ()


@dataclass(frozen=True)
class TensorBasis:
    """What the residual of a tensor is made of, and what decides how.

    Attributes:
        elements (`dict[str, torch.Tensor]`):
            The basis, float32: `"state-1"`, … (Θk - Θ0), `"start"` (Θ0 - P), `"tail"` and `"branches"` (their mean
            minus Θ0), `"theta0"` (-Θ0, or zero if nothing moved) and `"filtered"` (what stands out from the noise of
            the main displacement, see [`singular_part`]), as far as the snapshots are there.
        tensor_features (`torch.Tensor` of shape `(F,)`):
            Statistics in the order of [`TENSOR_FEATURES`].
        state_features (`torch.Tensor` of shape `(K, Q)`):
            Statistics of each state but Θ0 in the order of [`STATE_FEATURES`].
    """

    elements: Mapping[str, torch.Tensor]
    tensor_features: torch.Tensor
    state_features: torch.Tensor


@torch.no_grad()
def tensor_basis(
    theta0: torch.Tensor,
    states: Sequence[torch.Tensor] = (),
    start: torch.Tensor | None = None,
    tail: Sequence[torch.Tensor] = (),
    branches: Sequence[torch.Tensor] = (),
    origin: torch.Tensor | None = None,
    context: TensorContext | None = None,
) -> TensorBasis:
    """Compute the basis of a tensor and its statistics.

    The elements follow the scale of the tensor and the order of its rows and columns; the statistics do not change
    with them. If all snapshots are equal, all elements are zero. The *main displacement*, the unit of lengths, is Θ0
    minus the start; without one, minus the last state, the mean of the tail, or that of the branches. Logarithms are
    `log10 / 2` of ratios within 10⁻⁶ and 10⁶. A statistic of what is missing is 0, as its `has_…` is.

    Args:
        theta0 (`torch.Tensor`):
            After training on all data.
        states (sequence of `torch.Tensor`):
            Θ1, Θ2, …, least forgotten first.
        start (`torch.Tensor`, *optional*):
            Before the training.
        tail, branches (sequence of `torch.Tensor`):
            Late in the training of Θ0; after other trainings.
        origin (`torch.Tensor`, *optional*):
            Where the branches parted; Θ0 by default.
        context ([`TensorContext`], *optional*):
            Role, depth and recorded values.
    """
    context = context or TensorContext()
    theta0 = theta0.float()
    kinds = {
        "state": [state.float() - theta0 for state in states],
        "start": [] if start is None else [theta0 - start.float()],
        "tail": [snapshot.float() - theta0 for snapshot in tail],
        "branch": [branch.float() - theta0 for branch in branches],
        "origin": [] if origin is None or not branches else [origin.float() - theta0],
    }
    gram = _Gram(theta0, kinds)
    elements = {f"state-{index}": moved for index, moved in enumerate(kinds["state"], 1)}
    for name, kind in (("start", "start"), ("tail", "tail"), ("branches", "branch")):
        if kinds[kind]:
            elements[name] = torch.stack(kinds[kind]).mean(dim=0) if len(kinds[kind]) > 1 else kinds[kind][0]
    elements["theta0"] = -theta0 if gram.has_moved else torch.zeros_like(theta0)
    features = {**_context_features(context, len(states) + 1), **_features(gram)}
    if theta0.ndim > 1 and (main := gram.main_element):
        matrix = (elements[main] if main == "start" else -elements[main]).flatten(1)
        norm = gram.norm(gram.main)
        filtered, stable_rank = singular_part(matrix, norm)
        elements["filtered"] = filtered.reshape(theta0.shape)
        share = float(filtered.double().norm()) / norm if norm else 0.0
        features |= {"is_matrix": 1.0, "stable_rank": _log(stable_rank, 1), "filtered_share": share}
    of_states = [_state_features(gram, context, index) for index in range(1, len(states) + 1)]
    return TensorBasis(
        elements,
        torch.tensor([features.get(name, 0.0) for name in TENSOR_FEATURES]),
        torch.tensor([[of.get(name, 0.0) for name in STATE_FEATURES] for of in of_states]).reshape(
            -1, len(STATE_FEATURES)
        ),
    )


def combine(elements: Mapping[str, torch.Tensor], coefficients: Mapping[str, float]) -> torch.Tensor:
    """Return the residual `Σ_i c_i e_i` of a basis, float32. Elements without a coefficient, and coefficients of
    elements that are missing, count as zero.

    All controls are of this form: `shrink` is `{"theta0": 1 - factor}`; of S states `average` is 1 / S for each state
    and `task_vector` is `-scale` for the last; `start_interpolation` is `{"start": scale - 1}`, `tail_average` of T
    tail states `{"tail": T / (T + 1)}` and `branch_average` `{"branches": 1}`.
    """
    residual = torch.zeros_like(elements["theta0"])
    for name, element in elements.items():
        if coefficient := float(coefficients.get(name, 0.0)):
            residual += coefficient * element
    return residual


@dataclass
class _Gram:
    """Scalar products of Θ0 and all displacements, and of what is a weighted sum of them (`(M,)` float64)."""

    theta0: torch.Tensor
    kinds: Mapping[str, list[torch.Tensor]]
    rows: dict[str, np.ndarray] = field(init=False)
    products: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        vectors = [self.theta0, *(moved for of_kind in self.kinds.values() for moved in of_kind)]
        self.products = np.zeros((len(vectors), len(vectors)))
        for pieces in zip(*(vector.flatten().split(_CHUNK) for vector in vectors), strict=True):
            block = torch.stack(pieces).double()
            self.products += (block @ block.T).numpy()
        ends = np.cumsum([1, *map(len, self.kinds.values())])
        self.rows = dict(zip(("theta0", *self.kinds), np.split(np.eye(len(vectors)), ends[:-1]), strict=True))

    @property
    def has_moved(self) -> bool:
        """Whether any displacement is not zero."""
        return bool(self.products.diagonal()[1:].any())

    @property
    def main_element(self) -> str | None:
        """Name of the element that is the main displacement up to its sign."""
        states = len(self.rows["state"])
        names = {"start": "start", "state": f"state-{states}", "tail": "tail", "branch": "branches"}
        return next((name for kind, name in names.items() if len(self.rows[kind])), None)

    @property
    def main(self) -> np.ndarray:
        """The main displacement."""
        for row in self.rows["start"]:
            return row
        if len(self.rows["state"]):
            return -self.rows["state"][-1]
        return -self.mean("tail" if len(self.rows["tail"]) else "branch")

    def mean(self, kind: str) -> np.ndarray:
        """Return the mean of the displacements of a kind, zero if there are none."""
        return self.rows[kind].sum(axis=0) / max(len(self.rows[kind]), 1)

    def norm(self, row: np.ndarray) -> float:
        return math.sqrt(max(float(row @ self.products @ row), 0.0))

    def cosine(self, row: np.ndarray, other: np.ndarray) -> float:
        scale = self.norm(row) * self.norm(other)
        return float(row @ self.products @ other) / scale if scale else 0.0

    def ratio(self, row: np.ndarray, other: np.ndarray) -> float:
        return _log(self.norm(row), self.norm(other))

    def noise(self, kind: str) -> float:
        """Root of the variance of the mean of two or more of a kind, summed over all weights."""
        rows = self.rows[kind]
        square = sum(self.norm(row - self.mean(kind)) ** 2 for row in rows)
        return math.sqrt(square / (len(rows) * (len(rows) - 1)))


def _log(value: float, unit: float) -> float:
    """Return half of the decimal logarithm of a ratio, at most 3 in size; 0 if both are 0."""
    if value <= 0 or unit <= 0:
        return 0.0 if value <= 0 and unit <= 0 else math.copysign(3, value - unit)
    return min(max(math.log10(value) - math.log10(unit), -6.0), 6.0) / 2


def _context_features(context: TensorContext, num_states: int) -> dict[str, float]:
    role = {f"role_{context.role}": 1.0}
    train, evaluated = _known(context.train_losses, 0), _known(context.eval_losses, 0)
    losses: dict[str, float] = {}
    if train is not None:
        losses |= {"train_loss": _log(train, 1), "has_train_loss": 1.0}
    if evaluated is not None:
        losses |= {"eval_loss": _log(evaluated, 1), "has_eval_loss": 1.0}
    if train is not None and evaluated is not None:
        losses["loss_gap"] = losses["eval_loss"] - losses["train_loss"]
    return {
        **role,
        **losses,
        "depth": context.depth,
        "is_normalised": float(context.is_normalised),
        "num_states": math.log2(num_states) / 3,
        "ratio": _known(context.fractions, 1) or 0.0,
        "steps": _log(_known(context.steps, 0) or 1, 1),
    }


def _features(gram: _Gram) -> dict[str, float]:
    main, (theta0,) = gram.main, gram.rows["theta0"]
    features = {"moved": gram.ratio(main, theta0)}
    for row in gram.rows["start"]:
        features |= {"has_start": 1.0, "start_cosine": gram.cosine(row, theta0)}
        features["norm_growth"] = gram.ratio(theta0, theta0 - row)
    if len(gram.rows["state"]):
        mean = gram.mean("state")
        features |= {"states_moved": gram.ratio(mean, main), "states_cosine": gram.cosine(mean, main)}
    if len(gram.rows["tail"]):
        mean = gram.mean("tail")
        features |= {"has_tail": 1.0, "tail_moved": gram.ratio(mean, main), "tail_cosine": gram.cosine(mean, main)}
        if len(gram.rows["tail"]) > 1:
            features["tail_noise"] = _log(gram.noise("tail"), gram.norm(mean))
    if len(branches := gram.rows["branch"]):
        mean, origin = gram.mean("branch"), gram.mean("origin")
        features |= {"has_branches": 1.0, "branches_moved": gram.ratio(mean, main)}
        features["branches_cosine"] = gram.cosine(mean, main)
    if len(branches) > 1:
        pairs = [(a - origin, b - origin) for i, a in enumerate(branches) for b in branches[:i]]
        features["branches_agreement"] = sum(gram.cosine(a, b) for a, b in pairs) / len(pairs)
        noise, square = gram.noise("branch"), gram.norm(mean) ** 2
        features["branches_noise"] = _log(noise, gram.norm(mean - origin))
        # the positive-part James–Stein factor of the shrunken jackknife
        shrunk = max(0.0, 1 - 2 / gram.theta0.numel()) * 2 * noise**2
        features["branches_shrinkage"] = max(0.0, 1 - shrunk / square) if square else 0.0
    return features


def _state_features(gram: _Gram, context: TensorContext, index: int) -> dict[str, float]:
    """Return the statistics of state k = 1, 2, …"""
    main, (theta0,), states = gram.main, gram.rows["theta0"], gram.rows["state"]
    # Θ0 is zero among displacements from Θ0, and the start lies before it
    row, path = states[index - 1], [-gram.mean("start"), np.zeros_like(main), *states]
    before, here, after = path[index - 1 : index + 2]
    features = {"position": index / len(states), "share": 1 / len(states), "moved": gram.ratio(row, main)}
    features |= {"cosine": gram.cosine(row, main), "theta0_cosine": gram.cosine(row, theta0)}
    features |= {"step_moved": gram.ratio(after - here, main), "turn": gram.cosine(after - here, here - before)}
    if fraction := _known(context.fractions, index):
        features["fraction"] = _log(fraction, 1)
    if (steps := _known(context.steps, index)) and context.steps[0]:
        features["steps"] = _log(steps, context.steps[0])
    loss, first = _known(context.eval_losses, index), _known(context.eval_losses, 0)
    if loss is not None and first is not None:
        features |= {"loss_rise": _log(loss, first), "has_loss": 1.0}
    return features


def _known(values: Sequence[float | None], index: int) -> float | None:
    return values[index] if index < len(values) else None
