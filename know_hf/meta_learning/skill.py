"""How well a predictor runs recorded forgetting backwards."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import median

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

from ..known.modeling_known import KNOWNModel
from ..predictors import KNOWNPredictor, Predictor, get_predictor
from .dataset import TransitionDataset


@dataclass(frozen=True)
class RoleSkill:
    """
    How well one role's transitions were predicted.

    Args:
        skill (`float`):
            `1 - Σ|Θ̂ - Θ(-1)| / Σ|Θ0 - Θ(-1)|` over all scalars: 1 is perfect, 0 is as good as predicting that nothing
            changes, below 0 is worse than that. Where a part of a tensor's scalars was drawn, they stand for all.
        error (`float`):
            Mean `|Θ̂ - Θ(-1)|`, in units of the weights.
        no_change (`float`):
            Mean `|Θ0 - Θ(-1)|`, the error of predicting that nothing changes.
        transitions (`int`):
            Number of transitions that were predicted.
        by_trajectory (`dict[str, float]`):
            The skill in each trajectory alone, by its path.
    """

    skill: float
    error: float
    no_change: float
    transitions: int
    by_trajectory: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median over the trajectories; unlike `skill` it is not decided by those with the largest steps."""
        return median(self.by_trajectory.values())


def retrodiction_skill(
    predictor: Predictor | KNOWNModel | str,
    dataset: TransitionDataset,
    processes: Accelerator | PartialState | None = None,
) -> dict[str, RoleSkill]:
    """
    Skill of a predictor against "nothing changed", by role, over the transitions of a dataset.

    Args:
        predictor ([`Predictor`], [`KNOWNModel`] or `str`):
            A predictor, the model, or the name of a registered predictor that needs no fields.
        dataset ([`TransitionDataset`]):
            The transitions. Made with `max_per_tensor=None` it holds every scalar of its trajectories; otherwise the
            result is an estimate of what it would be with all of them.
        processes (`Accelerator` or `PartialState`, *optional*):
            To share the work between these processes; the result is the same on all, and for any number of them.

    Returns:
        `dict[str, RoleSkill]`, one entry for each role of the dataset.

    Raises:
        `ValueError`: when the predictor takes histories of another length than the dataset's.
    """
    if isinstance(predictor, KNOWNModel):
        predictor = KNOWNPredictor(predictor)
    elif isinstance(predictor, str):
        predictor = get_predictor(predictor)
    if predictor.num_states not in (None, dataset.num_states):
        raise ValueError(
            f"{type(predictor).__name__} takes {predictor.num_states} states, the dataset has num_states="
            f"{dataset.num_states}; make it with num_states={predictor.num_states}"
        )
    rank, step = (0, 1) if processes is None else (processes.process_index, processes.num_processes)
    found: list[tuple[int, _Sums]] = []
    for number in range(rank, len(dataset.blocks), step):
        block = dataset.blocks[number]
        history, labels = dataset.block(block)
        error = history[:, -1] + predictor.residual(history, block.role) - labels
        found.append((number, _Sums.of(error, history[:, -1] - labels, block.share)))
    if step > 1:
        found = sorted(gather_object(found), key=lambda entry: entry[0])
    sums: dict[str, dict[str, _Sums]] = defaultdict(lambda: defaultdict(_Sums))
    for number, of_block in found:
        block = dataset.blocks[number]
        sums[block.role][block.trajectory].add(of_block)
    return {role: _role_skill(by_trajectory) for role, by_trajectory in sums.items()}


@dataclass
class _Sums:
    error: float = 0.0
    no_change: float = 0.0
    scalars: float = 0.0
    transitions: int = 0

    @classmethod
    def of(cls, error: torch.Tensor, no_change: torch.Tensor, share: float) -> "_Sums":
        """Sums over a tensor of which a share was drawn, raised to those over the whole of it."""
        return cls(
            error=error.abs().sum(dtype=torch.float64).item() / share,
            no_change=no_change.abs().sum(dtype=torch.float64).item() / share,
            scalars=len(error) / share,
            transitions=len(error),
        )

    def add(self, other: "_Sums") -> None:
        self.error += other.error
        self.no_change += other.no_change
        self.scalars += other.scalars
        self.transitions += other.transitions

    @property
    def skill(self) -> float:
        # Where nothing moved, only predicting exactly that is no loss.
        if self.no_change == 0:
            return 0.0 if self.error == 0 else -math.inf
        return 1 - self.error / self.no_change


def _role_skill(by_trajectory: dict[str, _Sums]) -> RoleSkill:
    total = _Sums()
    for sums in by_trajectory.values():
        total.add(sums)
    return RoleSkill(
        skill=total.skill,
        error=total.error / total.scalars,
        no_change=total.no_change / total.scalars,
        transitions=total.transitions,
        by_trajectory={path: sums.skill for path, sums in by_trajectory.items()},
    )
