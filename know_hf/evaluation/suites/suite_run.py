"""[`run_suite`] records the trajectories of a suite and compares its arms."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...checkpoint import check_output
from ...known import KNOWNConfig
from ...prediction import SHIPPED_KNOWN
from ...schedule import ForgettingSchedule
from ..arms import Arm, known_step_arms, make_arm
from ..compare import compare_arms
from ..report.comparison_report import ComparisonReport
from .suite import Suite, load_suite
from .suite_task import SuiteTask


def run_suite(
    suite: Suite | str | Path,
    output_dir: str | Path,
    *,
    arms: Sequence[Arm | str | Mapping[str, Any]] | None = None,
    data: Mapping[str, str] | None = None,
    models: Mapping[str, str] | None = None,
    known: Mapping[str, str] | None = None,
    seeds: Sequence[int] | None = None,
    **options: Any,
) -> ComparisonReport:
    """Record the trajectories of a suite and compare its arms.

    Finished cells are not run again. You can add arms and seeds later.

    Args:
        suite ([`Suite`], `str` or `Path`):
            The suite, its file or its name, see [`load_suite`].
        output_dir (`str` or `Path`):
            See [`compare_arms`].
        arms (sequence, *optional*):
            Arms to run instead of all arms of the suite. Names of its arms keep its settings; for others, see
            [`make_arm`].
        data (`Mapping[str, str]`, *optional*):
            Folders to read the datasets of the suite from, by their Hub ids.
        models (`Mapping[str, str]`, *optional*):
            Folders to read its pretrained models from, by their Hub ids.
        known (`Mapping[str, str]`, *optional*):
            Further KNOWN weights, from a name to a folder or Hub id. Each gets the same KNOWN and matched-shrink arms
            as the shipped weights, or all of them if the suite has none. Weights with `variant="combination"` get only
            the arms of one step.
        seeds (sequence of `int`, *optional*):
            Trajectory seeds instead of those of the suite.
        options (*optional*):
            `num_processes`, `max_minutes`, `command` and `pages` of [`compare_arms`].

    Returns:
        [`ComparisonReport`]: the report, printable.

    Raises:
        `ValueError`: if `data` or `models` names something that the suite does not read, if `output_dir` is inside
            one of their folders, if an arm needs more states than the schedule has, and as [`load_suite`] and
            [`compare_arms`].
        `FileExistsError`, `RuntimeError`, `TimeoutError`: as [`compare_arms`].
    """
    task, arguments = suite_arguments(suite, output_dir, arms, data, models, known, seeds)
    return compare_arms(task.comparison_task(), output_dir, **arguments, **options)


def suite_arguments(
    suite: Suite | str | Path,
    output_dir: str | Path,
    arms: Sequence[Arm | str | Mapping[str, Any]] | None,
    data: Mapping[str, str] | None,
    models: Mapping[str, str] | None,
    known: Mapping[str, str] | None,
    seeds: Sequence[int] | None,
) -> tuple[SuiteTask, dict[str, Any]]:
    """Check arguments of [`run_suite`] and return the task and the other arguments of [`compare_arms`]."""
    if not isinstance(suite, Suite):
        suite = load_suite(suite)
    dataset_paths = _expanded("data", data, {suite.source.dataset, suite.target.dataset}, suite.name)
    model_paths = _expanded("models", models, {suite.model.pretrained} - {None}, suite.name)
    check_output(output_dir, [*dataset_paths.values(), *model_paths.values()], replaces=False)
    compared = list(suite.arms) if arms is None else [_arm(arm, suite) for arm in arms]
    names = {arm.name for arm in compared}
    for name, weights in (known or {}).items():
        folder = os.path.expanduser(weights)
        steps = (1,) if KNOWNConfig.from_pretrained(folder).variant == "combination" else (1, 2, 3)
        further = known_step_arms(steps, name, folder)
        matching = [arm for shipped, arm in zip(known_step_arms(steps), further, strict=True) if shipped.name in names]
        compared += matching or further
    _check_states(suite, compared)
    return SuiteTask(suite, dataset_paths, model_paths), {
        "protocols": suite.protocols,
        "arms": compared,
        "seeds": range(suite.first_seed, suite.first_seed + suite.seeds) if seeds is None else seeds,
        "draws": suite.draws,
        "trials_per_rate": suite.trials_per_rate,
        "landscape": suite.landscape,
        "name": suite.name,
        "description": suite.description,
    }


def _arm(arm: Arm | str | Mapping[str, Any], suite: Suite) -> Arm:
    if isinstance(arm, Arm):
        return arm
    return next((own for own in suite.arms if own.name == arm), None) or make_arm(arm)


def _check_states(suite: Suite, arms: Sequence[Arm]) -> None:
    """Raise a `ValueError` for an arm that needs more states than the schedule has."""
    recorded = ForgettingSchedule(**suite.schedule).num_states
    for arm in arms:
        needed = arm.state + 1
        if arm.uses_known:
            config = KNOWNConfig.from_pretrained(arm.known or SHIPPED_KNOWN)
            needed = config.num_states if config.variant == "reference" else 1
        if needed > recorded:
            raise ValueError(
                f"arm {arm.name!r} needs {needed} states, but the schedule of {suite.name} has num_states={recorded};"
                " leave out the arm, or record more states"
            )


def _expanded(argument: str, paths: Mapping[str, str] | None, ids: set[Any], suite: str) -> dict[str, str]:
    """Expand `~`, after a check that the suite reads these ids."""
    for name in paths or {}:
        if name not in ids:
            raise ValueError(f"{argument} names {name!r}, but {suite} reads {', '.join(sorted(ids)) or 'none'}")
    return {name: os.path.expanduser(path) for name, path in (paths or {}).items()}
