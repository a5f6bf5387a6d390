"""The design of a comparison and its checks before the work."""

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from ..prediction.selection import MINIMUM_VALUES
from .arms import NAMED_ARMS, Arm, known_step_arms, make_arm
from .comparison import ACCURACY, LOSS
from .comparison_task import ComparisonTask
from .linear_probe import LinearProbe
from .protocols import FineTuning, MeasuringProtocol, first_of_each_class, refined

_RUN_AGAIN = "delete it to run the cell again"
_USUAL_STATES = 5  # of a schedule by default; the shipped KNOWN needs as many


@dataclass(frozen=True)
class Design:
    """What is measured, with the arguments of [`compare_arms`]."""

    task: ComparisonTask
    protocols: tuple[MeasuringProtocol, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    draws: int
    trials_per_rate: int
    stacked: bool | None = None

    def trials(self, protocol: MeasuringProtocol, arm: Arm) -> tuple[tuple[Mapping[str, Any], ...], int]:
        """Return the settings of an arm that a protocol evaluates, and the trials of each at a rate of the grid."""
        if isinstance(protocol, FineTuning) and protocol.one_trial:
            return arm.settings[:1], 1
        return arm.settings, self.trials_per_rate // len(arm.settings)


def make_design(
    task: ComparisonTask,
    protocols: Sequence[MeasuringProtocol],
    arms: Sequence[Arm | str | Mapping[str, Any]] | None = None,
    seeds: Sequence[int] | None = None,
    draws: int = 1,
    trials_per_rate: int = 4,
    stacked: bool | None = None,
) -> Design:
    """Return the arguments of [`compare_arms`] with their defaults."""
    if seeds is None:
        seeds = range(10 if task.recorded is None else len(task.recorded))
    compared = tuple(arm if isinstance(arm, Arm) else make_arm(arm) for arm in arms or default_arms(task))
    numbers = tuple(int(seed) for seed in seeds)
    return Design(task, tuple(protocols), compared, numbers, draws, trials_per_rate, stacked)


def default_arms(task: ComparisonTask) -> list[str]:
    """Return the names of all arms for which the task has what they need."""
    trajectories = [task.open_trajectory(seed, Path()) for seed in range(len(task.recorded or []))]
    num_states = min((trajectory.num_states for trajectory in trajectories), default=_USUAL_STATES)
    arms = [arm for arm in NAMED_ARMS if all(getattr(task, needed) is not None for needed in arm.needs)]
    names = [arm.name for arm in (*arms, *known_step_arms()) if num_states >= _USUAL_STATES or not arm.uses_known]
    return names + [f"state-{index}" for index in range(1, num_states)]


@dataclass
class _Trial:
    options: dict[str, Any]
    learning_rate: float | None
    validation: dict[str, float | None]
    test: dict[str, float | None]


@dataclass
class _Draw:
    draw: int
    chosen: NonNegativeInt
    trials: list[_Trial]


@dataclass
class _MeasuredArm:
    seed: int
    arm: str
    seconds: float
    measured: dict[str, list[_Draw]]
    training_cost: float | None = None
    choice: dict[str, Any] | None = None
    weights: str | None = None


@dataclass
class _MeasuredTrajectory:
    seed: int
    num_examples: list[int | None]
    steps: list[int]
    seconds: float
    states: list[dict[str, float | None]]
    identity: dict[str, Any]


def check_stored_arm(content: Mapping[str, Any], what: str, design: Design, seed: int, arm: str) -> None:
    """Check the stored result of a cell; a `ValueError` names what is damaged."""
    cell = _validated(_MeasuredArm, content, what)
    measures = {measure.name for measure in design.task.measures}

    def is_complete(protocol: MeasuringProtocol) -> bool:
        draws = cell.measured.get(protocol.name, [])
        return (
            len(draws) == (1 if protocol.on_source else design.draws)
            and len({len(draw.trials) for draw in draws}) == 1
            and all(measures <= trial.validation.keys() & trial.test.keys() for d in draws for trial in d.trials)
            and all(draw.chosen < len(draw.trials) for draw in draws)
            and all(draw.trials[draw.chosen].test[name] is not None for draw in draws for name in measures)
        )

    if (cell.seed, cell.arm) != (seed, arm) or not all(map(is_complete, design.protocols)):
        raise ValueError(f"{what} is not a complete result of arm {arm!r} and seed {seed}; {_RUN_AGAIN}")


def check_stored_trajectory(content: Mapping[str, Any], what: str, design: Design, seed: int) -> None:
    """Check the stored entry of a trajectory; a `ValueError` names what is damaged."""
    entry = _validated(_MeasuredTrajectory, content, what)
    measures = {measure.name for measure in design.task.measures}
    lengths = {len(entry.num_examples), len(entry.steps), *([len(entry.states)] if entry.states else [])}
    has_identity = {"weights", "data"} <= entry.identity.keys() and isinstance(entry.identity["data"], dict)
    if (
        entry.seed != seed
        or len(lengths) > 1
        or not has_identity
        or not all(measures <= s.keys() for s in entry.states)
    ):
        raise ValueError(f"{what} is not a complete entry of seed {seed}; {_RUN_AGAIN}")


def _validated(kind: type, content: Mapping[str, Any], what: str) -> Any:
    try:
        return TypeAdapter(kind).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{what}: {key:.100} is {first['input']!r:.60} ({first['msg']}); {_RUN_AGAIN}") from None


def check_design(design: Design) -> None:
    """Check the arguments of [`compare_arms`] against each other; raises a `ValueError`."""
    names, seeds, draws = [arm.name for arm in design.arms], design.seeds, design.draws
    _check_names("arm", names)
    _check_names("protocol", [protocol.name for protocol in design.protocols])
    if "trajectory" in names:
        raise ValueError("an arm cannot be named 'trajectory', the name of a cell of each seed; rename it")
    if "naive" not in names:
        raise ValueError(f"arms must include naive, got {names}")
    if not design.protocols or not seeds or draws < 1 or len(set(seeds)) < len(seeds) or design.trials_per_rate < 1:
        raise ValueError(
            f"a comparison needs a protocol, draw and trial and distinct seeds, got {len(design.protocols)} protocols,"
            f" seeds={list(seeds)}, draws={draws} and trials_per_rate={design.trials_per_rate}"
        )
    if len(seeds) == 1 and draws == 1:
        raise ValueError(
            "one draw of one trajectory has no interval. Record more trajectories with other seeds (10 are better than"
            " 2) and pass them all, or use 10 draws if target(seed, draw) returns other examples for each draw. For"
            " one trajectory, compare_checkpoints(a, b, test=…) compares Θ0 with the enhanced checkpoint"
        )
    if (recorded := design.task.recorded) is not None and max(seeds) >= len(recorded):
        raise ValueError(f"seed {max(seeds)} has no trajectory; the task has {len(recorded)}")
    for arm in design.arms:
        arm.check_options()
        if design.trials_per_rate % len(arm.settings):
            count, fewer = len(arm.settings), [dict(setting) for setting in arm.settings[: design.trials_per_rate]]
            raise ValueError(
                f"trials_per_rate={design.trials_per_rate} is not a multiple of the {count} settings of arm"
                f" {arm.name!r}, and every arm gets the same number of trials. Set trials_per_rate={count}, or give"
                f" the arm fewer settings: {{'name': {arm.name!r}, 'tuned': {fewer}}}"
            )
        for needed in arm.needs:
            _check_given(design.task, needed, f"arm {arm.name!r}")
    for protocol in design.protocols:
        _check_given(design.task, "source" if protocol.on_source else "target", f"protocol {protocol.name!r}")


def check_protocols(design: Design) -> None:
    """Check that grids can be refined, measures computed, classes filled and gates used; raises a `ValueError`."""
    if gates := [arm for arm in design.arms if arm.kind in ("gate", "cross_fit")]:
        source, _ = design.task.splits(design.seeds[0], draws=0)
        assert source is not None
    for arm in gates:
        part, least = ("train", 2 * MINIMUM_VALUES) if arm.kind == "cross_fit" else ("validation", MINIMUM_VALUES)
        if (count := len(getattr(source, part)["labels"])) < least:
            raise ValueError(
                f"arm {arm.name!r} needs at least {least} examples in {part} of the source, got {count}; add some, or"
                " leave out the arm"
            )
    other = [measure.name for measure in design.task.measures if measure.name not in (ACCURACY.name, LOSS.name)]
    for protocol in design.protocols:
        if not isinstance(protocol, FineTuning | LinearProbe):
            continue
        for arm in design.arms:
            refined(protocol.grid, design.trials(protocol, arm)[1])
        if isinstance(protocol, LinearProbe) and other:
            raise ValueError(f"protocol {protocol.name!r} measures accuracy and loss, not {other[0]!r}; leave it out")
        if protocol.labels_per_class is not None:
            _, (split,) = design.task.splits(design.seeds[0], draws=1)
            first_of_each_class(split.train, protocol.labels_per_class)


def check_landscape(task: ComparisonTask) -> None:
    """Check that a loss landscape can be computed; raises a `ValueError`."""
    _check_given(task, "source", "landscape")
    if all(measure.higher_is_better for measure in task.measures):
        raise ValueError("a landscape needs a loss among the measures of the task; leave out the landscape")


def check_picklable(design: Design) -> None:
    """Check that everything can be sent to worker processes; raises a `ValueError` that names the value."""
    values: dict[str, Any] = {f"{f.name} of the task": getattr(design.task, f.name) for f in fields(design.task)}
    values |= {f"arm {arm.name!r}": arm for arm in design.arms}
    values |= {f"protocol {protocol.name!r}": protocol for protocol in design.protocols}
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
        if names.count(name) > 1 or not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(f"{what} {name!r} needs a unique name of letters, digits, _, ., + and -")


def _check_given(task: ComparisonTask, needed: str, what: str) -> None:
    if getattr(task, needed) is None:
        raise ValueError(f"{what} needs {needed} of the task; pass it, or leave out the {what.split()[0]}")
