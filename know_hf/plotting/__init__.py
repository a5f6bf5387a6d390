"""Figures, drawn without pyplot: nothing global is touched and no display is needed."""

from .forest import ForestRow, plot_forest
from .forgetting import plot_forgetting
from .forgetting_picture import forgetting_picture
from .landscape_figure import LandscapePoint, plot_landscape
from .learning_rates import RateCurve, RatePanel, plot_learning_rates
from .style import adaptive_svg, figure_svg, save_figure

__all__ = [
    "ForestRow",
    "LandscapePoint",
    "RateCurve",
    "RatePanel",
    "adaptive_svg",
    "figure_svg",
    "forgetting_picture",
    "plot_forest",
    "plot_forgetting",
    "plot_landscape",
    "plot_learning_rates",
    "save_figure",
]
