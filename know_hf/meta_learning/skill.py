"""Retrodiction skill: how well a predictor reverses recorded forgetting."""

import math
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

from ..known.modeling_known import KNOWNModel
from ..predictors import KNOWNPredictor, Predictor, SnapshotPredictor, get_predictor
from .dataset import TransitionBlock, TransitionDataset


@dataclass(frozen=True)
class RoleSkill:
    """Retrodiction skill on the transitions of one role.

    The skill is `1 - Σ|Θ̂ - Θ(-1)| / Σ|Θ0 - Θ(-1)|` over all scalars: 1 is perfect, 0 equals the prediction that
    nothing changes, below 0 is worse. The drawn scalars of a tensor represent all of its scalars.
    """

    skill: float
    error: float  # mean |Θ̂ - Θ(-1)|, in units of the weights
    no_change: float  # mean |Θ0 - Θ(-1)|, the error of the prediction that nothing changes
    transitions: int  # number of predicted ones
    by_trajectory: dict[str, float] = field(default_factory=dict)  # skill on each trajectory, by its path

    @property
    def median(self) -> float:
        """Median over the trajectories; unlike `skill`, it is not dominated by those with the largest steps."""
        return median(self.by_trajectory.values())

    def to_dict(self) -> dict[str, float | None]:
        """Return the summary over the trajectories as JSON values; a skill of minus infinity is `None`."""
        return {
            "skill": self.skill if math.isfinite(self.skill) else None,
            "median": self.median if math.isfinite(self.median) else None,
            "error": self.error,
            "no_change": self.no_change,
            "transitions": self.transitions,
            "trajectories": len(self.by_trajectory),
            "trajectories_above_zero": sum(value > 0 for value in self.by_trajectory.values()),
        }


def retrodiction_skill(
    predictor: Predictor | KNOWNModel | str,
    dataset: TransitionDataset,
    processes: Accelerator | PartialState | None = None,
) -> dict[str, RoleSkill]:
    """Compute the skill of a predictor against "nothing changes", by role, over the transitions of a dataset.

    Args:
        predictor ([`Predictor`], [`KNOWNModel`] or `str`):
            A predictor, a model, or the name of a registered predictor without fields.
        dataset ([`TransitionDataset`]):
            Transitions. With `max_per_tensor=None` it holds all scalars of its trajectories; otherwise the result is
            an estimate.
        processes (`Accelerator` or `PartialState`, *optional*):
            Processes that share the work. The result is the same on each of them, and for any number of them.

    Returns:
        `dict[str, RoleSkill]`: Skill of each role of the dataset.

    Raises:
        `ValueError`: If the predictor and the dataset differ in the length of a history, or the predictor reads
            complete tensors.
    """
    if isinstance(predictor, KNOWNModel):
        predictor = KNOWNPredictor(predictor)
    elif isinstance(predictor, str):
        predictor = get_predictor(predictor)
    if not isinstance(predictor, SnapshotPredictor) and predictor.num_states not in (None, dataset.num_states):
        raise ValueError(
            f"{type(predictor).__name__} takes {predictor.num_states} states, but the dataset has num_states="
            f"{dataset.num_states}; create the dataset with num_states={predictor.num_states}"
        )
    rank, step = (0, 1) if processes is None else (processes.process_index, processes.num_processes)
    errors: list[tuple[int, _BlockErrors]] = []
    for number in range(rank, len(dataset.blocks), step):
        block = dataset.blocks[number]
        history, labels = dataset.block(block)
        error = history[:, -1] + predictor.residual(history, block.role) - labels
        sums = (part.abs().sum(dtype=torch.float64).item() / block.share for part in (error, history[:, -1] - labels))
        errors.append((number, _BlockErrors(block, *sums)))
    if step > 1:
        errors = sorted(gather_object(errors), key=lambda entry: entry[0])
    return _skill_by_role([of_block for _, of_block in errors])


@dataclass(frozen=True)
class _BlockErrors:
    """Absolute errors of one tensor, summed over the drawn scalars and scaled to all of them."""

    block: TransitionBlock
    error: float
    no_change: float

    @property
    def key(self) -> tuple[str, str]:
        return self.block.role, self.block.trajectory

    @property
    def transitions(self) -> int:
        return self.block.stop - self.block.start


def _skill_by_role(blocks: list[_BlockErrors]) -> dict[str, RoleSkill]:
    from ..metrics import RetrodictionSkill  # importing evaluate takes a second

    def skill_by(groups: list[Any]) -> dict[Any, float]:
        errors, no_change = [block.error for block in blocks], [block.no_change for block in blocks]
        return RetrodictionSkill().compute(predictions=errors, references=no_change, groups=groups)

    skills = skill_by([errors.block.role for errors in blocks])
    by_trajectory = skill_by([errors.key for errors in blocks])
    result = {}
    for role, skill in skills.items():
        of_role = [errors for errors in blocks if errors.block.role == role]
        scalars = sum(errors.transitions / errors.block.share for errors in of_role)
        result[role] = RoleSkill(
            skill=skill,
            error=sum(errors.error for errors in of_role) / scalars,
            no_change=sum(errors.no_change for errors in of_role) / scalars,
            transitions=sum(errors.transitions for errors in of_role),
            by_trajectory={path: value for (group, path), value in by_trajectory.items() if group == role},
        )
    return result
