"""Base of the cards of a trajectory and of a checkpoint: what the recording says about itself."""

import logging as python_logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..config_files import default_of
from ..local_paths import resolved_name
from ..markdown import Table, clean, code, python_call
from ..schedule import ForgettingSchedule
from ..tasks.arguments import RecordArguments
from ..trajectory import StateRecord, WeightTrajectory
from ..trajectory.manifest import Manifest
from ..trajectory.summary import loss_names, other_snapshots
from .base import Card, Source, shown_folder, source
from .model_loading import architecture, auto_class, read_json

logger: python_logging.Logger = logging.get_logger(__name__)

_LICENSE_KEYS = ("license", "license_name", "license_link")


class About(TypedDict, total=False):
    """What the files of a trajectory do not say, or what replaces it. All keys are optional.

    The license is inherited from `base_card`, the front matter of the base model's card; by default from that in the
    base model's folder or in the cache of the Hub.
    """

    repo_id: str | None  # Hub repo of the files
    title: str  # heading
    base_model: str | None  # that the training started from; by default the recorded one
    base_revision: str | None
    base_card: ModelCardData | None
    license: str | None  # in place of the inherited one
    datasets: Mapping[str, str | None]  # from Hub id or folder to revision; by default those in record.json
    trajectory_id: str | None  # Hub repo; by default the one that it was opened from
    trajectory_revision: str | None
    picture: str | None  # path of the forgetting curve in the card


@dataclass(kw_only=True)
class RecordedCard(Card):
    """Common part of the cards of a trajectory and of a checkpoint, JSON values only.

    States are in the order of the trajectory, full data first; `others` are the start, tail states and branches.
    """

    base_model: Source | None  # see [`About`]
    datasets: list[Source]
    schedule: dict[str, Any] | None  # fields of the [`ForgettingSchedule`]
    states: list[dict[str, Any]]  # name, num_examples, size in words, steps, metrics, bytes
    architecture: str | None
    load_with: str | None  # class of transformers that loads the model, or the base of an adapter
    pipeline_tag: str | None  # task on the Hub
    adapter_type: str | None  # such as LORA
    recorded_with: dict[str, str]  # library versions
    others: list[dict[str, Any]] = field(default_factory=list)
    record_arguments: dict[str, Any] | None = None  # those of know-hf record that differ from the defaults
    picture: str | None = None
    trajectory_folder: str = "trajectory/"

    @property
    def versions(self) -> dict[str, Mapping[str, str]]:
        """Columns of the table of library versions."""
        return {"recorded with": self.recorded_with}

    @property
    def versions_table(self) -> Table:
        rows = [
            [code(name), *(column.get(name, "–") for column in self.versions.values())] for name in self.recorded_with
        ]
        return [["library", *self.versions], *rows]

    @property
    def states_table(self) -> Table:
        states = sorted((*self.states, *self.others), key=lambda state: state["name"] != "start")
        names = sorted({name for state in states for name in state["metrics"]})
        rows = [["state", "examples", "steps", *map(code, names)]]
        for state in states:
            examples = state["size"] if state["num_examples"] is None else f"{state['num_examples']:,}"
            metrics = [f"{state['metrics'][name]:.4g}" if name in state["metrics"] else "–" for name in names]
            rows.append([state["name"], examples, f"{state['steps']:,}", *metrics])
        return rows

    @property
    def ratio(self) -> float | None:
        return None if self.schedule is None else self.schedule["ratio"]

    @property
    def relative_cost(self) -> float | None:
        """Cost of one epoch for every state, in epochs on all data: Σ r^k."""
        return None if self.ratio is None else sum(self.ratio**k for k in range(len(self.states)))

    @property
    def not_forgotten(self) -> list[str]:
        """Losses that are no higher in the last state than in Θ0."""
        first, last = (self.states[k]["metrics"] for k in (0, -1))
        return [name for name in loss_names(first) if len(self.states) > 1 and last.get(name, math.inf) <= first[name]]

    @property
    def schedule_call(self) -> str | None:
        """Python code of the schedule."""
        if self.schedule is None:
            return None
        arguments = {name: self.schedule[name] for name in ("ratio", "num_states")}
        return python_call("ForgettingSchedule", arguments | _without_defaults(ForgettingSchedule(**self.schedule)))

    def front_matter(self, tags: Sequence[str], library_name: str | None, **more: Any) -> ModelCardData:
        """Return base model, datasets, library, license and tags."""
        base_model = self.base_model["name"] if self.base_model is not None and self.base_model["on_hub"] else None
        if base_model is not None:
            more["base_model_relation"] = "finetune" if self.adapter_type is None else "adapter"
        adapter_tags = [] if self.adapter_type is None else [clean(self.adapter_type).lower()]
        return ModelCardData(
            base_model=base_model,
            datasets=[dataset["name"] for dataset in self.datasets if dataset["on_hub"]] or None,
            library_name=library_name,
            tags=["know_hf", *tags, *adapter_tags],
            **self.license,
            **more,
        )


def recorded_fields(trajectory: WeightTrajectory, about: About, kind: str) -> dict[str, Any]:
    """Return the fields of a [`RecordedCard`]; `kind` is the subject of the card, for its title."""
    for repo_id in (about.get("repo_id"), about.get("trajectory_id")):
        if repo_id is not None:
            validate_repo_id(repo_id)
    adapter = read_json(trajectory.path / "adapter_config.json")
    arguments = _record_arguments(trajectory.path.resolve())
    recorded = trajectory.base_model or adapter.get("base_model_name_or_path")
    base_model = about.get("base_model") or (resolved_name(trajectory.path, str(recorded)) if recorded else None)
    revision = about.get("base_revision") or trajectory.base_revision or adapter.get("revision")
    datasets = about.get("datasets")
    shown, folder = None, shown_folder(trajectory.path)
    if arguments is not None:
        folder = f"{shown_folder(trajectory.path.parent)}{trajectory.path.name}/"
        if base_model == arguments.model:
            revision = revision or arguments.model_revision
        if datasets is None:
            datasets = {arguments.dataset: arguments.dataset_revision}
        # without folders of this machine
        names = {key: source(getattr(arguments, key))["name"] for key in ("model", "dataset")}
        shown = {key: value for key, value in _without_defaults(arguments).items() if key != "output_dir"} | names
    base = None if not base_model else source(str(base_model), revision)
    model_class = architecture(read_json(trajectory.path / "config.json"), adapter)
    load_with, pipeline_tag = auto_class(model_class, adapter.get("task_type"))
    subject = base["name"].rpartition("/")[2] if base else model_class
    license = about.get("license")
    return {
        "title": about.get("title") or (f"{kind} of {subject}" if subject else kind),
        "repo_id": about.get("repo_id"),
        "license": {"license": license} if license else _inherited_license(base, base_model, about.get("base_card")),
        "base_model": base,
        "datasets": [source(name, revision) for name, revision in (datasets or {}).items()],
        "schedule": trajectory.schedule.to_dict() if trajectory.schedule else None,
        "states": [_state(record) for record in trajectory.states],
        "others": [_state(record) for record in other_snapshots(trajectory)],
        "trajectory_folder": folder,
        "architecture": model_class,
        "load_with": load_with,
        "pipeline_tag": pipeline_tag,
        "adapter_type": str(adapter.get("peft_type") or "adapter") if trajectory.is_adapter else None,
        "recorded_with": Manifest.read(trajectory.path).library_versions,
        "record_arguments": shown,
        "picture": about.get("picture"),
    }


def _state(record: StateRecord) -> dict[str, Any]:
    return {
        "name": record.symbol,
        "num_examples": record.num_examples,
        "size": record.examples,
        "steps": record.steps,
        "metrics": dict(record.metrics),
        "bytes": sum(file.size for file in record.files),
    }


def _without_defaults(instance: Any) -> dict[str, Any]:
    values = asdict(instance)
    return {field.name: values[field.name] for field in fields(instance) if values[field.name] != default_of(field)}


def _record_arguments(trajectory: Path) -> RecordArguments | None:
    """Read `record.json` beside a trajectory in the output folder of `know-hf record`."""
    path = trajectory.with_name("record.json")
    content = read_json(path) if trajectory.name == "trajectory" else {}
    try:
        return RecordArguments.from_dict(content, str(path)) if content else None
    except ValueError as error:
        logger.warning(f"could not read record.json, so the card omits the recording arguments: {error}")
        return None


def _inherited_license(base: Source | None, base_model: str | None, base_card: ModelCardData | None) -> dict[str, Any]:
    if base is None or base_model is None:
        return {}
    metadata = _local_metadata(base, base_model) if base_card is None else base_card.to_dict()
    has_license = bool(metadata.get("license"))
    return {key: metadata[key] for key in _LICENSE_KEYS if has_license and isinstance(metadata.get(key), str | list)}


def _local_metadata(base: Source, base_model: str) -> dict[str, Any]:
    """Return the front matter of the base model's card if it is on this machine."""
    cached = try_to_load_from_cache(base_model, "README.md", revision=base["revision"]) if base["on_hub"] else None
    path = Path(cached) if isinstance(cached, str) else Path(base_model, "README.md")
    if not path.is_file():
        return {}
    try:
        return metadata_load(path) or {}
    except (ValueError, yaml.YAMLError) as error:
        logger.warning(f"the card omits the license: the front matter of {path} is invalid: {clean(error)}")
        return {}
