"""Model cards of enhanced checkpoints, trajectories and KNOWN weights: dataclasses that are filled along the way and
rendered by the Jinja templates of the package. Nothing here asks the network or writes a file."""

from .checkpoint_card import CheckpointCard, checkpoint_card
from .known_card import KNOWNCard, known_card
from .trajectory_card import TrajectoryCard, trajectory_card

__all__ = [
    "CheckpointCard",
    "KNOWNCard",
    "TrajectoryCard",
    "checkpoint_card",
    "known_card",
    "trajectory_card",
]
