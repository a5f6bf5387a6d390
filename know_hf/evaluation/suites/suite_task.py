"""What a suite compares arms on: its data, models and trainings, each by the seed alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from ...checkpoint import file_sha256
from ...recording import induce_forgetting
from ...schedule import ForgettingSchedule
from ...trajectory import WeightTrajectory
from ..measure import ComparisonTask
from ..splits import Split
from .small_cnn import SmallCNN
from .suite_data import Inputs, Prepared, Rows, Side, content_hash, prepare

_SOURCE, _TARGET = 0, 1
_OTHER_INITIALISATION = 1_000_000  # added to the seed of the trajectory


@dataclass(frozen=True)
class ModelSpec:
    """The model of a suite.

    Args:
        pretrained (`str`, *optional*): Hub id of weights to start from.
        class_name (`str`, *optional*): Class of transformers, or `"SmallCNN"`; by default what `Auto` classes give for
            `pretrained`.
        config (`Mapping[str, Any]`, *optional*): Its configuration, or what is changed of the pretrained one's.
        new (`bool`, *optional*, defaults to `False`): Whether only the architecture of `pretrained` is taken, newly
            initialised.
        lora (`Mapping[str, Any]`, *optional*): Arguments of `peft.LoraConfig`: an adapter is trained, not the model.
    """

    pretrained: str | None = None
    class_name: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    new: bool = False
    lora: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.pretrained is None and self.class_name is None:
            raise ValueError("a model needs pretrained, class_name, or both")
        if self.lora is not None and (self.pretrained is None or self.new):
            raise ValueError("an adapter needs pretrained weights to belong to")

    @property
    def model_class(self) -> type[PreTrainedModel] | None:
        """The class that is named."""
        import transformers

        if self.class_name is None:
            return None
        found = {"SmallCNN": SmallCNN}.get(self.class_name) or getattr(transformers, self.class_name, None)
        if found is None:
            raise ValueError(f"transformers has no class {self.class_name!r}, and it is not SmallCNN")
        return found


@dataclass(frozen=True)
class SuiteTask:
    """A suite with its data read; the methods are the callables of a [`ComparisonTask`].

    Args:
        inputs ([`Inputs`]): What rows become.
        source, target ([`Side`]): The examples.
        model ([`ModelSpec`]): The model.
        schedule (`Mapping[str, Any]`): Fields of [`ForgettingSchedule`]; seed and classes are set here.
        training (`Mapping[str, Any]`): Fields of `TrainingArguments`, for Θ0; the stages differ by the schedule.
        sources (`Mapping[str, str]`): Folders, or other Hub ids, to read datasets from, by their ids.
        models (`Mapping[str, str]`): The same for models.
    """

    inputs: Inputs
    source: Side
    target: Side
    model: ModelSpec
    schedule: Mapping[str, Any]
    training: Mapping[str, Any]
    sources: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)

    def task(self, facts: Mapping[str, Any]) -> ComparisonTask:
        """The task of [`compare_arms`]; all data is read, so that what is missing is told now.

        Args:
            facts (`Mapping[str, Any]`): The suite, JSON values only; hashes of the data and of pretrained weights are
                added.

        Raises:
            `ValueError`: when a split has fewer examples than the suite needs, or other classes than the other one.
        """
        for seed_independent in (lambda: self.source_split(0), lambda: self.target_split(0, 0)):
            seed_independent()
        parts = [part for side in (self.source, self.target) for part in self._parts(side)]
        starts_pretrained = self.model.pretrained is not None and not self.model.new
        return ComparisonTask(
            trajectory=self.record,
            target=self.target_split,
            source=self.source_split,
            fresh_model=self.fresh_model,
            pretrained_model=self.start if starts_pretrained else None,
            oracle_model=self.oracle_model,
            train_further=self.train_further,
            base_model=self.start if self.model.lora is not None else None,
            model_class=self.model.model_class,
            facts={**facts, "data": [content_hash(part) for part in parts], "pretrained": self._pretrained_identity()},
        )

    def source_split(self, seed: int) -> Split:
        """Training and unseen examples of the source."""
        pool, unseen = self._parts(self.source)
        rows = pool.rows([seed, _SOURCE])
        used = self._oracle_size
        if used > len(rows):
            raise ValueError(
                f"the oracle trains on {used} examples, but split {self.source.pool!r} of {self.source.dataset} has"
                f" {len(rows)} of the classes"
            )
        rest = rows[used:] if unseen == pool else unseen.rows([seed, _SOURCE, 1])
        validation, test = self._divide(self.source, rest)
        return Split(pool.take(rows[: self.source.train]), unseen.take(validation), unseen.take(test))

    def target_split(self, seed: int, draw: int) -> Split:
        """A downstream draw."""
        pool, unseen = self._parts(self.target)
        rows = pool.rows([seed, _TARGET, draw])
        used = self.target.train
        if used > len(rows):
            raise ValueError(
                f"{used} examples are asked for, but split {self.target.pool!r} of {self.target.dataset} has"
                f" {len(rows)} of the classes"
            )
        rest = rows[used:] if unseen == pool else unseen.rows([seed, _TARGET, draw, 1])
        validation, test = self._divide(self.target, rest)
        return Split(pool.take(rows[:used]), unseen.take(validation), unseen.take(test), len(self.target_classes))

    def record(self, seed: int, folder: Path) -> WeightTrajectory:
        """The trajectory of a seed; resumes."""
        trainer = self._trainer(seed, self.source.train, folder.parents[1] / "work" / folder.name)
        schedule = ForgettingSchedule(**{"stratify_by": "labels", "seed": seed, **self.schedule})
        return induce_forgetting(trainer, schedule, folder)

    def start(self, seed: int) -> PreTrainedModel:
        """The model that the training of a seed starts from, without its adapter."""
        return self._model(seed, new=self.model.new)

    def fresh_model(self, seed: int) -> PreTrainedModel:
        """A newly initialised model, in no relation to the one that was trained."""
        return self._model(seed + _OTHER_INITIALISATION, new=True)

    def oracle_model(self, seed: int, folder: Path) -> PreTrainedModel:
        """Trained like Θ0 on 1/r times the examples, those of Θ0 among them."""
        trainer = self._trainer(seed, self._oracle_size, folder / "oracle")
        trainer.train()
        return trainer.model

    def train_further(self, seed: int, model: PreTrainedModel, steps: list[int], folder: Path) -> PreTrainedModel:
        """Trains on all source data: each stage with the steps, seed and learning rates of its stage of the
        trajectory."""
        for name in getattr(model, "peft_config", {}):
            model.set_adapter(name)  # one that was loaded is frozen
        for stage, count in enumerate(steps, start=1):
            trainer = self._trainer(seed, self.source.train, folder / "further", model, stage, max_steps=count)
            trainer.train()
        return model

    @property
    def source_classes(self) -> tuple[int, ...]:
        return self._parts(self.source)[0].classes

    @property
    def target_classes(self) -> tuple[int, ...]:
        return self._parts(self.target)[0].classes

    @property
    def _oracle_size(self) -> int:
        return round(self.source.train / ForgettingSchedule(**self.schedule).ratio)

    def _parts(self, side: Side) -> tuple[Prepared, Prepared]:
        tokenizer = self.model.pretrained and self.models.get(self.model.pretrained, self.model.pretrained)
        make = partial(prepare, side, inputs=self.inputs, sources=self.sources, tokenizer=tokenizer)
        pool = make(side.pool)
        unseen = pool if side.unseen is None else make(side.unseen)
        if pool.classes != unseen.classes:
            raise ValueError(
                f"splits {side.pool!r} and {side.unseen!r} of {side.dataset} have different classes,"
                f" {list(pool.classes)} and {list(unseen.classes)}; name those that are used in classes"
            )
        return pool, unseen

    def _pretrained_identity(self) -> str | None:
        """What tells other pretrained weights from these: the hashes of their files, in a folder or the Hub cache."""
        if self.model.pretrained is None or self.model.new:
            return None
        place = self.models.get(self.model.pretrained, self.model.pretrained)
        for index, whole in ((SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME), (WEIGHTS_INDEX_NAME, WEIGHTS_NAME)):
            if found := _cached(place, whole):
                return file_sha256(found)[:20]
            if listed := _cached(place, index):
                names = sorted(set(json.loads(listed.read_text(encoding="utf-8"))["weight_map"].values()))
                return ",".join(file_sha256(shard)[:20] for name in names if (shard := _cached(place, name)))
        return None

    def _divide(self, side: Side, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        test = len(rows) - side.validation if side.test is None else side.test
        if test < 1 or side.validation + test > len(rows):
            raise ValueError(
                f"{side.validation} and {side.test or 'some'} unseen examples are asked for, {len(rows)} of"
                f" {side.dataset} are left"
            )
        return rows[: side.validation], rows[side.validation : side.validation + test]

    def _model(self, seed: int, new: bool) -> PreTrainedModel:
        options = {**self.model.config, "num_labels": len(self.source_classes)}
        model_class = self.model.model_class
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.model.pretrained is None:
                assert model_class is not None and model_class.config_class is not None
                return model_class(model_class.config_class(**options))
            place = self.models.get(self.model.pretrained, self.model.pretrained)
            is_image = self.inputs.image_size is not None
            auto = AutoModelForImageClassification if is_image else AutoModelForSequenceClassification
            if new:
                config = AutoConfig.from_pretrained(place, **options)
                return auto.from_config(config) if model_class is None else model_class(config)
            loaded = (model_class or auto).from_pretrained(place, ignore_mismatched_sizes=True, **options)
            if self.model.lora is None:  # peft looks for the base model under its name whenever it saves
                # files name the model, not the folder of this machine that it was read from
                loaded.name_or_path = loaded.config._name_or_path = self.model.pretrained
            return loaded

    def _trainer(
        self,
        seed: int,
        num_examples: int,
        folder: Path,
        model: nn.Module | None = None,
        stage: int = 0,
        **options: Any,
    ) -> Trainer:
        pool, _ = self._parts(self.source)
        arguments = TrainingArguments(
            str(folder),
            **{
                "seed": 100 * seed + stage,
                "save_strategy": "no",
                "logging_strategy": "no",
                "disable_tqdm": True,
                "remove_unused_columns": False,
                "label_names": ["labels"],
                "dataloader_pin_memory": torch.accelerator.is_available(),
                **self.training,
                **({"num_train_epochs": self.schedule.get("epochs_per_stage", 1)} if stage else {}),
                **options,
            },
        )
        trainer = Trainer(
            self._with_adapter(seed) if model is None else model,
            arguments,
            data_collator=_as_it_is,
            train_dataset=Rows(pool.stored(pool.rows([seed, _SOURCE])[:num_examples]), self.inputs),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _with_adapter(self, seed: int) -> nn.Module:
        model = self.start(seed)
        if self.model.lora is None:
            return model
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(model, LoraConfig(**self.model.lora))


def _cached(place: str, name: str) -> Path | None:
    found = cached_file(place, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _as_it_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch
