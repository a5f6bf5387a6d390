"""The two kinds of cells of a comparison: the trajectory of a seed, and an arm of a seed in every protocol."""

import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import PreTrainedModel

from ..checkpoint import read_json_object
from ..data.row_hashes import content_hash
from ..trajectory import WeightTrajectory
from .arm_weights import ArmSources
from .arms import Arm
from .comparison_checks import Design
from .comparison_task import ComparisonTask, trajectory_folder
from .fine_tuning import Examples, batches, inputs_of
from .linear_probe import LinearProbe
from .protocols import FineTuning, MeasuringProtocol, Trial, choose, or_none
from .splits import Split, check_labels
from .trials import STACK_BYTES

Group = list[tuple[Mapping[str, Any], PreTrainedModel]]  # settings and the weights of an arm with them

_RECALIBRATION_BATCH, _RECALIBRATION_EXAMPLES = 64, 1024
_SEED_OFFSET = 1_000_000_007  # of the seeds of trial-matched-naive


def measure_trajectory(seed: int, *, task: ComparisonTask, output_dir: Path) -> dict[str, Any]:
    """Record the trajectory of a seed and measure its states, zero-shot, on unseen source data.

    Returns:
        `dict`: An entry of `trajectories` in `report.json`; `states` is empty without source data.
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
            model = sources.state(state.index)
            sources.recalibrate(model)
            check_head(task, model, split, f"source({seed})")
            scores.append(_finite(task.evaluate(model, split.test), f"Θ{state.index} of seed {seed}"))
    return {
        "seed": seed,
        "num_examples": [state.num_examples for state in trajectory.states],
        "steps": [state.steps for state in trajectory.states],
        "states": scores,
        "seconds": _since(started),
    }


def measure_arm(cell: tuple[int, Arm], *, design: Design, output_dir: Path) -> dict[str, Any]:
    """Measure a cell, seed and arm, in every protocol with all of its trials; temporary files are deleted.

    If a finished cell of the seed has the same weights, its results are reused: all arms without settings have the
    same trials. Returns an entry of `cells` in `report.json`.

    Raises:
        `ValueError`: If all trials of a draw diverge, or the data cannot be used.
    """
    started = time.perf_counter()
    (seed, arm), task = cell, design.task
    work = output_dir / "work" / f"seed-{seed}.{arm.name}"
    source, targets = task.splits(seed, design.draws)
    trajectory = task.open_trajectory(seed, output_dir)
    sources = arm_sources(task, seed, trajectory, source, work, targets)
    choices: list[dict[str, Any]] = []
    groups: Iterable[Group] = _groups(arm, sources, design.draws, choices)
    weights, measured = None, None
    if not arm.tuned:  # the trials then depend on the weights alone
        ((only,),) = groups = list(groups)
        weights = content_hash(only[1].state_dict()).hex()
        measured = _measured_before(output_dir, seed, weights)
    if measured is None:
        measured = _measured(groups, seed, arm, design, source, targets)
    training_cost = arm.training_cost(arm.recording(sources))
    shutil.rmtree(work, ignore_errors=True)
    return {
        "seed": seed,
        "arm": arm.name,
        "seconds": _since(started),
        "training_cost": training_cost,
        "choice": choices[0] if choices else None,
        "weights": weights,
        "measured": measured,
    }


def _measured_before(output_dir: Path, seed: int, weights: str) -> dict[str, list[dict[str, Any]]] | None:
    """Return the results of a finished cell of the seed with the same weights, such as naive's for a gate that kept
    Θ0."""
    for path in sorted((output_dir / "cells").glob(f"seed-{seed}.*.json")):
        if (cell := read_json_object(path, "delete it to run the cell again")).get("weights") == weights:
            return cell["measured"]
    return None


def _measured(
    groups: Iterable[Group], seed: int, arm: Arm, design: Design, source: Split | None, targets: Sequence[Split]
) -> dict[str, list[dict[str, Any]]]:
    """Run all trials of the models of an arm in every protocol."""
    task = design.task
    measured: dict[str, list[dict[str, Any]]] = {
        protocol.name: [{"draw": draw, "trials": []} for draw in range(1 if protocol.on_source else design.draws)]
        for protocol in design.protocols
    }
    for group in groups:
        for protocol in design.protocols:
            runs, (settings, refinement) = [], design.trials(protocol, arm)
            evaluated = [pair for pair in group if pair[0] in settings]
            for (setting, model), result in product(evaluated, measured[protocol.name]):
                split = source if protocol.on_source else targets[result["draw"]]
                assert split is not None
                if isinstance(protocol, FineTuning):
                    check_head(task, model, split, f"target({seed}, {result['draw']})")
                run_seed = 1000 * seed + result["draw"] + _SEED_OFFSET * setting.get("seed", 0)
                runs.append((setting, result, (model, split, run_seed)))
            lists = _trials(protocol, [run for *_, run in runs], design, refinement)
            for (setting, result, _), trials in zip(runs, lists, strict=True):
                result["trials"] += [_trial_entry(setting, trial) for trial in trials]
    for name, results in measured.items():
        for result in results:
            result["chosen"] = choose(result["trials"], task.measures)
            for part in ("validation", "test"):
                what = f"the best trial of arm {arm.name!r}, seed {seed}, draw {result['draw']} of {name}"
                _finite(result["trials"][result["chosen"]][part], what)
    return measured


def _groups(arm: Arm, sources: ArmSources, draws: int, choices: list[dict[str, Any]]) -> Iterator[Group]:
    """Make the models of an arm; yield its settings with as many models as fit into memory. What a gate chose is added
    to `choices`."""
    group: Group = []
    for setting in arm.settings:
        model, choice = arm.initial_weights(sources, setting)
        choices += [] if choice is None else [choice]
        group.append((setting, model))
        if (len(group) + 1) * draws * group[0][1].get_memory_footprint() > STACK_BYTES:
            yield group
            group = []
    if group:
        yield group


def _trials(protocol: MeasuringProtocol, runs: list[Any], design: Design, refinement: int) -> list[list[Trial]]:
    task = design.task
    if not runs:
        return []
    if isinstance(protocol, FineTuning | LinearProbe):
        return protocol.trials_of(runs, task.evaluate, task.measures, refinement, design.stacked)
    options = task.evaluate, task.measures, refinement
    return [list(protocol.trials(model, split, seed, *options)) for model, split, seed in runs]


def _trial_entry(setting: Mapping[str, Any], trial: Trial) -> dict[str, Any]:
    """Return an entry of `trials` in `report.json`."""
    rates = {"learning_rate": trial.learning_rate}
    if trial.head_learning_rate is not None:
        rates["head_learning_rate"] = trial.head_learning_rate
    scores = {"validation": or_none(trial.validation), "test": or_none(trial.test)}
    return {"options": {**setting, **trial.options}, **rates, **scores}


def arm_sources(
    task: ComparisonTask,
    seed: int,
    trajectory: WeightTrajectory,
    source: Split | None,
    work: Path,
    targets: Sequence[Split] = (),
) -> ArmSources:
    """Collect what the arms of a seed need; `work` is a folder for temporary files."""
    further = task.train_further
    branches = partial(_branches, task, trajectory, seed, work.parent / "branches")
    return ArmSources(
        trajectory=trajectory,
        output_dir=work / "arms",
        batches=[] if source is None else recalibration_batches(source.train),
        fresh_model=task.fresh_model and partial(task.fresh_model, seed),
        oracle_model=task.oracle_model and partial(task.oracle_model, seed, work),
        known=task.known,
        pretrained_model=task.pretrained_model and partial(task.pretrained_model, seed),
        train_further=None if further is None else lambda model, steps: further(seed, model, steps, work),
        branch_trajectory=task.branch_trajectory and branches,
        base_model=task.base_model and partial(task.base_model, seed),
        model_class=task.model_class,
        device=device(),
        source=None if source is None else source.validation,
        train=None if source is None else source.train,
        target=targets[0].train if targets else None,
    )


def _branches(task: ComparisonTask, trajectory: WeightTrajectory, seed: int, folder: Path) -> WeightTrajectory:
    """Record the branches of a seed, or open them if another arm, perhaps in another process, has done so."""
    assert task.branch_trajectory is not None
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"seed-{seed}.lock"):
        branches = task.branch_trajectory(seed, folder / f"seed-{seed}", trajectory)
    for name in trajectory.names:
        if not torch.equal(branches.tensor(name), trajectory.tensor(name)):
            raise ValueError(
                f"branch_trajectory({seed}, …) has another Θ0 than the trajectory of seed {seed}: {name} differs;"
                " train both from the same start with the same seed and data"
            )
    return branches


def recalibration_batches(train: Examples) -> list[Examples]:
    """Return batches of equal size of the first training examples, without labels, for BatchNorm statistics."""
    inputs = {name: tensor[:_RECALIBRATION_EXAMPLES] for name, tensor in inputs_of(train).items()}
    count = len(next(iter(inputs.values())))
    full = count - count % _RECALIBRATION_BATCH or count  # all of them if they do not fill a batch
    return list(batches({name: tensor[:full] for name, tensor in inputs.items()}, _RECALIBRATION_BATCH))


def device() -> torch.device:
    """Return the accelerator, if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


@torch.inference_mode()
def check_head(task: ComparisonTask, model: PreTrainedModel, split: Split, what: str) -> None:
    """Check labels against the output of a head that is kept: not every config has its number of classes."""
    labels = split.test.get("labels")
    if task.classifies and split.num_labels is None and labels is not None and labels.ndim == 1:
        first = next(batches(inputs_of(split.test), 1, device=model.device))
        check_labels(split, what, model.eval()(**first).logits.shape[-1])


def _finite(scores: Mapping[str, float | None], what: str) -> dict[str, float]:
    for name, value in scores.items():
        if value is None or not math.isfinite(value):
            raise ValueError(f"{name} of {what} is not finite: the training diverged; use lower learning rates")
    return {name: float(value) for name, value in scores.items() if value is not None}


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 2)
