"""Card of a trajectory."""

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

from huggingface_hub import ModelCard, ModelCardData

from ..config_files import check_keys
from ..known import KNOWNConfig
from ..markdown import Table, python
from ..prediction import SHIPPED_KNOWN
from ..trajectory import WeightTrajectory
from ..trajectory.summary import TrajectorySummary
from .recorded_card import About, RecordedCard, recorded_fields

_PREDICTORS = {"tail": "tail_average", "branch": "branch_average", "start": "start_interpolation"}  # of Θ0 and others


@dataclass(kw_only=True)
class TrajectoryCard(RecordedCard):
    """Card of a trajectory, JSON values only."""

    template: ClassVar[str] = "trajectory.md"

    roles: list[dict[str, Any]]  # role, tensors, parameters and moved: None, or distances from Θ0 over its norm
    stored_once: int  # tensors of the last state that are stored with an earlier one
    bytes: int  # size of all files

    @classmethod
    def of(
        cls, trajectory: WeightTrajectory, summary: TrajectorySummary | None = None, **about: Unpack[About]
    ) -> "TrajectoryCard":
        """Collect the fields; see [`trajectory_card`]."""
        check_keys(about, tuple(About.__annotations__), "the card")
        recorded = recorded_fields(trajectory, about, "Forgetting trajectory")
        roles: dict[str, dict[str, Any]] = {}
        for name in trajectory.names:
            role = trajectory.roles[name].role
            moved = None if summary is None else summary.displacement.get(role)
            row = roles.setdefault(role, {"role": role, "tensors": 0, "parameters": 0, "moved": moved})
            row["tensors"] += 1
            row["parameters"] += trajectory.shape(name).numel()
        model_files = sum(path.stat().st_size for path in trajectory.model_files)
        return cls(
            **recorded,
            roles=[roles[role] for role in sorted(roles)],
            stored_once=len(trajectory.states[-1].unchanged),
            bytes=model_files + sum(state["bytes"] for state in (*recorded["states"], *recorded["others"])),
        )

    @property
    def has_displacement(self) -> bool:
        return any(row["moved"] for row in self.roles)

    @property
    def roles_table(self) -> Table:
        names = [state["name"] for state in (*self.states, *self.others) if state["name"] != "start"]
        moved = [f"moved, {name}" for name in names[1:]] if self.has_displacement else []
        rows = [["role", "tensors", "parameters", *moved]]
        for row in self.roles:
            distances = [f"{distance:.4f}" for distance in row["moved"][1:]] if row["moved"] else ["–"] * len(moved)
            rows.append([row["role"], f"{row['tensors']:,}", f"{row['parameters']:,}", *distances])
        return rows

    @property
    def opening_code(self) -> str:
        """Python code that opens and uses the trajectory."""
        trajectory = f"WeightTrajectory({python(self.trajectory_folder)})"
        if self.repo_id is not None:
            trajectory = f"WeightTrajectory.from_hub({python(self.repo_id)})"
        base = "" if self.adapter_type is None else ", base_model=base_model"
        comment = "  # the most forgotten state" if len(self.states) > 1 else ""
        how = "steps=1" if self._predictor is None else f"predictor={python(self._predictor)}"
        return f"""\
from know_hf import WeightTrajectory, predict_overflowed_weights

trajectory = {trajectory}
history = trajectory.history(trajectory.names[0])  # (S, *shape), most forgotten state first
model = trajectory.load_model({len(self.states) - 1}{base}){comment}
enhanced = predict_overflowed_weights(trajectory, {how}, output_dir="enhanced/")"""

    @property
    def _predictor(self) -> str | None:
        """A predictor that the snapshots suffice for; `None` for KNOWN."""
        if len(self.states) >= KNOWNConfig.from_pretrained(SHIPPED_KNOWN).num_states:
            return None
        kinds = {other["name"].partition(" ")[0] for other in self.others} if len(self.states) == 1 else set()
        return next((name for kind, name in _PREDICTORS.items() if kind in kinds), "average")

    def data(self) -> ModelCardData:
        return self.front_matter(["weight-trajectory"], "know_hf")


def trajectory_card(
    trajectory: WeightTrajectory, summary: TrajectorySummary | None = None, **about: Unpack[About]
) -> ModelCard:
    """Create the card of a trajectory from its JSON files and headers, without network access.

    A `summary`, the result of [`inspect_trajectory`], shows how far each role moved. For `about`, see
    [`~know_hf.cards.recorded_card.About`].

    Raises:
        `TrajectoryError`: if the trajectory has no state.
        `ValueError`: for an unknown key or an invalid Hub id.
    """
    return TrajectoryCard.of(trajectory, summary, **about).render()
