"""The record on disk of how weights changed: [`WeightTrajectory`] and what `trajectory.json` says."""

from .loading import load_into, load_pretrained
from .manifest import FileRecord, StateRecord, TrajectoryBusyError, TrajectoryError
from .snapshot import check_adapter, state_nbytes
from .weight_trajectory import WeightTrajectory

__all__ = [
    "FileRecord",
    "StateRecord",
    "TrajectoryBusyError",
    "TrajectoryError",
    "WeightTrajectory",
    "check_adapter",
    "load_into",
    "load_pretrained",
    "state_nbytes",
]
