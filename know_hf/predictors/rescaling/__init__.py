"""Rescaling that keeps the function of a model: its scale symmetries, the factors, and the check of the outputs."""

from .equalisation import equal_channels, equal_layers
from .rescale import Rescale
from .scale_symmetries import ScaleSymmetry, scale_symmetries

__all__ = ["Rescale", "ScaleSymmetry", "equal_channels", "equal_layers", "scale_symmetries"]
