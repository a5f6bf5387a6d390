"""[`CrossFit`]: choose a coefficient without validation data, on the halves that two branches have not seen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset
from transformers import PreTrainedModel

from ...data.subsets import divide
from ...predictors import get_predictor
from ...trajectory import WeightTrajectory
from ..engine import PredictedTensors
from ..plan import PredictionPlan
from ..result import PredictionResult
from ..selection import REFERENCE, GateResult, check_rule, choose
from ..tensor_sources import StateTensors, TensorSource
from ..write_checkpoint import WriteOptions
from .candidates import Candidate, PlannedCandidate, plan_candidates
from .gate import Evaluate, Gate, write_chosen

CROSS_FIT_FAMILY = (
    *(Candidate("start_interpolation", {"scale": s}) for s in (0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.25)),
    *(Candidate("start_interpolation", {"scale": scale, "slope": 1 - scale}) for scale in (0.6, 0.75, 0.9)),
    *(Candidate("shrink", {"factor": factor}) for factor in (0.9, 0.95, 1.025)),
)
"""What cross-fitting compares: predictions from Θ0 and the start alone, in which a branch can replace Θ0."""


@dataclass(frozen=True)
class CrossFit:
    """A `gate` for [`predict_overflowed_weights`] that chooses on the training data, without validation data.

    The trajectory has two branches from the start, trained on complementary halves of the data. Each candidate of
    [`CROSS_FIT_FAMILY`] is computed with branch A in place of Θ0 and evaluated on the half of B, which A has not seen,
    and vice versa. As in a [`Gate`], the choice depends on the paired differences over all batches, here from the
    branches themselves. The chosen candidate is then computed with Θ0.

    A candidate moves a branch twice as far as Θ0. A branch has seen half of the data, so the error of a finite sample,
    a variance or a bias of order 1 / n, is twice as large. With noise of variance v in Θ0, 2v in the branches and a
    signal S, the best multiples are `S / (S + v)` and `S / (S + 2v)`: going half of the way to the second never
    overshoots the first.

    Args:
        dataset (`torch.utils.data.Dataset`):
            The `train_dataset` of the recording.
        data_collator, batch_size, level, margin, base_model, device, seed, remove_unused_columns (*optional*):
            See [`Gate`]. Each half must give at least 10 batches.
        max_examples (`int`, *optional*, defaults to `2000`):
            Number of examples of each half to evaluate, drawn with the seed.

    Raises:
        `ValueError`: if a number is out of range.
    """

    dataset: Any
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None
    batch_size: int = 8
    level: float = 0.05
    margin: float | None = None
    base_model: PreTrainedModel | None = None
    device: torch.device | str | None = None
    seed: int = 0
    remove_unused_columns: bool = True
    max_examples: int = 2000

    def __post_init__(self) -> None:
        check_rule(self.level, self.margin)
        if self.max_examples < 1:
            raise ValueError(f"max_examples must be at least 1, got {self.max_examples}")

    def gates(self, trajectory: WeightTrajectory) -> dict[str, Gate]:
        """Return a gate for each branch, by its name, with the half that the branch has not seen.

        Raises:
            `ValueError`: if the trajectory lacks two branches from the start, or the dataset is not the recorded one.
        """
        schedule, path = trajectory.schedule, trajectory.path
        wanted = "record with ForgettingSchedule(kind='complementary', branch_from='start')"
        if schedule is None or schedule.kind != "complementary" or len(trajectory.branches) != 2:
            raise ValueError(f"{path} has no two branches on complementary halves, which CrossFit needs; {wanted}")
        if schedule.branch_from != "start":
            raise ValueError(
                f"the branches of {path} begin at Θ0, which has seen both halves, so no half tests them; {wanted}"
            )
        halves = divide(self.dataset, schedule)[1:]
        for half, branch in zip(halves, trajectory.branches, strict=True):
            if half.fingerprint != branch.subset_fingerprint:
                raise ValueError(
                    f"dataset is not the one that {path} was recorded from: its half for {branch.name} has the"
                    f" fingerprint {half.fingerprint}, recorded is {branch.subset_fingerprint}; pass the train_dataset"
                )
        names = [branch.name for branch in trajectory.branches]
        return {name: self._gate(half.dataset) for name, half in zip(names, reversed(halves), strict=True)}

    def _gate(self, half: Any) -> Gate:
        rows = np.random.RandomState(self.seed % 2**32).permutation(len(half))[: self.max_examples]
        shared = {name: getattr(self, name) for name in vars(self) if name != "max_examples"}
        return Gate(**{**shared, "dataset": Subset(half, sorted(rows.tolist()))})


def write_cross_fitted(
    cross_fit: CrossFit,
    plan: PredictionPlan,
    output_dir: str | Path,
    options: WriteOptions,
    finish: Callable[[Path, PredictionResult], None] | None = None,
) -> PredictionResult:
    """Evaluate each candidate on both branches and write the chosen one, made of Θ0; see [`write_best_candidate`].

    Raises:
        `ValueError`: as [`CrossFit.gates`] and [`write_best_candidate`] do.
    """
    gates = cross_fit.gates(plan.trajectory)
    recalibrates = options.recalibrate_with is not None
    candidates = plan_candidates(plan, CROSS_FIT_FAMILY, recalibrates, with_requested=False)
    planned = {candidate.name: candidate for candidate in candidates}

    def decide(evaluate: Evaluate) -> tuple[GateResult, PlannedCandidate]:
        losses: dict[str, list[float]] = {}
        for name, candidate in planned.items():
            losses[name] = []
            for branch, gate in gates.items():
                tensors, is_first = _of_branch(candidate, branch), name == REFERENCE
                values = evaluate(gate, tensors, candidate.recipe["recalibrated"], None, is_first)
                losses[name] += np.atleast_1d(values).tolist()
        rule = {name: getattr(cross_fit, name) for name in ("level", "margin", "seed")}
        decision = choose(losses, **rule)
        return replace(decision, is_cross_fitted=True), planned[decision.chosen]

    first, count = next(iter(gates.values())), len(planned) * len(gates)
    return write_chosen(first, plan, output_dir, options, decide, count, finish)


def _of_branch(candidate: PlannedCandidate, branch: str) -> TensorSource:
    """Return the tensors of a candidate that is made of a branch, which moves twice as far as Θ0."""
    recipe, plan = candidate.recipe, candidate.plan
    if recipe["state"] is not None:
        return StateTensors(plan.trajectory, branch)
    doubled = {name: 2 * value - (name != "slope") for name, value in recipe["predictor_options"].items()}
    return PredictedTensors(
        plan.with_predictor(get_predictor(recipe["predictor"], **doubled)).in_place_of_theta0(branch)
    )
