"""Arms: ways to initialise the downstream task, by name or as JSON.

| name | weights | tuned options |
| --- | --- | --- |
| `naive` | Θ0, trained on all source data | |
| `trial-matched-naive` | Θ0 | seed of the new head and of the order of examples |
| `random` | newly initialised | |
| `pretrained` | weights that the training started from | |
| `known-step-N` | KNOWN at N steps | |
| `shrink` | every predicted weight of Θ0 times a constant | the constant |
| `matched-shrink-step-N` | every tensor of Θ0 times the factor by which KNOWN at N steps shrinks it | |
| `average`, `ema` | (moving) average of the states | decay of `ema` |
| `task-vector` | Θ0 + λ (Θ0 − Θ(S−1)) | λ, of both signs |
| `linear`, `log` | fits through the states, extrapolated one step | |
| `task-singular-vectors` | Θ0 + λ times the moves of the states, merged by TSV | λ, of both signs |
| `lines` | task vector scaled by depth | α |
| `state-K` | ΘK | |
| `compute-matched` | Θ0 trained further on all data, for the steps of the later states | |
| `oracle` | trained on 1/r times the source data | |
| `shuffled` | Θ0 with the values of each tensor in random order | |
| `rescale` | the same function with other norms of the weights | the factor |
| `rescale-F` | the same with a fixed factor, such as `rescale-0.5` | |
| `start-interpolation` | between the start and Θ0, or beyond Θ0 | how far |
| `model_stock`, `jackknife`, … | predictions from branches, see [`know_hf.predictors.branches`] | |
| `family` | Θ0, an average, a task vector or a shrink | which of them |
| `gate` | what a [`Gate`] chooses from its family on source validation examples | |
| `gate-few` | the same with as many of these examples as the target task has training labels | |
| `cross-fit` | what [`CrossFit`] chooses, on the halves of the training data that two branches have not seen | |

The name of any registered predictor is an arm too. A tuned option is chosen on validation data of the *target* task,
by training; a gate chooses on the *source* task, by forward passes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from ..config_files import build
from ..prediction import PredictionPlan, plan_prediction
from ..predictors import Predictor, get_predictor
from ..trajectory import WeightTrajectory
from .arm_weights import (
    ArmSources,
    chosen_by_cross_fit,
    chosen_by_gate,
    matched_shrink,
    moved_by_singular_vectors,
    predicted,
    rescaled,
    shuffled,
    trained_on,
)

_MODELS = {"fresh": "fresh_model", "pretrained": "pretrained_model", "oracle": "oracle_model"}
_REFERENCES = (*_MODELS, "shuffled")
_PLANNED = ("predicted", "matched_shrink", "gate", "cross_fit")
_KINDS = (*_REFERENCES, *_PLANNED, "state", "trained_on", "task_singular_vectors")
_OF_ONE_TRAINING = frozenset({"shrink", "rescale", "start_interpolation"})
_OF_THE_TAIL = frozenset({"tail_average", "bema"})  # of one training if its tail is recorded
_OF_BRANCHES = frozenset("branch_average model_stock james_stein spectral_filter jackknife shrunken_jackknife".split())
_OF_STATES = frozenset("task_vector average ema linear log lines".split())
_CONTROLS = _OF_STATES | _OF_ONE_TRAINING | _OF_THE_TAIL | _OF_BRANCHES  # predictors that learn nothing


@dataclass(frozen=True)
class Arm:
    """A way to initialise the downstream task.

    Args:
        name (`str`):
            Name in tables and reports.
        kind (`str`):
            `"state"` (a state of the trajectory), `"fresh"` (newly initialised), `"pretrained"` (the start of the
            training), `"oracle"` (trained on more data), `"shuffled"`, `"trained_on"` (Θ0 trained further),
            `"predicted"`, `"matched_shrink"` (Θ0 with each tensor scaled as a prediction scales it),
            `"task_singular_vectors"`, `"gate"` (the best candidate on source validation data) or `"cross_fit"` (the
            best on halves of the training data).
        description (`str`):
            For reports.
        predictor (`str`, *optional*, defaults to `"known"`):
            Name of the predictor of a `"predicted"` or `"matched_shrink"` arm, and of the requested prediction of a
            `"gate"`, which is one of its candidates.
        options (`Mapping[str, Any]`, *optional*):
            Fields of the predictor; `scale` of `"task_singular_vectors"`; `examples` of a `"gate"`: `"all"`, or
            `"few"` for as many as the target task has training labels.
        steps (`int`, *optional*, defaults to `1`):
            Recursive predictions.
        state (`int`, *optional*, defaults to `0`):
            Index of the state of a `"state"` arm.
        tuned (sequence of mappings, *optional*):
            Settings of options to choose from on validation data; each overrides `options`, and with `predictor` or
            `state` also that field: a choice among different predictions.
        known (`str`, *optional*):
            KNOWN weights, folder or Hub id; those of the comparison by default.
        norm (`"keep"` or `"predict"`, *optional*, defaults to `"keep"`):
            Whether a prediction changes the weights of normalisation layers.

    Raises:
        `ValueError`: If the kind is unknown, or the predictor is not given by its name.
    """

    name: str
    kind: str
    description: str
    predictor: str = "known"
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1
    state: int = 0
    tuned: tuple[Mapping[str, Any], ...] = ()
    known: str | None = None
    norm: Literal["keep", "predict"] = "keep"

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"arm {self.name!r} has the unknown kind {self.kind!r}; use {', '.join(_KINDS)}")
        if not isinstance(self.predictor, str):
            raise ValueError(
                f"predictor of arm {self.name!r} must be a name, got {self.predictor!r:.100}; register its class with"
                " register_predictor, and set its fields with options="
            )

    def check_options(self) -> None:
        """Raise a `ValueError` if the predictor of a setting does not take its options."""
        for arm in map(self.with_setting, self.settings):
            if arm.kind in _PLANNED:
                try:
                    arm.make_predictor()
                except (TypeError, ValueError) as error:
                    raise ValueError(f"arm {self.name!r}: {error}") from error

    def make_predictor(self) -> Predictor | None:
        """Return the predictor with its options; `None` for KNOWN without options, whose weights are given apart."""
        options = {name: value for name, value in self.options.items() if (self.kind, name) != ("gate", "examples")}
        return get_predictor(self.predictor, **options) if options or self.predictor != "known" else None

    @property
    def role(self) -> Literal["method", "control", "reference"]:
        """`"method"` if it claims to know something or to choose well, `"control"` if it learns nothing but could be
        used instead of naive, and `"reference"` otherwise."""
        if self.kind in _REFERENCES or (self.kind == "state" and self.state == 0 and not self.tuned):
            return "reference"
        if self.kind in ("gate", "cross_fit") or any("predictor" in setting for setting in self.tuned):
            return "method"
        is_learned = self.kind == "predicted" and not set(self.predictor.split("+")) <= _CONTROLS
        return "method" if is_learned else "control"

    @property
    def settings(self) -> tuple[Mapping[str, Any], ...]:
        """Settings to evaluate; one empty setting without tuned options."""
        return self.tuned or ({},)

    def with_setting(self, setting: Mapping[str, Any]) -> "Arm":
        """Return the arm without tuned options that one of `settings` stands for."""
        options = {**self.options, **setting}
        if "state" in options:
            return replace(self, kind="state", state=options["state"], options={}, tuned=())
        return replace(self, predictor=options.pop("predictor", self.predictor), options=options, tuned=())

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of what the weights are made with, of the sources and of the task."""
        if self.kind == "gate":
            return ("source", "target") if self.options.get("examples") == "few" else ("source",)
        if self.kind == "cross_fit":
            return ("source", "branch_trajectory")
        if self.kind == "trained_on":
            return ("train_further",)
        if self.kind in _MODELS:
            return (_MODELS[self.kind],)
        arms = (self, *map(self.with_setting, self.tuned))
        return ("branch_trajectory",) if any(arm.uses_branches for arm in arms) else ()

    @property
    def uses_branches(self) -> bool:
        """Whether the weights are made of branches."""
        is_of_branches = not _OF_BRANCHES.isdisjoint(self.predictor.split("+"))
        return self.kind == "cross_fit" or (self.kind in _PLANNED and is_of_branches)

    @property
    def uses_known(self) -> bool:
        """Whether the weights depend on those of KNOWN."""
        return self.kind in _PLANNED and self.predictor == "known"

    def training_cost(self, trajectory: WeightTrajectory) -> float | None:
        """Return the optimizer steps behind the weights relative to those of Θ0; `None` if they are unknown.

        A prediction from several states or from branches needs the whole recording, see [`recording`].
        """
        names, (first, *later) = set(self.predictor.split("+")), (state.steps for state in trajectory.states)
        if self.kind in ("fresh", "pretrained"):
            return 0.0
        if self.kind == "oracle":
            return None if trajectory.schedule is None else 1 / trajectory.schedule.ratio
        of_one = _OF_ONE_TRAINING | (_OF_THE_TAIL if trajectory.tail else frozenset())
        if self.kind == "shuffled" or (self.kind == "predicted" and names <= of_one):
            later = []
        elif self.uses_branches:
            later = [branch.steps for branch in trajectory.branches]
        elif self.kind == "state":
            later = later[: self.state]
        return 1 + sum(later) / first if first else None

    def recording(self, sources: ArmSources) -> WeightTrajectory:
        """Return the trajectory that the weights are made of: that of the states or that of the branches."""
        if not self.uses_branches or sources.branch_trajectory is None:
            return sources.trajectory
        return sources.branch_trajectory()

    def initial_model(self, sources: ArmSources, setting: Mapping[str, Any] | None = None) -> PreTrainedModel:
        """Return the model of [`initial_weights`]."""
        return self.initial_weights(sources, setting)[0]

    def initial_weights(
        self, sources: ArmSources, setting: Mapping[str, Any] | None = None
    ) -> tuple[PreTrainedModel, dict[str, Any] | None]:
        """Return the initial weights in float32, with BatchNorm statistics computed on the source data, and what a
        gate chose (see [`chosen_by_gate`]). The setting is one of `settings`.

        They are float32 for any dtype of the recording, as small learning rates hardly change bfloat16 weights. A
        predicted checkpoint is written to `sources.output_dir / name`.

        Raises:
            `ValueError`: If the sources lack what the arm needs, such as an oracle.
        """
        for needed in self.needs:
            if getattr(sources, needed) is None:
                raise ValueError(f"arm {self.name!r} needs {needed} of the sources; pass it, or leave out the arm")
        if (arm := self.with_setting(setting or {})) != self:
            return arm.initial_weights(sources)
        choice, folder = None, sources.output_dir / self.name
        sources = replace(sources, trajectory=self.recording(sources))
        if self.kind == "cross_fit":
            model, choice = chosen_by_cross_fit(sources, folder, self._plan(sources))
        elif self.kind == "gate":
            few = self.options.get("examples") == "few"
            model, choice = chosen_by_gate(sources, folder, self._plan(sources), few)
        else:
            model = self._weights(sources, folder)
        sources.recalibrate(model)
        return model, choice

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as [`make_arm`] takes them."""
        required, default = ("name", "kind", "description"), vars(Arm(self.name, self.kind, self.description))
        return {key: value for key, value in vars(self).items() if key in required or value != default[key]}

    def _weights(self, sources: ArmSources, folder: Path) -> PreTrainedModel:
        if self.kind == "state":
            if self.state >= sources.trajectory.num_states:
                raise ValueError(f"arm {self.name!r} needs state {self.state}, which {sources.trajectory} lacks")
            return sources.state(self.state)
        if self.kind in _MODELS:
            return sources.merged(getattr(sources, _MODELS[self.kind])())
        if self.kind == "task_singular_vectors":
            return moved_by_singular_vectors(sources, folder, self.options.get("scale", 1.0))
        if self.kind in ("shuffled", "trained_on"):
            return (shuffled if self.kind == "shuffled" else trained_on)(sources)
        first, _, last = self.predictor.rpartition("+")
        if self.kind == "predicted" and last == "rescale":
            arm = replace(self, predictor=first, options=self.options.get(first, {})) if first else NAIVE
            options = self.options.get(last, {}) if first else self.options
            return rescaled(sources, arm.initial_model(sources), options)
        make = matched_shrink if self.kind == "matched_shrink" else predicted
        return make(sources, folder, self._plan(sources))

    def _plan(self, sources: ArmSources) -> PredictionPlan:
        predictor = self.make_predictor()
        return plan_prediction(
            sources.trajectory,
            (self.known or sources.known) if predictor is None else None,
            self.steps,
            predictor=predictor,
            norm=self.norm,
            dtype=torch.float32,
            estimate_time=False,
        )


def make_arm(spec: str | Mapping[str, Any]) -> Arm:
    """Return an arm by its name, or from JSON.

    Args:
        spec (`str` or `Mapping`):
            A name of the table in the docstring of this module or of a predictor; or fields of [`Arm`]. A `name` of
            the table provides the missing fields; another name needs a `kind`, or is a prediction. An option that is
            given is not tuned.

    Raises:
        `ValueError`: If a name or field is unknown, or a value has the wrong type.
    """
    if isinstance(spec, str):
        return _by_name(spec)
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise ValueError(f"an arm needs a name, got {spec!r:.200}")
    name = spec["name"]
    try:
        arm = _by_name(name)
    except ValueError:
        arm = Arm(name, "predicted", f"prediction of {spec.get('predictor', 'known')}")
    options = spec.get("options")
    is_fixed = isinstance(options, Mapping) and any(options.keys() & setting.keys() for setting in arm.tuned)
    return build(Arm, {**vars(arm), "tuned": () if is_fixed else arm.tuned, **spec}, f"arm {name!r:.100}")


def known_arm(steps: int, ratio: float) -> Arm:
    """KNOWN at a number of steps, named by the data it stands for: `known-x4` for 2 steps at ratio 0.5."""
    times = f"{ratio**-steps:.3g}"
    return Arm(f"known-x{times}", "predicted", f"KNOWN at {steps} step(s), for {times} times the data", steps=steps)


def known_step_arms(steps: Sequence[int] = (1, 2, 3), name: str = "known", known: str | None = None) -> list[Arm]:
    """KNOWN at several numbers of steps, each with its matched shrink.

    Args:
        steps (sequence of `int`, *optional*, defaults to `(1, 2, 3)`):
            Numbers of recursive predictions.
        name (`str`, *optional*, defaults to `"known"`):
            Name of the weights: arms are `{name}-step-N` and `matched-shrink-{name}-step-N`, for `"known"`
            `matched-shrink-step-N`.
        known (`str`, *optional*):
            KNOWN weights, folder or Hub id; those of the comparison by default.
    """
    infix, title = ("", "KNOWN") if name == "known" else (f"{name}-", f"KNOWN ({name})")
    arms = []
    for count in steps:
        method = f"{title} at {count} step{'s' if count > 1 else ''}"
        shrink = f"every tensor times the factor by which {method} shrinks it"
        options: dict[str, Any] = {"steps": count, "known": known}
        arms.append(Arm(f"{name}-step-{count}", "predicted", method, **options))
        arms.append(Arm(f"matched-shrink-{infix}step-{count}", "matched_shrink", shrink, **options))
    return arms


def shrink_arm(factor: float) -> Arm:
    """Every predicted weight times a constant."""
    return Arm("shrink", "predicted", f"every weight times {factor:g}", predictor="shrink", options={"factor": factor})


NAIVE = Arm("naive", "state", "Θ0, trained on all source data")
RANDOM = Arm("random", "fresh", "newly initialised")
ORACLE = Arm("oracle", "oracle", "trained on 1/r times the source data")
AVERAGE = Arm("average", "predicted", "mean of all states", predictor="average")


def _tuned(option: str, *values: float) -> tuple[Mapping[str, Any], ...]:
    return tuple({option: value} for value in values)


def _baseline(name: str, predictor: str, description: str, tuned: tuple[Mapping[str, Any], ...] = ()) -> Arm:
    return Arm(name, "predicted", description, predictor=predictor, tuned=tuned, norm="predict")


_FACTORS = _tuned("factor", 0.95, 0.8, 0.65, 0.5)
_SCALES = _tuned("scale", -1.0, -0.5, 0.5, 1.0)
_LINES = tuple({"alpha": alpha, "beta": 1 - alpha} for alpha in (0.0, 0.25, 0.5, 0.75))
_PARTS = _tuned("scale", 0.5, 0.75, 1.25, 1.5)
_RESCALINGS = _tuned("factor", 0.25, 0.5, 0.75, 1.5)
_SEEDS = _tuned("seed", 0, 1)  # the first is that of naive
_MEMBERS: tuple[Mapping[str, Any], ...] = (
    {"state": 0},
    {"predictor": "average"},
    {"predictor": "task_vector", "scale": 0.5},
    {"predictor": "shrink", "factor": 0.65},
)
GATE = Arm("gate", "gate", "chosen by a gate on source validation data", steps=2)
NAMED_ARMS = (
    NAIVE,
    replace(NAIVE, name="trial-matched-naive", description="Θ0 with a choice of seeds and finer rates", tuned=_SEEDS),
    RANDOM,
    Arm("pretrained", "pretrained", "weights that the training started from"),
    Arm("shrink", "predicted", "every weight times a constant", "shrink", tuned=_FACTORS),
    replace(AVERAGE, norm="predict"),
    _baseline("ema", "ema", "exponential moving average of the states", _tuned("decay", 0.3, 0.5, 0.7, 0.9)),
    _baseline("task-vector", "task_vector", "a multiple of Θ0 − Θ(S−1) added to Θ0", _SCALES),
    _baseline("linear", "linear", "line through the states, extrapolated one step"),
    _baseline("log", "log", "logarithmic fit to the states, extrapolated one step"),
    _baseline("lines", "lines", "task vector scaled by depth (LiNeS)", _LINES),
    Arm("task-singular-vectors", "task_singular_vectors", "moves of the states, merged by TSV", tuned=_SCALES),
    Arm("compute-matched", "trained_on", "Θ0 trained further on all data, for the steps of the later states"),
    ORACLE,
    Arm("shuffled", "shuffled", "Θ0 with the values of each tensor in random order"),
    Arm("family", "predicted", "choice among Θ0 and predictions, by training", "average", tuned=_MEMBERS),
    GATE,
    replace(
        GATE,
        name="gate-few",
        description="chosen by a gate on as many source examples as the target has labels",
        options={"examples": "few"},
    ),
    Arm("cross-fit", "cross_fit", "chosen on halves of the training data that branches have not seen", "average"),
)

_FURTHER_ARMS = (  # not by default: not every trajectory has a start, nor every model a symmetry
    Arm(
        "start-interpolation", "predicted", "between the start and Θ0, or beyond", "start_interpolation", tuned=_PARTS
    ),
    Arm("rescale", "predicted", "the same function with other norms of the weights", "rescale", tuned=_RESCALINGS),
)


def _by_name(name: str) -> Arm:
    named = {arm.name: arm for arm in (*NAMED_ARMS, *_FURTHER_ARMS)}
    number = name.rpartition("-")[2]
    if number.isdigit() and int(number) > 0:
        state = Arm(f"state-{number}", "state", f"Θ{number}", state=int(number))
        named |= {arm.name: arm for arm in (state, *known_step_arms([int(number)]))}
    if name in named:
        return named[name]
    if (factor := name.removeprefix("rescale-")) != name and re.fullmatch(r"\d+(\.\d+)?", factor):
        return Arm(name, "predicted", f"the same function, rescaled by {factor}", "rescale", {"factor": float(factor)})
    try:
        get_predictor(name)
    except ValueError as error:
        numbered = ("known-step-N", "matched-shrink-step-N", "state-K", "rescale-F")
        known = ", ".join([*(arm.name for arm in (*NAMED_ARMS, *_FURTHER_ARMS)), *numbered])
        raise ValueError(f"unknown arm {name!r}; use {known} or the name of a predictor") from error
    except TypeError:  # it exists, and needs options
        pass
    return Arm(name, "predicted", f"prediction of {name}", predictor=name)
