"""Predictors: from the history of each scalar weight, or from snapshots of each tensor, to predicted weights."""

from .averages import Average, MovingAverage
from .branches import (
    BranchAverage,
    Jackknife,
    JamesStein,
    ModelStock,
    ShrunkenJackknife,
    SpectralFilter,
    branch_average,
    factorise,
    jackknife,
    james_stein_average,
    model_stock,
    shrunken_jackknife,
    spectral_filter,
)
from .combination import Combination, LayerScaling
from .extrapolation import LinearFit, LogarithmicFit
from .hyper_model import KNOWNCombination, KNOWNPredictor, known_predictor
from .interpolation import Shrink, TaskVector
from .protocol import Composition, DepthPredictor, Predictor, get_predictor, register_predictor
from .relative_depth import relative_depths
from .rescaling import Rescale, ScaleSymmetry, scale_symmetries
from .snapshot_predictor import SnapshotPredictor, TensorSnapshots
from .start_interpolation import StartInterpolation, move_from_start
from .tail_averages import BiasCorrectedAverage, TailAverage, decay_weights
from .tensor_factor import Rescaler, Rescaling, TensorFactor

__all__ = [
    "Average",
    "BiasCorrectedAverage",
    "BranchAverage",
    "Combination",
    "Composition",
    "DepthPredictor",
    "Jackknife",
    "JamesStein",
    "KNOWNCombination",
    "KNOWNPredictor",
    "LayerScaling",
    "LinearFit",
    "LogarithmicFit",
    "ModelStock",
    "MovingAverage",
    "Predictor",
    "Rescale",
    "Rescaler",
    "Rescaling",
    "ScaleSymmetry",
    "Shrink",
    "ShrunkenJackknife",
    "SnapshotPredictor",
    "SpectralFilter",
    "StartInterpolation",
    "TailAverage",
    "TaskVector",
    "TensorFactor",
    "TensorSnapshots",
    "branch_average",
    "decay_weights",
    "factorise",
    "get_predictor",
    "jackknife",
    "james_stein_average",
    "known_predictor",
    "model_stock",
    "move_from_start",
    "register_predictor",
    "relative_depths",
    "scale_symmetries",
    "shrunken_jackknife",
    "spectral_filter",
]
