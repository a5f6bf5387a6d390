"""Predictors: from the history of each scalar weight to what is added to its full-data state."""

from .registry import (
    Average,
    DepthPredictor,
    KNOWNPredictor,
    LayerScaling,
    LinearFit,
    LogarithmicFit,
    MovingAverage,
    Predictor,
    Shrink,
    TaskVector,
    get_predictor,
    register_predictor,
)
from .relative_depth import relative_depths

__all__ = [
    "Average",
    "DepthPredictor",
    "KNOWNPredictor",
    "LayerScaling",
    "LinearFit",
    "LogarithmicFit",
    "MovingAverage",
    "Predictor",
    "Shrink",
    "TaskVector",
    "get_predictor",
    "register_predictor",
    "relative_depths",
]
