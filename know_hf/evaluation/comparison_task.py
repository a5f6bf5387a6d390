"""[`ComparisonTask`]: the trajectories, data and models that arms are compared on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..trajectory import WeightTrajectory
from .comparison import ACCURACY, LOSS, Measure
from .fine_tuning import Evaluate, evaluate_classifier
from .splits import Split, check_split

Recorded = WeightTrajectory | str | Path


@dataclass(frozen=True)
class ComparisonTask:
    """Trajectories, data and, optionally, further models to compare with.

    For more than one process all callables must be picklable: functions of a module, or `functools.partial` of them.
    Each must return the same at every call.

    Args:
        trajectory (`Callable`, [`WeightTrajectory`], `str`, `Path` or a sequence of these):
            A recorded trajectory, or several of the same recipe with different seeds, numbered 0, 1, …; or
            `trajectory(seed, folder)`, which records one or resumes, as [`induce_forgetting`] does.
        target (`Callable`, *optional*):
            `target(seed, draw)` returns the [`Split`] of a draw of the target task, with other examples for each draw
            and training examples in random order.
        source (`Callable`, *optional*):
            `source(seed)` returns the [`Split`] of the source task: training examples in random order, on which
            BatchNorm statistics are computed, and unseen ones.
        fresh_model, pretrained_model (`Callable`, *optional*):
            From a seed to a newly initialised model, and to the model that the training started from.
        oracle_model (`Callable`, *optional*):
            `oracle_model(seed, folder)` trains a model like Θ0 on 1/r times the data; it may write to the folder.
        train_further (`Callable`, *optional*):
            `train_further(seed, model, steps, folder)` trains a model on all source data as the stages of the
            trajectory were trained, with the optimizer steps of each stage in `steps`, and returns it.
        branch_trajectory (`Callable`, *optional*):
            `branch_trajectory(seed, folder, trajectory)` records a trajectory with the Θ0 of the given one, bit for
            bit, and branches, or opens the one that it has recorded. All arms of a seed that need it share the folder.
        base_model (`Callable`, *optional*):
            From a seed to the base model of a trajectory of adapters.
        model_class (`type`, *optional*):
            Class of the model, if transformers does not have it.
        known (`str` or `Path`, *optional*):
            KNOWN weights, folder or Hub id; the shipped ones by default.
        evaluate (`Callable`, *optional*):
            `evaluate(model, examples)` returns a value for each measure; by default accuracy and loss of a classifier.
        measures (`tuple[Measure, ...]`, *optional*, defaults to `(ACCURACY, LOSS)`):
            Measures that `evaluate` returns. Trials are chosen by the first.
        facts (`Mapping[str, Any]`, *optional*):
            What results depend on besides trajectories and data, JSON values only. A comparison with other facts is
            not resumed.
    """

    trajectory: Callable[[int, Path], WeightTrajectory] | Recorded | Sequence[Recorded]
    target: Callable[[int, int], Split] | None = None
    source: Callable[[int], Split] | None = None
    fresh_model: Callable[[int], PreTrainedModel] | None = None
    pretrained_model: Callable[[int], PreTrainedModel] | None = None
    oracle_model: Callable[[int, Path], PreTrainedModel] | None = None
    train_further: Callable[[int, PreTrainedModel, list[int], Path], PreTrainedModel] | None = None
    branch_trajectory: Callable[[int, Path, WeightTrajectory], WeightTrajectory] | None = None
    base_model: Callable[[int], PreTrainedModel] | None = None
    model_class: type[PreTrainedModel] | None = None
    known: str | Path | None = None
    evaluate: Evaluate = evaluate_classifier
    measures: tuple[Measure, ...] = (ACCURACY, LOSS)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recorded(self) -> list[Recorded] | None:
        """Trajectories recorded before; `None` if the comparison records them."""
        if callable(self.trajectory):
            return None
        return [self.trajectory] if isinstance(self.trajectory, Recorded) else list(self.trajectory)

    def open_trajectory(self, seed: int, output_dir: Path) -> WeightTrajectory:
        """Open the recorded trajectory of a seed."""
        recorded = trajectory_folder(output_dir, seed) if self.recorded is None else self.recorded[seed]
        return recorded if isinstance(recorded, WeightTrajectory) else WeightTrajectory(recorded)

    @property
    def classifies(self) -> bool:
        """Whether labels must be classes: `evaluate` is the default."""
        return self.evaluate is evaluate_classifier

    def splits(self, seed: int, draws: int) -> tuple[Split | None, list[Split]]:
        """Call `source` and, for each draw, `target`; `None` or empty without them.

        Raises:
            `ValueError`: If a return value cannot be used; names the call.
        """
        check = partial(check_split, classifies=self.classifies)
        source = check(self.source(seed), f"source({seed})") if self.source else None
        target = self.target
        targets = [check(target(seed, i), f"target({seed}, {i})") for i in range(draws)] if target else []
        return source, targets

    def data_hashes(self, seed: int, draws: int) -> dict[str, str]:
        """Return the hash of the data of a seed for each call, such as `"source(0)"` or `"target(0, 1)"`."""
        source, targets = self.splits(seed, draws)
        hashes = {} if source is None else {f"source({seed})": source.content()}
        return hashes | {f"target({seed}, {draw})": split.content() for draw, split in enumerate(targets)}


def trajectory_folder(output_dir: Path, seed: int) -> Path:
    return output_dir / "trajectories" / f"seed-{seed}"
