"""The space of trajectories, a YAML file, and the recipes that are drawn from it. Does not import torch.

All recipes are drawn before any training. The same file gives the same recipes on every machine.
"""

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from know_hf.config_files import nearest, read_numbers, read_yaml

_LARGEST_INTEGER, _MOST_DRAWS = 2**31, 10_000
FORMAT_VERSION = "2.0"
TRAIN, TRAJECTORY, ARCHITECTURE, DATASET = SPLITS = (
    "train",
    "held_out_trajectory",
    "held_out_architecture",
    "held_out_dataset",
)

_TRAINING = "inputs num_examples num_examples_limit num_eval_examples min_steps schedule training_arguments optimizers"


@dataclass(frozen=True)
class Recipe:
    """
    Recipe of one trajectory, stored as `recipe.json` in its folder.

    Attributes:
        name (`str`):
            Name of the folder, `<architecture>-<dataset>-<draw>`.
        split (`str`):
            One of `SPLITS`; meta-training trains on `"train"` only.
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
            Arguments of the config.
        lora (`dict`, *optional*):
            Arguments of `peft.LoraConfig`; full fine-tuning by default.
        freeze (`list[str]`):
            Prefixes of the names of frozen parameters.
        dataset (`str`):
            Name of the dataset in the space.
        dataset_path (`str`):
            Hub id or folder of the dataset.
        inputs (`dict`):
            Size of the images, or length of the texts.
        augmentation (`list[str]`):
            Random augmentations of the training examples.
        num_examples (`int`):
            |D0|, the number of examples sampled from the training split.
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
        """Raise a `ValueError` if `path` exists and is damaged or stores another recipe."""
        if not path.exists():
            return
        from know_hf.checkpoint import read_json_object

        stored = read_json_object(path, "delete its folder to record the trajectory again")
        for key, value in self.to_dict().items():
            if stored.get(key) != value:
                raise ValueError(
                    f"{path} has {key}={stored.get(key)!r}, but the space gives {value!r}; use the space of the"
                    " recording, or another --output-dir"
                )


@dataclass(frozen=True)
class HeldOut:
    """Trajectories to hold out from meta-training: architectures and datasets by name, and every n-th other draw."""

    architectures: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    every: int | None = None

    def split(self, architecture: str, dataset: str, draw: int) -> str | None:
        """Return the split of a trajectory, or `None` if both its architecture and its dataset are held out."""
        if architecture in self.architectures:
            return None if dataset in self.datasets else ARCHITECTURE
        if dataset in self.datasets:
            return DATASET
        return TRAJECTORY if self.every is not None and draw % self.every == self.every - 1 else TRAIN


@dataclass(frozen=True)
class Space:
    """
    Space of trajectories. The comments of known_base.yaml explain each key.

    Raises:
        `ValueError`: If a key is missing or unknown, or a name is not defined.
    """

    seed: int
    held_out: HeldOut
    training: dict[str, dict[str, Any]]
    architectures: dict[str, dict[str, Any]]
    datasets: dict[str, dict[str, str]]
    license: str | None = None

    @classmethod
    def from_yaml(cls, path: Path) -> "Space":
        content = read_numbers(read_yaml(path, "see known_base.yaml"))
        _check_keys(f"{path}", content, "seed held_out training architectures datasets", "license")
        _check_integer(f"seed of {path}", content["seed"])
        _check_keys(f"held_out of {path}", content["held_out"], "", "architectures datasets every")
        if (every := content["held_out"].get("every")) is not None:
            _check_integer(f"every in held_out of {path}", every, 1)
        for key in ("training", "architectures", "datasets"):
            _check_mapping(f"{key} of {path}", content[key])
        space = cls(**{**content, "held_out": HeldOut(**content["held_out"])})
        for name, dataset in space.datasets.items():
            source = f"dataset {name!r} of {path}"
            _check_mapping(source, dataset)
            _check_keys(source, dataset, f"path {'text' if 'text' in dataset else 'image'} label train eval")
        for name, training in space.training.items():
            _check_training(f"training {name!r} of {path}", training)
        for name, architecture in space.architectures.items():
            _check_architecture(f"architecture {name!r} of {path}", architecture, space)
        _check_names(f"held_out of {path}", space.held_out.architectures, space.architectures)
        _check_names(f"held_out of {path}", space.held_out.datasets, space.datasets)
        try:
            space.recipes()
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: no recipes can be drawn ({error!r:.300}); see known_base.yaml") from error
        return space

    def recipes(self) -> list[Recipe]:
        """Draw all recipes. Architectures and datasets take turns, so that any prefix is balanced."""
        rounds = max((count for a in self.architectures.values() for count in a["draws"].values()), default=0)
        return [
            self._recipe(draw, architecture, dataset, split)
            for draw in range(rounds)
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
        batch_sizes, smallest = _fitting_batch_sizes(training, schedule)
        arguments["per_device_train_batch_size"] = {"choice": batch_sizes}
        arguments = _draw_all(arguments, f"{stream}/training_arguments")
        batch_size = arguments["per_device_train_batch_size"]
        num_examples = max(_draw(training["num_examples"], f"{stream}/num_examples"), smallest[batch_size])
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
    """Return the batch sizes to draw from, and for each the smallest |D0| whose last subset fills a batch."""
    value = training["training_arguments"]["per_device_train_batch_size"]
    batch_sizes = sorted(value["choice"]) if isinstance(value, dict) else [value]
    share = schedule["ratio"] ** (schedule["num_states"] - 1)
    smallest = {batch_size: math.ceil(batch_size / share) for batch_size in batch_sizes}
    fitting = [batch_size for batch_size in batch_sizes if smallest[batch_size] <= training["num_examples_limit"]]
    return fitting or batch_sizes[:1], smallest


def _check_mapping(source: str, content: Any) -> None:
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{source} must be a mapping with text as keys, got {content!r:.60}; see known_base.yaml")


def _check_integer(source: str, value: Any, least: int = 0, most: int = _LARGEST_INTEGER) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{source} must be an integer from {least} to {most:,}, got {value!r:.60}")


def _check_draws(source: str, content: Any, only: str = "") -> None:
    """Check that each value is fixed or a distribution; `only` names the values to check, all by default."""
    _check_mapping(source, content)
    for key, value in content.items():
        if isinstance(value, dict) and (not only or key in only.split()):
            kind, bounds = next(iter(value.items())) if len(value) == 1 else (None, None)
            is_range = kind in ("uniform", "log_uniform") and isinstance(bounds, list) and len(bounds) == 2
            if is_range:
                numbers = [b for b in bounds if type(b) in (int, float) and abs(b) <= _LARGEST_INTEGER]
                is_range = len(numbers) == 2 and (kind == "uniform" or min(numbers) > 0)
            if not is_range and not (kind == "choice" and isinstance(bounds, list) and bounds):
                raise ValueError(
                    f"{key} of {source} must be a value, {{choice: [...]}}, {{uniform: [low, high]}} or"
                    f" {{log_uniform: [low, high]}}, got {value!r:.60}"
                )


def _check_training(source: str, training: Any) -> None:
    _check_keys(source, training, _TRAINING, "augmentation")
    _check_draws(source, training, "num_examples min_steps augmentation")
    _check_integer(f"num_eval_examples of {source}", training["num_eval_examples"], 1)
    _check_integer(f"num_examples_limit of {source}", training["num_examples_limit"], 1)
    for key in ("inputs", "schedule", "training_arguments"):
        _check_draws(f"{key} of {source}", training[key])
    _check_mapping(f"optimizers of {source}", training["optimizers"])
    for name, arguments in training["optimizers"].items():
        _check_draws(f"optimizer {name!r} of {source}", arguments)


def _check_architecture(source: str, architecture: Any, space: Space) -> None:
    _check_keys(source, architecture, "training draws model_class config", "pretrained lora freeze")
    _check_names(f"training of {source}", [architecture["training"]], space.training)
    _check_mapping(f"draws of {source}", architecture["draws"])
    _check_names(f"draws of {source}", architecture["draws"], space.datasets)
    _check_draws(f"config of {source}", architecture["config"])
    _check_draws(f"lora of {source}", architecture.get("lora") or {})
    _check_draws(source, architecture, "freeze")
    takes_text = "max_length" in space.training[architecture["training"]]["inputs"]
    for dataset, count in architecture["draws"].items():
        _check_integer(f"draws of {dataset!r} in {source}", count, 0, _MOST_DRAWS)
        if takes_text != ("text" in space.datasets[dataset]):
            kinds = ("text", "images") if takes_text else ("images", "text")
            raise ValueError(f"{source} takes {kinds[0]}, but dataset {dataset!r} has {kinds[1]}; remove it")


def _check_keys(source: str, content: Any, required: str, optional: str = "") -> None:
    _check_mapping(source, content)
    if missing := [key for key in required.split() if key not in content]:
        raise ValueError(f"{source} lacks the keys {', '.join(missing)}; see known_base.yaml")
    known = [*required.split(), *optional.split()]
    if unknown := [key for key in content if key not in known]:
        raise ValueError(f"{source} has the unknown key {unknown[0]!r}; {nearest(str(unknown[0]), known)}")


def _check_names(source: str, names: Iterable[str], known: Mapping[str, Any]) -> None:
    if not isinstance(names, list | dict):
        raise ValueError(f"{source} must be a list of names, got {names!r:.60}")
    if unknown := [name for name in names if not isinstance(name, str) or name not in known]:
        near = nearest(str(unknown[0]), [*known])
        raise ValueError(f"{source} names {unknown[0]!r:.60}, which is not defined; {near}")


def _draw_all(values: Mapping[str, Any], stream: str) -> dict[str, Any]:
    return {key: _draw(value, f"{stream}/{key}") for key, value in values.items()}


def _draw(value: Any, stream: str) -> Any:
    """Draw a value. Python guarantees the numbers that `random()` gives for a text seed."""
    if not isinstance(value, dict):
        return value
    ((distribution, bounds),) = value.items()
    number = random.Random(stream).random()
    if distribution == "choice":
        return bounds[int(number * len(bounds))]
    if distribution not in ("uniform", "log_uniform"):
        raise ValueError(f"unknown distribution {distribution!r} of {stream}; choose uniform, log_uniform or choice")
    low, high = bounds
    drawn = low + (high - low) * number if distribution == "uniform" else low * (high / low) ** number
    return round(drawn) if isinstance(low, int) and isinstance(high, int) else drawn
