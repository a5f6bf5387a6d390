"""Recording: structured forgetting with a `Trainer`, every state handed to a [`WeightTrajectory`]."""

from .callback import WeightTransitionCallback
from .stages import induce_forgetting

__all__ = ["WeightTransitionCallback", "induce_forgetting"]
