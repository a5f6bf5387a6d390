"""The data, models and trainings of a suite; each depends on the seed alone."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from ...checkpoint import atomic_folder, file_sha256
from ...recording import induce_forgetting
from ...schedule import ForgettingSchedule
from ...trajectory import WeightTrajectory
from ...trajectory.manifest import Manifest
from ..comparison import ACCURACY, LOSS
from ..comparison_task import ComparisonTask
from ..fine_tuning import evaluate_classifier, evaluate_next_token
from ..splits import Split
from .suite import Suite
from .suite_data import PreparedSplit, Side, StoredExamples, prepare

_SOURCE, _TARGET = 0, 1
_FRESH_MODEL_OFFSET = 1_000_000  # added to the seed of the trajectory


@dataclass(frozen=True)
class SuiteTask:
    """A suite as a [`ComparisonTask`], whose callables are the methods of this class.

    Datasets and pretrained models are read from the given folders or other Hub ids, by their ids.
    """

    suite: Suite
    dataset_paths: Mapping[str, str] = field(default_factory=dict)
    model_paths: Mapping[str, str] = field(default_factory=dict)

    def comparison_task(self) -> ComparisonTask:
        """Read all data and return the task of [`compare_arms`].

        Raises:
            `ValueError`: if a split has fewer examples than the suite needs, or other classes than its counterpart.
        """
        self.source_split(0)
        self.target_split(0, 0)
        model = self.suite.model
        splits = [split for side in (self.suite.source, self.suite.target) for split in self._splits(side)]
        return ComparisonTask(
            trajectory=self.record,
            target=self.target_split,
            source=self.source_split,
            fresh_model=self.fresh_model,
            pretrained_model=self.start if model.starts_pretrained else None,
            oracle_model=self.oracle_model,
            train_further=self.train_further,
            branch_trajectory=self.branch_trajectory,
            base_model=self.start if model.lora is not None else None,
            model_class=model.model_class,
            evaluate=evaluate_next_token if self.suite.inputs.next_byte else evaluate_classifier,
            measures=(LOSS, ACCURACY) if self.suite.inputs.next_byte else (ACCURACY, LOSS),
            facts={
                **self.suite.identity,
                "data": [file_sha256(split.path)[:20] for split in splits],
                "pretrained": model.weights_hash(model.path(self.model_paths)),
            },
        )

    def source_split(self, seed: int) -> Split:
        """Return training, validation and test examples of the source task."""
        return self._split(self.suite.source, [seed, _SOURCE], "the oracle", self.oracle_size)

    def target_split(self, seed: int, draw: int) -> Split:
        """Return the examples of a downstream draw."""
        side = self.suite.target
        pool, _ = self._splits(side)
        split = self._split(side, [seed, _TARGET, draw], "target", side.train)
        return replace(split, num_labels=len(pool.classes) or None)

    def record(self, seed: int, folder: Path) -> WeightTrajectory:
        """Record the trajectory of a seed, or resume it."""
        schedule = self._schedule(seed, self.suite.schedule)
        return self._record(seed, folder, folder.parents[1] / "work" / folder.name, schedule)

    def branch_trajectory(self, seed: int, folder: Path, trajectory: WeightTrajectory) -> WeightTrajectory:
        """Copy start and Θ0 of the trajectory of a seed, and record two branches from the start on complementary
        halves."""
        if WeightTrajectory.exists(folder) and len((recorded := WeightTrajectory(folder)).branches) == 2:
            return recorded
        schedule = self._schedule(seed, {"kind": "complementary", "branch_from": "start"})
        if not WeightTrajectory.exists(folder):
            with atomic_folder(folder) as work:
                others = shutil.ignore_patterns(".lock", "state-[1-9]*", "tail-*")
                shutil.copytree(trajectory.path, work, ignore=others, dirs_exist_ok=True)
                manifest = Manifest.read(work)
                replace(manifest, schedule=schedule, states=manifest.states[:1], tail=()).write(work)
        return self._record(seed, folder, folder.parent / "work" / folder.name, schedule)

    def start(self, seed: int) -> PreTrainedModel:
        """Return the model that the training of a seed starts from, without its adapter."""
        return self._build(seed, new=self.suite.model.new)

    def fresh_model(self, seed: int) -> PreTrainedModel:
        """Return a randomly initialised model, independent of the trained one."""
        return self._build(seed + _FRESH_MODEL_OFFSET, new=True)

    def oracle_model(self, seed: int, folder: Path) -> PreTrainedModel:
        """Train as Θ0 was trained, on 1/r times the examples; they include those of Θ0."""
        trainer = self._trainer(seed, self.oracle_size, folder / "oracle")
        trainer.train()
        return trainer.model

    def train_further(self, seed: int, model: PreTrainedModel, steps: list[int], folder: Path) -> PreTrainedModel:
        """Train on all source data, with the steps, seed and learning rates of each stage of the trajectory."""
        for name in getattr(model, "peft_config", {}):
            model.set_adapter(name)  # a loaded adapter is frozen
        for stage, count in enumerate(steps, start=1):
            epochs = self.suite.schedule.get("epochs_per_stage", 1)
            options = {"num_train_epochs": epochs, "max_steps": count}
            self._trainer(seed, self.suite.source.train, folder / "further", model, stage, **options).train()
        return model

    def _schedule(self, seed: int, options: Mapping[str, Any]) -> ForgettingSchedule:
        stratify_by = None if self.suite.inputs.next_byte else "labels"
        return ForgettingSchedule(**{"stratify_by": stratify_by, "seed": seed, **options})

    def _record(self, seed: int, folder: Path, work: Path, schedule: ForgettingSchedule) -> WeightTrajectory:
        return induce_forgetting(self._trainer(seed, self.suite.source.train, work), schedule, folder)

    @property
    def oracle_size(self) -> int:
        """Number of training examples of the oracle."""
        return round(self.suite.source.train / ForgettingSchedule(**self.suite.schedule).ratio)

    def _split(self, side: Side, seed: list[int], trained: str, num_trained: int) -> Split:
        """Shuffle and divide the examples of a side; no unseen one is among those that `trained` trains on."""
        pool, unseen = self._splits(side)
        rows = pool.rows(seed)
        if num_trained > len(rows):
            split = f"split {side.pool!r} of {side.dataset} has {len(rows)} of the classes"
            raise ValueError(f"{trained} trains on {num_trained} examples, but {split}; lower train")
        rest = rows[num_trained:] if unseen == pool else unseen.rows([*seed, 1])
        validation, test = _divide(side, rest)
        return Split(pool.take(rows[: side.train]), unseen.take(validation), unseen.take(test))

    def _splits(self, side: Side) -> tuple[PreparedSplit, PreparedSplit]:
        return self._prepared[side]

    @cached_property
    def _prepared(self) -> dict[Side, tuple[PreparedSplit, PreparedSplit]]:
        """Prepared pool and unseen examples; a pickled task keeps them, so that worker processes read no dataset."""
        return {side: self._prepare(side) for side in (self.suite.source, self.suite.target)}

    def _prepare(self, side: Side) -> tuple[PreparedSplit, PreparedSplit]:
        tokenizer = self.suite.model.path(self.model_paths)
        read = partial(prepare, side, inputs=self.suite.inputs, dataset_paths=self.dataset_paths, tokenizer=tokenizer)
        pool = read(side.pool)
        unseen = pool if side.unseen is None else read(side.unseen)
        if pool.classes != unseen.classes:
            raise ValueError(
                f"splits {side.pool!r} and {side.unseen!r} of {side.dataset} have different classes,"
                f" {list(pool.classes)} and {list(unseen.classes)}; list the classes to use"
            )
        return pool, unseen

    def _build(self, seed: int, new: bool) -> PreTrainedModel:
        model, (pool, _) = self.suite.model, self._splits(self.suite.source)
        is_image = self.suite.inputs.image_size is not None
        return model.build(seed, len(pool.classes), model.path(self.model_paths), is_image, new)

    def _trainer(
        self,
        seed: int,
        num_examples: int,
        folder: Path,
        model: nn.Module | None = None,
        stage: int = 0,
        **options: Any,
    ) -> Trainer:
        pool, _ = self._splits(self.suite.source)
        arguments = {
            "seed": 100 * seed + stage,
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "dataloader_pin_memory": torch.accelerator.is_available(),
            **self.suite.training,
            **options,
        }
        trainer = Trainer(
            self.suite.model.with_adapter(self.start(seed), seed) if model is None else model,
            TrainingArguments(str(folder), **arguments),
            data_collator=_collate,
            train_dataset=StoredExamples(pool.stored(pool.rows([seed, _SOURCE])[:num_examples]), self.suite.inputs),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def _divide(side: Side, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide the unseen rows into validation and test."""
    test = len(rows) - side.validation if side.test is None else side.test
    if test < 1 or side.validation + test > len(rows):
        raise ValueError(
            f"{side.dataset} has {len(rows)} unseen examples left, fewer than validation={side.validation} and"
            f" test={side.test or 'at least 1'}; lower them"
        )
    return rows[: side.validation], rows[side.validation : side.validation + test]


def _collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch  # StoredExamples.__getitems__ returns complete batches
