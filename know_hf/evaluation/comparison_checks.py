"""Checks of the arguments of a comparison before the work."""

import pickle
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from .arms import Arm
from .comparison import ACCURACY, LOSS
from .comparison_task import ComparisonTask
from .linear_probe import LinearProbe
from .protocols import FineTuning, MeasuringProtocol, first_of_each_class, refined


def check_arguments(
    task: ComparisonTask,
    arms: Sequence[Arm],
    protocols: Sequence[MeasuringProtocol],
    seeds: Sequence[int],
    draws: int,
    trials_per_rate: int,
) -> None:
    """Check arguments of [`compare_arms`] against each other; raises a `ValueError`."""
    names = [arm.name for arm in arms]
    _check_names("arm", names)
    _check_names("protocol", [protocol.name for protocol in protocols])
    if "trajectory" in names:
        raise ValueError("an arm cannot be named 'trajectory', the name of a cell of each seed; rename it")
    if "naive" not in names:
        raise ValueError(f"arms must include naive, got {names}")
    if not protocols or not seeds or draws < 1 or len(set(seeds)) < len(seeds) or trials_per_rate < 1:
        raise ValueError(
            "a comparison needs at least one protocol, draw and trial and distinct seeds, got"
            f" {len(protocols)} protocols, seeds={list(seeds)}, draws={draws} and trials_per_rate={trials_per_rate}"
        )
    if len(seeds) == 1 and draws == 1:
        raise ValueError("one draw of one trajectory has no interval; use more seeds or draws")
    if (recorded := task.recorded) is not None and max(seeds) >= len(recorded):
        raise ValueError(f"seed {max(seeds)} has no trajectory; the task has {len(recorded)}")
    for arm in arms:
        _check_arm(arm, task, trials_per_rate)
    for protocol in protocols:
        needed = "source" if protocol.on_source else "target"
        if getattr(task, needed) is None:
            raise ValueError(
                f"protocol {protocol.name!r} needs {needed} of the task; pass it, or leave out the protocol"
            )


def check_protocols(
    task: ComparisonTask, arms: Sequence[Arm], protocols: Sequence[MeasuringProtocol], seed: int, trials_per_rate: int
) -> None:
    """Check that grids can be refined, measures computed and classes filled; raises a `ValueError`."""
    of_probe = {measure.name for measure in (ACCURACY, LOSS)}
    for protocol in protocols:
        if not isinstance(protocol, FineTuning | LinearProbe):
            continue
        for arm in arms:
            refined(protocol.learning_rates, trials_per_rate // len(arm.settings))
        if isinstance(protocol, LinearProbe) and (other := [m.name for m in task.measures if m.name not in of_probe]):
            raise ValueError(f"protocol {protocol.name!r} measures accuracy and loss, not {other[0]!r}; leave it out")
        if protocol.labels_per_class is not None and task.target is not None:
            _, (split,) = task.splits(seed, draws=1)
            first_of_each_class(split.train, protocol.labels_per_class)


def check_landscape(task: ComparisonTask) -> None:
    """Check that a loss landscape can be computed; raises a `ValueError`."""
    if task.source is None:
        raise ValueError("a landscape needs source of the task; pass it, or leave out the landscape")
    if all(measure.higher_is_better for measure in task.measures):
        raise ValueError("a landscape needs a loss among the measures of the task; leave out the landscape")


def check_picklable(task: ComparisonTask, arms: Sequence[Arm], protocols: Sequence[MeasuringProtocol]) -> None:
    """Check that everything can be sent to worker processes; raises a `ValueError` that names the value."""
    values: dict[str, Any] = {f"{f.name} of the task": getattr(task, f.name) for f in fields(task)}
    values |= {f"arm {arm.name!r}": arm for arm in arms}
    values |= {f"protocol {protocol.name!r}": protocol for protocol in protocols}
    for what, value in values.items():
        try:
            pickle.dumps(value)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{what} cannot be pickled for another process ({error}); use functions and classes of a module,"
                " functools.partial of them, or num_processes=1"
            ) from error


def _check_names(what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1 or not re.fullmatch(r"[\w+-]+", name):
            raise ValueError(f"{what} {name!r} needs a unique name of letters, digits, _, + and -")


def _check_arm(arm: Arm, task: ComparisonTask, trials_per_rate: int) -> None:
    if trials_per_rate % len(arm.settings):
        raise ValueError(
            f"trials_per_rate={trials_per_rate} is not a multiple of the {len(arm.settings)} settings of arm"
            f" {arm.name!r}; every arm needs the same number of trials, so change one of the two"
        )
    if arm.needs is not None and getattr(task, arm.needs) is None:
        raise ValueError(f"arm {arm.name!r} needs {arm.needs} of the task; pass it, or leave out the arm")
