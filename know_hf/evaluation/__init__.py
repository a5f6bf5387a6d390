"""Comparison of initial weights: arms, the protocols that measure them, statistics and reports."""

from .arm_weights import ArmSources
from .arms import AVERAGE, NAIVE, ORACLE, RANDOM, Arm, known_arm, known_step_arms, make_arm, shrink_arm
from .cells import CellStore, run_cells
from .compare import compare_arms
from .comparison import ArmResult, Comparison, Measure, compare_with_naive
from .comparison_task import ComparisonTask
from .fine_tuning import Examples, accuracy, batches, evaluate_classifier, fine_tune, with_new_head
from .landscape import Landscape
from .linear_probe import LinearProbe
from .protocols import FineTuning, MeasuringProtocol, Trial, ZeroShot
from .report.comparison_report import ComparisonReport
from .splits import Split
from .statistics import Estimate, PairedDifference, holm, mean_and_interval, paired_difference
from .suites import ComparisonPlan, Suite, load_suite, plan_suite, run_suite

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
    "ComparisonPlan",
    "ComparisonReport",
    "ComparisonTask",
    "Estimate",
    "Examples",
    "FineTuning",
    "Landscape",
    "LinearProbe",
    "Measure",
    "MeasuringProtocol",
    "PairedDifference",
    "Split",
    "Suite",
    "Trial",
    "ZeroShot",
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
    "plan_suite",
    "run_cells",
    "run_suite",
    "shrink_arm",
    "with_new_head",
]
