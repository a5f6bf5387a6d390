"""Loss landscape: the loss in the plane through Θ0 that the states of a trajectory span best.

After Li et al., *Visualizing the Loss Landscape of Neural Nets* (arXiv 1712.09913, section 7), with differences to Θ0
that are not centred, so that the plane contains Θ0. The principal directions follow from the small Gram matrix of the
differences. Weights are read in pieces from a temporary file, and one model is in memory at a time.
"""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..batch_norm import recalibrate_batch_norm
from ..checkpoint import check_free_disk
from .arms import Arm
from .comparison_task import ComparisonTask
from .measure import arm_sources

_PIECE = 2**20  # weights read at a time
_MIN_ASPECT = 0.5  # of the height of the grid to its width, or the reverse
_MARGIN = 0.25  # of the grid around the outermost points, as a share of their distance


@dataclass(frozen=True)
class Landscape:
    """Options of a loss landscape.

    Args:
        resolution (`int`, *optional*, defaults to `15`):
            Grid points per axis; the loss is computed `resolution²` times.
        num_examples (`int`, *optional*, defaults to `256`):
            Number of unseen source examples.

    Raises:
        `ValueError`: If the resolution is below 2 or there is no example.
    """

    resolution: int = 15
    num_examples: int = 256

    def __post_init__(self) -> None:
        if self.resolution < 2 or self.num_examples < 1:
            raise ValueError(f"a landscape needs resolution >= 2 and num_examples >= 1, got {self}")


def measure_landscape(
    landscape: Landscape, task: ComparisonTask, seed: int, arms: Sequence[Arm], output_dir: Path
) -> dict[str, Any]:
    """Compute `landscape` of `report.json`: the loss around the states of a seed, with untuned predictions; needs
    source data and a loss."""
    measure = next(measure.name for measure in task.measures if not measure.higher_is_better)
    split, _ = task.splits(seed, draws=0)
    assert split is not None
    work = output_dir / "work" / "landscape"
    sources = arm_sources(task, seed, task.open_trajectory(seed, output_dir), split, work)
    examples = {name: tensor[: landscape.num_examples] for name, tensor in split.test.items()}
    result = loss_landscape(
        [partial(sources.state, index) for index in range(sources.trajectory.num_states)],
        {arm.name: partial(arm.initial_model, sources) for arm in arms},
        lambda model: task.evaluate(model, examples)[measure],
        recalibrate_with=sources.batches,
        resolution=landscape.resolution,
    )
    shutil.rmtree(work, ignore_errors=True)
    return {"seed": seed, "measure": measure, "num_examples": len(examples["labels"]), **result}


def loss_landscape(
    states: Sequence[Callable[[], nn.Module]],
    arms: Mapping[str, Callable[[], nn.Module]],
    compute_loss: Callable[[Any], float],
    *,
    recalibrate_with: Sequence[Mapping[str, torch.Tensor]] = (),
    resolution: int = 15,
) -> dict[str, Any]:
    """Compute the loss on a grid of the plane, of the states and of other weights.

    `states` has at least three different ones, full data first. `compute_loss` gets models in evaluation mode, without
    gradients. BatchNorm statistics are recomputed before each loss on the batches of `recalibrate_with`; without them,
    the grid has those of Θ0.

    Returns:
        `dict`, JSON values only: `explained`, the share of the states' squared distances to Θ0 along each axis; `x`
        and `y`, grid coordinates, distances in weights with Θ0 at (0, 0); `loss` of shape `(len(y), len(x))`; and
        `points`, states and then arms, each with `name`, `kind`, `x`, `y`, the `loss` of the weights themselves and
        `off_plane`, their distance from the plane. A loss that is not finite is `None`.

    Raises:
        `ValueError`: If the states lie on a line, or a model has another number of weights than Θ0.
    """
    if len(states) < 3:
        raise ValueError(f"a plane needs at least three states, got {len(states)}")
    measure = partial(_finite_loss, compute_loss, recalibrate_with)
    names = [f"Θ{index}" for index in range(len(states))] + list(arms)
    with tempfile.TemporaryDirectory(prefix="know_hf-landscape-") as folder:
        weights = _Weights(Path(folder) / "weights", len(names))
        losses = []
        for index, make_model in enumerate(tqdm([*states, *arms.values()], desc="weights", unit="model")):
            model = make_model()
            weights.put(index, model, names[index])
            losses.append(measure(model))
        gram = weights.gram()
        coefficients, explained = _directions(gram[: len(states), : len(states)])
        coordinates = gram[:, : len(states)] @ coefficients  # (points, 2)
        off_plane = np.sqrt(np.maximum(np.diag(gram) - (coordinates**2).sum(axis=1), 0))
        weights.keep_directions(coefficients)
        x, y = _axes(coordinates, resolution)
        grid: list[list[float | None]] = [[None] * resolution for _ in y]
        model = states[0]()
        for row, column in tqdm(list(np.ndindex(resolution, resolution)), desc="loss landscape", unit="point"):
            weights.set(model, x[column], y[row])
            grid[row][column] = measure(model)
    kinds = ["state"] * len(states) + ["arm"] * len(arms)
    columns = (names, kinds, *coordinates.T.tolist(), losses, off_plane.tolist())
    keys = ("name", "kind", "x", "y", "loss", "off_plane")
    points = [dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)]
    return {"explained": explained, "x": x, "y": y, "loss": grid, "points": points}


class _Weights:
    """The floating-point parameters of several models, one row per model in a file, and two directions."""

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.count = count
        self.rows: np.ndarray = np.empty((0, 0), np.float32)

    def put(self, index: int, model: nn.Module, name: str) -> None:
        parameters = _parameters(model)
        total = sum(parameter.numel() for parameter in parameters)
        if index == 0:
            check_free_disk(self.path, 4 * total * (self.count + 2))
            self.rows = np.memmap(self.path, np.float32, "w+", shape=(self.count + 2, total))
        elif total != self.rows.shape[1]:
            raise ValueError(f"{name} has {total:,} weights, but Θ0 has {self.rows.shape[1]:,}; use the same model")
        torch.cat([p.detach().float().cpu().flatten() for p in parameters], out=torch.from_numpy(self.rows[index]))

    def gram(self) -> np.ndarray:
        """Compute the inner products of the differences to Θ0, `(count, count)`."""
        return sum((d @ d.T for _, d in self._differences()), np.zeros((self.count, self.count)))

    def keep_directions(self, coefficients: np.ndarray) -> None:
        """Store two directions, combinations `(states, 2)` of the first differences to Θ0, below the models."""
        for piece, difference in self._differences():
            self.rows[-2:, piece] = coefficients.T @ difference[: len(coefficients)]

    def set(self, model: nn.Module, x: float, y: float) -> None:
        """Load the weights at a point of the plane into a model."""
        start = 0
        for parameter in _parameters(model):
            stop = start + parameter.numel()
            theta, first, second = self.rows[0, start:stop], self.rows[-2, start:stop], self.rows[-1, start:stop]
            values = theta + np.float32(x) * first + np.float32(y) * second
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(values).reshape(parameter.shape))
            start = stop

    def _differences(self) -> Iterator[tuple[slice, np.ndarray]]:
        for start in range(0, self.rows.shape[1], _PIECE):
            piece = slice(start, start + _PIECE)
            values = self.rows[: self.count, piece].astype(np.float64)
            yield piece, values - values[0]


def _finite_loss(
    compute_loss: Callable[[Any], float], batches: Sequence[Mapping[str, torch.Tensor]], model: nn.Module
) -> float | None:
    if batches:
        recalibrate_batch_norm(model, batches)
    model.eval()
    with torch.no_grad():
        loss = float(compute_loss(model))
    return loss if math.isfinite(loss) else None


def _directions(gram: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Compute orthonormal directions as combinations `(S, 2)` of the differences to Θ0, and their shares.

    With `G = D Dᵀ = U Λ Uᵀ`, the principal directions are `Dᵀ u / √λ`. The most forgotten state has a positive first
    coordinate, and the largest second coordinate is positive.
    """
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1][:2], vectors[:, ::-1][:, :2]
    if not values[1] > 1e-10 * values[0]:
        raise ValueError("the states lie on a line; a plane needs states that differ in two directions")
    coordinates = vectors * np.sqrt(values)
    signs = np.sign([coordinates[-1, 0], coordinates[np.abs(coordinates[:, 1]).argmax(), 1]])
    signs[signs == 0] = 1
    return vectors * signs / np.sqrt(values), (values / np.trace(gram)).tolist()


def _axes(coordinates: np.ndarray, resolution: int) -> tuple[list[float], list[float]]:
    low, high = coordinates.min(axis=0), coordinates.max(axis=0)
    spans = np.maximum(high - low, _MIN_ASPECT * (high - low).max()) * (1 + 2 * _MARGIN)
    centres = (low + high) / 2
    x, y = np.linspace(centres - spans / 2, centres + spans / 2, resolution, axis=1).tolist()
    return x, y


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.is_floating_point()]
