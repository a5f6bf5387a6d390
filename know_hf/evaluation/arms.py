"""Arms: the ways to initialise the downstream task that are compared with each other, by name or as JSON.

| name | weights | options that are tuned |
| --- | --- | --- |
| `naive` | Θ0, trained on all source data | |
| `random` | newly initialised | |
| `pretrained` | those that the training started from | |
| `known-step-N` | KNOWN at N steps | |
| `shrink` | every predicted weight of Θ0 times a constant | the constant |
| `matched-shrink-step-N` | every tensor of Θ0 times the factor by which KNOWN at N steps shrinks it | |
| `average`, `ema` | (moving) average of the states | of `ema` the decay |
| `task-vector` | Θ0 + λ (Θ0 - Θ(S-1)) | λ, of both signs |
| `linear`, `log` | fits through the states, read one step on | |
| `task-singular-vectors` | Θ0 + λ times what TSV merges the moves of the states into | λ, of both signs |
| `lines` | the task vector scaled by depth | α |
| `state-K` | ΘK by itself | |
| `compute-matched` | Θ0 trained on, for as many steps as the later states took, on all data | |
| `oracle` | really trained on 1/r times the source data | |
| `shuffled` | Θ0 with the numbers of each tensor in random order: the worst there is | |

Any registered predictor's name is an arm too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from transformers import PreTrainedModel

from ..config_files import check_keys
from ..predictors import get_predictor
from .arm_weights import ArmSources, initial_model

Kind = Literal[
    "state",
    "fresh",
    "pretrained",
    "oracle",
    "shuffled",
    "trained_on",
    "predicted",
    "matched_shrink",
    "task_singular_vectors",
]
_REFERENCES = ("fresh", "pretrained", "oracle", "shuffled")
_CONTROLS = ("shrink", "task_vector", "average", "ema", "linear", "log", "lines")  # predictors that learn nothing


@dataclass(frozen=True)
class Arm:
    """One way to get initial weights.

    Args:
        name (`str`): What tables and reports call it.
        kind (`str`): `"state"` (a state of the trajectory as it is), `"fresh"` (newly initialised), `"pretrained"`
            (what the training started from), `"oracle"` (really trained on more data), `"shuffled"`, `"trained_on"`
            (Θ0 trained further), `"predicted"`, `"matched_shrink"` (of a prediction only the factor by which it
            shrinks each tensor) or `"task_singular_vectors"`.
        description (`str`): For people.
        predictor (`str`, *optional*, defaults to `"known"`): Name of the predictor of a `"predicted"` or
            `"matched_shrink"` arm.
        options (`Mapping[str, Any]`, *optional*): Fields of the predictor, or `scale` of `"task_singular_vectors"`.
        steps (`int`, *optional*, defaults to `1`): Recursive predictions.
        state (`int`, *optional*, defaults to `0`): Index of the state of a `"state"` arm.
        tuned (sequence of mappings, *optional*): Settings of options that are tried, one of which validation data
            chooses; each goes before `options`.
        known (`str`, *optional*): KNOWN weights, folder or Hub id; by default those of the comparison.
        norm (`"keep"` or `"predict"`, *optional*, defaults to `"keep"`): Whether a prediction changes the weights of
            normalisation layers.

    Raises:
        `ValueError`: for an unknown kind.
    """

    name: str
    kind: Kind
    description: str
    predictor: str = "known"
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1
    state: int = 0
    tuned: tuple[Mapping[str, Any], ...] = ()
    known: str | None = None
    norm: Literal["keep", "predict"] = "keep"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"arm {self.name!r} is of kind {self.kind!r}; there are {', '.join(get_args(Kind))}")

    @property
    def role(self) -> Literal["method", "control", "reference"]:
        """`"method"` for what claims to know something, `"control"` for what is trivial but could be chosen, and
        `"reference"` for what nobody would choose instead of naive."""
        if self.kind in _REFERENCES or (self.kind == "state" and self.state == 0):
            return "reference"
        return "method" if self.kind == "predicted" and self.predictor not in _CONTROLS else "control"

    @property
    def is_candidate(self) -> bool:
        """Whether a user could choose this arm instead of naive; the others are points of reference."""
        return self.role != "reference"

    @property
    def settings(self) -> tuple[Mapping[str, Any], ...]:
        """What is tried of its own options; one empty setting where it has none to tune."""
        return self.tuned or ({},)

    def initial_model(self, sources: ArmSources, setting: Mapping[str, Any] | None = None) -> PreTrainedModel:
        """Makes the initial weights, BatchNorm statistics measured on the source data.

        Args:
            sources ([`ArmSources`]): What they are made from; a predicted checkpoint is written to
                `sources.output_dir / name`, in place of an earlier one.
            setting (`Mapping[str, Any]`, *optional*): One of `settings`.

        Raises:
            `ValueError`: when the sources lack what it is made from, such as an oracle.
        """
        return initial_model(replace(self, options={**self.options, **(setting or {})}), sources)

    def to_dict(self) -> dict[str, Any]:
        """Its fields, less those at their defaults; what [`make_arm`] takes."""
        kept = {}
        for f in fields(self):
            value = getattr(self, f.name)
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            if value != default:
                kept[f.name] = [dict(setting) for setting in value] if f.name == "tuned" else value
        return kept


def make_arm(spec: str | Mapping[str, Any]) -> Arm:
    """An arm by its name, or from JSON.

    Args:
        spec (`str` or `Mapping`): A name of the table in this module's docstring or of a predictor; or the fields of
            [`Arm`], where a `name` of the table gives those that are left out, and any other one needs a `kind`, or
            else is a prediction. An option that is given is not tuned.

    Raises:
        `ValueError`: for a name or field that is not known.
    """
    if isinstance(spec, str):
        return _by_name(spec)
    known_fields = [f.name for f in fields(Arm)]
    if "name" not in spec:
        raise ValueError(f"an arm needs a name, got {dict(spec)}")
    name = spec["name"]
    check_keys(spec, known_fields, f"arm {name!r}")
    given = dict(spec)
    if "tuned" in given:
        given["tuned"] = tuple(dict(setting) for setting in given["tuned"])
    try:
        arm = _by_name(name)
    except ValueError:
        arm = Arm(name, "predicted", f"prediction of {given.get('predictor', 'known')}")
    fixed = set(given.get("options", ()))
    if "tuned" not in given and any(fixed & set(setting) for setting in arm.tuned):
        given["tuned"] = ()  # what is given is not to be tuned
    return replace(arm, **given)


def known_arm(steps: int, ratio: float) -> Arm:
    """KNOWN at a number of steps, named by the amount of data it stands for: `known-x4` for 2 steps at ratio 0.5."""
    times = f"{ratio**-steps:.3g}"
    return Arm(
        f"known-x{times}", "predicted", f"KNOWN, {steps} step(s), standing for {times} times the data", steps=steps
    )


def known_step_arms(steps: Sequence[int] = (1, 2, 3), name: str = "known", known: str | None = None) -> list[Arm]:
    """KNOWN at several numbers of steps, and what remains of each when only its shrinking is kept.

    Args:
        steps (sequence of `int`, *optional*): Numbers of recursive predictions.
        name (`str`, *optional*, defaults to `"known"`): What the weights are called: arms are `{name}-step-N` and
            `matched-shrink-{name}-step-N`, of `"known"` only `matched-shrink-step-N`.
        known (`str`, *optional*): KNOWN weights, folder or Hub id; by default those of the comparison.
    """
    infix = "" if name == "known" else f"{name}-"
    arms = []
    for count in steps:
        of = f"{name.upper() if name == 'known' else f'KNOWN ({name})'} at {count} step{'s' if count > 1 else ''}"
        arms.append(Arm(f"{name}-step-{count}", "predicted", of, steps=count, known=known))
        arms.append(
            Arm(
                f"matched-shrink-{infix}step-{count}",
                "matched_shrink",
                f"every tensor times the factor by which {of} shrinks it",
                steps=count,
                known=known,
            )
        )
    return arms


def shrink_arm(factor: float) -> Arm:
    """Every predicted weight times a constant."""
    return Arm("shrink", "predicted", f"every weight times {factor:g}", predictor="shrink", options={"factor": factor})


NAIVE = Arm("naive", "state", "Θ0, trained on all source data")
RANDOM = Arm("random", "fresh", "newly initialised")
ORACLE = Arm("oracle", "oracle", "really trained on 1/r times the source data")
AVERAGE = Arm("average", "predicted", "mean of all states", predictor="average")

_BOTH_SIGNS: tuple[Mapping[str, Any], ...] = tuple({"scale": scale} for scale in (-1.0, -0.5, 0.5, 1.0))
_NAMED = {
    arm.name: arm
    for arm in (
        NAIVE,
        RANDOM,
        Arm("pretrained", "pretrained", "the weights that the training started from"),
        ORACLE,
        Arm("shuffled", "shuffled", "Θ0 with the numbers of each tensor in random order"),
        Arm(
            "shrink",
            "predicted",
            "every weight times a constant",
            predictor="shrink",
            tuned=tuple({"factor": factor} for factor in (0.95, 0.8, 0.65, 0.5)),
        ),
        replace(AVERAGE, norm="predict"),
        Arm(
            "ema",
            "predicted",
            "exponential moving average of the states",
            predictor="ema",
            tuned=tuple({"decay": decay} for decay in (0.3, 0.5, 0.7, 0.9)),
            norm="predict",
        ),
        Arm(
            "task-vector",
            "predicted",
            "a multiple of Θ0 - Θ(S-1) added",
            predictor="task_vector",
            tuned=_BOTH_SIGNS,
            norm="predict",
        ),
        Arm("linear", "predicted", "line through the states, one step on", predictor="linear", norm="predict"),
        Arm("log", "predicted", "logarithmic fit to the states, one step on", predictor="log", norm="predict"),
        Arm(
            "lines",
            "predicted",
            "task vector scaled by depth (LiNeS)",
            predictor="lines",
            tuned=tuple({"alpha": alpha, "beta": 1 - alpha} for alpha in (0.0, 0.25, 0.5, 0.75)),
            norm="predict",
        ),
        Arm(
            "task-singular-vectors",
            "task_singular_vectors",
            "the moves of the states, merged by their singular vectors (TSV)",
            tuned=_BOTH_SIGNS,
        ),
        Arm("compute-matched", "trained_on", "Θ0 trained on for the steps of the later states, on all data"),
    )
}


def _by_name(name: str) -> Arm:
    if name in _NAMED:
        return _NAMED[name]
    prefix, _, number = name.rpartition("-")
    if number.isdigit() and int(number) > 0:
        if prefix == "state":
            return Arm(name, "state", f"Θ{number} by itself", state=int(number))
        for arm in known_step_arms([int(number)]):
            if arm.name == name:
                return arm
    if _is_predictor(name):
        return Arm(name, "predicted", f"prediction of {name}", predictor=name)
    stems = "known-step-N, matched-shrink-step-N, state-K"
    raise ValueError(f"unknown arm {name!r}; there are {', '.join(_NAMED)}, {stems} and the names of predictors")


def _is_predictor(name: str) -> bool:
    try:
        get_predictor(name)
    except TypeError:  # it needs options, so there is one
        return True
    except ValueError:
        return False
    return True
