"""[`run_quickstart`]: the `digits` suite with a short list of arms, and an enhanced checkpoint to load."""

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...predict import predict_overflowed_weights
from ...trajectory import WeightTrajectory
from ..comparison_task import trajectory_folder
from ..measure import recalibration_batches
from ..report.comparison_report import ComparisonReport
from .suite import load_suite
from .suite_run import run_suite
from .suite_task import SuiteTask

SUITE = "digits"
ARMS = ("naive", "random", "known-step-2", "shrink", "oracle")
NUM_SEEDS = 5
STEPS = 2


@dataclass(frozen=True)
class QuickstartReport:
    """Result of the quickstart; printable.

    Attributes:
        path (`Path`):
            Folder with `report.html`, `report.json` and the two folders below.
        trajectory (`Path`):
            Trajectory of the first seed.
        enhanced (`Path`):
            Enhanced checkpoint predicted from it.
        comparison ([`ComparisonReport`]):
            Comparison of the arms over all seeds.
    """

    path: Path
    trajectory: Path
    enhanced: Path
    comparison: ComparisonReport

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        paths = {name: str(getattr(self, name)) for name in ("path", "trajectory", "enhanced")}
        return {**paths, "comparison": self.comparison.to_dict()}

    def __str__(self) -> str:
        compared = [c for (_, measure), c in self.comparison.comparisons.items() if measure == "accuracy"]
        tables = "\n\n".join(f"{comparison.what}\n\n{comparison.table()}" for comparison in compared)
        return f"""\
{compared[0].verdict()}
{compared[0].validity()}

{tables}

trajectory           {self.trajectory}
enhanced checkpoint  {self.enhanced}
full report          {self.path / "report.html"}"""


def run_quickstart(output_dir: str | Path, seed: int = 0, *, num_processes: int | None = None) -> QuickstartReport:
    """Record, predict and compare on scikit-learn's digits, offline.

    Runs the `digits` suite with a few of its arms. Called again with the same folder, it resumes.

    Args:
        output_dir (`str` or `Path`):
            Folder of the comparison, see [`run_suite`]. The enhanced checkpoint is written to `enhanced/` in it.
        seed (`int`, *optional*, defaults to `0`):
            First of the trajectory seeds. The enhanced checkpoint is predicted from its trajectory.
        num_processes (`int`, *optional*):
            Processes that share the work. Defaults to one per core, at most 4.

    Returns:
        [`QuickstartReport`]: the result, printable.

    Raises:
        `ImportError`: if a package of the extra `demo` is missing.
        `FileExistsError`: if `output_dir` contains something else.
        `ValueError`: if `seed` is out of range, or `output_dir` contains another comparison.
    """
    if not 0 <= seed < 1_000_000:
        raise ValueError(f"seed must be in [0, 1,000,000), got {seed}")
    output_dir, suite = Path(output_dir), replace(load_suite(SUITE), landscape=None)
    comparison = run_suite(
        suite,
        output_dir,
        arms=ARMS,
        seeds=range(seed, seed + NUM_SEEDS),
        num_processes=num_processes or min(4, _num_cores()),
        command=shlex.join(["know-hf", "quickstart", "--output-dir", str(output_dir), "--seed", str(seed)]),
    )
    trajectory = WeightTrajectory(trajectory_folder(output_dir, seed))
    for state, scores in enumerate(comparison.trajectories[0]["states"]):
        trajectory.update_metrics(state, {"unseen_accuracy": scores["accuracy"]})
    enhanced = predict_overflowed_weights(
        trajectory,
        steps=STEPS,
        output_dir=output_dir / "enhanced",
        recalibrate_with=recalibration_batches(SuiteTask(suite).source_split(seed).train),
        model_class=suite.model.model_class,
        overwrite=True,
        card={"comparisons": list(comparison.comparisons.values()), "arm": f"known-step-{STEPS}"},
    )
    return QuickstartReport(output_dir, trajectory.path, enhanced.path, comparison)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
