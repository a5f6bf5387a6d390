"""Time of a prediction, estimated from a trial."""

import timeit
from collections.abc import Collection

import torch

from ..predictors import DepthPredictor, Predictor

_TRIAL_SIZE = 2**16  # rows


def seconds_per_weight(predictor: Predictor, networks: Collection[str], num_states: int) -> float:
    """Time a predictor on random rows, after a first run that compiles; 0 without networks."""
    if not networks:
        return 0.0
    rows = 0.05 * torch.randn(_TRIAL_SIZE, num_states, generator=torch.Generator().manual_seed(0))
    if isinstance(predictor, DepthPredictor):
        predictor = predictor.at_depth(0.5)
    trial = timeit.repeat(lambda: predictor.residual(rows, min(networks)), number=1, repeat=3)
    return min(trial) / _TRIAL_SIZE


def duration(seconds: float) -> str:
    """Format a time."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
