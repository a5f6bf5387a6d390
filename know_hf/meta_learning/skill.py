"""Retrodiction skill: how well a predictor reverses recorded forgetting."""

from collections import defaultdict
from dataclasses import dataclass, field
from statistics import median

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

from ..known.modeling_known import KNOWNModel
from ..predictors import KNOWNPredictor, Predictor, get_predictor
from .dataset import TransitionBlock, TransitionDataset


@dataclass(frozen=True)
class RoleSkill:
    """
    Retrodiction skill on the transitions of one role.

    Attributes:
        skill (`float`):
            `1 - Σ|Θ̂ - Θ(-1)| / Σ|Θ0 - Θ(-1)|` over all scalars: 1 is perfect, 0 equals the prediction that nothing
            changes, below 0 is worse. The drawn scalars of a tensor represent all of its scalars.
        error (`float`):
            Mean `|Θ̂ - Θ(-1)|`, in units of the weights.
        no_change (`float`):
            Mean `|Θ0 - Θ(-1)|`, the error of the prediction that nothing changes.
        transitions (`int`):
            Number of predicted transitions.
        by_trajectory (`dict[str, float]`):
            Skill on each trajectory, by its path.
    """

    skill: float
    error: float
    no_change: float
    transitions: int
    by_trajectory: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median over the trajectories; unlike `skill`, it is not dominated by those with the largest steps."""
        return median(self.by_trajectory.values())


def retrodiction_skill(
    predictor: Predictor | KNOWNModel | str,
    dataset: TransitionDataset,
    processes: Accelerator | PartialState | None = None,
) -> dict[str, RoleSkill]:
    """
    Compute the skill of a predictor against "nothing changes", by role, over the transitions of a dataset.

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
        `ValueError`: If the predictor and the dataset differ in the length of a history.
    """
    if isinstance(predictor, KNOWNModel):
        predictor = KNOWNPredictor(predictor)
    elif isinstance(predictor, str):
        predictor = get_predictor(predictor)
    if predictor.num_states not in (None, dataset.num_states):
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
        errors.append((number, _BlockErrors.of(block, error, history[:, -1] - labels)))
    if step > 1:
        errors = sorted(gather_object(errors), key=lambda entry: entry[0])
    by_role: dict[str, list[_BlockErrors]] = defaultdict(list)
    for number, of_block in errors:
        by_role[dataset.blocks[number].role].append(of_block)
    return {role: _role_skill(of_role) for role, of_role in by_role.items()}


@dataclass(frozen=True)
class _BlockErrors:
    """Absolute errors of one tensor, summed over the drawn scalars and scaled to all of them."""

    trajectory: str
    error: float
    no_change: float
    scalars: float
    transitions: int

    @classmethod
    def of(cls, block: TransitionBlock, error: torch.Tensor, no_change: torch.Tensor) -> "_BlockErrors":
        return cls(
            trajectory=block.trajectory,
            error=error.abs().sum(dtype=torch.float64).item() / block.share,
            no_change=no_change.abs().sum(dtype=torch.float64).item() / block.share,
            scalars=len(error) / block.share,
            transitions=len(error),
        )


def _role_skill(blocks: list[_BlockErrors]) -> RoleSkill:
    from ..metrics import RetrodictionSkill  # importing evaluate takes a second

    metric = RetrodictionSkill()
    errors = {"predictions": [block.error for block in blocks], "references": [block.no_change for block in blocks]}
    scalars = sum(block.scalars for block in blocks)
    return RoleSkill(
        skill=metric.compute(**errors)["retrodiction_skill"],
        error=sum(errors["predictions"]) / scalars,
        no_change=sum(errors["references"]) / scalars,
        transitions=sum(block.transitions for block in blocks),
        by_trajectory=metric.compute(**errors, groups=[block.trajectory for block in blocks]),
    )
