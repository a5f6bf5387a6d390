"""Figures, drawn without pyplot: no global state, no display."""

from .forest_plot import ForestRow, plot_forest
from .forgetting_curve import ForgettingPanel, forgetting_picture, plot_forgetting, plot_forgetting_panels
from .landscape_plot import LandscapePoint, plot_landscape
from .learning_rate_plot import RateCurve, RatePanel, plot_learning_rates
from .style import adaptive_svg, figure_svg, save_figure

__all__ = [
    "ForestRow",
    "ForgettingPanel",
    "LandscapePoint",
    "RateCurve",
    "RatePanel",
    "adaptive_svg",
    "figure_svg",
    "forgetting_picture",
    "plot_forest",
    "plot_forgetting",
    "plot_forgetting_panels",
    "plot_landscape",
    "plot_learning_rates",
    "save_figure",
]
