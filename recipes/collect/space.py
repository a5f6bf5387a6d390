"""The space of trajectories: what a YAML file says, and what is drawn from it. Standard library and PyYAML only.

Everything is drawn before anything is trained, so the same file gives the same recipes on every machine.
"""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

FORMAT_VERSION = "1.0"


@dataclass(frozen=True)
class Recipe:
    """What was drawn for one trajectory; stands as `recipe.json` in its folder.

    Args:
        name (`str`): Its folder, `<architecture>-<dataset>-<draw>`.
        split (`str`): `"train"` or `"held_out"`: whether meta-training may learn from it.
        draw (`int`): Number of the draw among those of its architecture and dataset.
        seed (`int`): Seed of the examples, the initial weights and the training.
        architecture (`str`): Name of the architecture in the space.
        model_class (`str`): Its class, of models.py or transformers.
        model_config (`dict`): Arguments of the class's config.
        dataset (`str`): Name of the dataset in the space.
        dataset_path (`str`): Its Hub id or folder.
        image_size, image_channels (`int`): What its images are turned into.
        num_examples (`int`): |D0|, drawn from the training split.
        num_eval_examples (`int`): Examples of the evaluation split every state is evaluated on.
        schedule (`dict`): Arguments of `ForgettingSchedule`.
        training_arguments (`dict`): Arguments of `TrainingArguments`.
    """

    name: str
    split: str
    draw: int
    seed: int
    architecture: str
    model_class: str
    model_config: dict[str, Any]
    dataset: str
    dataset_path: str
    image_size: int
    image_channels: int
    num_examples: int
    num_eval_examples: int
    schedule: dict[str, Any]
    training_arguments: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    def check_same(self, path: Path) -> None:
        """Raises `ValueError` when `path` is a recipe.json of another recipe."""
        if not path.exists():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        for key, value in self.to_dict().items():
            if found.get(key) != value:
                raise ValueError(
                    f"{path} has {key}={found.get(key)!r}, the space now gives {value!r}; give the space it was"
                    " recorded with, or another --output-dir"
                )


@dataclass(frozen=True)
class Space:
    """A YAML file as known_base.yaml, which says what each key means.

    Raises:
        `ValueError`: when a key is missing or unknown.
    """

    seed: int
    draws: int
    held_out_every: int
    image_size: int
    image_channels: int
    num_eval_examples: int
    num_examples: Any
    num_examples_limit: int
    min_steps: int
    schedule: dict[str, Any]
    training_arguments: dict[str, Any]
    architectures: dict[str, dict[str, Any]]
    datasets: dict[str, dict[str, str]]

    @classmethod
    def from_yaml(cls, path: Path) -> "Space":
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        _check_keys(f"{path}", content, {field.name for field in fields(cls)})
        for name, architecture in content["architectures"].items():
            _check_keys(f"architecture {name!r} of {path}", architecture, {"model_class", "config"})
        for name, dataset in content["datasets"].items():
            _check_keys(f"dataset {name!r} of {path}", dataset, {"path", "image", "label", "train", "eval"})
        return cls(**content)

    def recipes(self) -> list[Recipe]:
        """All recipes, draw by draw over every architecture and dataset, so that a part of them is balanced too."""
        return [
            self._recipe(draw, architecture, dataset)
            for draw in range(self.draws)
            for architecture in self.architectures
            for dataset in self.datasets
        ]

    def _recipe(self, draw: int, architecture: str, dataset: str) -> Recipe:
        name = f"{architecture}-{dataset}-{draw:03d}"
        stream = f"{self.seed}/{name}"
        schedule = _draw_all(self.schedule, f"{stream}/schedule")
        training = dict(self.training_arguments)
        batch_sizes, least = self._fitting_batch_sizes(schedule)
        training["per_device_train_batch_size"] = {"choice": batch_sizes}
        training = _draw_all(training, f"{stream}/training_arguments")
        batch_size = training["per_device_train_batch_size"]
        num_examples = max(_draw(self.num_examples, f"{stream}/num_examples"), least[batch_size])
        training["num_train_epochs"] = math.ceil(self.min_steps / math.ceil(num_examples / batch_size))
        seed = int(random.Random(f"{stream}/seed").random() * 2**31)
        model = self.architectures[architecture]
        return Recipe(
            name=name,
            split="held_out" if draw % self.held_out_every == self.held_out_every - 1 else "train",
            draw=draw,
            seed=seed,
            architecture=architecture,
            model_class=model["model_class"],
            model_config=_draw_all(model["config"], f"{stream}/model_config"),
            dataset=dataset,
            dataset_path=self.datasets[dataset]["path"],
            image_size=self.image_size,
            image_channels=self.image_channels,
            num_examples=num_examples,
            num_eval_examples=self.num_eval_examples,
            schedule={**schedule, "seed": seed},
            training_arguments=training,
        )

    def _fitting_batch_sizes(self, schedule: Mapping[str, Any]) -> tuple[list[int], dict[int, int]]:
        """The batch sizes that may be drawn, and for each the least |D0| whose last subset holds one batch."""
        given = self.training_arguments["per_device_train_batch_size"]
        batch_sizes = sorted(given["choice"]) if isinstance(given, dict) else [given]
        share = schedule["ratio"] ** (schedule["num_states"] - 1)
        least = {batch_size: math.ceil(batch_size / share) for batch_size in batch_sizes}
        fitting = [batch_size for batch_size in batch_sizes if least[batch_size] <= self.num_examples_limit]
        return fitting or batch_sizes[:1], least


def _check_keys(where: str, content: Mapping[str, Any], expected: set[str]) -> None:
    if missing := expected - set(content):
        raise ValueError(f"{where} has no {sorted(missing)}; known_base.yaml has every key")
    if unknown := set(content) - expected:
        raise ValueError(f"{where} has unknown keys {sorted(unknown)}; the known ones are {sorted(expected)}")


def _draw_all(values: Mapping[str, Any], stream: str) -> dict[str, Any]:
    return {key: _draw(value, f"{stream}/{key}") for key, value in values.items()}


def _draw(value: Any, stream: str) -> Any:
    """Draws a value; `random()` of a text seed alone, which Python promises to keep."""
    if not isinstance(value, dict):
        return value
    ((kind, bounds),) = value.items()
    number = random.Random(stream).random()
    if kind == "choice":
        return bounds[int(number * len(bounds))]
    low, high = (float(bound) if isinstance(bound, str) else bound for bound in bounds)  # YAML 1.1 reads 1e-5 as text
    if kind == "uniform":
        drawn = low + (high - low) * number
    elif kind == "log_uniform":
        drawn = low * (high / low) ** number
    else:
        raise ValueError(f"unknown distribution {kind!r} of {stream}; there are uniform, log_uniform and choice")
    return round(drawn) if isinstance(low, int) and isinstance(high, int) else drawn
