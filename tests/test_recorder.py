"""Record states: order, crashes, background, lock, roles and the base model."""

import json
import shutil
import threading
from unittest.mock import Mock

import pytest
import torch
from conftest import make_resnet
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from know_hf import WeightTrajectory
from know_hf.trajectory import TrajectoryBusyError, TrajectoryError
from know_hf.trajectory.snapshot import Snapshot

NAME = "classifier.1.weight"
SIZES = {"hidden_size": 8, "intermediate_size": 8}


@pytest.fixture
def created(tmp_path):
    return WeightTrajectory.create(tmp_path / "trajectory")


def test_a_refused_or_interrupted_state_is_recorded_later(record_states):
    trajectory = record_states(make_resnet(), num_states=2)
    with pytest.raises(TrajectoryError, match=r"state 2 .* 2 examples, state 1 on 2"):
        trajectory.record(make_resnet(), num_examples=2, steps=1)
    other = make_resnet()
    other.classifier[1] = nn.Linear(16, 7)
    with pytest.raises(TrajectoryError, match=r"'classifier\.1\.bias' .*\(7,\) .*head"):
        trajectory.record(other, num_examples=1, steps=1)
    assert not (trajectory.path / "state-2").exists()
    shutil.copytree(trajectory.path / "state-1", trajectory.path / "state-2")  # killed before trajectory.json
    (trajectory.path / "state-2/model.safetensors").write_bytes(b"half")
    again = WeightTrajectory(trajectory.path)
    assert again.num_states == 2
    again.record(make_resnet(seed=3), num_examples=1, steps=1)
    WeightTrajectory(trajectory.path).verify()
    assert torch.equal(again.tensor(NAME, 2), make_resnet(seed=3).classifier[1].weight)


def test_metrics_can_be_added_later(record_states):
    trajectory = record_states(nn.Linear(2, 2), num_states=2)
    trajectory.update_metrics(0, {"eval_loss": 0.5})
    trajectory.update_metrics(0, {"eval_accuracy": 1.0})
    again = WeightTrajectory(trajectory.path)
    assert [state.metrics for state in again.states] == [{"eval_loss": 0.5, "eval_accuracy": 1.0}, {}]
    content = json.loads((trajectory.path / "trajectory.json").read_text())
    assert content["format_version"] == "1.1"
    assert {"know_hf", "torch", "transformers", "safetensors"} <= set(content["library_versions"])


@pytest.mark.parametrize("make", [make_resnet, lambda seed: nn.Linear(2, 2)])
def test_a_state_without_changes_stores_all_tensors(created, make):
    model, other = make(seed=0), make(seed=1)
    for num_examples in (3, 2):
        created.record(model, num_examples=num_examples, steps=0)
    created.verify()
    assert created.states[1].unchanged == {}
    created.load_into(other, 1)
    torch.testing.assert_close(dict(other.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_an_error_in_the_background_is_raised_once(created):
    model = nn.Linear(2, 2)
    weight = model.weight.data.clone()
    created.record(model, num_examples=3, steps=1, background=True)
    model.weight.data[0, 0] = float("nan")  # the weights were copied before
    assert torch.equal(created.tensor("weight"), weight)
    created.record(model, num_examples=2, steps=1, background=True)
    with pytest.raises(TrajectoryError, match=r"'weight' .*NaN.* in state 1"):
        created.record(nn.Linear(2, 2), num_examples=1, steps=1)
    created.record(nn.Linear(2, 2), num_examples=2, steps=1)
    assert WeightTrajectory(created.path).num_states == 2


def test_check_does_not_wait_and_waiting_can_be_interrupted(created, monkeypatch):
    release, seen = threading.Event(), []

    def on_written(record):
        release.wait(timeout=60)
        seen.append((record.index, created.num_states))  # reading in the writer thread does not wait for itself
        raise ValueError("full")

    created.record(nn.Linear(2, 2), num_examples=3, steps=1, background=True, on_written=on_written)
    created.check()
    assert not seen and not any(thread.daemon for thread in threading.enumerate() if "know_hf" in thread.name)
    with monkeypatch.context() as patch:
        patch.setattr("know_hf.trajectory.recorder.wait", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _ = created.states
    release.set()
    with pytest.raises(ValueError, match="full"):
        created.check(wait=True)
    created.check(wait=True)
    assert seen == [(0, 1)] and created.num_states == 1


def test_buffers_may_be_infinite_but_not_nan(created):
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
    created.record(module, num_examples=3, steps=1)
    assert torch.equal(created.tensor("mask"), module.mask)
    module.mask[0, 0] = float("nan")
    with pytest.raises(TrajectoryError, match=r"'mask' .*NaN.* in state 1"):
        created.record(module, num_examples=2, steps=1)


def test_values_beyond_float16_are_named(created):
    model = make_resnet()
    model.classifier[1].bias.data[0] = 1e6
    with pytest.raises(TrajectoryError, match=r"'classifier\.1\.bias' .*float16 is too narrow"):
        created.record(model, dtype=torch.float16, num_examples=2, steps=1)


def test_a_second_recorder_is_refused(created):
    second = WeightTrajectory.create(created.path)
    with created.recording():
        with pytest.raises(TrajectoryBusyError, match="another process"):
            second.record(nn.Linear(2, 2), num_examples=3, steps=1)
        with pytest.raises(TrajectoryBusyError, match="another process"):
            second.record(nn.Linear(2, 2), num_examples=3, steps=1, background=True)
            second.check(wait=True)
        created.record(nn.Linear(2, 2), num_examples=3, steps=1)
    with pytest.raises(RuntimeError, match="1 states, expected 0"):
        second.record(nn.Linear(2, 2), num_examples=3, steps=1)
    assert WeightTrajectory(created.path).num_states == 1


def test_the_generation_config_is_copied(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=1, num_attention_heads=1, **SIZES))
    snapshot = Snapshot.of(model)
    model.generation_config.max_length = 99  # as generate() does while it runs
    snapshot.save(tmp_path)
    assert "max_length" not in json.loads((tmp_path / "generation_config.json").read_text())
    assert model.generation_config.max_length == 99


def test_roles_by_names_on_disk(record_states):
    config = ViTConfig(num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, **SIZES)
    roles = record_states(ViTForImageClassification(config), num_states=1).roles
    assert roles["vit.encoder.layer.0.layernorm_before.bias"].role == "norm"
    assert roles["vit.encoder.layer.0.intermediate.dense.weight"].role == "fc"
    assert not [name for name, role in roles.items() if "unknown" in role.reason]


@pytest.mark.parametrize(
    ("name", "base_model"),
    [
        ("models/tiny", "./models/tiny"),  # a folder, which would read as a Hub id
        ("microsoft/resnet-18", "microsoft/resnet-18"),
        ("/deleted/models/base", ".../base"),  # not recorded
        ("beside", "../beside"),  # a folder beside the trajectory
        ("", None),
    ],
)
def test_the_base_model_by_its_name(created, tmp_path, monkeypatch, name, base_model):
    monkeypatch.chdir(tmp_path)
    for folder in ("models/tiny", "beside"):
        (tmp_path / folder).mkdir(parents=True)
    model = make_resnet()
    model.config._name_or_path = name
    created.record(model, num_examples=8, steps=1)
    assert (created.base_model, created.base_revision) == (base_model, None)


def test_the_base_revision_is_the_only_commit_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("know_hf.trajectory.recorder.HF_HUB_CACHE", str(tmp_path / "cache"))
    model = make_resnet()
    model.config._name_or_path = "someone/base"
    revisions = []
    for commit in ("a" * 40, "b" * 40):
        (tmp_path / "cache/models--someone--base/snapshots" / commit).mkdir(parents=True)
        trajectory = WeightTrajectory.create(tmp_path / commit)
        trajectory.record(model, num_examples=1, steps=1)
        revisions.append(trajectory.base_revision)
    assert revisions == ["a" * 40, None]
