"""Files that cannot be written completely, as on a full disk: a clear error, old files intact, the next run goes on.

A limit on the size of files stands for the disk. Recordings are in tests/processes/test_recording_crash.py.
"""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import make_resnet
from doubles.hub_fixtures import contents, store
from doubles.loopback_hub import LoopbackHub
from doubles.toy_trajectories import record_lines
from peft import LoraConfig, get_peft_model
from quadrants import source, target

from know_hf import KNOWNConfig, TransitionDataset, WeightTrajectory, compare_arms, meta_train
from know_hf import predict_overflowed_weights as predict
from know_hf.evaluation import ComparisonTask, ZeroShot
from know_hf.hub import pull
from know_hf.meta_learning import MetaTrainingArguments
from know_hf.meta_learning.training_checkpoints import CheckpointFolder
from know_hf.trajectory.merging import merge_adapters

pytestmark = pytest.mark.usefixtures("no_sleep")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_predict(recorded: Path, enhanced: Path, tmp_path: Path) -> None:
    out = shutil.copytree(enhanced, tmp_path / enhanced.name)  # a card names its folder
    size = (enhanced / "model.safetensors").stat().st_size
    with largest_file(size // 2), pytest.raises(OSError, match="too large"):
        predict(recorded, predictor="average", output_dir=out, overwrite=True)
    assert names(tmp_path) == {out.name} and contents(out) == contents(enhanced)
    predict(recorded, output_dir=out, overwrite=True)
    assert contents(out) == contents(enhanced)


def test_merge(tmp_path: Path) -> None:
    base = make_resnet()
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(make_resnet(), LoraConfig(r=2, target_modules=["classifier.1"]))
    trajectory = WeightTrajectory.create(tmp_path / "adapters")
    for state in range(2):
        adapted.base_model.model.classifier[1].lora_B["default"].weight.data += 0.1
        trajectory.record(adapted, num_examples=4 >> state, steps=1)
    (tmp_path / "out").mkdir()
    merge = {"base_model": tmp_path / "base", "output_dir": tmp_path / "out"}
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    with largest_file(size // 2), pytest.raises(OSError, match=r"state 0 .*too large"):
        merge_adapters(tmp_path / "adapters", **merge)
    assert names(tmp_path) == {"base", "adapters", "out"} and not names(tmp_path / "out")
    merge_adapters(tmp_path / "adapters", **merge).verify()


def test_compare(recorded: Path, tmp_path: Path) -> None:
    def run(folder: str) -> dict:
        task = ComparisonTask([recorded], target, source)
        options = {"protocols": (ZeroShot(),), "arms": ["naive", "shrink", "average"], "draws": 2, "pages": False}
        compare_arms(task, tmp_path / folder, **options)
        return json.loads((tmp_path / folder / "report.json").read_text())["results"]

    expected = run("undisturbed")
    size = (recorded / "state-0" / "model.safetensors").stat().st_size
    with largest_file(size // 2), pytest.raises(OSError, match="too large"):
        run("out")
    assert not (tmp_path / "out" / "report.json").exists()
    assert run("out") == expected
    assert names(tmp_path / "out") == names(tmp_path / "undisturbed")


def test_meta_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_lines(tmp_path / "lines")

    def train(folder: str) -> dict[str, torch.Tensor]:
        data = TransitionDataset([tmp_path / "lines"], cache_dir=tmp_path / "cache", progress=False)
        args = MetaTrainingArguments(steps=3, save_every=1, batch_size=8, checkpoint_dir=str(tmp_path / folder))
        return meta_train(KNOWNConfig(hidden_size=8), data, args=args, progress=False).model.state_dict()

    with largest_file(100), pytest.raises(OSError, match="too large"):
        train("undisturbed")  # the cache
    expected = train("undisturbed")
    save = CheckpointFolder.save

    def limited(self: CheckpointFolder, progress: object) -> None:
        with largest_file(10**8 if progress.step < 3 else 5000):
            save(self, progress)

    monkeypatch.setattr(CheckpointFolder, "save", limited)
    with pytest.raises(OSError, match="step-00000003"):
        train("out")
    assert names(tmp_path / "out") == {"step-00000001", "step-00000002"}
    monkeypatch.undo()
    for name, weight in train("out").items():
        assert torch.equal(weight, expected[name])


def test_pull(hub: LoopbackHub, enhanced: Path, tmp_path: Path) -> None:
    store(hub, enhanced, "me/x")
    size = (enhanced / "model.safetensors").stat().st_size
    with largest_file(size // 2), pytest.raises(OSError, match="too large"):
        pull("me/x", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    assert contents(pull("me/x", tmp_path / "pulled")) == contents(enhanced)
