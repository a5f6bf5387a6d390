"""Recording: train on smaller and smaller subsets with a `Trainer`, and hand every state to a trajectory."""

from .callback import WeightTransitionCallback
from .induce import induce_forgetting

__all__ = ["WeightTransitionCallback", "induce_forgetting"]
