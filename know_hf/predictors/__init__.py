"""Predictors: from the history of each scalar weight to what is added to its full-data state."""

from .averages import Average, MovingAverage
from .branches import (
    branch_average,
    combine_adapters,
    factorise,
    jackknife,
    james_stein_average,
    model_stock,
    shrunken_jackknife,
)
from .combination import Combination, LayerScaling
from .extrapolation import LinearFit, LogarithmicFit
from .hyper_model import KNOWNPredictor
from .interpolation import Shrink, TaskVector
from .protocol import Composition, DepthPredictor, Predictor, get_predictor, register_predictor
from .relative_depth import relative_depths
from .rescaling import Rescale, ScaleSymmetry, scale_symmetries
from .spectral_filter import spectral_filter
from .start_interpolation import move_from_start
from .tail_averages import BiasCorrectedAverage, TailAverage, decay_weights
from .tensor_factor import Rescaler, Rescaling, TensorFactor

__all__ = [
    "Average",
    "BiasCorrectedAverage",
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
    "TailAverage",
    "TaskVector",
    "TensorFactor",
    "branch_average",
    "combine_adapters",
    "decay_weights",
    "factorise",
    "get_predictor",
    "jackknife",
    "james_stein_average",
    "model_stock",
    "move_from_start",
    "register_predictor",
    "relative_depths",
    "scale_symmetries",
    "shrunken_jackknife",
    "spectral_filter",
]
