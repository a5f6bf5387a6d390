"""Recording: structured forgetting with a `Trainer`, every state handed to a [`WeightTrajectory`]."""

from .callback import WeightTransitionCallback
from .induce import induce_forgetting

__all__ = ["WeightTransitionCallback", "induce_forgetting"]
