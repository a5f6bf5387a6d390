"""From a trajectory and a predictor to the enhanced checkpoint, in pieces of bounded size.

This is where files and mathematics meet: `trajectory` reads, `predictors` compute, `checkpoint` writes. `planning`
says from the files' headers alone what will be done, `running` does it, `report` says what it did.
"""

from .planning import SHIPPED_KNOWN, PredictionPlan, plan_prediction
from .predict import PredictionResult, predict_overflowed_weights
from .report import ResidualReport

__all__ = [
    "SHIPPED_KNOWN",
    "PredictionPlan",
    "PredictionResult",
    "ResidualReport",
    "plan_prediction",
    "predict_overflowed_weights",
]
