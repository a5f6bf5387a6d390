"""Choosing what to write: candidates, their screening, and the gate that compares them on validation data."""

from .candidates import FAMILY, Candidate
from .cross_fit import CrossFit
from .gate import Gate

__all__ = ["FAMILY", "Candidate", "CrossFit", "Gate"]
