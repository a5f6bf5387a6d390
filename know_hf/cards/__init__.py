"""Model cards: dataclasses rendered by Jinja templates, without network access or file writes."""

from .checkpoint_card import CheckpointCard, checkpoint_card
from .known_card import KNOWNCard, known_card
from .trajectory_card import TrajectoryCard, trajectory_card

__all__ = ["CheckpointCard", "KNOWNCard", "TrajectoryCard", "checkpoint_card", "known_card", "trajectory_card"]
