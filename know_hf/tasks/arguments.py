"""What `know-hf record` is told, by YAML, by flags or in Python; needs no torch, so that `--help` comes at once."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

from ..config_files import check_keys, nearest, read_numbers

if TYPE_CHECKING:
    from ..schedule import ForgettingSchedule

TEXT, IMAGE, LM = TASKS = ("text-classification", "image-classification", "causal-lm")
LABELS = "labels"

# Keys of TrainingArguments that have a meaning of their own here, with what to give instead.
_RESERVED = {
    "output_dir": "give output_dir beside training",
    "num_train_epochs": "give epochs and epochs_per_stage",
    "seed": "give seed beside training",
    "remove_unused_columns": "it follows from the task",
    "label_names": "it follows from the task",
}
# Keys that would have no effect with a task.
_FOREIGN = {
    TEXT: ("image_column", "pack"),
    IMAGE: ("text_column", "text_pair_column", "max_length", "pack"),
    LM: ("image_column", "label_column", "text_pair_column"),
}
_WORDS = {"none": None, "null": None, "true": True, "false": False}


@dataclass(frozen=True)
class LoraArguments:
    """A low-rank adapter to train in place of the whole model; as in `peft.LoraConfig`.

    Args:
        r (`int`, *optional*, defaults to `8`): Rank.
        alpha (`float`, *optional*, defaults to `16`): `lora_alpha`, the adapter's scale times its rank.
        dropout (`float`, *optional*, defaults to `0`): `lora_dropout`.
        target_modules (`str` or `list[str]`, *optional*, defaults to `"all-linear"`):
            Modules that get an adapter: endings of their names, or `"all-linear"`. New heads are trained whole, and so
            are BatchNorm layers, whose statistics move.
        use_dora, use_rslora (`bool`, *optional*, defaults to `False`): The variants DoRA and rank-stabilised LoRA.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    use_dora: bool = False
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora r={self.r}: choose a rank of at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora dropout={self.dropout}: choose a share in [0, 1)")


@dataclass(frozen=True)
class RecordArguments:
    """One recording of structured forgetting; a key of the YAML and a flag of `know-hf record` is a field here.

    What a field means stands in its `metadata["help"]`, and in `know-hf record --help`. Make one with [`from_yaml`] or
    [`from_dict`], which check keys and turn strings into numbers.

    Raises:
        `ValueError`: for a value out of range, a key of `training` that has a field of its own, or a field that has no
            meaning for the task.
    """

    task: str = field(metadata={"help": f"what is trained: {', '.join(TASKS)}"})
    model: str = field(metadata={"help": "Hub id or folder of the pretrained model"})
    dataset: str = field(metadata={"help": "Hub id or folder of the dataset, as datasets.load_dataset reads it"})
    output_dir: str = field(
        metadata={"help": "folder for trajectory/, record.json, forgetting.png and the Trainer's own files"}
    )
    model_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of the model"})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "of the weights: float32, bfloat16 or auto, the checkpoint's (default: float32; lora: auto)"
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a dataset that has several"})
    dataset_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of the dataset"})
    train_split: str = field(default="train", metadata={"help": "split to train on; slices such as train[:90%] work"})
    eval_split: str | None = field(
        default="auto",
        metadata={
            "help": "split every state is evaluated on; auto takes a validation, or else the test split; none for none"
        },
    )
    text_column: str | None = field(default=None, metadata={"help": "column of the text (default: found by its name)"})
    text_pair_column: str | None = field(default=None, metadata={"help": "column of the second text of a pair"})
    image_column: str | None = field(
        default=None, metadata={"help": "column of the image (default: found by its name)"}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "column of the class (default: found by its name)"}
    )
    max_examples: int | None = field(
        default=None, metadata={"help": "train on this many rows, drawn with the seed (default: all)"}
    )
    max_eval_examples: int | None = field(
        default=None, metadata={"help": "evaluate on this many rows, drawn with the seed (default: all)"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "tokens of an example (default: what the model takes, at most 512)"}
    )
    pack: bool = field(
        default=False, metadata={"help": "causal-lm: join the texts and cut them into examples of max_length tokens"}
    )
    epochs: float = field(default=3.0, metadata={"help": "epochs on all of the data"})
    epochs_per_stage: float = field(default=1.0, metadata={"help": "epochs on each smaller subset"})
    steps_per_stage: int | None = field(
        default=None, metadata={"help": "optimizer steps on each smaller subset, instead of epochs_per_stage"}
    )
    ratio: float = field(default=0.5, metadata={"help": "share of the examples that each stage keeps"})
    num_states: int = field(default=5, metadata={"help": "states to record, that of all of the data among them"})
    start: str = field(
        default="train",
        metadata={"help": "train makes the full-data state, current takes the model's weights as that state"},
    )
    stratify: bool | None = field(
        default=None, metadata={"help": "keep the balance of the classes in every subset (default: in classification)"}
    )
    lora: LoraArguments | None = field(
        default=None,
        metadata={"help": f"train a LoRA adapter: {', '.join(f.name for f in fields(LoraArguments))}; none for none"},
    )
    seed: int = field(default=0, metadata={"help": "of the new head, the order of the examples and the subsets"})
    training: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "any other of transformers' TrainingArguments"}
    )

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is not known; {nearest(self.task, TASKS)}")
        for name in ("max_examples", "max_eval_examples", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}: choose at least 1, or none")
        if not self.epochs > 0:
            raise ValueError(f"epochs={self.epochs}: choose a number above 0")
        for name, choices in (("start", ("train", "current")), ("dtype", ("float32", "bfloat16", "auto", None))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(str, choices))}")
        for name in _FOREIGN[self.task]:
            if getattr(self, name) not in (None, False):
                raise ValueError(f"{name}={getattr(self, name)!r} has no meaning for {self.task}; leave it out")
        if self.task == LM and self.stratify:
            raise ValueError(f"stratify=True has no meaning for {LM}, which has no classes; leave it out")
        if self.lora is not None and self.start == "current":
            raise ValueError(
                "start='current' has no meaning with lora: a new adapter is trained on nothing; use 'train'"
            )
        for name in self.training:
            if name in _RESERVED:
                raise ValueError(f"training may not hold {name!r}: {_RESERVED[name]}")
        self.schedule  # noqa: B018  its own checks

    @property
    def schedule(self) -> "ForgettingSchedule":
        """The subsets."""
        from ..schedule import ForgettingSchedule

        stratify = self.task != LM if self.stratify is None else self.stratify
        return ForgettingSchedule(
            ratio=self.ratio,
            num_states=self.num_states,
            epochs_per_stage=self.epochs_per_stage,
            stratify_by=LABELS if stratify else None,
            seed=self.seed,
            steps_per_stage=self.steps_per_stage,
        )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "the arguments") -> "RecordArguments":
        """Arguments from a mapping as a YAML file gives it; numbers and booleans may be strings.

        Args:
            content (`Mapping[str, Any]`): Values by the names of the fields; `lora` and `training` are mappings.
            source (`str`, *optional*): Where they come from, for the errors.

        Raises:
            `ValueError`: for an unknown key, with the nearest valid one; a missing key; a value of the wrong kind.
        """
        check_keys(content, [f.name for f in fields(cls)], source)
        values = {f.name: _read(f, content[f.name], source) for f in fields(cls) if f.name in content}
        for required in fields(cls):
            if required.name not in values and required.default is required.default_factory is MISSING:
                flag = required.name.replace("_", "-")
                raise ValueError(f"{source}: {required.name} is missing; give it in the YAML or as --{flag}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> "RecordArguments":
        """Arguments from a YAML file.

        Args:
            path (`str` or `Path`): The file.
            overrides (`Mapping[str, Any]`, *optional*): Values that go before those of the file; in `lora` and
                `training` key by key.

        Raises:
            `ValueError`: as [`from_dict`], and when the file does not hold a mapping.
        """
        content = _parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds no keys; see recipes/record for files that do")
        names = [f.name for f in fields(cls)]
        check_keys(content, names, str(path))
        merged = dict(content)
        for name, value in (overrides or {}).items():
            if isinstance(value, Mapping) and isinstance(content.get(name), Mapping):
                value = {**content[name], **value}
            merged[name] = value
        return cls.from_dict(merged, str(path))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every field of [`RecordArguments`]; one that is not given leaves no trace in the namespace."""
    for key in fields(RecordArguments):
        options: dict[str, Any] = {"help": key.metadata["help"].replace("%", "%%"), "default": argparse.SUPPRESS}
        kinds = _kinds(key)
        if kinds & {dict, LoraArguments}:
            options |= {"nargs": "+", "metavar": "KEY=VALUE"}
        elif bool in kinds:
            options |= {"action": argparse.BooleanOptionalAction}
        else:
            options |= {"metavar": "N" if kinds & {int, float} else key.name.split("_")[-1].upper()}
        if not any(key.default is silent for silent in (MISSING, None, False)):
            options["help"] += f" (default: {key.default:g})" if float in kinds else f" (default: {key.default})"
        parser.add_argument(f"--{key.name.replace('_', '-')}", **options)


def read_flags(namespace: argparse.Namespace) -> RecordArguments:
    """The arguments that flags, and the YAML file of `--config`, give; flags go before the file."""
    given = {f.name: getattr(namespace, f.name) for f in fields(RecordArguments) if hasattr(namespace, f.name)}
    for name in ("lora", "training"):
        if name in given:
            given[name] = _mapping(name, given[name])
    if config := getattr(namespace, "config", None):
        return RecordArguments.from_yaml(config, given)
    return RecordArguments.from_dict(given, "the flags")


def _kinds(key: "Field[Any]") -> set[type]:
    found = {getattr(kind, "__origin__", kind) for kind in get_args(key.type) or (key.type,)}
    return {dict} if getattr(key.type, "__origin__", None) is dict else found


def _read(key: "Field[Any]", value: Any, source: str) -> Any:
    """The value in the kind its field wants; strings are read as flags give them."""
    kinds = _kinds(key)
    if NoneType in kinds and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    if LoraArguments in kinds:
        content = {} if value is True else value
        if isinstance(content, Mapping):
            check_keys(content, [f.name for f in fields(LoraArguments)], f"lora of {source}")
            return LoraArguments(
                **{
                    f.name: _read(f, content[f.name], f"lora of {source}")
                    for f in fields(LoraArguments)
                    if f.name in content
                }
            )
    elif dict in kinds and (isinstance(value, Mapping) or value is None):
        return {str(name): read_numbers(item) for name, item in (value or {}).items()}
    elif list in kinds and isinstance(value, list):
        return [str(item) for item in value]
    elif bool in kinds:
        value = _WORDS.get(value.lower(), value) if isinstance(value, str) else value
        if isinstance(value, bool):
            return value
    elif int in kinds or float in kinds:
        kind = float if float in kinds else int
        try:
            number = kind(value)
        except (TypeError, ValueError):
            number = None
        if number is not None and not isinstance(value, bool) and (isinstance(value, str) or number == value):
            return number
    elif str in kinds and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    wanted = " or ".join(sorted("a mapping" if k in (dict, LoraArguments) else k.__name__ for k in kinds - {NoneType}))
    raise ValueError(f"{source}: {key.name}={value!r} is not of the right kind; give {wanted}")


def _mapping(name: str, pairs: Sequence[str]) -> dict[str, Any] | None:
    """`["r=8", "target_modules=[q,v]"]` as a mapping; the single word none, for `lora`, as None."""
    if name == "lora" and [pair.lower() for pair in pairs] == ["none"]:
        return None
    content = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--{name} {pair}: give KEY=VALUE")
        content[key] = read_numbers(_parse_yaml(value, f"--{name} {pair}"))
    return content


def _parse_yaml(text: str, source: str) -> Any:
    import yaml  # type: ignore[import-untyped]

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {error}") from error
