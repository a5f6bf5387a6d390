"""Model cards: dataclasses with the facts, rendered by Jinja templates. No network access, no file writes."""

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
