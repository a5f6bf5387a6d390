"""Predictors: from the history of each scalar weight to what is added to its full-data state."""

from .averages import Average, MovingAverage
from .combination import Combination, LayerScaling
from .extrapolation import LinearFit, LogarithmicFit
from .hyper_model import KNOWNPredictor
from .interpolation import Shrink, TaskVector
from .protocol import DepthPredictor, Predictor, get_predictor, register_predictor
from .relative_depth import relative_depths

__all__ = [
    "Average",
    "Combination",
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
