"""Does it help? Arms to compare, protocols that measure them, statistics that say how sure it is."""

from .arms import AVERAGE, NAIVE, ORACLE, RANDOM, Arm, known_arm, known_step_arms, make_arm, shrink_arm
from .cells import run_cells
from .compare import compare_arms
from .comparison import ArmResult, Comparison, compare_with_naive
from .initial_weights import ArmSources
from .landscape import Landscape
from .measuring import ComparisonTask
from .probing import LinearProbe
from .protocols import (
    AsTheyAre,
    FineTuning,
    accuracy,
    evaluate_classifier,
)
from .results import ComparisonReport
from .splits import Split
from .statistics import Estimate, PairedDifference, holm, mean_and_interval, paired_difference
from .store import CellStore
from .suites import Suite, load_suite, run_suite
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
    "ComparisonReport",
    "ComparisonTask",
    "Estimate",
    "Examples",
    "FineTuning",
    "Landscape",
    "LinearProbe",
    "PairedDifference",
    "Split",
    "Suite",
    "accuracy",
    "batches",
    "compare_arms",
    "compare_with_naive",
    "evaluate_classifier",
    "fine_tune",
    "holm",
    "known_arm",
    "known_step_arms",
    "load_suite",
    "make_arm",
    "mean_and_interval",
    "paired_difference",
    "run_cells",
    "run_suite",
    "shrink_arm",
    "with_new_head",
]
