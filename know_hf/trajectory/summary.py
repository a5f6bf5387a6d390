"""Statistics of a trajectory: its states, the roles of its tensors, and how far the tensors of each role moved."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..terminal import aligned
from .records import StateRecord
from .store import StateName
from .weight_trajectory import WeightTrajectory

_PIECE_SIZE = 2**20  # elements


@dataclass
class TrajectorySummary:
    """Statistics of a trajectory; `str` gives two tables.

    The displacement is `‖Θk − Θ0‖₂ / ‖Θ0‖₂` of every state k over all tensors of a role, then of every tail state and
    branch; 0 where Θ0 is all zeros and nothing moved. For the forgetting, see [`ForgettingRate`].
    """

    states: tuple[StateRecord, ...]  # full data first
    others: tuple[StateRecord, ...] = ()  # start, tail states and branches
    tensors: dict[str, int] = field(default_factory=dict)  # by role
    parameters: dict[str, int] = field(default_factory=dict)  # by role
    displacement: dict[str, list[float]] = field(default_factory=dict)  # by role
    forgetting: dict[str, float] = field(default_factory=dict)  # by metric that every state has

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; displacements by role and snapshot."""
        keys = ("name", "kind", "num_examples", "steps", "metrics")
        records = [record for record in (*self.states, *self.others) if record.kind != "start"]
        return {
            "snapshots": [{key: getattr(record, key) for key in keys} for record in (*self.states, *self.others)],
            "roles": {
                role: {"tensors": self.tensors[role], "parameters": self.parameters[role]} for role in self.tensors
            },
            "displacement": {
                role: {record.name: moved for record, moved in zip(records, of_role, strict=True)}
                for role, of_role in self.displacement.items()
            },
            "forgetting": self.forgetting,
        }

    def __str__(self) -> str:
        records = sorted((*self.states, *self.others), key=lambda record: record.kind != "start")
        metrics, roles = sorted({name for record in records for name in record.metrics}), list(self.displacement)
        rows = [["state", "examples", "steps", *metrics, *(f"moved {role}" for role in roles)]]
        moved = iter(zip(*self.displacement.values(), strict=True))
        for record in records:
            values = [f"{record.metrics[name]:z.4f}" if name in record.metrics else "–" for name in metrics]
            distances = ["–"] * len(roles) if record.kind == "start" else [f"{d:.4f}" for d in next(moved, ())]
            rows.append([record.symbol, record.examples, f"{record.steps:,}", *values, *distances])
        parts = [aligned(rows)]
        if roles:
            parts[0] += "\nmoved: distance from Θ0, relative to its norm"
        if self.forgetting:
            changes = ", ".join(f"{name} {-rate:+z.4f}" for name, rate in self.forgetting.items())
            parts[0] += f"\nper halving of the examples: {changes}"
        if self.tensors:
            counts = [[role, f"{self.tensors[role]:,}", f"{self.parameters[role]:,}"] for role in self.tensors]
            parts.append(aligned([["role", "tensors", "parameters"], *counts]))
        return "\n\n".join(parts)


def inspect_trajectory(trajectory: WeightTrajectory) -> TrajectorySummary:
    """Read all tensors of a trajectory once and measure how far those of each role moved; not those of the start.

    Tensors are read in pieces, so memory does not grow with them. Sums are float64: the distances of tensors of any
    size agree with those of a single sum to about 1e-12, relative.
    """
    summary = metrics_summary(trajectory)
    names = [record.name for record in (*trajectory.states, *trajectory.tail, *trajectory.branches)]
    length: defaultdict[str, float] = defaultdict(float)
    distance: dict[str, dict[str, float]] = {}
    for name in trajectory.names:
        role = trajectory.roles[name].role
        summary.tensors[role] = summary.tensors.get(role, 0) + 1
        summary.parameters[role] = summary.parameters.get(role, 0) + trajectory.shape(name).numel()
        if role == "copied":
            continue
        of_role = distance.setdefault(role, dict.fromkeys(names, 0.0))
        later = names[trajectory.num_states if trajectory.is_unchanged(name) else 1 :]
        for squared, *moved in _squares(trajectory, name, later):
            length[role] += squared
            for state, value in zip(later, moved, strict=True):
                of_role[state] += value
    for role, of_role in distance.items():
        norm = max(length[role] ** 0.5, 1e-30)
        summary.displacement[role] = [squared**0.5 / norm for squared in of_role.values()]
    return summary


def metrics_summary(trajectory: WeightTrajectory) -> TrajectorySummary:
    """Return the metrics of every state, without reading tensors."""
    return TrajectorySummary(trajectory.states, other_snapshots(trajectory), forgetting=_forgetting(trajectory))


def other_snapshots(trajectory: WeightTrajectory) -> tuple[StateRecord, ...]:
    """Return the records of the snapshots that are not states: start, tail states and branches."""
    start = () if trajectory.start is None else (trajectory.start,)
    return (*start, *trajectory.tail, *trajectory.branches)


def displacement(trajectory: WeightTrajectory, state: StateName) -> float:
    """Return `‖Θk − Θ0‖₂ / ‖Θ0‖₂` over all parameters; 0 for state 0."""
    moved = length = 0.0
    for name, role in trajectory.roles.items():
        if state not in (0, "state-0") and role.role != "copied":
            for squared, distance in _squares(trajectory, name, [state]):
                length, moved = length + squared, moved + distance
    return (moved / max(length, 1e-60)) ** 0.5


def loss_names(metrics: Iterable[str]) -> list[str]:
    """Names of metrics that are losses: `eval_loss`, or `eval_<name>_loss` for a dictionary of evaluation sets."""
    return sorted(name for name in metrics if re.search(r"(?<![a-z])loss(?![a-z])", name, re.IGNORECASE))


def _squares(trajectory: WeightTrajectory, name: str, states: Sequence[StateName]) -> Iterator[list[float]]:
    """Yield ‖Θ0‖² and each ‖Θk − Θ0‖² of the pieces of a tensor."""
    size = trajectory.shape(name).numel()
    for start in range(0, size, _PIECE_SIZE):
        stop = min(start + _PIECE_SIZE, size)
        first = _as_double(trajectory.read(name, start, stop))
        moves = (_as_double(trajectory.read(name, start, stop, state)) - first for state in states)
        yield [float(first.square().sum()), *(float(move.square().sum()) for move in moves)]


def _as_double(values: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(values).double() if values.is_complex() else values.double()


def _forgetting(trajectory: WeightTrajectory) -> dict[str, float]:
    sizes = {state.num_examples for state in trajectory.states}
    metrics = (set(state.metrics) for state in trajectory.states)
    names = sorted(set.intersection(*metrics))
    if not names or None in sizes or len(sizes) < 2:
        return {}
    from ..metrics import ForgettingRate  # importing evaluate takes a second

    rate = ForgettingRate()
    return {name: rate.of_trajectory(trajectory, name)["forgetting_rate"] for name in names}
