"""The gate: candidates for the weights are tried on validation data, and Θ0 is kept when none is better."""

from .choosing import REFERENCE, GateCandidate, GateResult, choose
from .trying import Gate, predict_through_gate

__all__ = ["REFERENCE", "Gate", "GateCandidate", "GateResult", "choose", "predict_through_gate"]
