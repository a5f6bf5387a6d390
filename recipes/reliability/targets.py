"""Inputs of know_hf that can be damaged, and what reads each of them."""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import commands
import h5py
import torch
import yaml

from know_hf import (
    KNOWNConfig,
    KNOWNModel,
    TransitionDataset,
    WeightTrajectory,
    cli,
    compare_arms,
    predict_overflowed_weights,
)
from know_hf.cards import checkpoint_card
from know_hf.checkpoint import read_json_object
from know_hf.evaluation import ComparisonTask, LinearProbe, Split, ZeroShot
from know_hf.evaluation.report.pages import write_report
from know_hf.evaluation.suites import load_suite
from know_hf.known.keras_import import KERAS_FILES, KERAS_LAYERS
from know_hf.meta_learning import read_collection
from know_hf.tasks import RecordArguments

GATE = {
    "metric": "loss", "scores": {"Θ0": 1.0, "KNOWN, 1 step": 0.5}, "chosen": "KNOWN, 1 step", "sentence": "Better.",
    "candidates": [{"name": "Θ0", "loss": 1.0, "difference": 0.0, "low": -0.1, "high": 0.1, "p_value": 0.5}],
    "level": 0.05,
}  # fmt: skip
RECORD = {
    "task": "text-classification", "model": "org/model", "dataset": "org/data", "output_dir": "out", "epochs": 3,
    "max_length": 128, "ratio": 0.5, "num_states": 5, "lora": {"r": 8, "target_modules": ["query"]},
    "training": {"learning_rate": 5.0e-5, "per_device_train_batch_size": 16},
}  # fmt: skip


class CommandError(ValueError):
    """A command ended with exit code 1 and this message."""


@dataclass(frozen=True)
class Target:
    """A folder and what reads it.

    Attributes:
        make (`Callable`):
            Writes the intact folder.
        run (`Callable`):
            Reads a folder and writes to another one; returns something that depends on everything that was read.
        has_hashes (`bool`):
            Whether hashes protect the files, so that a damaged one must not change the result.
        names_file (`bool`):
            Whether errors must name the file; the others are of content that the caller read.
        weight (`int`):
            How often it is chosen.
    """

    make: Callable[[Path], object]
    run: Callable[[Path, Path], Any]
    has_hashes: bool = False
    names_file: bool = True
    weight: int = 1


def command(*argv: object) -> str:
    """Run a command in this process; its message becomes an error."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = cli.main([str(arg) for arg in argv])
    text = errors.getvalue()
    if "Traceback" in text:
        raise RuntimeError(text)
    if code:
        raise CommandError(text.rpartition(f"know-hf {argv[0]}: ")[2].strip())
    return output.getvalue()


def weights(folder: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.safetensors"))]


def tiny_known() -> KNOWNModel:
    torch.manual_seed(0)
    return KNOWNModel(KNOWNConfig(hidden_size=8, bottleneck_size=2, stream_size=4))


def make_adapters(folder: Path) -> None:
    commands.model().save_pretrained(folder / "base")
    commands.record_walk(folder / "adapters", adapted=True)


def make_known(folder: Path) -> None:
    known = tiny_known()
    limits = {"largest_weight": 1.0, "largest_displacement": 1.0, "mean_displacement": 0.1, "trajectories": 2}
    known.config.trained_on = {"trajectories": 2, "roles": dict.fromkeys(("conv", "fc", "bias"), limits)}
    known.save_pretrained(folder)


def make_keras(folder: Path) -> None:
    folder.mkdir()
    tensors = tiny_known().state_dict()
    for role, name in KERAS_FILES.items():
        with h5py.File(folder / name, "w") as file:
            for number, layer in enumerate(KERAS_LAYERS):
                group = "dense" if number == 0 else f"dense_{number}"
                file[f"{group}/{group}/kernel:0"] = tensors[f"networks.{role}.{layer}.weight"].T.numpy()
                file[f"{group}/{group}/bias:0"] = tensors[f"networks.{role}.{layer}.bias"].numpy()


def make_published(folder: Path) -> None:
    folder.mkdir()
    with h5py.File(folder / "trajectory.h5", "w") as file:
        for name, shape in {"ConvWeights": (3, 3, 8, 6), "FCWeights": (20, 6), "Bias": (9, 6)}.items():
            file[name] = torch.randn(shape, generator=torch.Generator().manual_seed(0)).numpy()


def make_collection(folder: Path) -> None:
    rows = [{"path": name, "split": split} for name, split in (("a", "train"), ("b", "held_out"))]
    for seed, row in enumerate(rows):
        commands.record_walk(folder / row["path"], seed=seed)
        (folder / row["path"] / "recipe.json").write_text(
            json.dumps({"split": row["split"], "schedule": {"ratio": 0.5}})
        )
    (folder / "index.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def make_yaml(name: str, content: Any) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        folder.mkdir()
        text = json.dumps(content) if name.endswith(".json") else yaml.safe_dump(content, sort_keys=False)
        (folder / name).write_text(text, encoding="utf-8")

    return make


class Targets:
    """All targets; `inputs` is a folder for what they share."""

    def __init__(self, inputs: Path) -> None:
        self.walk = inputs / "walk"
        commands.record_walk(self.walk)
        self.enhanced = predict_overflowed_weights(self.walk, output_dir=inputs / "enhanced")
        self.plain = {"trajectory": self.walk, "predictor": "average", "card": False}

    def all(self) -> dict[str, Target]:
        suite = yaml.safe_load((Path(load_suite.__code__.co_filename).parent / "digits.yaml").read_text("utf-8"))
        return {
            "trajectory": Target(commands.record_walk, self.predict, has_hashes=True, weight=8),
            "inspect": Target(
                commands.record_walk, lambda folder, out: command("inspect", "--roles", folder), weight=3
            ),
            "card": Target(self.make_recorded, self.card, weight=2),
            "merge": Target(make_adapters, self.merge, weight=5),
            "known": Target(make_known, self.known, weight=6),
            "comparison": Target(self.make_comparison, self.compare, weight=4),
            "report": Target(
                self.make_report, lambda folder, out: write_report(folder / "report.json", out), weight=2
            ),
            "cache": Target(self.cache, self.read_cache, weight=4),
            "collection": Target(make_collection, lambda folder, out: read_collection(folder, 4), weight=2),
            "keras": Target(make_keras, self.keras, weight=5),
            "published": Target(make_published, self.published, weight=4),
            "record-yaml": Target(
                make_yaml("record.yaml", RECORD),
                lambda folder, out: RecordArguments.from_yaml(folder / "record.yaml"),
                weight=5,
            ),
            "suite-yaml": Target(
                make_yaml("suite.yaml", suite), lambda folder, out: load_suite(folder / "suite.yaml"), weight=5
            ),
            "gate": Target(make_yaml("gate.json", GATE), self.gate, names_file=False, weight=2),
        }

    def predict(self, folder: Path, out: Path) -> Any:
        predict_overflowed_weights(folder, output_dir=out / "enhanced", card=False)
        return weights(out)

    def make_recorded(self, folder: Path) -> None:
        commands.record_walk(folder / "trajectory")
        (folder / "record.json").write_text(json.dumps(RECORD))

    def card(self, folder: Path, out: Path) -> None:
        command("predict", folder / "trajectory", "--predictor", "average", "--output-dir", out / "enhanced")

    def merge(self, folder: Path, out: Path) -> None:
        command("merge", folder / "adapters", "--base-model", folder / "base", "--output-dir", out / "merged")

    def known(self, folder: Path, out: Path) -> None:
        command("predict", self.walk, "--known", folder, "--output-dir", out / "enhanced")

    def make_comparison(self, folder: Path) -> None:
        self.compare(folder, folder)

    def compare(self, folder: Path, out: Path) -> None:
        def split(seed: int, draw: int = 0) -> Split:
            return Split(*(commands.images(16, 100 * part + 10 * seed + draw) for part in (1, 2, 3)), 4)

        task = ComparisonTask([self.walk], split, split, facts={"name": "noise"})
        protocols, arms = (ZeroShot(), LinearProbe((0.01, 0.1), steps=1)), ["naive", "shrink"]
        compare_arms(task, folder, protocols=protocols, arms=arms, draws=2, pages=False)

    def make_report(self, folder: Path) -> None:
        self.compare(folder, folder)
        for path in folder.iterdir():
            if path.name == "identity.json":
                path.unlink()

    def cache(self, folder: Path) -> Any:
        data = TransitionDataset([self.walk], 4, max_per_tensor=20, cache_dir=folder, progress=False)
        return [data.block(block)[0].tolist() for block in data.blocks]

    def read_cache(self, folder: Path, out: Path) -> Any:
        return self.cache(folder)

    def keras(self, folder: Path, out: Path) -> None:
        KNOWNModel.from_keras(folder, tiny_known().config)

    def published(self, folder: Path, out: Path) -> Any:
        return len(TransitionDataset([folder / "trajectory.h5"], 4, max_per_tensor=20, progress=False))

    def gate(self, folder: Path, out: Path) -> str:
        content = read_json_object(folder / "gate.json")
        return str(checkpoint_card(WeightTrajectory(self.walk), self.enhanced, "average", 1, gate=content))
