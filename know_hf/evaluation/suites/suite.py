"""Suites: comparisons written as YAML before they run. `know-hf compare` runs them.

The keys of a file are the fields of [`Suite`]. Its `variants` are named changes to these keys: `name:variant` selects
one, `name` alone the first.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    TypeAdapter,
    ValidationError,
)
from transformers import TrainingArguments

from ...config_files import check_types, nearest, read_numbers, read_yaml
from ...schedule import ForgettingSchedule
from ...terminal import shorten_words
from ..arms import Arm, make_arm
from ..landscape import Landscape
from ..linear_probe import LinearProbe
from ..protocols import FineTuning, ZeroShot
from .suite_data import Inputs, Side
from .suite_model import ModelSpec

SUITES_DIR = Path(__file__).parent

_PROTOCOLS = {"fine_tuning": FineTuning, "linear_probe": LinearProbe, "zero_shot": ZeroShot}
_PARTS: dict[str, type] = {
    "inputs": Inputs,
    "source": Side,
    "target": Side,
    "model": ModelSpec,
    "schedule": ForgettingSchedule,
    "training": TrainingArguments,
    "landscape": Landscape,
    **_PROTOCOLS,
}
# Further seeds, arms and draws extend a comparison; these keys do not tell one comparison from another.
_EXTENSIBLE = ("seeds", "first_seed", "arms", "description", "landscape", "draws", "trials_per_rate", "protocols")


def _check_fields(cls: type, content: dict[str, Any]) -> dict[str, Any]:
    names = [f.name for f in fields(cls)]
    for name in content:
        if name not in names:
            raise ValueError(f"unknown key {name!r}; {nearest(str(name), names)}")
    check_types(content, cls)
    if cls is ForgettingSchedule:
        cls(**content)
    return content


def _kind(content: Any) -> str | None:
    kind = content.get("kind") if isinstance(content, Mapping) else None
    return "zero_shot" if kind == "as_they_are" else kind  # its name in 0.1


def _without_kind(content: Any) -> Any:
    # the output of a validator is Python, where strict pydantic takes no list for a tuple
    return {key: tuple(v) if isinstance(v, list) else v for key, v in content.items() if key != "kind"}


_KINDS = f"kind must be one of {', '.join(_PROTOCOLS)}"
ProtocolEntry = Annotated[
    Annotated[FineTuning, BeforeValidator(_without_kind), Tag("fine_tuning")]
    | Annotated[LinearProbe, BeforeValidator(_without_kind), Tag("linear_probe")]
    | Annotated[ZeroShot, BeforeValidator(_without_kind), Tag("zero_shot")],
    Discriminator(_kind, custom_error_type="protocol_kind", custom_error_message=_KINDS),
]


Count = Annotated[int, Field(gt=0, le=10_000)]


@dataclass(frozen=True)
class Suite:
    """A comparison as written in YAML.

    Args:
        name, description (`str`):
            Name and description for the report.
        seeds (`int`):
            Number of trajectory seeds, counted from `first_seed`.
        inputs ([`Inputs`]):
            Model inputs that rows are converted to.
        source, target ([`Side`]):
            Examples of the source task and of the target task.
        model ([`ModelSpec`]):
            Model to train.
        schedule (`Mapping[str, Any]`):
            Fields of [`ForgettingSchedule`]. Seed and classes are set by the suite.
        training (`Mapping[str, Any]`):
            Fields of `TrainingArguments` for Θ0. Later stages differ by the schedule.
        protocols (`tuple`):
            Measuring protocols, the most important first.
        arms (`tuple[Arm, ...]`):
            Arms to compare.
        draws (`int`, *optional*, defaults to `1`):
            Downstream draws of each trajectory.
        trials_per_rate (`int`, *optional*, defaults to `4`):
            Tuning trials of each arm at each learning rate.
        first_seed (`int`, *optional*, defaults to `0`):
            First trajectory seed.
        landscape ([`Landscape`], *optional*):
            Loss landscape to plot.
        content (`Mapping[str, Any]`, *optional*):
            Content of the YAML file.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    name: str
    description: str
    seeds: Count
    inputs: Inputs
    source: Side
    target: Side
    model: ModelSpec
    schedule: Annotated[Mapping[str, Any], AfterValidator(partial(_check_fields, ForgettingSchedule))]
    training: Annotated[Mapping[str, Any], AfterValidator(partial(_check_fields, TrainingArguments))]
    protocols: tuple[ProtocolEntry, ...]
    arms: tuple[Annotated[Arm, PlainValidator(make_arm)], ...]
    draws: Count = 1
    trials_per_rate: Count = 4
    first_seed: int = 0
    landscape: Landscape | None = None
    content: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str) -> "Suite":
        """Build a suite from the content of its YAML file, without `variants`; errors name the file, `source`.

        Raises:
            `ValueError`: if a key is missing or unknown, or a value is invalid.
        """
        content = read_numbers(content)
        if "content" in content:
            raise ValueError(f"{source}: unknown key 'content'")
        # JSON, whose arrays strict pydantic takes for tuples
        document = json.dumps({**content, "content": content}, default=str)
        try:
            return TypeAdapter(cls).validate_json(document)
        except ValidationError as error:
            raise ValueError(shorten_words(f"{source}: {_explain(error)}")) from None

    @property
    def identity(self) -> dict[str, Any]:
        """Keys of the file that the results depend on."""
        return {key: value for key, value in self.content.items() if key not in _EXTENSIBLE}


def load_suite(name: str | Path) -> Suite:
    """Load a suite.

    Args:
        name (`str` or `Path`):
            Path of a YAML file, or name of a suite of the package. `:variant` after it selects a variant.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if there is no such variant, and as [`Suite.from_dict`].
    """
    text, _, variant = str(name).partition(":")
    path = Path(text) if text.endswith((".yaml", ".yml")) else SUITES_DIR / f"{text}.yaml"
    if not path.exists():
        names = sorted(file.stem for file in SUITES_DIR.glob("*.yaml"))
        available = f"available: {', '.join(names)} (or give the path of a YAML file)"
        hint = f"did you mean {path.stem!r}?" if path.stem in names else available
        raise FileNotFoundError(f"unknown suite {text!r}; {hint}")
    content = read_yaml(path, f"see the suites in {SUITES_DIR}")
    variants = content.pop("variants", None) or {}
    if not isinstance(variants, dict) or not all(isinstance(variant, dict) for variant in variants.values()):
        raise ValueError(f"variants of {path} must map names to keys of a suite, got {variants!r:.60}")
    if variant and variant not in variants:
        raise ValueError(f"{path} has no variant {variant!r}; its variants: {', '.join(variants) or 'none'}")
    if variants:
        variant = variant or next(iter(variants))
        content = {**content, **variants[variant], "name": f"{content.get('name')}:{variant}"}
    return Suite.from_dict(content, str(path))


def suite_template() -> str:
    """Return a commented suite to edit, which runs as it is."""
    return (SUITES_DIR / "template" / "my_suite.yaml").read_text(encoding="utf-8")


def _explain(error: ValidationError) -> str:
    """Describe the first problem, unknown keys before others: a key may be missing because it is misspelled."""
    first = min(error.errors(), key=lambda entry: entry["type"] != "unexpected_keyword_argument")
    path = [part for part in first["loc"] if part not in _PROTOCOLS]
    parent = next((part for part in reversed(first["loc"][:-1]) if isinstance(part, str)), "")
    names = [f.name for f in fields(_PARTS.get(parent, Suite)) if f.name != "content"]
    key = ".".join(map(str, path))
    if first["type"] == "unexpected_keyword_argument":
        return f"unknown key {key!r}; {nearest(str(path[-1]), names)}"
    if first["type"] == "missing":
        return f"key {key!r} is missing; {parent or 'a suite'} has the keys {', '.join(names)}"
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}"
    return f"{key}: {first['msg'].removeprefix('Input ')}, got {first['input']!r:.200}"
