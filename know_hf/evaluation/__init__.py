"""Does it help? Arms to compare, protocols that measure them, statistics that say how sure it is."""

from .arms import AVERAGE, NAIVE, ORACLE, RANDOM, Arm, ArmSources, known_arm, shrink_arm
from .cells import run_cells
from .comparison import ArmResult, Comparison, compare_with_naive
from .protocols import (
    Examples,
    FewShot,
    TunedAccuracy,
    accuracy,
    batches,
    few_shot_accuracy,
    fine_tune,
    with_new_head,
)
from .statistics import Estimate, PairedDifference, holm, mean_and_interval, paired_difference
from .store import CellStore

__all__ = [
    "AVERAGE",
    "NAIVE",
    "ORACLE",
    "RANDOM",
    "Arm",
    "ArmResult",
    "ArmSources",
    "CellStore",
    "Comparison",
    "Estimate",
    "Examples",
    "FewShot",
    "PairedDifference",
    "TunedAccuracy",
    "accuracy",
    "batches",
    "compare_with_naive",
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
