"""The start: the weights before the training, stored once where state 0 or the Hub holds them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_resnet, make_trainer
from doubles.loopback_hub import LoopbackHub
from doubles.small_trainers import BALANCED
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, ResNetForImageClassification

from know_hf import WeightTrajectory, WeightTransitionCallback, induce_forgetting
from know_hf.hub import push_trajectory
from know_hf.trajectory import TrajectoryError
from know_hf.trajectory.merging import merge_adapters

pytestmark = pytest.mark.usefixtures("no_sleep")

HEAD = "classifier.1.weight"
BODY = "resnet.embedder.embedder.convolution.weight"
COMMIT = "a" * 40


def assert_start(trajectory: WeightTrajectory, expected: dict[str, torch.Tensor]) -> None:
    trajectory = WeightTrajectory(trajectory.path)
    trajectory.verify()
    assert trajectory.start.kind == trajectory.start.name == "start"
    for name, tensor in expected.items():
        assert torch.equal(trajectory.tensor(name, "start"), tensor)
        assert torch.equal(trajectory.read(name, 0, 1, "start"), tensor.flatten()[:1])
    into = make_resnet(seed=5)
    trajectory.load_into(into, "start")
    for model in (trajectory.load_model("start"), into):
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def move(tmp_path: Path) -> Callable[..., WeightTrajectory]:
    """Records the start of a model, moves parameters and records state 0."""

    def record(model: nn.Module, moved: str = "", weights: str = "reference") -> WeightTrajectory:
        trajectory = WeightTrajectory.create(tmp_path / "moved")
        trajectory.record_start(model, weights=weights)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if moved in name:
                    parameter += 0.5
        trajectory.record(model, num_examples=8, steps=1)
        return trajectory

    return record


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResNetForImageClassification:
    """A model with a new head on a body that is in the Hub cache, without the prefix of the names in this model."""
    model = make_resnet()
    for module in ("huggingface_hub.constants", "know_hf.trajectory.recorder"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "cache"))
    model.resnet.save_pretrained(tmp_path / "cache/models--me--base/snapshots" / COMMIT)
    model.config._name_or_path, model.config._commit_hash = "me/base", COMMIT
    return model


def test_a_recording_holds_the_start(trajectory):
    assert_start(trajectory, copies(make_resnet()))
    assert trajectory.start.files[-1].path == "start/model.safetensors"
    assert trajectory.tail == trajectory.branches == ()
    assert not torch.equal(trajectory.tensor(HEAD, "start"), trajectory.tensor(HEAD))


def test_frozen_tensors_are_stored_once(move):
    model = make_resnet()
    before = copies(model)
    trajectory = move(model, moved="classifier")
    assert_start(trajectory, before)
    assert trajectory.start.unchanged[BODY] == 0 and HEAD not in trajectory.start.unchanged
    assert sum(file.size for file in trajectory.start.files if file.path.endswith(".safetensors")) < 1000
    loaded = ResNetForImageClassification.from_pretrained(trajectory.path, subfolder="start").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in before.items())


def test_a_training_that_changes_nothing(move):
    model = make_resnet()
    trajectory = move(model, moved="nothing")
    assert trajectory.start.unchanged.keys() == set(trajectory.names)
    assert_start(trajectory, copies(model))


def test_the_body_is_stored_by_reference_to_the_hub(move, cached, tmp_path):
    before = copies(cached)
    trajectory = move(cached, moved=".weight")
    hub = trajectory.start.hub
    assert (hub.repo_id, hub.commit, [file.path for file in hub.files]) == ("me/base", COMMIT, ["model.safetensors"])
    assert hub.names[BODY] == BODY.removeprefix("resnet.") and HEAD not in hub.names
    assert sum(file.size for file in trajectory.start.files if file.path.endswith(".safetensors")) < 1000
    assert_start(trajectory, before)
    with pytest.raises(OSError, match=r"model\.safetensors"):  # not the stored part with a new body
        ResNetForImageClassification.from_pretrained(trajectory.path, subfolder="start")
    shutil.rmtree(tmp_path / "cache")
    again = WeightTrajectory(trajectory.path)
    again.verify()
    for call in (lambda: again.tensor(BODY, "start"), lambda: again.load_model("start")):
        with pytest.raises(TrajectoryError, match=r"me/base at aaaaaaaa.*Connect to the Hub"):
            call()


def test_everything_is_stored_on_demand(move, cached, tmp_path):
    before = copies(cached)
    trajectory = move(cached, weights="full")
    shutil.rmtree(tmp_path / "cache")
    assert trajectory.start.hub is None
    assert_start(trajectory, before)


def test_other_bits_than_on_the_hub_are_stored(move, cached):
    with torch.no_grad():
        for parameter in cached.parameters():
            parameter += 1e-3
    before = copies(cached)
    trajectory = move(cached)
    names = {} if trajectory.start.hub is None else trajectory.start.hub.names
    assert BODY not in names
    assert_start(trajectory, before)


def test_the_start_of_an_adapter(move, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    base = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    trajectory = move(model, moved="lora_")
    (name,) = (name for name in trajectory.names if "lora_B" in name)
    assert not trajectory.tensor(name, "start").any() and trajectory.tensor(name).all()
    trajectory.load_into(model, "start")
    assert not model.state_dict()[name.replace(".weight", ".default.weight")].any()
    base = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
    weight = base.bert.encoder.layer[0].attention.self.query.weight.clone()
    loaded = trajectory.load_model("start", base_model=base)
    assert not loaded.state_dict()[name.replace(".weight", ".default.weight")].any()
    merged = merge_adapters(trajectory, base_model=loaded.unload(), output_dir=tmp_path / "merged")
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(merged.tensor(query, "start"), weight) and not torch.equal(merged.tensor(query), weight)


@pytest.mark.parametrize("options", [{"start": "current"}, {"start_weights": "none"}])
def test_recordings_without_a_start_say_so(tmp_path, options):
    trajectory = induce_forgetting(make_trainer(tmp_path), BALANCED, tmp_path / "trajectory", **options)
    assert trajectory.start is None and not (trajectory.path / "start").exists()
    for call in (lambda: trajectory.tensor(HEAD, "start"), lambda: trajectory.load_model("start")):
        with pytest.raises(TrajectoryError, match="no start"):
            call()
    with pytest.raises(TrajectoryError, match=r"'tail-0' .*does not exist.* 0 to 2"):
        trajectory.tensor(HEAD, "tail-0")


def test_a_start_counts_with_state_0_only(tmp_path):
    trajectory = WeightTrajectory.create(tmp_path / "trajectory")
    trajectory.record_start(make_resnet(seed=1))  # the training is killed
    assert not WeightTrajectory.exists(trajectory.path)
    again = induce_forgetting(make_trainer(tmp_path), BALANCED, tmp_path / "trajectory")
    assert_start(again, copies(make_resnet()))
    with pytest.raises(TrajectoryError, match="states already"):
        again.record_start(make_resnet())
    with pytest.raises(ValueError, match=r"start_weights must be one of .*'all'"):
        WeightTrajectory.create(tmp_path / "other").record_start(make_resnet(), weights="all")


def test_the_callback_alone(tmp_path):
    callback = WeightTransitionCallback(tmp_path / "trajectory")
    model = make_resnet()
    for size in (16, 8):
        trainer = make_trainer(tmp_path, model, max_steps=2, save_strategy="steps", save_steps=1)
        trainer.train_dataset = trainer.train_dataset.select(range(size))
        trainer.add_callback(callback)
        trainer.train()
    assert_start(callback.trajectory, copies(make_resnet()))

    resumed = WeightTransitionCallback(tmp_path / "resumed")
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.add_callback(resumed)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.trajectory.num_states == 1 and resumed.trajectory.start is None


def test_a_model_that_gets_another_head_in_the_training_has_no_start(move, caplog, tmp_path):
    trajectory = WeightTrajectory.create(tmp_path / "trajectory")
    model = make_resnet()
    trajectory.record_start(model)
    model.classifier[1] = nn.Linear(16, 7)
    trajectory.record(model, num_examples=8, steps=1)
    assert trajectory.start is None and "classifier.1" in caplog.text
    assert not (trajectory.path / "start").exists()


def test_a_start_on_the_hub(move, hub: LoopbackHub):
    model = make_resnet()
    before = copies(model)
    trajectory = move(model, moved="stages.1")
    push_trajectory(trajectory, "me/moved")
    remote = WeightTrajectory.from_hub("me/moved")
    assert remote.start == trajectory.start
    assert torch.equal(remote.tensor(HEAD, "start"), before[HEAD])
    assert all(torch.equal(remote.load_model("start").state_dict()[name], tensor) for name, tensor in before.items())
