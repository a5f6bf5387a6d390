"""What the kill campaign runs: each command of know_hf on models of a few hundred weights."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from local_hub import LocalHub
from peft import LoraConfig, get_peft_model
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from know_hf import (
    ForgettingSchedule,
    Gate,
    KNOWNConfig,
    TransitionDataset,
    WeightTrajectory,
    compare_arms,
    induce_forgetting,
    meta_train,
    predict_overflowed_weights,
)
from know_hf.evaluation import ComparisonTask, LinearProbe, Split, ZeroShot
from know_hf.hub import pull, push
from know_hf.meta_learning import MetaTrainingArguments
from know_hf.trajectory.merging import merge_adapters

REPO = "me/trajectory"
Contents = dict[str, bytes]


@dataclass(frozen=True)
class Command:
    """A command of know_hf.

    Attributes:
        run (`Callable`):
            Runs it in an empty folder; it writes to `out` there.
        is_whole (`bool`):
            Whether `out` appears complete or not at all. Otherwise the files in it do.
        old (`Callable`, *optional*):
            Puts the result that the command replaces into the folder.
        on_hub (`bool`):
            Whether the command writes to the Hub instead.
    """

    run: Callable[[Path], object]
    is_whole: bool = True
    old: Callable[[Path], object] | None = None
    on_hub: bool = False


def images(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Noise around four class means, 8×8."""
    labels = torch.arange(count) % 4
    means = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": means[labels] + noise, "labels": labels}


def dataset(count: int, seed: int = 0) -> Dataset:
    return Dataset.from_dict({name: values.numpy() for name, values in images(count, seed).items()}).with_format(
        "torch"
    )


def model(seed: int = 0) -> ResNetForImageClassification:
    torch.manual_seed(seed)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "num_channels": 1, "num_labels": 4}
    return ResNetForImageClassification(ResNetConfig(layer_type="basic", **sizes))


def record(folder: Path, num_states: int = 3, seed: int = 0, trainer_dir: Path | None = None) -> WeightTrajectory:
    options: dict[str, Any] = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 0.01}
    options |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": seed, "report_to": "none"}
    args = TrainingArguments(str(trainer_dir or folder.with_name("trainer")), dataloader_pin_memory=False, **options)
    trainer = Trainer(model(seed), args, train_dataset=dataset(32), eval_dataset=dataset(8, 1))
    return induce_forgetting(trainer, ForgettingSchedule(num_states=num_states, stratify_by="labels"), folder)


def record_walk(folder: Path, adapted: bool = False, seed: int = 0) -> None:
    """Record five states without a training: every trained weight takes a random step from state to state."""
    torch.manual_seed(seed)
    walking: Any = model(seed)
    if adapted:
        walking = get_peft_model(
            ResNetForImageClassification.from_pretrained(folder.with_name("base")),
            LoraConfig(r=2, target_modules=["classifier.1"]),
        )
    trajectory = WeightTrajectory.create(folder)
    for state in range(5):
        for parameter in walking.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape)
        trajectory.record(walking, num_examples=32 >> state, steps=1)


class Commands:
    """The commands, and their inputs in a folder."""

    def __init__(self, inputs: Path, hub: LocalHub) -> None:
        self.inputs, self.hub = inputs, hub
        if not inputs.exists():
            inputs.mkdir(parents=True)
            model().save_pretrained(inputs / "base")
            for seed, name in enumerate(("walk", "other")):
                record_walk(inputs / name, seed=seed)
            record_walk(inputs / "adapters", adapted=True)
            predict_overflowed_weights(inputs / "other", predictor="average", output_dir=inputs / "enhanced")
        hub.create("me/pulled", contents(inputs / "walk"))

    def all(self) -> dict[str, Command]:
        def old_folder(trial: Path) -> None:
            shutil.copytree(self.inputs / "enhanced", trial / "out")

        def old_repo(trial: Path) -> None:
            self.hub.create(REPO, contents(self.inputs / "other"))

        return {
            "record": Command(lambda trial: record(trial / "out", trainer_dir=trial / "trainer"), is_whole=False),
            "predict": Command(lambda trial: self.predict(trial), old=old_folder),
            "gate": Command(
                lambda trial: self.predict(trial, gate=Gate(dataset=dataset(80, 2), candidates=[1, "average"])),
                old=old_folder,
            ),
            "merge": Command(self.merge, old=old_folder),
            "compare": Command(self.compare, is_whole=False),
            "meta-train": Command(lambda trial: train_known(self.inputs, trial / "out"), is_whole=False),
            "push": Command(lambda trial: push(self.inputs / "walk", REPO), old=old_repo, on_hub=True),
            "pull": Command(lambda trial: pull("me/pulled", trial / "out")),
        }

    def predict(self, trial: Path, **options: Any) -> None:
        predict_overflowed_weights(self.inputs / "walk", output_dir=trial / "out", overwrite=True, **options)

    def merge(self, trial: Path) -> None:
        merge_adapters(self.inputs / "adapters", self.inputs / "base", output_dir=trial / "out", overwrite=True)

    def compare(self, trial: Path) -> None:
        def split(seed: int, draw: int = 0) -> Split:
            return Split(*(images(16, 100 * part + 10 * seed + draw) for part in (1, 2, 3)), 4)

        task = ComparisonTask(
            lambda seed, folder: record(folder, 2, seed, trial / "trainer"), split, split, facts={"name": "noise"}
        )
        protocols = (ZeroShot(), LinearProbe((0.01, 0.1), steps=2))
        arms = ["naive", "shrink", "average"]
        compare_arms(task, trial / "out", protocols=protocols, arms=arms, seeds=(0,), draws=2, pages=False)


def train_known(inputs: Path, out: Path) -> None:
    """Meta-train a small KNOWN on the trajectories among the inputs."""
    sizes = {name: 4 for name in ("hidden_size", "stream_size") if hasattr(KNOWNConfig(), name)}
    trajectories = [inputs / "walk", inputs / "other"]
    data = TransitionDataset(trajectories, 4, cache_dir=out / "cache", progress=False)
    options: dict[str, Any] = {"steps": 6, "batch_size": 16, "save_every": 2, "keep_checkpoints": 9}
    args = MetaTrainingArguments(checkpoint_dir=str(out / "checkpoints"), warmup_steps=0, **options)
    result = meta_train(KNOWNConfig(num_states=4, **sizes), data, args=args, progress=False)
    if int(os.environ.get("RANK", 0)) == 0:
        result.model.save_pretrained(out / "known")


def contents(folder: Path) -> Contents:
    """Bytes of all files by their path in the folder, without measured times, pages that show them, and optimizers."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    skipped = (".lock", ".bin", ".pkl", "report.html", "report.md")
    return {
        name: _without_times(name, path.read_bytes()) for name, path in files.items() if not name.endswith(skipped)
    }


def _without_times(name: str, content: bytes) -> bytes:
    if not name.endswith(".json") or b'"seconds"' not in content:
        return content
    zero = {"seconds": 0}
    try:
        return json.dumps(json.loads(content, object_hook=lambda e: {**e, **zero} if "seconds" in e else e)).encode()
    except ValueError:  # cut off
        return content
