"""The meta-tasks of `split.yaml`: what each trains on, from which start, and the few-shot target."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset
from transformers import PreTrainedConfig, PreTrainedModel, Trainer
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from know_hf import WeightTrajectory
from know_hf.checkpoint import atomic_folder
from know_hf.evaluation.suites import Suite
from know_hf.evaluation.suites.suite_data import Inputs, Side, StoredExamples
from know_hf.evaluation.suites.suite_model import ModelSpec
from know_hf.evaluation.suites.suite_task import SuiteTask

_PRETRAINING_OFFSET = 5000  # added to the seed
_TARGET_VALIDATION = 40


@strict
class MLPConfig(PreTrainedConfig):
    r"""
    Args:
        width (`int`, *optional*, defaults to `32`):
            Units of each hidden layer.
        num_layers (`int`, *optional*, defaults to `2`):
            Number of hidden layers.
        num_inputs (`int`, *optional*, defaults to `256`):
            Pixels of an image.
    """

    model_type = "hyper_model_mlp"

    width: int = 32
    num_layers: int = 2
    num_inputs: int = 256


class MLP(PreTrainedModel):
    """Hidden layers with ReLU and a linear classifier."""

    config_class = MLPConfig
    base_model_prefix = "features"
    main_input_name = "pixel_values"

    def __init__(self, config: MLPConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = [nn.Flatten()]
        for index in range(config.num_layers):
            layers += [nn.Linear(config.width if index else config.num_inputs, config.width), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(config.width, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutputWithNoAttention:
        logits = self.classifier(self.features(pixel_values))
        loss = None if labels is None else cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


@dataclass(frozen=True)
class MetaModel(ModelSpec):
    """The model of a suite, or an [`MLP`]."""

    @property
    def model_class(self) -> type[PreTrainedModel] | None:
        return MLP if self.class_name == "MLP" else super().model_class


@dataclass(frozen=True)
class MetaSuiteTask(SuiteTask):
    """A suite without an oracle, whose recordings have losses on training and validation data."""

    @property
    def oracle_size(self) -> int:
        return self.suite.source.train

    def trainer(self, seed: int, folder: Path) -> Trainer:
        """Return the trainer of Θ0."""
        return self._trainer(seed, self.suite.source.train, folder)

    def _trainer(self, seed: int, num_examples: int, folder: Path, *args: Any, **options: Any) -> Trainer:
        trainer = super()._trainer(seed, num_examples, folder, *args, **options)
        side, (pool, _) = self.suite.source, self._splits(self.suite.source)
        rows = pool.rows([seed, 0])[: side.train + side.validation]
        examples = StoredExamples(pool.stored(rows), self.suite.inputs)
        parts = {"train": range(side.validation), "validation": range(side.train, len(rows))}
        trainer.eval_dataset = {name: Subset(examples, part) for name, part in parts.items()}
        return trainer


@dataclass(frozen=True)
class MetaTask:
    """One meta-task.

    Attributes:
        name, part (`str`):
            Unique name, and part of the split.
        seed (`int`):
            Seed of its draws and trainings.
        architecture, regime (`str`):
            Keys of the split.
        stages (`float`):
            Epochs of a stage, relative to those of Θ0.
        classes (`dict[str, tuple[int, ...]]`):
            Labels of the characters of `"source"`, `"target"` and `"pretraining"`.
        split (`dict`):
            Content of `split.yaml`.
        data (`str`):
            Folder or Hub id of the dataset.
        folder (`Path`):
            Folder of its recordings.
    """

    name: str
    part: str
    seed: int
    architecture: str
    regime: str
    stages: float
    classes: Mapping[str, tuple[int, ...]]
    split: Mapping[str, Any] = field(repr=False)
    data: str
    folder: Path

    @cached_property
    def suite_task(self) -> MetaSuiteTask:
        """Source and target task, model and trainings."""
        regime = dict(self.split["regimes"][self.regime])
        is_pretrained = "pretrained" in regime and regime.pop("pretrained") > 0
        return self._suite_task("source", regime, str(self.folder / "pretrained") if is_pretrained else None)

    def record(self) -> None:
        """Train the start if it is pretrained, record the nested states and the branches, and train Θ0 further. It
        resumes."""
        task = self.suite_task
        pretrained, epochs = self.folder / "pretrained", self.split["regimes"][self.regime].get("pretrained")
        if epochs and not (pretrained / "model.safetensors").exists():
            trainer = self._suite_task("pretraining", {"epochs": epochs}).trainer(
                self.seed + _PRETRAINING_OFFSET, self.folder / "work"
            )
            trainer.train()
            trainer.model.save_pretrained(pretrained)
        nested = task.record(self.seed, self.folder / "nested")
        task.branch_trajectory(self.seed, self.folder / "branches", nested)
        if not self.further.exists():
            steps = [state.steps for state in nested.states[1:]]
            theta0 = nested.load_model(0, task.suite.model.model_class)
            model = task.train_further(self.seed, theta0, steps, self.folder / "work")
            with atomic_folder(self.further) as folder:
                model.save_pretrained(folder)

    @property
    def further(self) -> Path:
        """Folder of the weights of Θ0 trained on all data, for the steps of the smaller states."""
        return self.folder / "further"

    @property
    def is_recorded(self) -> bool:
        folders = self.folder / "nested", self.folder / "branches"
        if not all(WeightTrajectory.exists(folder) for folder in folders) or not self.further.exists():
            return False
        nested, branches = map(WeightTrajectory, folders)
        return nested.num_states == nested.schedule.num_states and len(branches.branches) == 2

    def _suite_task(self, source: str, regime: Mapping[str, Any], pretrained: str | None = None) -> MetaSuiteTask:
        split, target, options = self.split, self.split["target"], dict(regime)
        epochs = options.pop("epochs")
        sides = {
            "source": Side(self.data, split["source"]["train"], split["source"]["validation"]),
            "target": Side(self.data, target["characters"] * target["labels_per_class"], _TARGET_VALIDATION),
        }
        chosen = {"source": self.classes[source], "target": self.classes["target"]}
        suite = Suite(
            name=self.name,
            description="",
            seeds=1,
            inputs=Inputs(**split["inputs"]),
            model=MetaModel(pretrained, **split["architectures"][self.architecture]),
            schedule={"epochs_per_stage": max(1, round(self.stages * epochs)), **split["schedule"]},
            training={"num_train_epochs": epochs, "per_device_eval_batch_size": 64, **split["training"], **options},
            protocols=(),
            arms=(),
            **{name: replace(side, classes=chosen[name]) for name, side in sides.items()},
        )
        return MetaSuiteTask(suite)


def read_split(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def meta_tasks(split: Mapping[str, Any], part: str, data: str, output_dir: Path) -> list[MetaTask]:
    """Return the tasks of a part of a split.

    Args:
        split (mapping):
            Content of `split.yaml`.
        part (`str`):
            `"train"`, `"validation"` or `"test"`.
        data (`str`):
            Folder or Hub id of the dataset.
        output_dir (`Path`):
            Folder of all recordings.

    Raises:
        `ValueError`:
            If an alphabet has too few characters or the part is unknown.
    """
    if part not in split["parts"]:
        raise ValueError(f"the split has no part {part!r}; choose one of {', '.join(split['parts'])}")
    options, characters = split["parts"][part], characters_of(data)
    architectures, regimes = options["architectures"], list(split["regimes"])
    tasks = []
    for index in range(options["tasks"]):
        seed = options["first_seed"] + index
        random = np.random.RandomState(seed)
        alphabets = dict(zip(("source", "target"), random.permutation(options["alphabets"]), strict=False))
        others = [alphabet for alphabet in options["pretraining"] if alphabet not in alphabets.values()]
        alphabets["pretraining"] = others[random.randint(len(others))]
        classes = {}
        for side, alphabet in alphabets.items():
            labels, count = characters[alphabet], split["target" if side == "target" else "source"]["characters"]
            if count > len(labels):
                raise ValueError(f"alphabet {alphabet!r} has {len(labels)} characters; lower characters={count}")
            classes[side] = tuple(int(label) for label in np.sort(random.permutation(labels)[:count]))
        architecture = architectures[index % len(architectures)]
        regime = regimes[index // len(architectures) % len(regimes)]
        stages = split["stages"][index // len(architectures) // len(regimes) % len(split["stages"])]
        name = f"{part}-{index:02}-{architecture}-{regime}"
        folder = output_dir / "tasks" / name
        tasks.append(MetaTask(name, part, seed, architecture, regime, stages, classes, split, data, folder))
    return tasks


@cache
def characters_of(data: str) -> dict[str, list[int]]:
    """Return the labels of each alphabet of the dataset, sorted."""
    rows = datasets.load_dataset(data, split="train").select_columns(["alphabet", "label"])
    pairs = sorted(set(zip(rows["alphabet"][:], rows["label"][:], strict=True)))
    return {alphabet: [label for _, label in of_alphabet] for alphabet, of_alphabet in groupby(pairs, itemgetter(0))}
