"""Tiny real models, a real `Trainer` and one recorded trajectory that the tests share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gc
import importlib.util
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from know_hf import ForgettingSchedule, WeightTrajectory, induce_forgetting
from know_hf.checkpoint import file_sha256

pytest_plugins = ("doubles.loopback_hub", "doubles.hub_fixtures", "doubles.task_fixtures", "doubles.card_fields")

NUM_EXAMPLES = 64
SCHEDULE = ForgettingSchedule(ratio=0.5, num_states=5, stratify_by="labels")


@pytest.fixture(scope="session", autouse=True)
def quick_process() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects garbage at the start of every training: what was imported needs no look


def make_resnet(seed: int = 0) -> ResNetForImageClassification:
    set_seed(seed)
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    return ResNetForImageClassification(config)


def make_images(num_examples: int = NUM_EXAMPLES, seed: int = 0) -> Dataset:
    """Noise around four class means, 8×8, classes of equal size."""
    random = np.random.RandomState(seed)
    labels = np.arange(num_examples) % 4
    means = np.random.RandomState(1).randn(4, 1, 8, 8)
    pixels = (means[labels] + random.randn(num_examples, 1, 8, 8)).astype(np.float32)
    return Dataset.from_dict({"pixel_values": pixels, "labels": labels}).with_format("torch")


def make_trainer(output_dir: Path, model: torch.nn.Module | None = None, **arguments: object) -> Trainer:
    options = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(str(output_dir), **{**options, **arguments})
    return Trainer(
        model if model is not None else make_resnet(),
        args,
        train_dataset=make_images(),
        eval_dataset=make_images(16, seed=7),
    )


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a trajectory of five states of the tiny ResNet; never changed, see `trajectory_copy`."""
    folder = tmp_path_factory.mktemp("recorded")
    induce_forgetting(make_trainer(folder / "out"), SCHEDULE, folder / "trajectory")
    return folder / "trajectory"


@pytest.fixture
def trajectory(recorded: Path) -> WeightTrajectory:
    return WeightTrajectory(recorded)


@pytest.fixture
def trajectory_copy(recorded: Path, tmp_path: Path) -> Path:
    """A copy of the recorded trajectory to damage."""
    return shutil.copytree(recorded, tmp_path / "trajectory")


@pytest.fixture(scope="session")
def stored_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of three states of the tiny ResNet, of which the second and third store only what moved."""
    trajectory = WeightTrajectory.create(tmp_path_factory.mktemp("stored-once") / "states", ForgettingSchedule())
    model = make_resnet()
    for state in range(3):
        trajectory.record(model, num_examples=8 >> state, steps=1, seed=state, metrics={"eval_loss": 0.5})
        with torch.no_grad():
            model.classifier[1].weight += 1
    return trajectory.path


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs a script of the recipes and returns what it prints; an exit code other than 0 is an error."""

    def run(path: Path, *arguments: object) -> str:
        monkeypatch.setattr("sys.argv", [str(path), *map(str, arguments)])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        return capsys.readouterr().out

    return run


@pytest.fixture
def load_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], ModuleType]:
    """Imports a script of the recipes as a module that others can import."""

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def record_states(tmp_path: Path) -> Callable[..., WeightTrajectory]:
    """Records a model with its weights moved at random a little before every state but the first."""

    def record(model: PreTrainedModel, num_states: int = 5, name: str = "states") -> WeightTrajectory:
        trajectory = WeightTrajectory.create(tmp_path / name)
        generator = torch.Generator().manual_seed(0)
        for state in range(num_states):
            trajectory.record(model, num_examples=2 ** (num_states - state), steps=1)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter)
        return trajectory

    return record


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    """Changes the content of a `trajectory.json`."""
    path = folder / "trajectory.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite_state(folder: Path, state: int, change: Callable[[dict], object]) -> None:
    """Changes the tensors of a state and records the new file, as a faulty program would."""
    (path,) = folder.glob(f"state-{state}/*.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})

    def enter(content: dict) -> None:
        for record in content["states"][state]["files"]:
            if record["path"].endswith(".safetensors"):
                record.update(size=path.stat().st_size, sha256=file_sha256(path))

    edit_manifest(folder, enter)
