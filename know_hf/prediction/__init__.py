"""From a trajectory and a predictor to the enhanced checkpoint, in pieces of bounded size.

`plan` decides from the files' headers, `engine` predicts, `write_checkpoint` writes, `choosing` chooses.
"""

from .choosing import FAMILY, Candidate, CrossFit, Gate
from .plan import SHIPPED_KNOWN, PredictionPlan, plan_prediction
from .residuals import ResidualReport
from .result import PredictionResult
from .selection import REFERENCE, GateCandidate, GateResult, choose
from .tensor_sources import StateTensors, TensorSource
from .write_checkpoint import WriteOptions, write_checkpoint

__all__ = [
    "FAMILY",
    "REFERENCE",
    "SHIPPED_KNOWN",
    "Candidate",
    "CrossFit",
    "Gate",
    "GateCandidate",
    "GateResult",
    "PredictionPlan",
    "PredictionResult",
    "ResidualReport",
    "StateTensors",
    "TensorSource",
    "WriteOptions",
    "choose",
    "plan_prediction",
    "write_checkpoint",
]
