"""Suites: comparisons that are written down in YAML before they are run; `know-hf compare` runs them.

Keys of the file are the fields of [`Suite`]. Under `variants` there are changes of them, one of which is run with
`name:variant`; without a name it is the first. Suites of this project are in `recipes/compare`.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainingArguments

from ...config_files import check_keys, read_numbers
from ...schedule import ForgettingSchedule
from ..arms import Arm, known_step_arms, make_arm
from ..compare import compare_arms
from ..landscape import Landscape
from ..linear_probe import LinearProbe
from ..protocols import AsTheyAre, FineTuning, MeasuringProtocol
from ..report.comparison_report import ComparisonReport
from .suite_data import Inputs, Side
from .suite_task import ModelSpec, SuiteTask

SUITES_DIR = Path(__file__).parent

Part = TypeVar("Part")
_PROTOCOLS = {"fine_tuning": FineTuning, "linear_probe": LinearProbe, "as_they_are": AsTheyAre}


@dataclass(frozen=True)
class Suite:
    """A comparison as it is written down.

    Args:
        name, description (`str`): For the report.
        seeds (`int`): Number of trajectory seeds, counted from `first_seed`.
        inputs ([`Inputs`]): What rows become.
        source, target ([`Side`]): Where examples come from, and how many.
        model ([`ModelSpec`]): What is trained.
        schedule (`Mapping`): Fields of [`ForgettingSchedule`].
        training (`Mapping`): Fields of `TrainingArguments`.
        protocols (`tuple`): What is measured, the most important first.
        arms (`tuple[Arm, ...]`): What is compared.
        draws (`int`, *optional*, defaults to `1`): Downstream draws of each trajectory.
        trials_per_rate (`int`, *optional*, defaults to `4`): Trials of every arm at each learning rate.
        first_seed (`int`, *optional*, defaults to `0`): The first trajectory seed.
        landscape ([`Landscape`], *optional*): Picture of the loss.
    """

    name: str
    description: str
    seeds: int
    inputs: Inputs
    source: Side
    target: Side
    model: ModelSpec
    schedule: Mapping[str, Any]
    training: Mapping[str, Any]
    protocols: tuple[MeasuringProtocol, ...]
    arms: tuple[Arm, ...]
    draws: int = 1
    trials_per_rate: int = 4
    first_seed: int = 0
    landscape: Landscape | None = None
    content: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str) -> "Suite":
        """A suite from what its YAML file holds, without `variants`.

        Args:
            content (`Mapping[str, Any]`): The file's content.
            source (`str`): Where it comes from, for errors.

        Raises:
            `ValueError`: for keys that are missing or not known, and for values that are off.
        """
        content = read_numbers(content)
        names = [f.name for f in fields(cls) if f.name != "content"]
        check_keys(content, names, source)
        required = names[: names.index("draws")]
        if missing := [name for name in required if name not in content]:
            raise ValueError(f"{source} has no {missing[0]!r}; a suite needs {', '.join(required)}")
        read = dict(content)
        read["inputs"] = _part(Inputs, content["inputs"], f"inputs of {source}")
        for side in ("source", "target"):
            read[side] = _part(Side, content[side], f"{side} of {source}")
        read["model"] = _part(ModelSpec, content["model"], f"model of {source}")
        for name, kind in (("schedule", ForgettingSchedule), ("training", TrainingArguments)):
            _check_mapping(content[name], kind, f"{name} of {source}")
        _part(ForgettingSchedule, content["schedule"], f"schedule of {source}")
        read["protocols"] = tuple(_protocol(entry, source) for entry in content["protocols"])
        read["arms"] = tuple(make_arm(entry) for entry in content["arms"])
        if content.get("landscape") is not None:
            read["landscape"] = _part(Landscape, content["landscape"], f"landscape of {source}")
        return cls(**read, content=copy.deepcopy(dict(content)))

    @property
    def facts(self) -> dict[str, Any]:
        """What its results depend on, as it stands in the file; seeds and arms can be added later."""
        later = ("seeds", "first_seed", "arms", "description", "landscape", "draws", "trials_per_rate", "protocols")
        return {key: value for key, value in self.content.items() if key not in later}


def load_suite(name: str | Path) -> Suite:
    """Reads a suite.

    Args:
        name (`str` or `Path`): A YAML file, or the name of one in `recipes/compare`, which are installed with the
            package; with `:variant` behind it one of its variants.

    Raises:
        `FileNotFoundError`: when there is no such file.
        `ValueError`: when there is no such variant, or as [`Suite.from_dict`].
    """
    import yaml  # type: ignore[import-untyped]

    text, _, variant = str(name).partition(":")
    path = Path(text) if text.endswith((".yaml", ".yml")) else SUITES_DIR / f"{text}.yaml"
    if not path.exists():
        there = ", ".join(sorted(found.stem for found in SUITES_DIR.glob("*.yaml"))) or "none on this machine"
        raise FileNotFoundError(f"there is no suite {path}; give a YAML file, or one of these: {there}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no keys; see recipes/compare for suites")
    variants = content.pop("variants", {})
    if variant and variant not in variants:
        raise ValueError(f"{path} has no variant {variant!r}; it has {', '.join(variants) or 'none'}")
    if variants:
        chosen = variant or next(iter(variants))
        content = {**content, **variants[chosen], "name": f"{content.get('name')}:{chosen}"}
    return Suite.from_dict(content, str(path))


def run_suite(
    suite: Suite | str | Path,
    output_dir: str | Path,
    *,
    arms: Sequence[Arm | str | Mapping[str, Any]] | None = None,
    data: Mapping[str, str] | None = None,
    models: Mapping[str, str] | None = None,
    known: Mapping[str, str] | None = None,
    seeds: Sequence[int] | None = None,
    num_processes: int = 1,
    command: str | None = None,
    pages: bool = True,
) -> ComparisonReport:
    """Runs a suite: records its trajectories and compares the arms; resumes, and takes more arms or seeds.

    Args:
        suite ([`Suite`], `str` or `Path`): The suite, its file or name, see [`load_suite`].
        output_dir (`str` or `Path`): As of [`compare_arms`].
        arms (sequence, *optional*): Arms instead of the suite's, see [`make_arm`].
        data (`Mapping[str, str]`, *optional*): Folders to read the suite's datasets from, by their Hub ids.
        models (`Mapping[str, str]`, *optional*): Folders to read its pretrained models from, by their Hub ids.
        known (`Mapping[str, str]`, *optional*): Further KNOWN weights, from a name to a folder or Hub id. Each gets
            the arms that the shipped ones have, at one to three steps and as matched shrink; all of these where they
            have none.
        seeds (sequence of `int`, *optional*): Trajectory seeds instead of the suite's.
        num_processes, command, pages (*optional*): As of [`compare_arms`].

    Returns:
        [`ComparisonReport`]: printable.

    Raises:
        `ValueError`: when `data` or `models` name what the suite does not read.
        `ValueError`, `FileExistsError`, `RuntimeError`: as [`load_suite`] and [`compare_arms`].
    """
    if not isinstance(suite, Suite):
        suite = load_suite(suite)
    for what, given, read in (
        ("data", data, {suite.source.dataset, suite.target.dataset}),
        ("models", models, {suite.model.pretrained} - {None}),
    ):
        if other := sorted(set(given or {}) - read):
            raise ValueError(
                f"{what} names {other[0]!r}, which {suite.name} does not read; it reads"
                f" {', '.join(sorted(map(str, read))) or 'none'}"
            )
    chosen = [arm if isinstance(arm, Arm) else make_arm(arm) for arm in (suite.arms if arms is None else arms)]
    names = {arm.name for arm in chosen}
    for name, weights in (known or {}).items():
        further = known_step_arms(name=name, known=os.path.expanduser(weights))
        alike = [arm for shipped, arm in zip(known_step_arms(), further, strict=True) if shipped.name in names]
        chosen += alike or further
    task = SuiteTask(
        inputs=suite.inputs,
        source=suite.source,
        target=suite.target,
        model=suite.model,
        schedule=suite.schedule,
        training=suite.training,
        sources={name: os.path.expanduser(place) for name, place in (data or {}).items()},
        models={name: os.path.expanduser(place) for name, place in (models or {}).items()},
    )
    return compare_arms(
        task.task(suite.facts),
        output_dir,
        protocols=suite.protocols,
        arms=chosen,
        seeds=range(suite.first_seed, suite.first_seed + suite.seeds) if seeds is None else seeds,
        draws=suite.draws,
        trials_per_rate=suite.trials_per_rate,
        landscape=suite.landscape,
        num_processes=num_processes,
        name=suite.name,
        description=suite.description,
        command=command,
        pages=pages,
    )


def _part(kind: type[Part], content: Any, source: str) -> Part:
    _check_mapping(content, kind, source)
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in content.items()})
    except TypeError as error:
        raise ValueError(f"{source}: {error}") from error


def _check_mapping(content: Any, kind: type, source: str) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} must hold keys, got {content!r}")
    check_keys(content, [f.name for f in fields(kind)], source)


def _protocol(content: Mapping[str, Any], source: str) -> MeasuringProtocol:
    read = dict(content)
    kind = read.pop("kind", None)
    if kind not in _PROTOCOLS:
        raise ValueError(f"protocol of {source} is of kind {kind!r}; there are {', '.join(_PROTOCOLS)}")
    return _part(_PROTOCOLS[kind], read, f"protocol {kind} of {source}")
