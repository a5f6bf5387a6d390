"""Predictors: from the history of each scalar weight to what is added to its full-data state."""

from .averages import Average, MovingAverage
from .combination import Combination, LayerScaling
from .extrapolation import LinearFit, LogarithmicFit
from .hyper_model import KNOWNPredictor
from .interpolation import Shrink, TaskVector
from .protocol import Composition, DepthPredictor, Predictor, get_predictor, register_predictor
from .relative_depth import relative_depths
from .rescaling import Rescale, ScaleSymmetry, scale_symmetries
from .tensor_factor import Rescaler, Rescaling, TensorFactor

__all__ = [
    "Average",
    "Combination",
    "Composition",
    "DepthPredictor",
    "KNOWNPredictor",
    "LayerScaling",
    "LinearFit",
    "LogarithmicFit",
    "MovingAverage",
    "Predictor",
    "Rescale",
    "Rescaler",
    "Rescaling",
    "ScaleSymmetry",
    "Shrink",
    "TaskVector",
    "TensorFactor",
    "get_predictor",
    "register_predictor",
    "relative_depths",
    "scale_symmetries",
]
