"""The card of a trajectory: its states, how they were made, and how they are opened."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from huggingface_hub import ModelCard, ModelCardData

from ..markdown import Table, code
from .code_snippets import opening_code
from .provenance import About, RecordedCard, recorded_fields

if TYPE_CHECKING:
    from ..trajectory import WeightTrajectory
    from ..trajectory.summary import TrajectorySummary


@dataclass(kw_only=True)
class TrajectoryCard(RecordedCard):
    """All that is known of a trajectory; JSON values only.

    Args:
        roles (`list[dict]`): `role`, `tensors`, `parameters` and, where they were measured, `moved`: the distance of
            every state from Θ0, relative to its length.
        stored_once (`int`): Tensors of the last state that earlier states' files hold.
        bytes (`int`): Of all files together.
    """

    template: ClassVar[str] = "trajectory.md"

    roles: list[dict[str, Any]]
    stored_once: int
    bytes: int

    @classmethod
    def of(
        cls, trajectory: "WeightTrajectory", summary: "TrajectorySummary | None" = None, **about: Unpack[About]
    ) -> "TrajectoryCard":
        """What a trajectory says of itself; see [`trajectory_card`]."""
        recorded = recorded_fields(trajectory, about, "Forgetting trajectory")
        counts: dict[str, list[int]] = {}
        for name in trajectory.names:
            count = counts.setdefault(trajectory.roles[name].role, [0, 0])
            count[0] += 1
            count[1] += trajectory.shape(name).numel()
        moved = {} if summary is None else summary.displacement
        model_files = sum(path.stat().st_size for path in trajectory.model_files)
        return cls(
            **recorded,
            roles=[
                {"role": role, "tensors": tensors, "parameters": parameters, "moved": moved.get(role)}
                for role, (tensors, parameters) in sorted(counts.items())
            ],
            stored_once=len(trajectory.states[-1].unchanged),
            bytes=model_files + sum(state["bytes"] for state in recorded["states"]),
        )

    @property
    def has_displacement(self) -> bool:
        return any(row["moved"] for row in self.roles)

    @property
    def roles_table(self) -> Table:
        moved = [f"moved, Θ{state['index']}" for state in self.states[1:]] if self.has_displacement else []
        rows: list[Sequence[object]] = [["role", "tensors", "parameters", *moved]]
        for row in self.roles:
            distances = [f"{distance:.4f}" for distance in row["moved"][1:]] if row["moved"] else ["–"] * len(moved)
            rows.append([row["role"], f"{row['tensors']:,}", f"{row['parameters']:,}", *distances])
        return rows

    @property
    def environment_table(self) -> Table:
        return [["library", "recorded with"], *([code(name), found] for name, found in self.recorded_with.items())]

    @property
    def opening_code(self) -> str:
        return opening_code(self)

    def data(self) -> ModelCardData:
        return self.front_matter(["weight-trajectory"], "know_hf")


def trajectory_card(
    trajectory: "WeightTrajectory", summary: "TrajectorySummary | None" = None, **about: Unpack[About]
) -> ModelCard:
    """Card of a trajectory. Reads its JSON files and headers; asks no network and writes nothing.

    Args:
        trajectory ([`WeightTrajectory`]): With at least one state.
        summary ([`TrajectorySummary`], *optional*): What [`inspect_trajectory`] gives; the card then says how far each
            role moved.
        about: See [`~know_hf.cards.provenance.About`].

    Returns:
        `ModelCard`: `str(card)` is the README.md, `card.data` its front matter.

    Raises:
        `TrajectoryError`: when the trajectory has no state.
        `ValueError`: for an id that the Hub does not take.
    """
    return TrajectoryCard.of(trajectory, summary, **about).render()
