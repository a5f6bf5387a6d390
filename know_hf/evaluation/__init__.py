"""Does it help? Arms to compare, protocols that measure them, statistics that say how sure it is."""

from .arms import AVERAGE, NAIVE, ORACLE, RANDOM, Arm, ArmSources, known_arm, shrink_arm
from .cells import run_cells
from .comparison import ArmResult, Comparison, compare_with_naive
from .probing import LinearProbe
from .protocols import (
    AsTheyAre,
    FineTuning,
    Split,
    TunedAccuracy,
    accuracy,
    evaluate_classifier,
    few_shot_accuracy,
)
from .statistics import Estimate, PairedDifference, holm, mean_and_interval, paired_difference
from .store import CellStore
from .training import Examples, batches, fine_tune, with_new_head

__all__ = [
    "AVERAGE",
    "NAIVE",
    "ORACLE",
    "RANDOM",
    "Arm",
    "ArmResult",
    "ArmSources",
    "AsTheyAre",
    "CellStore",
    "Comparison",
    "Estimate",
    "Examples",
    "FineTuning",
    "LinearProbe",
    "PairedDifference",
    "Split",
    "TunedAccuracy",
    "accuracy",
    "batches",
    "compare_with_naive",
    "evaluate_classifier",
    "few_shot_accuracy",
    "fine_tune",
    "holm",
    "known_arm",
    "mean_and_interval",
    "paired_difference",
    "run_cells",
    "shrink_arm",
    "with_new_head",
]
