"""The loss in a plane of weight space: through Θ0 and as close to the other states as a plane through it can be.

After Li et al., *Visualizing the Loss Landscape of Neural Nets* (arXiv 1712.09913, section 7), with the differences to
Θ0 not centred, so that the plane goes through Θ0 itself. The principal directions come from the Gram matrix of the
differences, which is small: the weights themselves are read in pieces from a temporary file, and one model is in
memory at a time.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..batch_norm import recalibrate_batch_norm
from ..checkpoint import check_free_disk
from ..plotting import LandscapePoint

_PIECE = 2**20  # weights read at a time
_FLATTEST = 0.5  # height of the grid, of its width


@dataclass(frozen=True)
class LossLandscape:
    """
    Attributes:
        explained (`tuple[float, float]`): Share of the states' squared distances to Θ0 that lies along each axis.
        x, y (`list[float]`): Coordinates of the grid, distances in weights with Θ0 at (0, 0).
        loss (`list[list[float | None]]` of shape `(len(y), len(x))`): Loss on the grid; `None` where not finite.
        points (`list[LandscapePoint]`): The states, full data first, then the other weights.
    """

    explained: tuple[float, float]
    x: list[float]
    y: list[float]
    loss: list[list[float | None]]
    points: list[LandscapePoint]

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; the part of `report.json` under `landscape`."""
        return {
            "explained": list(self.explained),
            "x": self.x,
            "y": self.y,
            "loss": self.loss,
            "points": [asdict(point) for point in self.points],
        }


def loss_landscape(
    states: Sequence[Callable[[], nn.Module]],
    arms: Mapping[str, Callable[[], nn.Module]],
    compute_loss: Callable[[Any], float],
    *,
    recalibrate_with: Iterable[Mapping[str, torch.Tensor]] | None = None,
    resolution: int = 15,
    margin: float = 0.25,
) -> LossLandscape:
    """Measures the loss on a grid of the plane, and of the states and other weights themselves.

    Args:
        states (sequence of callables): Each makes the model of one state, full data first; such as
            `partial(trajectory.load_model, k)`. At least three of them, which differ.
        arms (`Mapping[str, Callable]`): From name to what makes the model, such as `result.load_model`.
        compute_loss (callable): From a model in evaluation mode to its loss; called without gradients. The same
            examples for every call.
        recalibrate_with (iterable of batches, *optional*): From which BatchNorm statistics are measured anew before
            every loss. Without it they are those of Θ0 on the whole grid.
        resolution (`int`, *optional*, defaults to `15`): Grid points an axis.
        margin (`float`, *optional*, defaults to `0.25`): How far the grid goes beyond the outermost points, as a
            share of the distance between them; they count as at least half as far apart along one axis as along the
            other.

    Returns:
        [`LossLandscape`].

    Raises:
        `ValueError`: when the states lie on a line, a model has other weights than Θ0, or an argument is off.
    """
    if len(states) < 3:
        raise ValueError(f"a plane needs three different states, got {len(states)}")
    if resolution < 2:
        raise ValueError(f"resolution={resolution}: a grid needs at least 2 points an axis")
    batches = None if recalibrate_with is None else list(recalibrate_with)

    def measure(model: nn.Module) -> float | None:
        if batches is not None:
            recalibrate_batch_norm(model, batches)
        model.eval()
        with torch.no_grad():
            loss = float(compute_loss(model))
        return loss if math.isfinite(loss) else None

    names = [f"Θ{index}" for index in range(len(states))] + list(arms)
    kinds = ["state"] * len(states) + ["arm"] * len(arms)
    makers = [*states, *arms.values()]
    with tempfile.TemporaryDirectory(prefix="know_hf-landscape-") as folder:
        weights = _Weights(Path(folder) / "weights", len(makers))
        losses = []
        for index, (name, make) in enumerate(
            tqdm(list(zip(names, makers, strict=True)), desc="weights", unit="model")
        ):
            model = make()
            weights.put(index, model, name)
            losses.append(measure(model))
        gram = weights.gram()
        coefficients, explained = _directions(gram[: len(states), : len(states)])
        places = gram[:, : len(states)] @ coefficients  # (points, 2)
        off_plane = np.sqrt(np.maximum(np.diag(gram) - (places**2).sum(axis=1), 0))
        points = [
            LandscapePoint(name, kind, float(x), float(y), loss, float(off))
            for name, kind, (x, y), loss, off in zip(names, kinds, places, losses, off_plane, strict=True)
        ]
        weights.keep_directions(coefficients)
        least = _FLATTEST * float(np.ptp(places, axis=0).max())
        columns, rows = (_axis(places[:, axis], resolution, margin, least) for axis in (0, 1))
        grid: list[list[float | None]] = [[None] * resolution for _ in rows]
        model = states[0]()
        cells = [(row, column) for row in range(resolution) for column in range(resolution)]
        for row, column in tqdm(cells, desc="loss landscape", unit="point"):
            weights.set(model, columns[column], rows[row])
            grid[row][column] = measure(model)
    return LossLandscape(explained, columns, rows, grid, points)


class _Weights:
    """The floating-point parameters of several models, one row each of a file, and two directions among them."""

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.count = count
        self.rows: np.ndarray | None = None

    def put(self, index: int, model: nn.Module, name: str) -> None:
        parameters = _parameters(model)
        total = sum(parameter.numel() for parameter in parameters)
        if self.rows is None:
            check_free_disk(self.path, 4 * total * (self.count + 2))
            self.rows = np.memmap(self.path, np.float32, "w+", shape=(self.count + 2, total))
        elif total != self.rows.shape[1]:
            raise ValueError(f"{name} has {total:,} weights, Θ0 has {self.rows.shape[1]:,}: it is of another model")
        start = 0
        for parameter in parameters:
            self.rows[index, start : start + parameter.numel()] = parameter.detach().float().cpu().flatten().numpy()
            start += parameter.numel()

    def gram(self) -> np.ndarray:
        """Inner products of the differences to Θ0, `(count, count)`."""
        gram = np.zeros((self.count, self.count))
        for piece in self._pieces():
            difference = self._differences(piece)
            gram += difference @ difference.T
        return gram

    def keep_directions(self, coefficients: np.ndarray) -> None:
        """Writes the two directions, combinations `(states, 2)` of the first differences to Θ0, below the models."""
        assert self.rows is not None
        for piece in self._pieces():
            self.rows[-2:, piece] = coefficients.T @ self._differences(piece)[: len(coefficients)]

    def set(self, model: nn.Module, x: float, y: float) -> None:
        """Gives a model the weights at a place of the plane."""
        assert self.rows is not None
        start = 0
        for parameter in _parameters(model):
            stop = start + parameter.numel()
            theta, first, second = self.rows[0, start:stop], self.rows[-2, start:stop], self.rows[-1, start:stop]
            values = theta + np.float32(x) * first + np.float32(y) * second
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(values).reshape(parameter.shape))
            start = stop

    def _differences(self, piece: slice) -> np.ndarray:
        assert self.rows is not None
        values = self.rows[: self.count, piece].astype(np.float64)
        return values - values[0]

    def _pieces(self) -> Iterator[slice]:
        assert self.rows is not None
        for start in range(0, self.rows.shape[1], _PIECE):
            yield slice(start, start + _PIECE)


def _directions(gram: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Orthonormal directions as combinations `(S, 2)` of the differences to Θ0, and their shares of the squares.

    With `G = D Dᵀ = U Λ Uᵀ`, the principal directions `Dᵀ u / √λ` need no `D`. The most forgotten state has a positive
    first coordinate, and the largest second coordinate is positive.
    """
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1][:2], vectors[:, ::-1][:, :2]
    if not values[1] > 1e-10 * values[0]:
        raise ValueError("the states lie on a line: a plane needs three that differ in more than one direction")
    places = vectors * np.sqrt(values)
    signs = np.sign([places[-1, 0], places[np.abs(places[:, 1]).argmax(), 1]])
    signs[signs == 0] = 1
    first, second = (values / np.trace(gram)).tolist()
    return vectors * signs / np.sqrt(values), (first, second)


def _axis(places: np.ndarray, resolution: int, margin: float, least: float) -> list[float]:
    low, high = float(places.min()), float(places.max())
    spare = max(least - (high - low), 0.0) / 2
    low, high = low - spare, high + spare
    room = margin * (high - low)
    return np.linspace(low - room, high + room, resolution).tolist()


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.is_floating_point()]
