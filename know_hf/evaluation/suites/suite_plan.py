"""[`plan_suite`]: cells, minutes and memory of a comparison, before it runs."""

import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from ...markdown import quantity
from ...markdown import size as format_bytes
from ...schedule import ForgettingSchedule
from ...tasks.recording_plan import steps_per_epoch
from ..arms import Arm
from ..cells import TRAJECTORY, CellStore, one_thread_without_bars
from ..compare import ComparisonRun, cell_times
from ..comparison_checks import Design, make_design
from ..fine_tuning import Evaluate, Examples, with_new_head
from ..linear_probe import LinearProbe
from ..measure import device
from ..protocols import FineTuning, first_of_each_class
from ..trials import Start, Training, measure_trained
from .suite import Suite
from .suite_run import suite_arguments
from .suite_task import SuiteTask

_TRIAL_SECONDS, _MOST_STEPS, _EXAMPLES = 1.0, 100, 64  # of a trial


@dataclass(frozen=True)
class ComparisonPlan:
    """What a comparison will run. `str` gives a summary."""

    name: str  # of the suite
    trajectories: int  # to record; finished ones are not counted
    cells: int  # arms of seeds to measure; finished ones are not counted
    seeds: int
    arms: int
    draws: int  # downstream
    trajectory_seconds: float  # expected mean
    cell_seconds: float  # expected mean
    memory: int  # bytes that a process needs
    num_processes: int
    based_on: Literal["trial", "finished cells"]  # a few optimizer steps on this machine, or the output folder

    @property
    def minutes(self) -> float:
        """Expected minutes of the comparison, without its landscape and pages."""
        seconds = self.trajectories * self.trajectory_seconds + self.cells * self.cell_seconds
        return seconds / 60 / self.num_processes

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {**asdict(self), "minutes": self.minutes}

    def __str__(self) -> str:
        trial = "a trial of a few optimizer steps on this machine"
        basis = trial if self.based_on == "trial" else "the finished cells in the output folder"
        plural = "es" if self.num_processes > 1 else ""
        return "\n".join(
            [
                f"{self.name}: {quantity(self.seeds, 'seed')}, {quantity(self.arms, 'arm')},"
                f" {quantity(self.draws, 'downstream draw')} each",
                f"to record: {self.trajectories} of {self.seeds} trajectories, {self.trajectory_seconds:.3g} s each",
                f"to run: {self.cells} of {self.seeds * self.arms} arms of a seed, {self.cell_seconds:.3g} s each",
                f"time: about {self.minutes:.3g} min with {self.num_processes} process{plural}, by {basis}",
                f"memory: about {format_bytes(self.memory)} for each process",
            ]
        )


def plan_suite(
    suite: Suite | str | Path,
    output_dir: str | Path,
    *,
    arms: Sequence[Arm | str | Mapping[str, Any]] | None = None,
    data: Mapping[str, str] | None = None,
    models: Mapping[str, str] | None = None,
    known: Mapping[str, str] | None = None,
    seeds: Sequence[int] | None = None,
    num_processes: int = 1,
) -> ComparisonPlan:
    """Count the cells of a comparison and estimate its time and memory. Nothing is recorded.

    Seconds are those of cells that are finished in the output folder. If there are none, a few optimizer steps and
    forward passes are timed and multiplied by the steps and examples of all protocols; making the weights of arms and
    training heads alone are left out.

    Args:
        suite, output_dir, arms, data, models, known, seeds, num_processes:
            As in [`run_suite`], which raises the same errors.
    """
    suite_task, arguments = suite_arguments(suite, output_dir, arms, data, models, known, seeds)
    task = suite_task.comparison_task()
    options = ("protocols", "arms", "seeds", "draws", "trials_per_rate")
    design = make_design(task, **{name: arguments[name] for name in options})
    run = ComparisonRun(design, Path(output_dir), num_processes, arguments["name"])
    run.check()
    finished, recorded = {}, {}
    if (run.output_dir / CellStore.IDENTITY_NAME).exists():
        store = run.open_store()
        finished = run.finished_cells(store)
        stored = {seed: store.read(f"seed-{seed}.{TRAJECTORY}") for seed in design.seeds}
        recorded = {seed: entry for seed, entry in stored.items() if entry is not None}
    times = cell_times(finished, recorded)
    if not finished or not recorded:
        trial = _Trial(suite_task, task.evaluate, design)
        if not recorded:
            times.add(TRAJECTORY, trial.trajectory_seconds())
        if not finished:
            for arm in design.arms:
                times.add(arm.name, trial.arm_seconds(arm))
    cells = [times.expected(arm.name) or 0.0 for seed, arm in run.cells if (seed, arm.name) not in finished]
    return ComparisonPlan(
        name=arguments["name"],
        trajectories=len(design.seeds) - len(recorded),
        cells=len(cells),
        seeds=len(design.seeds),
        arms=len(design.arms),
        draws=design.draws,
        trajectory_seconds=times.expected(TRAJECTORY) or 0.0,
        cell_seconds=sum(cells) / max(len(cells), 1),
        memory=_peak_memory(),
        num_processes=num_processes,
        based_on="finished cells" if finished else "trial",
    )


class _Trial:
    """Times of single optimizer steps and examples."""

    def __init__(self, task: SuiteTask, evaluate: Evaluate, design: Design) -> None:
        self.task, self.evaluate, self.design, self.suite = task, evaluate, design, task.suite
        self.seed = design.seeds[0]
        self.model = task.start(self.seed).to(device())
        self.source, self.target = task.source_split(self.seed), task.target_split(self.seed, 0)
        with tempfile.TemporaryDirectory() as folder:
            self.recording_step = self._recording_step(Path(folder))
        self.source_example = self._seconds_of_example(self.source.test)
        self.target_example = self._seconds_of_example(self.target.test)
        self.target_steps: dict[str, float] = {}

    def trajectory_seconds(self) -> float:
        states = len(self._recording_steps()) * len(self.source.test["labels"]) * self.source_example
        return sum(self._recording_steps()) * self.recording_step + states

    def arm_seconds(self, arm: Arm) -> float:
        _, *later = self._recording_steps()
        steps = {"oracle": self._steps(self.task.oracle_size), "trained_on": sum(later)}.get(arm.kind, 0)
        seconds, draws = steps * self.recording_step, self.design.draws
        for protocol in self.design.protocols:
            settings, trials = self.design.trials(protocol, arm)
            if isinstance(protocol, FineTuning):
                rates = len(protocol.learning_rates) * len(protocol.head_rates or (None,))
                of_training = protocol.steps * self._target_step(protocol) + self._unseen("target")
                seconds += draws * len(settings) * trials * rates * of_training
            elif isinstance(protocol, LinearProbe):
                train = first_of_each_class(self.target.train, protocol.labels_per_class)
                of_draw = self._unseen("target") + len(train["labels"]) * self.target_example
                seconds += draws * len(settings) * of_draw
            else:
                seconds += len(settings) * self._unseen("source")
        return seconds

    def _unseen(self, side: Literal["source", "target"]) -> float:
        split = getattr(self, side)
        return (len(split.validation["labels"]) + len(split.test["labels"])) * getattr(self, f"{side}_example")

    def _recording_steps(self) -> list[int]:
        """Return the optimizer steps of each state of a trajectory."""
        schedule = ForgettingSchedule(**self.suite.schedule)
        first, *later = schedule.sizes(self.suite.source.train)
        of_stage = schedule.steps_per_stage
        return [self._steps(first), *(of_stage or self._steps(size, schedule.epochs_per_stage) for size in later)]

    def _steps(self, size: int, epochs: float | None = None) -> int:
        training = TrainingArguments("unused", **self.suite.training)
        if epochs is None and training.max_steps > 0:
            return training.max_steps
        epochs = training.num_train_epochs if epochs is None else epochs
        return math.ceil(epochs * steps_per_epoch(size, training.train_batch_size, training))

    def _recording_step(self, folder: Path) -> float:
        model = self.suite.model.with_adapter(self.task.start(self.seed), self.seed)
        return _seconds_of_step(lambda steps: self.task.train_further(self.seed, model, [steps], folder))

    def _target_step(self, protocol: FineTuning) -> float:
        if protocol.name not in self.target_steps:
            self.target_steps[protocol.name] = self._measured_step(protocol)
        return self.target_steps[protocol.name]

    def _measured_step(self, protocol: FineTuning) -> float:
        split, model = self.target, self.model
        if split.num_labels is not None:
            model = with_new_head(model, split.num_labels, self.seed)
        train = first_of_each_class(split.train, protocol.labels_per_class)
        start = Start(model, train, split.validation, split.test, self.seed)
        trainings = [Training(start, rate) for rate in protocol.learning_rates[:2]]

        def train_all(steps: int) -> None:
            measure_trained(trainings, steps, protocol.batch_size, lambda *_: {})

        return _seconds_of_step(train_all) / len(trainings)

    def _seconds_of_example(self, examples: Examples) -> float:
        some = {name: tensor[:_EXAMPLES] for name, tensor in examples.items()}
        return _seconds(lambda: self.evaluate(self.model, some)) / len(some["labels"])


def _seconds_of_step(train: Callable[[int], Any]) -> float:
    """Time a few steps, without what a training of any length takes."""
    warming_up = _seconds(lambda: train(1))
    if warming_up > _TRIAL_SECONDS / 2:  # steps take longer than what is around them
        return _seconds(lambda: train(2)) / 2
    of_one = _seconds(lambda: train(1))
    steps = max(2, min(_MOST_STEPS, int(_TRIAL_SECONDS / of_one)))
    return max(_seconds(lambda: train(1 + steps)) - of_one, 0.0) / steps


def _seconds(function: Callable[[], Any]) -> float:
    """Time a function as cells run, on one thread; on a CPU without the time of other programs."""
    clock = time.process_time if device().type == "cpu" else time.perf_counter
    with one_thread_without_bars():
        started = clock()
        function()
        return clock() - started


def _peak_memory() -> int:
    """Return the most memory that this process had so far, in bytes; on an accelerator, that of its tensors."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
