"""Arguments of `know-hf record`, from YAML, flags or Python. The module imports no torch, so `--help` is instant."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..config_files import build, read_numbers, read_yaml

if TYPE_CHECKING:
    from ..schedule import ForgettingSchedule

TEXT, IMAGE, LM = TASKS = ("text-classification", "image-classification", "causal-lm")
LABELS = "labels"
SINGLE_LABEL = "single_label_classification"  # problem_type of transformers

# Keys of TrainingArguments that another argument sets.
_RESERVED = {
    "output_dir": "use output_dir outside of training",
    "hub_token": "log in with `hf auth login`, because record.json and the card show it",
    "num_train_epochs": "use epochs and epochs_per_stage",
    "seed": "use seed outside of training",
    "remove_unused_columns": "the task sets it",
    "label_names": "the task sets it",
}
# Arguments that have no effect on a task.
_UNUSED = {
    TEXT: ("image_column", "pack"),
    IMAGE: ("text_column", "text_pair_column", "max_length", "pack"),
    LM: ("image_column", "label_column", "text_pair_column", "stratify"),
}
_DTYPE_HELP = "dtype of the weights: float32, bfloat16 or auto, that of the checkpoint (default: float32; LoRA: auto)"
_LORA_HELP = (
    "train a LoRA adapter instead of all weights, with the defaults if no values follow; keys: r, alpha, dropout,"
    " target_modules, use_dora, use_rslora; none: train all weights even if the YAML sets an adapter"
)
_MAX_RANK = 65_536
_EVAL_SPLIT_HELP = (
    "split to evaluate on; auto: validation, valid, val or dev, else held-out; held-out: a tenth of the training rows,"
    " which are not trained on; none: no evaluation"
)
_KIND_HELP = "nested: states on smaller and smaller subsets; complementary: two branches, each on one half of the data"
_START_WEIGHTS_HELP = (
    "how to store the weights before training: reference (only those not in the Hub cache), full or none"
)
_CHOICES = {
    "start": ("train", "current"),
    "dtype": ("float32", "bfloat16", "auto", None),
    "kind": ("nested", "complementary"),
    "branch_from": ("state-0", "start"),
    "start_weights": ("reference", "full", "none"),
}


@dataclass(frozen=True)
class LoraArguments:
    """Low-rank adapter to train instead of all weights; see `peft.LoraConfig`.

    Args:
        r (`int`, *optional*, defaults to `8`):
            Rank.
        alpha (`float`, *optional*, defaults to `16`):
            `lora_alpha`; the adapter is scaled by `alpha / r`.
        dropout (`float`, *optional*, defaults to `0`):
            `lora_dropout`.
        target_modules (`str` or `list[str]`, *optional*, defaults to `"all-linear"`):
            Suffixes of the names of the modules that get an adapter, or `"all-linear"`. New heads and BatchNorm layers
            are trained in full.
        use_dora (`bool`, *optional*, defaults to `False`):
            Use DoRA.
        use_rslora (`bool`, *optional*, defaults to `False`):
            Use rank-stabilized LoRA.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    use_dora: bool = False
    use_rslora: bool = False

    __pydantic_config__: ClassVar[dict[str, bool]] = {"coerce_numbers_to_str": True}

    def __post_init__(self) -> None:
        if not 1 <= self.r <= _MAX_RANK:
            raise ValueError(f"lora r={self.r}: the rank must be at least 1 and at most {_MAX_RANK:,}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora dropout={self.dropout}: must be in [0, 1)")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RecordArguments:
    """Arguments of one recording: each field is a key of the YAML and a flag of `know-hf record`.

    `know-hf record --help` describes the fields. [`from_yaml`] and [`from_dict`] check keys and convert strings.

    Raises:
        `ValueError`: for a value out of range, a key of `training` that another argument sets, or an argument that has
            no effect on the task.
    """

    task: str = _option(MISSING, f"one of {', '.join(TASKS)}")
    model: str = _option(MISSING, "Hub id or folder of the pretrained model")
    dataset: str = _option(MISSING, "Hub id or folder of the dataset, as datasets.load_dataset reads it")
    output_dir: str = _option(MISSING, "folder for trajectory/, record.json, forgetting.png and the Trainer's files")
    model_revision: str | None = _option(None, "branch, tag or commit of the model")
    dtype: str | None = _option(None, _DTYPE_HELP)
    dataset_config: str | None = _option(None, "configuration of the dataset, if it has several")
    dataset_revision: str | None = _option(None, "branch, tag or commit of the dataset")
    train_split: str = _option("train", "split to train on; slices such as train[:90%] work")
    eval_split: str | None = _option("auto", _EVAL_SPLIT_HELP)
    text_column: str | None = _option(None, "column of the text (default: detected by its name)")
    text_pair_column: str | None = _option(None, "column of the second text of a pair")
    image_column: str | None = _option(None, "column of the image (default: detected by its name)")
    label_column: str | None = _option(None, "column of the class (default: detected by its name)")
    max_examples: int | None = _option(None, "train on this many rows, drawn with the seed (default: all)")
    max_eval_examples: int | None = _option(None, "evaluate on this many rows, drawn with the seed (default: all)")
    max_length: int | None = _option(None, "maximum tokens per example (default: maximum of the model, at most 512)")
    pack: bool = _option(False, "causal-lm: join the texts and cut them into examples of max_length tokens")
    epochs: float = _option(3.0, "epochs on all data")
    epochs_per_stage: float = _option(1.0, "epochs on each smaller subset")
    steps_per_stage: int | None = _option(None, "optimizer steps on each smaller subset, instead of epochs_per_stage")
    ratio: float = _option(0.5, "share of the examples that each stage keeps")
    num_states: int = _option(5, "number of states to record, including the state trained on all data")
    start: str = _option("train", "train: train state 0 on all data; current: use the pretrained weights as state 0")
    kind: str = _option("nested", _KIND_HELP)
    branch_from: str = _option("state-0", "where complementary branches begin: state-0 or start")
    tail_states: int = _option(0, "number of extra states to record in the second half of the training of state 0")
    start_weights: str = _option("reference", _START_WEIGHTS_HELP)
    stratify: bool | None = _option(None, "keep the class balance in every subset (default: yes in classification)")
    lora: LoraArguments | None = field(default=None, metadata={"help": _LORA_HELP})
    seed: int = _option(0, "seed of the new head, the order of the examples and the subsets")
    training: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "other keys of transformers.TrainingArguments"}
    )

    __pydantic_config__: ClassVar[dict[str, bool]] = {"coerce_numbers_to_str": True}

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"unknown task {self.task!r}; choose one of {', '.join(TASKS)}")
        self._check_values()
        for name in _UNUSED[self.task]:
            if getattr(self, name) not in (None, False):
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect on {self.task}; remove it")
        if self.lora is not None and self.start == "current":
            raise ValueError("start='current' needs trained weights, but a LoRA adapter is new; use start='train'")
        if self.tail_states and self.start == "current":
            raise ValueError(f"tail_states={self.tail_states} has no effect with start='current'; remove it")
        for name in self.training:
            if name in _RESERVED:
                raise ValueError(f"training must not contain {name!r}: {_RESERVED[name]}")

    def _check_values(self) -> None:
        for name in ("model", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give a Hub id or a folder")
        for name in ("max_examples", "max_eval_examples", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1, or none")
        if not 0 < self.epochs <= 1_000_000:
            raise ValueError(f"epochs={self.epochs}: must be positive and at most 1,000,000")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(str, choices))}")
        _ = self.schedule  # runs the checks of the schedule

    @property
    def schedule(self) -> "ForgettingSchedule":
        """The schedule of the subsets."""
        from ..schedule import ForgettingSchedule

        stratify = self.task != LM if self.stratify is None else self.stratify
        names = "ratio num_states epochs_per_stage steps_per_stage seed tail_states kind branch_from".split()
        options = {name: getattr(self, name) for name in names}
        return ForgettingSchedule(**options, stratify_by=LABELS if stratify else None)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "the arguments") -> "RecordArguments":
        """Build the arguments from a mapping of field names to values; numbers and booleans may be strings.

        `source` names the origin of the values in error messages.

        Raises:
            `ValueError`: for an unknown key (with the nearest known one), a missing key, or a value of the wrong type.
        """
        return build(cls, {**content, "training": read_numbers(content.get("training"))}, source)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> "RecordArguments":
        """Read the arguments from a YAML file; `overrides` replaces values, and single keys of `lora` and `training`.

        Raises:
            `FileNotFoundError`: when the file does not exist.
            `ValueError`: see [`from_dict`]; also when the file does not hold a mapping.
        """
        content = read_yaml(path, "recipes/record has examples")
        for name, value in (overrides or {}).items():
            if isinstance(value, Mapping) and isinstance(content.get(name), Mapping):
                value = {**content[name], **value}
            content[name] = value
        return cls.from_dict(content, str(path))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
