"""Model cards of enhanced checkpoints, trajectories and KNOWN weights: dataclasses that are filled along the way and
rendered by the Jinja templates of the package. Nothing here asks the network or writes a file."""

from .checkpoint import CheckpointCard, checkpoint_card
from .known import KNOWNCard, known_card
from .picture import forgetting_picture
from .trajectory import TrajectoryCard, trajectory_card

__all__ = [
    "CheckpointCard",
    "KNOWNCard",
    "TrajectoryCard",
    "checkpoint_card",
    "forgetting_picture",
    "known_card",
    "trajectory_card",
]
