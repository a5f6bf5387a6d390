"""Where the values of a checkpoint come from: a recorded state, a function, or a prediction (see `engine`)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from ..trajectory import TrajectoryError, WeightTrajectory
from .pieces import Piece
from .residuals import ResidualReport, is_finite

TensorFunction = Callable[[str, int, int], torch.Tensor | None]


class TensorSource(ABC):
    """Values of all tensors of a checkpoint, piece by piece.

    `read` runs in a thread ahead of `values`, so that disk and processor work at the same time.
    """

    description = "Writing checkpoint"

    def cost(self, name: str) -> float:
        """Cost per element of a tensor, in units of a copied element."""
        return 1.0

    @abstractmethod
    def read(self, piece: Piece) -> Any:
        """Read what [`values`] needs for a piece."""

    @abstractmethod
    def values(self, piece: Piece, data: Any) -> tuple[torch.Tensor, ResidualReport]:
        """Return the piece's values `(N,)`, which the writer casts to the dtype on disk, and a report on them."""


class StateTensors(TensorSource):
    """The tensors of one recorded state or snapshot, copied bit for bit."""

    def __init__(self, trajectory: WeightTrajectory, state: int | str) -> None:
        trajectory.snapshot(state)
        self.trajectory = trajectory
        self.state = state

    def read(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor | None]:
        trajectory = self.trajectory
        values = trajectory.read(piece.name, piece.start, piece.stop, self.state)
        is_equal = isinstance(self.state, int) and trajectory.is_unchanged(piece.name)
        if not values.is_floating_point() or not values.numel() or is_equal:
            return values, None
        history = trajectory.read_history(piece.name, piece.start, piece.stop)
        # the report on a piece needs two states
        return values, history if len(history) > 1 else torch.cat([values.float()[None], history])

    def values(
        self, piece: Piece, data: tuple[torch.Tensor, torch.Tensor | None]
    ) -> tuple[torch.Tensor, ResidualReport]:
        values, history = data
        if self.trajectory.roles[piece.name].role != "copied":
            check_finite(values, piece.name, self.trajectory, self.state)
        report = count_piece(self.trajectory, piece, unchanged=history is None and values.is_floating_point())
        if history is not None:
            report += ResidualReport.of(history, values.float() - history[-1])
        return values, report


class FunctionTensors(TensorSource):
    """The tensors that a function computes; see [`write_checkpoint`]."""

    def __init__(self, trajectory: WeightTrajectory, function: TensorFunction) -> None:
        self.trajectory = trajectory
        self.function = function

    def read(self, piece: Piece) -> torch.Tensor:
        values = self.function(piece.name, piece.start, piece.stop)
        return self.trajectory.read(piece.name, piece.start, piece.stop) if values is None else values

    def values(self, piece: Piece, data: torch.Tensor) -> tuple[torch.Tensor, ResidualReport]:
        if data.numel() != piece.size:
            what = f"elements {piece.start} to {piece.stop - 1} of tensor {piece.name!r}"
            raise ValueError(f"the function returned {data.numel()} values for {what}; return {piece.size}")
        return data.flatten(), count_piece(self.trajectory, piece)


def full_tensors(function: Callable[[str], torch.Tensor | None]) -> TensorFunction:
    """Turn a function of a tensor's name into one of pieces; the last tensor is kept in memory."""
    latest = lru_cache(maxsize=1)(function)

    def piece(name: str, start: int, stop: int) -> torch.Tensor | None:
        values = latest(name)
        return None if values is None else values.flatten()[start:stop]

    return piece


def count_piece(trajectory: WeightTrajectory, piece: Piece, unchanged: bool = False) -> ResidualReport:
    """Count a tensor in the report of its first piece."""
    if not piece.is_first:
        return ResidualReport()
    return ResidualReport(tensors=1, parameters=trajectory.shape(piece.name).numel(), unchanged=int(unchanged))


def check_finite(values: torch.Tensor, name: str, trajectory: WeightTrajectory, state: int | str) -> None:
    """Raise a `TrajectoryError` if a value of a recorded tensor is NaN or infinite."""
    if not is_finite(values):
        count = int((~torch.isfinite(values)).sum())
        raise TrajectoryError(
            f"tensor {name!r} of state {state} of {trajectory.path} has {count} NaN or infinite values: the training"
            " diverged. Record again with a lower learning rate"
        )


def check_history(
    history: torch.Tensor, piece: Piece, trajectory: WeightTrajectory, snapshots: Sequence[int | str]
) -> None:
    """Check that a piece of snapshots, `(S, N)` float32, is finite.

    Raises:
        `TrajectoryError`: if a recorded value is NaN or infinite.
        `ValueError`: if a float64 value is too large for float32.
    """
    for state, values in reversed(list(zip(snapshots, history, strict=True))):
        if is_finite(values):
            continue
        stored = trajectory.read(piece.name, piece.start, piece.stop, state)
        check_finite(stored, piece.name, trajectory, state)
        raise ValueError(
            f"tensor {piece.name!r} of state {state} of {trajectory.path} has values up to"
            f" {float(stored.abs().max()):.3g}, too large for float32, in which predictions are computed; scale the"
            " tensor down and record again"
        )


def count_differences(trajectory: WeightTrajectory, piece: Piece, snapshots: Sequence[int | str]) -> int:
    """Return how many elements of a piece, as stored, are not equal in all snapshots."""
    first, *others = (trajectory.read(piece.name, piece.start, piece.stop, snapshot) for snapshot in snapshots)
    if first.dtype != torch.float64:  # bits: torch does not compare all dtypes
        first, *others = (values.view(torch.uint8).view(piece.size, -1) for values in (first, *others))
    differ = torch.zeros(first.shape, dtype=torch.bool)
    for values in others:
        differ |= values != first
    return int(differ.view(piece.size, -1).any(dim=1).sum())


def cast(values: torch.Tensor, dtype: torch.dtype, name: str, trajectory: WeightTrajectory) -> torch.Tensor:
    """Cast values to the dtype on disk. Raises a `ValueError` if a finite value overflows the dtype."""
    result = values.to(dtype)
    if dtype != values.dtype and dtype.is_floating_point and not is_finite(result) and is_finite(values):
        reason = f"tensor {name!r} of {trajectory.path} has values too large for {dtype}"
        raise ValueError(f"{reason}; write bfloat16 or float32")
    return result
