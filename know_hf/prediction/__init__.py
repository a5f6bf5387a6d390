"""From a trajectory and a predictor to the enhanced checkpoint, in pieces of bounded size."""

from .gate import Gate
from .plan import SHIPPED_KNOWN, PredictionPlan, plan_prediction
from .residuals import ResidualReport
from .result import PredictionResult
from .selection import REFERENCE, GateCandidate, GateResult, choose

__all__ = [
    "REFERENCE",
    "SHIPPED_KNOWN",
    "Gate",
    "GateCandidate",
    "GateResult",
    "PredictionPlan",
    "PredictionResult",
    "ResidualReport",
    "choose",
    "plan_prediction",
]
