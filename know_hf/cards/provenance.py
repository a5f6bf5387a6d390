"""What a recording says of itself: what it was made from, how, with what, and how its weights are loaded."""

import json
import logging as python_logging
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils import logging

from ..config_files import check_keys
from ..markdown import Table, clean, code, python_call
from ..schedule import ForgettingSchedule
from ..tasks.arguments import RecordArguments
from .base import Card

if TYPE_CHECKING:
    from ..trajectory import WeightTrajectory

logger: python_logging.Logger = logging.get_logger(__name__)

_RECORD_NAME, _TRAJECTORY_NAME = "record.json", "trajectory"
_LICENSE_KEYS = ("license", "license_name", "license_link")

# Class that loads an architecture, transformers' table that says so, task on the Hub; the first that has it counts.
_AUTO_CLASSES = (
    ("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION", "text-classification"),
    ("AutoModelForImageClassification", "IMAGE_CLASSIFICATION", "image-classification"),
    ("AutoModelForImageTextToText", "IMAGE_TEXT_TO_TEXT", "image-text-to-text"),
    ("AutoModelForCausalLM", "CAUSAL_LM", "text-generation"),
    ("AutoModelForTokenClassification", "TOKEN_CLASSIFICATION", "token-classification"),
    ("AutoModelForQuestionAnswering", "QUESTION_ANSWERING", "question-answering"),
    ("AutoModelForMaskedLM", "MASKED_LM", "fill-mask"),
    ("AutoModelForSpeechSeq2Seq", "SPEECH_SEQ_2_SEQ", "automatic-speech-recognition"),
    ("AutoModelForCTC", "CTC", "automatic-speech-recognition"),
    ("AutoModelForAudioClassification", "AUDIO_CLASSIFICATION", "audio-classification"),
    ("AutoModelForVideoClassification", "VIDEO_CLASSIFICATION", "video-classification"),
    ("AutoModelForObjectDetection", "OBJECT_DETECTION", "object-detection"),
    ("AutoModelForSemanticSegmentation", "SEMANTIC_SEGMENTATION", "image-segmentation"),
    ("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", None),
)
_AUTO_CLASS_OF_TASK = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


class Source(TypedDict):
    """A model or dataset that something was made from: Hub id, or name of a local folder, and revision."""

    name: str
    on_hub: bool
    revision: str | None


class About(TypedDict, total=False):
    """What the files of a trajectory can't say, or say otherwise than one wants; all keys are optional.

    Args:
        repo_id (`str`): Where the files are or will be on the Hub.
        title (`str`): Heading.
        base_model, base_revision (`str`): What the training started from; by default what was recorded.
        base_card (`ModelCardData`): Front matter of the base model's card, of which the license is inherited; by
            default that of the base model's folder or of the Hub's cache, if it is there.
        license (`str`): Instead of the inherited one.
        datasets (`Mapping[str, str | None]`): From the Hub id or folder of the data to its revision; by default those
            that `know-hf record` wrote beside the trajectory.
        trajectory_id, trajectory_revision (`str`): Where the trajectory is on the Hub; by default where it was opened.
        picture (`str`): Forgetting curve, as the card is to refer to it, such as `forgetting.png`.
    """

    repo_id: str | None
    title: str
    base_model: str | None
    base_revision: str | None
    base_card: ModelCardData | None
    license: str | None
    datasets: Mapping[str, str | None]
    trajectory_id: str | None
    trajectory_revision: str | None
    picture: str | None


@dataclass(kw_only=True)
class RecordedCard(Card):
    """What the cards of a trajectory and of what is made from it share; JSON values only.

    Args:
        base_model ([`Source`], *optional*): What the training started from.
        datasets (`list[Source]`): The source data.
        schedule (`dict`, *optional*): Fields of the [`ForgettingSchedule`].
        states (`list[dict]`): Full data first: `index`, `num_examples`, `size` in words, `steps`, `metrics`, `bytes`.
        architecture (`str`, *optional*): Class of the model.
        load_with (`str`, *optional*): Class of transformers that loads it, of an adapter the class of its base.
        pipeline_tag (`str`, *optional*): Its task on the Hub.
        adapter_type (`str`, *optional*): Such as `LORA`, where the weights are an adapter's.
        recorded_with (`dict[str, str]`): From library to version.
        record_arguments (`dict`, *optional*): What `know-hf record` was told.
        picture (`str`, *optional*): File of the forgetting curve.
    """

    base_model: Source | None
    datasets: list[Source]
    schedule: dict[str, Any] | None
    states: list[dict[str, Any]]
    architecture: str | None
    load_with: str | None
    pipeline_tag: str | None
    adapter_type: str | None
    recorded_with: dict[str, str]
    record_arguments: dict[str, Any] | None = None
    picture: str | None = None

    @property
    def states_table(self) -> Table:
        names = sorted({name for state in self.states for name in state["metrics"]})
        rows: list[Sequence[object]] = [["state", "examples", "steps", *map(code, names)]]
        for state in self.states:
            examples = state["size"] if state["num_examples"] is None else f"{state['num_examples']:,}"
            metrics = [f"{state['metrics'][name]:.4g}" if name in state["metrics"] else "–" for name in names]
            rows.append([f"Θ{state['index']}", examples, f"{state['steps']:,}", *metrics])
        return rows

    @property
    def steps_of_stages(self) -> int:
        """Optimizer steps of all states but the first."""
        return sum(state["steps"] for state in self.states[1:])

    @property
    def relative_cost(self) -> float | None:
        """Σ r^k, one epoch of every state in epochs on all of the data."""
        ratio = self.ratio
        return None if ratio is None else sum(ratio**k for k in range(len(self.states)))

    @property
    def ratio(self) -> float | None:
        return None if self.schedule is None else self.schedule["ratio"]

    @property
    def losses(self) -> tuple[float, float] | None:
        """Evaluation loss of the first and of the last state, where there is more than one and both are known."""
        if len(self.states) < 2:
            return None
        first, last = (state["metrics"].get("eval_loss") for state in (self.states[0], self.states[-1]))
        return None if first is None or last is None else (first, last)

    @property
    def schedule_call(self) -> str | None:
        """The schedule as Python makes it."""
        if self.schedule is None:
            return None
        told = {"ratio": self.schedule["ratio"], "num_states": self.schedule["num_states"]}
        return python_call("ForgettingSchedule", told | _other_than_default(ForgettingSchedule(**self.schedule)))

    def front_matter(self, tags: Sequence[str], library_name: str | None, **more: Any) -> ModelCardData:
        """Base model, data, library, license and tags."""
        is_adapter = self.adapter_type is not None
        base_model = self.base_model["name"] if self.base_model is not None and self.base_model["on_hub"] else None
        if base_model is not None:
            more["base_model_relation"] = "adapter" if is_adapter else "finetune"
        return ModelCardData(
            base_model=base_model,
            datasets=[source["name"] for source in self.datasets if source["on_hub"]] or None,
            library_name=library_name,
            tags=["know_hf", *tags, *([clean(self.adapter_type).lower()] if is_adapter else [])],
            **self.license,
            **more,
        )


def recorded_fields(trajectory: "WeightTrajectory", about: About, kind: str) -> dict[str, Any]:
    """Fields of a [`RecordedCard`] that a trajectory and what is known beside it give.

    Args:
        trajectory ([`WeightTrajectory`]): With at least one state.
        about ([`About`]): What it can't say.
        kind (`str`): What the card is of, for its title.

    Raises:
        `ValueError`: for a key that [`About`] does not have, or an id that the Hub does not take.
    """
    from ..trajectory.manifest import Manifest

    check_keys(about, tuple(About.__annotations__), "the card")
    for repo_id in (about.get("repo_id"), about.get("trajectory_id")):
        validate_repo_id(repo_id)
    adapter = _read_json(trajectory.path / "adapter_config.json")
    arguments = _record_arguments(trajectory.path.resolve())
    base_model = about.get("base_model") or trajectory.base_model or adapter.get("base_model_name_or_path")
    revision = about.get("base_revision") or trajectory.base_revision or adapter.get("revision")
    datasets = about.get("datasets")
    if arguments is not None:
        if base_model == arguments.model:
            revision = revision or arguments.model_revision
        if datasets is None:
            datasets = {arguments.dataset: arguments.dataset_revision}
    base = None if not base_model else source(str(base_model), revision)
    architecture = _architecture(adapter, _read_json(trajectory.path / "config.json"))
    load_with, pipeline_tag = _loading(architecture, adapter.get("task_type"))
    subject = base["name"].rpartition("/")[2] if base else architecture
    given = about.get("license")
    return {
        "title": about.get("title") or (f"{kind} of {subject}" if subject else kind),
        "repo_id": about.get("repo_id"),
        "license": {"license": given} if given else _inherited_license(base, base_model, about.get("base_card")),
        "base_model": base,
        "datasets": [source(name, revision) for name, revision in (datasets or {}).items()],
        "schedule": trajectory.schedule.to_dict() if trajectory.schedule else None,
        "states": [
            {
                "index": state.index,
                "num_examples": state.num_examples,
                "size": state.size,
                "steps": state.steps,
                "metrics": dict(state.metrics),
                "bytes": sum(file.size for file in state.files),
            }
            for state in trajectory.states
        ],
        "architecture": architecture,
        "load_with": load_with,
        "pipeline_tag": pipeline_tag,
        "adapter_type": str(adapter.get("peft_type") or "adapter") if trajectory.is_adapter else None,
        "recorded_with": Manifest.read(trajectory.path).library_versions,
        "record_arguments": None if arguments is None else _told(arguments),
        "picture": about.get("picture"),
    }


def source(name: str, revision: str | None = None) -> Source:
    """Where something comes from. What can't be a Hub id, or is a folder here, is local: its last name is told."""
    try:
        validate_repo_id(name)
        on_hub = not Path(name).exists()
    except HFValidationError:
        on_hub = False
    return {"name": name if on_hub else Path(name).name or name, "on_hub": on_hub, "revision": revision}


def _told(arguments: RecordArguments) -> dict[str, Any]:
    """Arguments that differ from their defaults, without what says where this machine has its files."""
    told = {key: value for key, value in _other_than_default(arguments).items() if key != "output_dir"}
    return told | {key: source(told[key])["name"] for key in ("model", "dataset")}


def _other_than_default(instance: Any) -> dict[str, Any]:
    values = asdict(instance)
    defaults = {
        key.name: key.default if key.default_factory is MISSING else key.default_factory() for key in fields(instance)
    }
    return {name: value for name, value in values.items() if value != defaults[name]}


def _record_arguments(trajectory: Path) -> RecordArguments | None:
    """What stands beside a trajectory in the folder of `know-hf record`."""
    path = trajectory.with_name(_RECORD_NAME)
    content = _read_json(path) if trajectory.name == _TRAJECTORY_NAME else {}
    try:
        return RecordArguments.from_dict(content, str(path)) if content else None
    except ValueError as error:
        logger.warning(f"the card does not say what was recorded: {error}")
        return None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; nothing where there is none."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _architecture(adapter: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    if adapter:
        mapping = adapter.get("auto_mapping")
        names = [mapping.get("base_model_class")] if isinstance(mapping, dict) else None
    found = names[0] if isinstance(names, list) and names else None
    return found if isinstance(found, str) and found.isidentifier() else None


def _loading(architecture: str | None, task_type: object) -> tuple[str | None, str | None]:
    """Class of transformers that loads an architecture, or the base of an adapter for a task, and its task."""
    import transformers
    from transformers.models.auto import modeling_auto

    tags = {auto_class: tag for auto_class, _, tag in _AUTO_CLASSES}
    if isinstance(task_type, str) and task_type in _AUTO_CLASS_OF_TASK:
        auto_class = _AUTO_CLASS_OF_TASK[task_type]
        return auto_class, tags.get(auto_class)
    if architecture is None:
        return None, None
    for auto_class, table, tag in _AUTO_CLASSES:
        if _holds(getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}), architecture):
            return auto_class, tag
    if _holds(getattr(modeling_auto, "MODEL_MAPPING_NAMES", {}), architecture):
        return "AutoModel", None
    return (architecture if hasattr(transformers, architecture) else None), None


def _holds(table: Mapping[str, str | tuple[str, ...]], architecture: str) -> bool:
    return any(architecture in (names if isinstance(names, tuple) else (names,)) for names in table.values())


def _inherited_license(base: Source | None, base_model: str | None, base_card: ModelCardData | None) -> dict[str, Any]:
    if base is None or base_model is None:
        return {}
    metadata = _local_metadata(base, base_model) if base_card is None else base_card.to_dict()
    if not metadata.get("license"):
        return {}
    return {key: metadata[key] for key in _LICENSE_KEYS if isinstance(metadata.get(key), str | list)}


def _local_metadata(base: Source, base_model: str) -> dict[str, Any]:
    """Front matter of the base model's card, where it is on this machine already."""
    import yaml  # type: ignore[import-untyped]

    path: object = Path(base_model) / "README.md"
    if base["on_hub"]:
        path = try_to_load_from_cache(base_model, "README.md", revision=base["revision"])
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return {}
    try:
        return metadata_load(path) or {}
    except (ValueError, yaml.YAMLError) as error:
        logger.warning(f"the license is left out, as the front matter of {path} can't be read: {clean(error)}")
        return {}
