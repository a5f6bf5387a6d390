"""The space of trajectories: a YAML file and what is drawn from it. Needs only PyYAML.

All draws precede all trainings: the same file gives the same recipes on every machine.
"""

import json
import math
import random
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

FORMAT_VERSION = "2.0"
TRAIN, TRAJECTORY, ARCHITECTURE, DATASET = SPLITS = (
    "train",
    "held_out_trajectory",
    "held_out_architecture",
    "held_out_dataset",
)

_COLUMNS = {"label", "train", "eval"}
_TRAINING = {
    "inputs",
    "num_examples",
    "num_examples_limit",
    "num_eval_examples",
    "min_steps",
    "schedule",
    "training_arguments",
    "optimizers",
}


@dataclass(frozen=True)
class Recipe:
    """The draw of one trajectory, `recipe.json` in its folder.

    Args:
        name (`str`):
            Its folder, `<architecture>-<dataset>-<draw>`.
        split (`str`):
            One of `SPLITS`; meta-training uses `"train"` only.
        draw (`int`):
            Index of the draw for its architecture and dataset.
        seed (`int`):
            Seed of examples, initial weights and training.
        architecture (`str`):
            Name of the architecture in the space.
        model_class (`str`):
            Class in models.py or transformers.
        pretrained (`str`, *optional*):
            Hub id of the pretrained weights; random weights by default.
        model_config (`dict`):
            Arguments of the class's config.
        lora (`dict`, *optional*):
            Arguments of `peft.LoraConfig`; full fine-tuning by default.
        freeze (`list[str]`):
            Prefixes of the names of frozen parameters.
        dataset (`str`):
            Name of the dataset in the space.
        dataset_path (`str`):
            Hub id or folder of the dataset.
        inputs (`dict`):
            Form of the examples.
        augmentation (`list[str]`):
            Random augmentations of the training examples.
        num_examples (`int`):
            |D0|, sampled from the training split.
        num_eval_examples (`int`):
            Number of evaluation examples.
        schedule (`dict`):
            Arguments of `ForgettingSchedule`.
        optimizer (`str`):
            Name of the optimizer in the space.
        training_arguments (`dict`):
            Arguments of `TrainingArguments`.
    """

    name: str
    split: str
    draw: int
    seed: int
    architecture: str
    model_class: str
    pretrained: str | None
    model_config: dict[str, Any]
    lora: dict[str, Any] | None
    freeze: list[str]
    dataset: str
    dataset_path: str
    inputs: dict[str, Any]
    augmentation: list[str]
    num_examples: int
    num_eval_examples: int
    schedule: dict[str, Any]
    optimizer: str
    training_arguments: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    def check_same(self, path: Path) -> None:
        """Raise `ValueError` if `path` is the recipe.json of another recipe."""
        if not path.exists():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        for key, value in self.to_dict().items():
            if found.get(key) != value:
                raise ValueError(
                    f"{path} has {key}={found.get(key)!r}, the space now gives {value!r}; give the space it was"
                    " recorded with or another --output-dir"
                )


@dataclass(frozen=True)
class HeldOut:
    """What meta-training must not see: names of architectures and datasets, and every n-th draw of the rest."""

    architectures: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    every: int | None = None

    def split(self, architecture: str, dataset: str, draw: int) -> str | None:
        """Return the split of a trajectory; `None` if it would be held out in two ways and is not recorded."""
        if architecture in self.architectures:
            return None if dataset in self.datasets else ARCHITECTURE
        if dataset in self.datasets:
            return DATASET
        return TRAJECTORY if self.every is not None and draw % self.every == self.every - 1 else TRAIN


@dataclass(frozen=True)
class Space:
    """A YAML file like known_base.yaml, whose comments explain each key.

    Raises:
        `ValueError`: if a key is missing or unknown, or a name is not defined.
    """

    seed: int
    held_out: HeldOut
    training: dict[str, dict[str, Any]]
    architectures: dict[str, dict[str, Any]]
    datasets: dict[str, dict[str, str]]
    license: str | None = None

    @classmethod
    def from_yaml(cls, path: Path) -> "Space":
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        _check_keys(f"{path}", content, {field.name for field in fields(cls)} - {"license"}, {"license"})
        _check_keys(f"held_out of {path}", content["held_out"], set(), {field.name for field in fields(HeldOut)})
        space = cls(**{**content, "held_out": HeldOut(**content["held_out"])})
        for name, dataset in space.datasets.items():
            kind = "text" if "text" in dataset else "image"
            _check_keys(f"dataset {name!r} of {path}", dataset, {"path", kind, *_COLUMNS}, set())
        for name, training in space.training.items():
            _check_keys(f"training {name!r} of {path}", training, _TRAINING, {"augmentation"})
        for name, architecture in space.architectures.items():
            where = f"architecture {name!r} of {path}"
            needed, further = {"training", "draws", "model_class", "config"}, {"pretrained", "lora", "freeze"}
            _check_keys(where, architecture, needed, further)
            _check_names(f"training of {where}", [architecture["training"]], space.training)
            _check_names(f"draws of {where}", architecture["draws"], space.datasets)
            is_text = "max_length" in space.training[architecture["training"]]["inputs"]
            for dataset in architecture["draws"]:
                if is_text != ("text" in space.datasets[dataset]):
                    raise ValueError(f"{where} cannot be trained on {dataset!r}: one is text, the other images")
        _check_names(f"held_out of {path}", space.held_out.architectures, space.architectures)
        _check_names(f"held_out of {path}", space.held_out.datasets, space.datasets)
        return space

    def recipes(self) -> list[Recipe]:
        """Return all recipes, draw by draw over architectures and datasets, so that any prefix is balanced."""
        most = max((count for a in self.architectures.values() for count in a["draws"].values()), default=0)
        return [
            self._recipe(draw, architecture, dataset, split)
            for draw in range(most)
            for architecture, content in self.architectures.items()
            for dataset, count in content["draws"].items()
            if draw < count and (split := self.held_out.split(architecture, dataset, draw)) is not None
        ]

    def _recipe(self, draw: int, architecture: str, dataset: str, split: str) -> Recipe:
        name = f"{architecture}-{dataset}-{draw:03d}"
        stream = f"{self.seed}/{name}"
        model = self.architectures[architecture]
        training = self.training[model["training"]]
        schedule = _draw_all(training["schedule"], f"{stream}/schedule")
        optimizer = _draw({"choice": list(training["optimizers"])}, f"{stream}/optimizer")
        arguments = {**training["training_arguments"], **training["optimizers"][optimizer]}
        batch_sizes, least = _fitting_batch_sizes(training, schedule)
        arguments["per_device_train_batch_size"] = {"choice": batch_sizes}
        arguments = _draw_all(arguments, f"{stream}/training_arguments")
        batch_size = arguments["per_device_train_batch_size"]
        num_examples = max(_draw(training["num_examples"], f"{stream}/num_examples"), least[batch_size])
        min_steps = _draw(training["min_steps"], f"{stream}/min_steps")
        arguments["num_train_epochs"] = math.ceil(min_steps / math.ceil(num_examples / batch_size))
        seed = int(random.Random(f"{stream}/seed").random() * 2**31)
        lora = model.get("lora")
        return Recipe(
            name=name,
            split=split,
            draw=draw,
            seed=seed,
            architecture=architecture,
            model_class=model["model_class"],
            pretrained=model.get("pretrained"),
            model_config=_draw_all(model["config"], f"{stream}/model_config"),
            lora=None if lora is None else _draw_all(lora, f"{stream}/lora"),
            freeze=_draw(model.get("freeze", []), f"{stream}/freeze"),
            dataset=dataset,
            dataset_path=self.datasets[dataset]["path"],
            inputs=_draw_all(training["inputs"], f"{stream}/inputs"),
            augmentation=_draw(training.get("augmentation", []), f"{stream}/augmentation"),
            num_examples=num_examples,
            num_eval_examples=training["num_eval_examples"],
            schedule={**schedule, "seed": seed},
            optimizer=optimizer,
            training_arguments=arguments,
        )


def _fitting_batch_sizes(training: Mapping[str, Any], schedule: Mapping[str, Any]) -> tuple[list[int], dict[int, int]]:
    """Return the batch sizes to draw from, and for each the smallest |D0| whose last subset holds one batch."""
    given = training["training_arguments"]["per_device_train_batch_size"]
    batch_sizes = sorted(given["choice"]) if isinstance(given, dict) else [given]
    share = schedule["ratio"] ** (schedule["num_states"] - 1)
    least = {batch_size: math.ceil(batch_size / share) for batch_size in batch_sizes}
    fitting = [batch_size for batch_size in batch_sizes if least[batch_size] <= training["num_examples_limit"]]
    return fitting or batch_sizes[:1], least


def _check_keys(where: str, content: Mapping[str, Any], expected: set[str], optional: set[str]) -> None:
    if missing := expected - set(content):
        raise ValueError(f"{where} lacks the keys {sorted(missing)}; see known_base.yaml")
    if unknown := set(content) - expected - optional:
        raise ValueError(f"{where} has unknown keys {sorted(unknown)}; known are {sorted(expected | optional)}")


def _check_names(where: str, names: Any, known: Mapping[str, Any]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{where} refers to {unknown[0]!r}; the space defines {', '.join(known)}")


def _draw_all(values: Mapping[str, Any], stream: str) -> dict[str, Any]:
    return {key: _draw(value, f"{stream}/{key}") for key, value in values.items()}


def _draw(value: Any, stream: str) -> Any:
    """Draw a value with `random()` of a text seed, which Python keeps stable."""
    if not isinstance(value, dict):
        return _number(value)
    ((kind, bounds),) = value.items()
    number = random.Random(stream).random()
    if kind == "choice":
        return _number(bounds[int(number * len(bounds))])
    low, high = (_number(bound) for bound in bounds)
    if kind == "uniform":
        drawn = low + (high - low) * number
    elif kind == "log_uniform":
        drawn = low * (high / low) ** number
    else:
        raise ValueError(f"unknown distribution {kind!r} of {stream}; choose uniform, log_uniform or choice")
    return round(drawn) if isinstance(low, int) and isinstance(high, int) else drawn


def _number(value: Any) -> Any:
    """Convert numbers such as 1e-5, which PyYAML (YAML 1.1) reads as text."""
    is_number = isinstance(value, str) and re.fullmatch(r"\d+(\.\d*)?[eE][+-]?\d+", value)
    return float(value) if is_number else value
