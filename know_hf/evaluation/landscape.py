"""The loss around the states of a trajectory, in the plane in which they move most."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .arm_weights import ArmSources
from .arms import Arm
from .loss_landscape import loss_landscape
from .measure import ComparisonTask, arm_sources


@dataclass(frozen=True)
class Landscape:
    """How a picture of the loss is made.

    Args:
        resolution (`int`, *optional*, defaults to `15`): Points of the grid along each axis; the loss is measured
            `resolution²` times.
        num_examples (`int`, *optional*, defaults to `256`): Unseen source examples that it is measured on.

    Raises:
        `ValueError`: for a resolution below 2, or no example.
    """

    resolution: int = 15
    num_examples: int = 256

    def __post_init__(self) -> None:
        if self.resolution < 2 or self.num_examples < 1:
            raise ValueError(f"a landscape needs a resolution of at least 2 and an example, got {self}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_landscape(
    landscape: Landscape, task: ComparisonTask, seed: int, arms: Sequence[Arm], output_dir: Path
) -> dict[str, Any]:
    """The loss around the states of one trajectory ([`loss_landscape`]), with untuned predictions in it.

    Args:
        landscape ([`Landscape`]): How fine.
        task ([`ComparisonTask`]): With source data.
        seed (`int`): Whose trajectory.
        arms (sequence of [`Arm`]): Shown besides the states.
        output_dir (`Path`): Folder of the comparison.

    Returns:
        `dict`: `landscape` of `report.json`.

    Raises:
        `ValueError`: when the task has no source data or no loss, or as [`loss_landscape`].
    """
    if task.source is None:
        raise ValueError("a landscape needs source of the task; give it, or leave the landscape out")
    if (measure := next((m.name for m in task.measures if not m.higher_is_better), None)) is None:
        raise ValueError("a landscape needs a loss among the measures of the task; leave the landscape out")
    split, _ = task.splits(seed, draws=0)
    assert split is not None
    work = output_dir / "work" / "landscape"
    sources = arm_sources(task, seed, task.open_trajectory(seed, output_dir), split, work)
    examples = {name: tensor[: landscape.num_examples] for name, tensor in split.test.items()}
    found = loss_landscape(
        [partial(_state, sources, index) for index in range(sources.trajectory.num_states)],
        {arm.name: partial(arm.initial_model, sources) for arm in arms},
        lambda model: task.evaluate(model, examples)[measure],
        recalibrate_with=sources.batches or None,
        resolution=landscape.resolution,
    )
    shutil.rmtree(work, ignore_errors=True)
    return {"seed": seed, "measure": measure, "num_examples": len(examples["labels"]), **found.to_dict()}


def _state(sources: ArmSources, index: int) -> PreTrainedModel:
    return sources.state(index).to(sources.device)
