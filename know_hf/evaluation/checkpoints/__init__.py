"""Comparison of two checkpoints on one dataset, without a suite."""

from .compare_checkpoints import CheckpointComparison, PairedScore, compare_checkpoints
from .compare_on_dataset import compare_on_dataset

__all__ = ["CheckpointComparison", "PairedScore", "compare_checkpoints", "compare_on_dataset"]
