"""The snapshots that a predictor reads, and the complete tensors that a [`SnapshotPredictor`] computes from them."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import pad

from ..checkpoint import parse_json
from ..predictors import Predictor, SnapshotPredictor, TensorSnapshots, factorise
from ..trajectory import WeightTrajectory
from .tensor_contexts import tensor_contexts

Snapshots = Mapping[int | str, torch.Tensor]

_HOW_TO_RECORD = {
    "start": "induce_forgetting(trainer, schedule, folder), without start='current' or start_weights='none'",
    "branches": "ForgettingSchedule(kind='complementary'), or import other trainings with"
    " WeightTrajectory.from_checkpoints(folders, output_dir, 'branches')",
    "fraction": "ForgettingSchedule(kind='complementary'), or set fraction=, the share of the data of each branch",
}
_HOW_TO_RECORD["origin"] = _HOW_TO_RECORD["start"]
_NAMES = {
    "start": "no start (the weights before the training)",
    "origin": "no start, from which its branches parted",
    "fraction": "branches without a recorded share of the data",
}


class MissingSnapshotsError(ValueError):
    """A trajectory lacks snapshots that a predictor reads, or has them in a form that it cannot combine."""


def snapshots_read(trajectory: WeightTrajectory, predictor: Predictor) -> list[int | str]:
    """Return the snapshots that a predictor reads: indices of states and names of others, Θ0 last.

    Those of a history are the states, most forgotten first; or the tail for a predictor that follows one training. A
    `MissingSnapshotsError` says what the trajectory lacks and how to record it.
    """
    if not isinstance(predictor, SnapshotPredictor):
        if getattr(predictor, "follows_training", False) and trajectory.tail:
            return [*(record.name for record in trajectory.tail), 0]
        if trajectory.num_states == 1 and trajectory.start and getattr(predictor, "reads_theta0_alone", False):
            return ["start", 0]  # with which frozen tensors are found
        return list(reversed(range(trajectory.num_states)))
    available = _available(trajectory)
    for kind, least in predictor.reads().items():
        if len(available[kind]) < least:
            lacks = _NAMES.get(kind, f"{len(available[kind])} {kind} of the {least} needed")
            raise MissingSnapshotsError(
                f"{type(predictor).__name__} cannot predict from {trajectory.path}, which has {lacks}. Record with"
                f" {_HOW_TO_RECORD[kind]}"
            )
    if trajectory.is_adapter and (kind := _adapter_type(trajectory)) != "LORA":
        raise MissingSnapshotsError(
            f"{trajectory.path} records adapters of type {kind}; {type(predictor).__name__} combines full models and"
            " LoRA, whose products are linear in the model. Merge them first: know-hf merge"
        )
    kinds = ("branches", "origin", "start", "tail", "states")
    names = [name for kind in kinds if kind in predictor.reads() for name in available[kind]]
    return [*(name for name in dict.fromkeys(names) if name != 0), 0]


class CompleteTensors:
    """The residuals of a [`SnapshotPredictor`], computed for one complete tensor, or pair of LoRA, at a time.

    The last of the `snapshots` is Θ0, or a branch in its place. There is one predictor per tensor.
    """

    def __init__(
        self, trajectory: WeightTrajectory, snapshots: Sequence[int | str], predictors: Mapping[str, Predictor]
    ) -> None:
        self._trajectory, self._snapshots, self._predictors = trajectory, snapshots, predictors
        available = _available(trajectory)
        self._origin = next(iter(available["origin"]), None)
        self._several = {
            kind: [name for name in available[kind] if name in snapshots] for kind in ("branches", "tail", "states")
        }
        self._fraction = next(iter(available["fraction"]), None)
        self._pairs = lora_pairs(trajectory)
        self._contexts = tensor_contexts(trajectory)
        self._computed = lru_cache(maxsize=1)(self._compute)

    def group(self, name: str) -> tuple[str, ...]:
        """Return the names of the tensors that are computed together with one."""
        return self._pairs.get(name, (name,))

    def residual(self, name: str) -> torch.Tensor:
        """Return the predicted tensor minus Θ0, flat, float32."""
        return self._computed(self.group(name))[name]

    def _compute(self, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        predictor: Any = self._predictors[names[0]]  # a SnapshotPredictor
        read = {
            snapshot: [self._trajectory.tensor(name, snapshot).float() for name in names]
            for snapshot in self._snapshots
        }

        def combine(tensors: Snapshots) -> torch.Tensor:
            several = {kind: [tensors[name] for name in group] for kind, group in self._several.items()}
            snapshots = TensorSnapshots(
                tensors[self._snapshots[-1]],
                tensors.get("start"),
                None if self._origin is None else tensors.get(self._origin),
                several["branches"],
                self._fraction,
                several["states"][::-1],
                several["tail"],
                self._contexts[names[0]],
            )
            return predictor.tensor(snapshots)

        new = [combine({key: one for key, (one,) in read.items()})] if len(names) == 1 else _on_products(read, combine)
        return {name: (a - b).flatten() for name, a, b in zip(names, new, read[self._snapshots[-1]], strict=True)}


def lora_partner(name: str) -> str:
    """Return the name of B by that of A; other names are unchanged."""
    return name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")


def lora_pairs(trajectory: WeightTrajectory) -> dict[str, tuple[str, str]]:
    """Return the names of A and B of LoRA by the name of each; empty for full models."""
    pairs = {}
    for name in trajectory.names if trajectory.is_adapter else ():
        other = lora_partner(name)
        if other != name and other in trajectory.roles:
            pairs[name] = pairs[other] = (name, other)
    return pairs


def _on_products(
    read: Mapping[int | str, Sequence[torch.Tensor]], combine: Callable[[Snapshots], torch.Tensor]
) -> list[torch.Tensor]:
    """Combine the products of A `(r, in, …)` and B `(out, r, …)`, and return both factors of the result at rank r."""
    theta0 = list(read)[-1]
    first, second = read[theta0]
    rank = len(first)
    # all products are left @ core @ right.T, with small cores and orthogonal columns in left and right
    left, lefts = torch.linalg.qr(torch.cat([b.flatten(1) for _, b in read.values()], dim=1))
    right, rights = torch.linalg.qr(torch.cat([a.flatten(1).T for a, _ in read.values()], dim=1))
    parts = zip(lefts.split(rank, dim=1), rights.split(rank, dim=1), strict=True)
    cores = {name: x @ y.T for name, (x, y) in zip(read, parts, strict=True)}
    core = combine(cores)
    if torch.equal(core, cores[theta0]):
        return [first, second]
    kept = min(rank, *core.shape)
    a, b = factorise(core, kept)
    a, b = pad(a @ right.T, (0, 0, 0, rank - kept)), pad(left @ b, (0, rank - kept))
    return [a.reshape(first.shape), b.reshape(second.shape)]


def _available(trajectory: WeightTrajectory) -> dict[str, list]:
    """Return the snapshots of each kind, and the common share of the data of the branches as `fraction`."""
    start = [] if trajectory.start is None else ["start"]
    schedule = trajectory.schedule
    is_from_theta0 = schedule is not None and schedule.kind == "complementary" and schedule.branch_from == "state-0"
    fractions = {record.fraction for record in trajectory.branches}
    return {
        "start": start,
        "origin": [0] if is_from_theta0 else start,
        "branches": [record.name for record in trajectory.branches],
        "tail": [record.name for record in trajectory.tail],
        "states": list(range(trajectory.num_states - 1, 0, -1)),
        "fraction": [f for f in fractions if f is not None and 0 < f < 1] if len(fractions) == 1 else [],
    }


def _adapter_type(trajectory: WeightTrajectory) -> str:
    config = parse_json((trajectory.path / "adapter_config.json").read_bytes())
    if config.get("use_dora"):
        return "DoRA"  # its magnitudes are not linear in the model
    if config.get("target_parameters"):
        return "LORA of target_parameters"  # one pair of matrices holds all experts
    return config.get("peft_type", "")
