"""Suites: comparisons written down in YAML."""

from .suite import SUITES_DIR, Suite, load_suite, run_suite

__all__ = ["SUITES_DIR", "Suite", "load_suite", "run_suite"]
