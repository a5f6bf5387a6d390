"""[`run_quickstart`]: the `digits` suite with a short list of arms, and the checkpoint that a gate chooses."""

import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...predict import predict_overflowed_weights
from ...prediction import Gate
from ...trajectory import WeightTrajectory
from ..comparison_task import trajectory_folder
from ..fine_tuning import rows_of
from ..measure import recalibration_batches
from ..protocols import FineTuning
from ..report.comparison_report import ComparisonReport
from .suite import load_suite
from .suite_run import run_suite
from .suite_task import SuiteTask

SUITE = "digits"
ARMS = ("naive", "random", "known-step-2", "shrink", "oracle")
NUM_SEEDS = 5
STEPS = 2

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class QuickstartReport:
    """Result of the quickstart; printable.

    Attributes:
        path (`Path`):
            Folder with `report.html`, `report.json` and the two folders below.
        trajectory (`Path`):
            Trajectory of the first seed.
        enhanced (`Path`):
            Checkpoint that the gate chose from it.
        sentence (`str`):
            What the gate chose, and why.
        comparison ([`ComparisonReport`]):
            Comparison of the arms over all seeds.
    """

    path: Path
    trajectory: Path
    enhanced: Path
    sentence: str
    comparison: ComparisonReport

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        texts = {name: str(getattr(self, name)) for name in ("path", "trajectory", "enhanced", "sentence")}
        return {**texts, "comparison": self.comparison.to_dict()}

    def __str__(self) -> str:
        first, *others = (c for (_, measure), c in self.comparison.comparisons.items() if measure == "accuracy")
        states = enumerate(self.comparison.trajectories[0]["states"])
        forgetting = ", ".join(f"Θ{state} {scores['accuracy']:.1%}" for state, scores in states)
        return "\n".join(
            [
                self.sentence,
                f"Unseen accuracy of the states, which train on less and less data: {forgetting}.",
                "",
                first.table(),
                "",
                *(comparison.verdict() for comparison in (first, *others)),
                first.validity(),
                f"next: open {self.path / 'report.html'}, or load the checkpoint in {self.enhanced}/",
            ]
        )


def run_quickstart(output_dir: str | Path, seed: int = 0, *, num_processes: int | None = None) -> QuickstartReport:
    """Record, choose with a gate and compare on scikit-learn's digits, offline.

    Runs the `digits` suite with a few of its arms, without fine-tuning on the target task. Called again with the same
    folder, it resumes.

    Args:
        output_dir (`str` or `Path`):
            Folder of the comparison, see [`run_suite`]. The enhanced checkpoint is written to `enhanced/` in it.
        seed (`int`, *optional*, defaults to `0`):
            First of the trajectory seeds. The gate chooses the enhanced checkpoint from its trajectory.
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
    output_dir, suite = Path(output_dir), load_suite(SUITE)
    quick = tuple(protocol for protocol in suite.protocols if not isinstance(protocol, FineTuning))
    suite = replace(suite, protocols=quick, landscape=None)
    _show_stage(f"Recording {NUM_SEEDS} trajectories and comparing {len(ARMS)} arms on {suite.name} …")
    comparison = run_suite(
        suite,
        output_dir,
        arms=ARMS,
        seeds=range(seed, seed + NUM_SEEDS),
        num_processes=num_processes or min(4, _num_cores()),
        command=shlex.join(["know-hf", "quickstart", "--output-dir", str(output_dir), "--seed", str(seed)]),
    )
    _show_stage("Choosing the checkpoint …")
    trajectory = WeightTrajectory(trajectory_folder(output_dir, seed))
    for state, scores in enumerate(comparison.trajectories[0]["states"]):
        trajectory.update_metrics(state, {"unseen_accuracy": scores["accuracy"]})
    split = SuiteTask(suite).source_split(seed)
    enhanced = predict_overflowed_weights(
        trajectory,
        steps=STEPS,
        output_dir=output_dir / "enhanced",
        gate=Gate(dataset=rows_of(split.validation)),
        recalibrate_with=recalibration_batches(split.train),
        model_class=suite.model.model_class,
        overwrite=True,
        card={"comparisons": list(comparison.comparisons.values())},
    )
    return QuickstartReport(output_dir, trajectory.path, enhanced.path, enhanced.sentence, comparison)


def _show_stage(text: str) -> None:
    if not sys.stderr.isatty():  # where the command line shows no progress bars
        logger.warning(text)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
