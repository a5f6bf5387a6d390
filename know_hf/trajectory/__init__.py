"""Trajectories on disk: [`WeightTrajectory`], the records of `trajectory.json`, and loading models from a state."""

from .adapters import check_recordable
from .loading import load_into, load_pretrained
from .manifest import TrajectoryError
from .recorder import TrajectoryBusyError
from .records import FileRecord, StateRecord
from .snapshot import state_nbytes
from .weight_trajectory import WeightTrajectory

__all__ = [
    "FileRecord",
    "StateRecord",
    "TrajectoryBusyError",
    "TrajectoryError",
    "WeightTrajectory",
    "check_recordable",
    "load_into",
    "load_pretrained",
    "state_nbytes",
]
