"""One cell of a comparison: the trajectory of a seed, or an arm of it in every protocol."""

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..trajectory import WeightTrajectory
from .arm_weights import ArmSources
from .arms import Arm
from .comparison import ACCURACY, LOSS, Measure
from .fine_tuning import Examples, batches
from .protocols import Evaluate, FineTuning, MeasuringProtocol, choose, evaluate_classifier, or_none
from .splits import Split, check_labels, check_split

_RECALIBRATION_BATCH, _RECALIBRATION_EXAMPLES = 64, 1024

Recorded = WeightTrajectory | str | Path


@dataclass(frozen=True)
class ComparisonTask:
    """What arms are compared on: trajectories, data and, where there are any, further models to compare with.

    For more than one process all callables must be picklable: functions of a module, or `functools.partial` of them.

    Args:
        trajectory (callable, [`WeightTrajectory`], `str`, `Path` or a sequence of these):
            A recorded trajectory, or several of the same recipe with other seeds, which are then seeds 0, 1, …; or
            `trajectory(seed, folder)`, which records one into a folder, or resumes ([`induce_forgetting`] does).
        target (callable, *optional*): `target(seed, draw)` gives the [`Split`] of a downstream draw: other draws are
            other examples, the same at every call. Training examples are in random order.
        source (callable, *optional*): `source(seed)` gives the [`Split`] of the source task: training examples, in
            random order, that BatchNorm statistics are measured on, and unseen ones; the same at every call.
        fresh_model (callable, *optional*): `fresh_model(seed)`, newly initialised.
        pretrained_model (callable, *optional*): `pretrained_model(seed)`, what the training started from.
        oracle_model (callable, *optional*): `oracle_model(seed, folder)`, trained like Θ0 on 1/r times the data; the
            folder is for whatever the training writes.
        train_further (callable, *optional*): `train_further(seed, model, steps, folder)` trains a model on all source
            data, stage by stage of so many optimizer steps, each as a stage of the trajectory was; and returns it.
        base_model (callable, *optional*): For trajectories of adapters, `base_model(seed)`, on which they belong.
        model_class (`type`, *optional*): The model's class, where transformers has none of its name.
        known (`str` or `Path`, *optional*): KNOWN weights, folder or Hub id; by default the shipped ones.
        evaluate (callable, *optional*): `evaluate(model, examples)`, from names of measures to values; by default
            accuracy and loss of a classifier.
        measures (`tuple[Measure, ...]`, *optional*): What `evaluate` gives; choices are made by the first.
        facts (`Mapping[str, Any]`, *optional*): What results depend on besides trajectories and data, which are told
            by their content; JSON values only: a folder with other facts is not resumed.
    """

    trajectory: Callable[[int, Path], WeightTrajectory] | Recorded | Sequence[Recorded]
    target: Callable[[int, int], Split] | None = None
    source: Callable[[int], Split] | None = None
    fresh_model: Callable[[int], PreTrainedModel] | None = None
    pretrained_model: Callable[[int], PreTrainedModel] | None = None
    oracle_model: Callable[[int, Path], PreTrainedModel] | None = None
    train_further: Callable[[int, PreTrainedModel, list[int], Path], PreTrainedModel] | None = None
    base_model: Callable[[int], PreTrainedModel] | None = None
    model_class: type[PreTrainedModel] | None = None
    known: str | Path | None = None
    evaluate: Evaluate = evaluate_classifier
    measures: tuple[Measure, ...] = (ACCURACY, LOSS)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recorded(self) -> list[Recorded] | None:
        """The trajectories that were recorded before, `None` where they are still to be recorded."""
        if callable(self.trajectory):
            return None
        return [self.trajectory] if isinstance(self.trajectory, Recorded) else list(self.trajectory)

    def open_trajectory(self, seed: int, output_dir: Path) -> WeightTrajectory:
        """The trajectory of a seed, once it is recorded."""
        if self.recorded is None:
            return WeightTrajectory(trajectory_folder(output_dir, seed))
        found = self.recorded[seed]
        return found if isinstance(found, WeightTrajectory) else WeightTrajectory(found)

    @property
    def classifies(self) -> bool:
        """Whether labels have to be classes: accuracy and loss are measured as they are by default."""
        return self.evaluate is evaluate_classifier

    def splits(self, seed: int, draws: int) -> tuple[Split | None, list[Split]]:
        """What `source` and, for so many draws, `target` give for a seed; `None` or empty where there is none.

        Raises:
            `ValueError`: when it can't be used; names the call and what is off.
        """
        source, targets = None, []
        if self.source is not None:
            source = check_split(self.source(seed), f"source({seed})", self.classifies)
        if self.target is not None:
            for draw in range(draws):
                what = f"target({seed}, {draw})"
                targets.append(check_split(self.target(seed, draw), what, self.classifies))
        return source, targets


def trajectory_folder(output_dir: Path, seed: int) -> Path:
    return output_dir / "trajectories" / f"seed-{seed}"


def hash_data(seed: int, advance: Callable[[str], None], *, task: ComparisonTask, draws: int) -> dict[str, str]:
    """Hashes the data of a seed.

    Args:
        seed (`int`): The seed.
        advance (callable): Told when it is done.
        task ([`ComparisonTask`]): What is compared on.
        draws (`int`): Downstream draws.

    Returns:
        `dict[str, str]`: from each call, `"source(0)"` or `"target(0, 1)"`, to the hash of what it gave.

    Raises:
        `ValueError`: as [`ComparisonTask.splits`].
    """
    source, targets = task.splits(seed, draws)
    found = {} if source is None else {f"source({seed})": source.content()}
    found |= {f"target({seed}, {draw})": split.content() for draw, split in enumerate(targets)}
    advance(f"seed {seed}: data")
    return found


def measure_trajectory(
    seed: int, advance: Callable[[str], None], *, task: ComparisonTask, output_dir: Path
) -> dict[str, Any]:
    """Records the trajectory of a seed and measures its states as they are on unseen source data.

    Args:
        seed (`int`): The seed.
        advance (callable): Told when it is done.
        task ([`ComparisonTask`]): What is compared on.
        output_dir (`Path`): Folder of the comparison.

    Returns:
        `dict`: an entry of `trajectories` in `report.json`; without source data its `states` is empty.
    """
    started = time.perf_counter()
    if callable(task.trajectory):
        task.trajectory(seed, trajectory_folder(output_dir, seed))
    trajectory = task.open_trajectory(seed, output_dir)
    scores = []
    split, _ = task.splits(seed, draws=0)
    if split is not None:
        sources = arm_sources(task, seed, trajectory, split, output_dir)
        for state in trajectory.states:
            model = sources.state(state.index).to(sources.device)
            sources.recalibrate(model)
            _check_head(task, model, split, f"source({seed})")
            scores.append(_finite(task.evaluate(model, split.test), f"Θ{state.index} of seed {seed}"))
    advance(f"seed {seed}: trajectory")
    return {
        "seed": seed,
        "num_examples": [state.num_examples for state in trajectory.states],
        "steps": [state.steps for state in trajectory.states],
        "states": scores,
        "seconds": _since(started),
    }


def measure_arm(
    cell: tuple[int, Arm],
    advance: Callable[[str], None],
    *,
    task: ComparisonTask,
    protocols: Sequence[MeasuringProtocol],
    draws: int,
    trials_per_rate: int,
    output_dir: Path,
) -> dict[str, Any]:
    """Measures an arm of a seed in every protocol, with all of its trials.

    Args:
        cell (`tuple[int, Arm]`): Seed and arm.
        advance (callable): Told when it is done.
        task ([`ComparisonTask`]): What is compared on.
        protocols (sequence of protocols): What is measured.
        draws (`int`): Downstream draws.
        trials_per_rate (`int`): K of [`know_hf.evaluation.protocols`].
        output_dir (`Path`): Folder of the comparison; what the arm writes while it is made is deleted again.

    Returns:
        `dict`: an entry of `cells` in `report.json`.

    Raises:
        `ValueError`: when all trials of a draw diverge, or the data can't be used.
    """
    started = time.perf_counter()
    seed, arm = cell
    work = output_dir / "work" / f"seed-{seed}.{arm.name}"
    source, targets = task.splits(seed, draws)
    sources = arm_sources(task, seed, task.open_trajectory(seed, output_dir), source, work)
    measured: dict[str, list[dict[str, Any]]] = {}
    for setting in arm.settings:
        model = arm.initial_model(sources, setting)
        for protocol in protocols:
            of_protocol = [source] if protocol.on_source else targets
            results = measured.setdefault(protocol.name, [{"draw": d, "trials": []} for d in range(len(of_protocol))])
            for result, split in zip(results, of_protocol, strict=True):
                assert split is not None
                if isinstance(protocol, FineTuning):
                    _check_head(task, model, split, f"target({seed}, {result['draw']})")
                refinement, head_seed = trials_per_rate // len(arm.settings), 1000 * seed + result["draw"]
                for trial in protocol.trials(model, split, head_seed, task.evaluate, task.measures, refinement):
                    scores = {"validation": or_none(trial.validation), "test": or_none(trial.test)}
                    result["trials"].append({"options": dict(setting), "learning_rate": trial.learning_rate, **scores})
    for name, results in measured.items():
        for result in results:
            result["chosen"] = choose(result["trials"], task.measures)
            best = result["trials"][result["chosen"]]
            for part in ("validation", "test"):
                _finite(
                    best[part], f"the best trial of arm {arm.name!r}, seed {seed}, draw {result['draw']} of {name}"
                )
    shutil.rmtree(work, ignore_errors=True)
    advance(f"seed {seed}: {arm.name}")
    return {"seed": seed, "arm": arm.name, "seconds": _since(started), "measured": measured}


def arm_sources(
    task: ComparisonTask, seed: int, trajectory: WeightTrajectory, source: Split | None, work: Path
) -> ArmSources:
    """What the arms of a seed are made from; `work` is for files on the way.

    Args:
        task ([`ComparisonTask`]): What is compared on.
        seed (`int`): The seed.
        trajectory ([`WeightTrajectory`]): Its trajectory.
        source ([`Split`], *optional*): Its source data.
        work (`Path`): A folder.
    """
    inputs: list[Mapping[str, Tensor]] = [] if source is None else list(recalibration_batches(source.train))
    return ArmSources(
        trajectory=trajectory,
        output_dir=work / "arms",
        batches=inputs,
        fresh_model=_bound(task.fresh_model, seed),
        oracle_model=None if task.oracle_model is None else partial(task.oracle_model, seed, work),
        known=task.known,
        pretrained_model=_bound(task.pretrained_model, seed),
        train_further=_further(task, seed, work),
        base_model=_bound(task.base_model, seed),
        model_class=task.model_class,
        device=device(),
    )


def recalibration_batches(train: Examples) -> list[Examples]:
    """Batches of equal size of the first training examples, without labels, for BatchNorm statistics."""
    inputs = {name: tensor[:_RECALIBRATION_EXAMPLES] for name, tensor in train.items() if name != "labels"}
    found = list(batches(inputs, _RECALIBRATION_BATCH))
    whole = [batch for batch in found if len(next(iter(batch.values()))) == _RECALIBRATION_BATCH]
    return list(whole or found)


def device() -> torch.device:
    """Where models are trained and evaluated: the accelerator, if there is one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


@torch.inference_mode()
def _check_head(task: ComparisonTask, model: PreTrainedModel, split: Split, what: str) -> None:
    """Of a head that is kept only its output tells the number of classes: not every config has it."""
    labels = split.test.get("labels")
    if task.classifies and split.num_labels is None and labels is not None and labels.ndim == 1:
        inputs = {name: tensor for name, tensor in split.test.items() if name != "labels"}
        one = next(batches(inputs, 1, device=model.device))
        check_labels(split, what, model.eval()(**one).logits.shape[-1])


def _bound(maker: Callable[[int], PreTrainedModel] | None, seed: int) -> Callable[[], PreTrainedModel] | None:
    return None if maker is None else partial(maker, seed)


def _further(
    task: ComparisonTask, seed: int, work: Path
) -> Callable[[PreTrainedModel, list[int]], PreTrainedModel] | None:
    train_further = task.train_further
    if train_further is None:
        return None
    return lambda model, steps: train_further(seed, model, steps, work)


def _finite(scores: Mapping[str, float | None], what: str) -> dict[str, float]:
    found = {}
    for name, value in scores.items():
        if value is None or not math.isfinite(value):
            raise ValueError(f"{name} of {what} is not finite: the training diverged; give lower learning rates")
        found[name] = float(value)
    return found


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 2)
