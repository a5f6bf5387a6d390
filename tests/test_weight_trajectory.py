"""Reading a trajectory, and what is wrong with a damaged one."""

import pytest
import torch
from conftest import NUM_EXAMPLES, SCHEDULE, edit_manifest, make_resnet, rewrite_state
from safetensors.torch import load_file
from torch import nn
from transformers import ResNetForImageClassification

from know_hf import WeightTrajectory
from know_hf.checkpoint import file_sha256
from know_hf.trajectory import TrajectoryError
from know_hf.trajectory.summary import inspect_trajectory

NAME = "classifier.1.weight"


def test_attributes(trajectory):
    assert [state.num_examples for state in trajectory.states] == SCHEDULE.sizes(NUM_EXAMPLES)
    assert trajectory.schedule == SCHEDULE
    assert trajectory.roles[NAME].role == "fc"
    assert trajectory.repo is None and not trajectory.is_adapter
    assert [path.name for path in trajectory.model_files] == ["config.json"]
    assert repr(trajectory) == f"WeightTrajectory({str(trajectory.path)!r}, num_examples={SCHEDULE.sizes(64)})"
    record = trajectory.states[2].files[-1]
    path = trajectory.path / record.path
    assert (record.path, record.size) == ("state-2/model.safetensors", path.stat().st_size)
    assert record.sha256 == file_sha256(path)


def test_history_has_the_full_data_state_last(trajectory):
    history = trajectory.history(NAME)
    assert (history.shape, history.dtype) == ((5, 4, 16), torch.float32)
    for position, state in enumerate([4, 3, 2, 1, 0]):
        weights = load_file(trajectory.path / f"state-{state}/model.safetensors")[NAME]
        assert torch.equal(history[position], weights)
        assert torch.equal(trajectory.read(NAME, 3, 20, state), weights.flatten()[3:20])
        assert torch.equal(trajectory.read_history(NAME, 3, 20)[position], weights.flatten()[3:20])
    assert not torch.equal(history[0], history[-1])


def test_unchanged_tensors_are_read_from_the_state_that_stores_them(tmp_path):
    model, trajectory = make_resnet(), WeightTrajectory.create(tmp_path / "trajectory")
    moved = [(), ("classifier", "stages.1"), ("classifier",), ("classifier", "stages.1")]
    expected = []
    for state, parts in enumerate(moved):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in parts):
                    parameter += 0.1
        expected.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        trajectory.record(model, num_examples=8 - state, steps=1)
    inner = "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight"
    outer = "resnet.embedder.embedder.convolution.weight"
    assert [state.unchanged.get(inner) for state in trajectory.states] == [None, None, 1, None]
    assert [state.unchanged.get(outer) for state in trajectory.states] == [None, 0, 0, 0]
    again = WeightTrajectory(trajectory.path)
    again.verify()
    for state, weights in enumerate(expected):
        loaded = ResNetForImageClassification.from_pretrained(again.path, subfolder=f"state-{state}").state_dict()
        for name, tensor in weights.items():
            assert torch.equal(again.tensor(name, state), tensor)
            assert torch.equal(loaded[name], tensor)
    assert again.is_unchanged(outer)
    assert not again.is_unchanged(inner)


def test_a_folder_without_states(tmp_path, trajectory):
    with pytest.raises(FileNotFoundError, match=r"trajectory\.json"):
        WeightTrajectory(tmp_path)
    with pytest.raises(FileExistsError, match="already has a trajectory"):
        WeightTrajectory.create(trajectory.path)
    with pytest.raises(TrajectoryError, match="no finished state"):
        _ = WeightTrajectory.create(tmp_path / "new").names
    assert not (tmp_path / "new").exists()


def edit(**changes):
    def change(folder):
        edit_manifest(folder, lambda content: content.update(changes))

    return change


def reverse_states(folder):
    def change(content):
        content["states"] = [{**s, "index": 4 - s["index"]} for s in reversed(content["states"])]

    edit_manifest(folder, change)


def truncate(folder):
    path = folder / "state-2/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (reverse_states, r"state 1 .* 8 examples, state 0 on 4.*reversed"),
        (lambda folder: edit_manifest(folder, lambda content: content["states"].reverse()), "position 0 has index 4"),
        (lambda folder: edit_manifest(folder, lambda c: c["states"][2].update(unchanged={NAME: 3})), "from state 3"),
        (edit(format_version="2.0"), r"version 2\.0.* up to 1\.0"),
        (truncate, r"state-2/model\.safetensors of state 2 has \d+ bytes, \d+ were recorded.*truncated"),
        (lambda folder: (folder / "state-3/model.safetensors").unlink(), "state 3 is missing"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json of the model is missing"),
    ],
)
def test_damage_that_opening_reports(trajectory_copy, damage, message):
    damage(trajectory_copy)
    with pytest.raises(TrajectoryError, match=message):
        WeightTrajectory(trajectory_copy)


def test_a_newer_minor_version_is_read(trajectory_copy):
    edit(format_version="1.9", something_new=1)(trajectory_copy)
    assert WeightTrajectory(trajectory_copy).num_states == 5


def swap_folders(folder):
    (folder / "state-0").rename(folder / "x")
    (folder / "state-4").rename(folder / "state-0")
    (folder / "x").rename(folder / "state-4")


def flip_a_bit(folder):
    path = folder / "state-0/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [swap_folders, flip_a_bit])
def test_damage_that_verify_reports(trajectory_copy, damage):
    WeightTrajectory(trajectory_copy).verify()
    damage(trajectory_copy)
    trajectory = WeightTrajectory(trajectory_copy)
    with pytest.raises(TrajectoryError, match=r"state-0/model\.safetensors of state 0 .*SHA-256"):
        trajectory.verify()
    for part in (0, 1):  # the first file is the config of the model, the second that of state 0
        trajectory.verify(part, 100)


def test_a_damaged_header(trajectory_copy):
    path = trajectory_copy / "state-1/model.safetensors"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(TrajectoryError, match=r"state 1 .*model\.safetensors"):
        _ = WeightTrajectory(trajectory_copy).names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NAME), r"'classifier\.1\.weight' .* in state 0 but not in state 3"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "'extra' .* in state 3 but not in state 0"),
        (lambda tensors: tensors.update({NAME: torch.zeros(5, 16)}), r"\(5, 16\) .* in state 3 .*\(4, 16\)"),
        (lambda tensors: tensors.update({NAME: tensors[NAME].half()}), r"float16 in state 3 .*float32"),
    ],
)
def test_states_with_other_tensors(trajectory_copy, change, message):
    rewrite_state(trajectory_copy, 3, change)
    with pytest.raises(TrajectoryError, match=message):
        _ = WeightTrajectory(trajectory_copy).names


def test_a_tensor_without_a_role(trajectory_copy):
    edit_manifest(trajectory_copy, lambda content: content["roles"].pop("classifier.1.bias"))
    with pytest.raises(TrajectoryError, match=r"role .*'classifier\.1\.bias'"):
        _ = WeightTrajectory(trajectory_copy).names


def test_scalars_and_empty_tensors_are_inspected(record_states):
    module = nn.Linear(2, 2)
    module.scale, module.none = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.empty(0))
    summary = inspect_trajectory(record_states(module, num_states=2))
    assert (summary.tensors["kept"], summary.parameters["kept"]) == (2, 1)
    assert summary.displacement["kept"][0] == 0 < summary.displacement["kept"][1]
