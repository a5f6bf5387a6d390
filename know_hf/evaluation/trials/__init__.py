"""Trainings of many trials: heads on cached features, and models that train together in a stack."""

from .frozen_body import HeadOnFeatures, with_features
from .linear_heads import Heads, adam_heads, logistic_heads, logits, ridge_heads
from .run_trials import STACK_BYTES, Start, Training, measure_trained, with_trained_heads
from .stack import Stack, stackable

__all__ = [
    "STACK_BYTES",
    "HeadOnFeatures",
    "Heads",
    "Stack",
    "Start",
    "Training",
    "adam_heads",
    "logistic_heads",
    "logits",
    "measure_trained",
    "ridge_heads",
    "stackable",
    "with_features",
    "with_trained_heads",
]
