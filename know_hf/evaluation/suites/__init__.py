"""Suites: comparisons written as YAML, and the quickstart."""

from .quickstart import QuickstartReport, run_quickstart
from .suite import SUITES_DIR, Suite, load_suite, suite_template
from .suite_plan import ComparisonPlan, plan_suite
from .suite_run import run_suite

__all__ = [
    "SUITES_DIR",
    "ComparisonPlan",
    "QuickstartReport",
    "Suite",
    "load_suite",
    "plan_suite",
    "run_quickstart",
    "run_suite",
    "suite_template",
]
