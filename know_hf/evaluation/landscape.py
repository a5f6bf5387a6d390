"""The loss around the states of a trajectory, in the plane in which they move most."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import PreTrainedModel

from ..batch_norm import recalibrate_batch_norm
from .arms import Arm
from .measuring import ComparisonTask, arm_sources, device

_MARGIN = 0.25  # of the points' span, on each side


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
    """Loss on a grid through Θ0 along the two first principal components of the states (Li et al., *Visualizing the
    Loss Landscape of Neural Nets*, arXiv 1712.09913, §7), and where states and arms are in it.

    Principal components are those of the differences to Θ0, so that Θ0 is the origin. BatchNorm statistics are
    measured anew at every point.

    Args:
        landscape ([`Landscape`]): How fine.
        task ([`ComparisonTask`]): With source data.
        seed (`int`): Whose trajectory.
        arms (sequence of [`Arm`]): Shown besides the states.
        output_dir (`Path`): Folder of the comparison.

    Returns:
        `dict`: `landscape` of `report.json`.

    Raises:
        `ValueError`: when the task has no source data, no loss, or fewer than three states to span a plane.
    """
    if task.source is None:
        raise ValueError("a landscape needs source of the task; give it, or leave the landscape out")
    if (measure := next((m.name for m in task.measures if not m.higher_is_better), None)) is None:
        raise ValueError("a landscape needs a loss among the measures of the task; leave the landscape out")
    split = task.source(seed)
    work = output_dir / "work" / "landscape"
    sources = arm_sources(task, seed, task.open_trajectory(seed, output_dir), split, work)
    examples = {name: tensor[: landscape.num_examples] for name, tensor in split.test.items()}
    states = [sources.state(index) for index in range(sources.trajectory.num_states)]
    if len(states) < 3:
        raise ValueError(f"a plane needs at least three states, {sources.trajectory} has {len(states)}")
    origin = _flat(states[0])
    axes, explained = _principal_axes(torch.stack([_flat(model) - origin for model in states[1:]]))

    def loss(model: PreTrainedModel) -> float | None:
        recalibrate_batch_norm(model, sources.batches)
        value = task.evaluate(model, examples)[measure]
        return value if math.isfinite(value) else None

    def point(name: str, kind: str, model: PreTrainedModel) -> dict[str, Any]:
        moved = _flat(model) - origin
        x, y = (axes @ moved).tolist()
        off_plane = float((moved - x * axes[0] - y * axes[1]).norm())
        return {"name": name, "kind": kind, "x": x, "y": y, "loss": loss(model.to(device())), "off_plane": off_plane}

    points = [point(f"Θ{index}", "state", model) for index, model in enumerate(states)]
    points += [point(arm.name, "arm", arm.initial_model(sources)) for arm in arms]
    grid_x, grid_y = (_grid([point[axis] for point in points], landscape.resolution) for axis in ("x", "y"))
    probe, losses = states[0], []
    for y in grid_y:
        row = []
        for x in grid_x:
            place = origin + x * axes[0] + y * axes[1]
            vector_to_parameters(place.to(device()), probe.parameters())
            row.append(loss(probe))
        losses.append(row)
    shutil.rmtree(work, ignore_errors=True)
    return {
        "seed": seed,
        "measure": measure,
        "num_examples": len(examples["labels"]),
        "explained": explained,
        "x": grid_x,
        "y": grid_y,
        "loss": losses,
        "points": points,
    }


def _flat(model: PreTrainedModel) -> Tensor:
    """All parameters `(N,)`, float32 on the CPU."""
    return parameters_to_vector(model.parameters()).detach().float().cpu()


def _principal_axes(moves: Tensor) -> tuple[Tensor, list[float]]:
    """The first two right singular vectors `(2, N)` of moves `(S - 1, N)`, and their shares of the squares."""
    products = (moves @ moves.T).double()
    values, vectors = torch.linalg.eigh(products)
    values, vectors = values.flip(0), vectors.flip(1)
    axes = vectors[:, :2].T.float() @ moves
    shares = (values[:2] / values.sum()).tolist()
    return axes / axes.norm(dim=1, keepdim=True), shares


def _grid(places: Sequence[float], resolution: int) -> list[float]:
    low, high = min(places), max(places)
    margin = _MARGIN * (high - low)
    return torch.linspace(low - margin, high + margin, resolution, dtype=torch.float64).tolist()
