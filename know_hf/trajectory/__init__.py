"""The record on disk of how weights changed: [`WeightTrajectory`] and what `trajectory.json` says."""

from .manifest import FileRecord, StateRecord, TrajectoryError
from .weight_trajectory import WeightTrajectory, load_pretrained

__all__ = ["FileRecord", "StateRecord", "TrajectoryError", "WeightTrajectory", "load_pretrained"]
