"""Trajectories on disk: [`WeightTrajectory`], the records of `trajectory.json`, and loading models from a state."""

from .loading import load_into, load_pretrained
from .manifest import FileRecord, StateRecord, TrajectoryError
from .recorder import TrajectoryBusyError
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
