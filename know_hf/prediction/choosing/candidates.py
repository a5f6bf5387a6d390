"""The candidates of a gate: recorded states and predictions, by default the [`FAMILY`]."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from ...predictors import Average, Composition, Predictor, Rescaler, get_predictor
from ...trajectory import WeightTrajectory
from ...trajectory.summary import other_snapshots
from ..engine import PredictedTensors
from ..plan import PredictionPlan
from ..selection import REFERENCE
from ..snapshot_predictions import MissingSnapshotsError
from ..tensor_sources import StateTensors, TensorSource


def _states(least: int) -> Callable[[WeightTrajectory], bool]:
    return lambda trajectory: trajectory.num_states >= least


def _along_training(least: int) -> Callable[[WeightTrajectory], bool]:
    return lambda trajectory: len(trajectory.tail) + 1 >= least or (not trajectory.tail and _states(least)(trajectory))


def _has_tail(trajectory: WeightTrajectory) -> bool:
    return bool(trajectory.tail)


def _always(trajectory: WeightTrajectory) -> bool:
    return True


@dataclass(frozen=True)
class Candidate:
    """A prediction that a gate evaluates.

    Args:
        predictor (`str` or [`Predictor`]):
            The predictor, by name or as an object.
        options (`Mapping[str, Any]`, *optional*):
            Fields of a predictor given by its name.
        name (`str`, *optional*):
            Name in result and card; made of the predictor and its fields by default.
        needs (`Callable[[WeightTrajectory], bool]`, *optional*):
            Whether the candidate differs from the others with a trajectory; always by default. A gate leaves it out if
            not, and if the trajectory lacks snapshots that the predictor reads.

    Raises:
        `ValueError`: for an unknown predictor, wrong fields, KNOWN (which is the requested prediction), or a predictor
            that rescales: it keeps the function of the model, so no loss can choose it.
    """

    predictor: str | Predictor
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    needs: Callable[[WeightTrajectory], bool] = _always

    def __post_init__(self) -> None:
        predictor = self.make()
        if not isinstance(predictor, Predictor):
            raise ValueError(f"a candidate is a predictor or its name, got {predictor!r:.100}")
        if self.options and not isinstance(self.predictor, str):
            raise ValueError(
                f"options={dict(self.options)} apply to a predictor given by name, got {predictor!r:.100}"
            )
        members = predictor.members if isinstance(predictor, Composition) else [predictor]
        if any(isinstance(member, Rescaler) for member in members):
            raise ValueError(
                f"{self.predictor!r:.100} rescales, which keeps the function, so no loss can choose it; rescale what"
                " the gate writes"
            )
        if not self.name:
            object.__setattr__(self, "name", self._default_name())

    def make(self) -> Predictor:
        """Return the predictor."""
        if not isinstance(self.predictor, str):
            return self.predictor
        try:
            return get_predictor(self.predictor, **self.options)
        except TypeError as error:
            raise ValueError(str(error)) from error

    def _default_name(self) -> str:
        kind, options = self.predictor, self.options
        if not isinstance(kind, str):
            kind, made = type(kind).__name__, kind
            options = {f.name: getattr(made, f.name) for f in fields(made) if f.init} if is_dataclass(made) else {}
        return ", ".join([kind, *(f"{name} {value}" for name, value in options.items())])


FAMILY = (
    Candidate("average", name="average of the states"),
    Candidate("ema", needs=_states(3)),
    Candidate("tail_average", needs=_has_tail),
    Candidate("tail_average", {"last": 2}, needs=_along_training(3)),
    Candidate("tail_average", {"shape": "sqrt"}, needs=_along_training(3)),
    Candidate("bema", needs=_along_training(3)),
    # towards the most forgotten state and away from it; of two states, half of the way is the average
    Candidate("task_vector", {"scale": -0.5}, needs=_states(3)),
    *(Candidate("task_vector", {"scale": scale}) for scale in (-0.25, 0.25, 0.5)),
    # half of the way to Θ1 is the average of the last two
    *(Candidate("task_vector", {"scale": scale, "since": 1}, needs=_states(3)) for scale in (-0.25, 0.5, 1.0)),
    *(Candidate("lines", {"alpha": alpha, "beta": 0.5}) for alpha in (-0.5, 0.0)),
    *(Candidate("shrink", {"factor": factor}) for factor in (0.9, 0.95, 1.05)),
    *(Candidate("start_interpolation", {"scale": scale}) for scale in (0.5, 0.75, 0.9, 1.1, 1.25, 1.5)),
    *(Candidate("start_interpolation", {"scale": scale, "slope": 1 - scale}) for scale in (0.5, 0.75)),
    *(Candidate(name) for name in ("branch_average", "model_stock", "james_stein", "spectral_filter")),
    *(Candidate(name) for name in ("jackknife", "shrunken_jackknife")),
)
"""What a gate evaluates besides Θ0, the other states and the requested prediction, where the trajectory allows it.

`rescale` is not among them: it keeps the function of the model, so the validation loss is the same for every factor.
"""


@dataclass(frozen=True)
class PlannedCandidate:
    """A candidate of one trajectory and how to write it.

    `plan` is that of the prediction; of a state, any plan of the trajectory. For `recipe` see [`GateResult`].
    """

    name: str
    tensors: TensorSource
    plan: PredictionPlan
    recipe: dict[str, Any]


def as_candidate(item: int | str | Predictor | Candidate) -> int | Candidate:
    """Return a candidate of a user's list: the index of a state, or a [`Candidate`]."""
    return item if isinstance(item, int | Candidate) else Candidate(item)


def plan_candidates(
    plan: PredictionPlan,
    given: Sequence[int | str | Predictor | Candidate] | None,
    recalibrates: bool,
    with_requested: bool = True,
) -> list[PlannedCandidate]:
    """List all candidates of a trajectory, Θ0 first.

    They are the requested prediction of `plan` at 1, 2, … steps and those that are `given`, by default the other
    states and [`FAMILY`]. Without `with_requested`, the requested prediction and Θ0 with recalibrated statistics are
    left out.

    Raises:
        `ValueError`: if two candidates have one name, or one does not fit the trajectory.
    """
    trajectory = plan.trajectory
    planned = [_state(plan, 0, REFERENCE, recalibrated=False)]
    if recalibrates and with_requested and any(role.is_batch_norm for role in trajectory.roles.values()):
        planned.append(_state(plan, 0, f"{REFERENCE}, BatchNorm recalibrated", recalibrated=True))
    if given is None:
        planned += [_state(plan, index, f"Θ{index}", recalibrates) for index in range(1, trajectory.num_states)]
        planned += [_state(plan, other.name, other.name, recalibrates) for other in other_snapshots(trajectory)]
    can_predict = with_requested and (len(plan.snapshots) > 1 or plan.rescaling is not None)
    for steps in range(1, plan.steps + 1) if can_predict else ():
        fewer = replace(plan, steps=steps)
        planned.append(_prediction(fewer.name, fewer, recalibrates))
    for item in map(as_candidate, FAMILY if given is None else given):
        if isinstance(item, int):
            planned.append(_state(plan, item, f"Θ{item}", recalibrates))
        elif candidate := _planned(plan, item, recalibrates, given is None, with_requested):
            planned.append(candidate)
    names = [candidate.name for candidate in planned]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two candidates of the gate have the name {min(twice)!r}; {REFERENCE} is always one")
    return planned


def _planned(
    plan: PredictionPlan, item: Candidate, recalibrates: bool, may_lack: bool, with_requested: bool
) -> PlannedCandidate | None:
    """Plan a candidate; `None` if it does not differ from the others, or may lack its snapshots and does."""
    predictor = item.make()
    is_requested = with_requested and plan.rescaling is None and predictor == plan.predictor
    if is_requested or not item.needs(plan.trajectory):
        return None  # the requested prediction is a candidate already
    try:
        own = plan.with_predictor(predictor)
    except MissingSnapshotsError:
        if may_lack:
            return None
        raise
    if len(own.snapshots) < 2:  # of Θ0 alone, nothing differs
        return None
    name, options = (item.predictor, dict(item.options)) if isinstance(item.predictor, str) else (item.name, None)
    return _prediction(item.name, own, recalibrates, name, options)


def _state(plan: PredictionPlan, state: int | str, name: str, recalibrated: bool) -> PlannedCandidate:
    recipe = {"predictor": None, "predictor_options": None, "steps": 0, "recalibrated": recalibrated, "state": state}
    unscaled = replace(plan, predictor=Average(), members=[], steps=1, rescaling=None)
    return PlannedCandidate(name, StateTensors(plan.trajectory, state), unscaled, recipe)


def _prediction(
    name: str,
    plan: PredictionPlan,
    recalibrated: bool,
    predictor: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> PlannedCandidate:
    recipe = {"predictor": predictor, "predictor_options": options, "steps": plan.steps}
    recipe |= {"recalibrated": recalibrated, "state": None}
    return PlannedCandidate(name, PredictedTensors(plan), plan, recipe)
