"""Read a trajectory, and report damage."""

import re
from pathlib import Path

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


def test_state_dict(trajectory):
    weights = trajectory.state_dict(1)
    assert list(weights) == trajectory.names and torch.equal(weights[NAME], trajectory.tensor(NAME, 1))


def test_the_loop_of_the_recipe_runs(tmp_path, monkeypatch):
    recipe = Path(__file__).parents[1] / "recipes" / "record" / "README.md"
    (block,) = re.findall(r"```python\n(.*?)```", recipe.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(block, namespace)
    trajectory = namespace["trajectory"]
    assert [state.num_examples for state in trajectory.states] == [64, 32, 16]
    assert trajectory.history("0.weight").shape == (3, 16, 8)
    assert torch.equal(namespace["model"].state_dict()["0.weight"], trajectory.tensor("0.weight"))


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
    sizes = [sum(file.size for file in state.files) for state in again.states]
    assert sizes[2] < sizes[1] < sizes[0]
    for state, weights in enumerate(expected):
        loaded = ResNetForImageClassification.from_pretrained(again.path, subfolder=f"state-{state}").state_dict()
        torch.testing.assert_close(dict(loaded), weights, rtol=0, atol=0)
        assert all(torch.equal(again.tensor(name, state), tensor) for name, tensor in weights.items())
    assert again.is_unchanged(outer)
    assert not again.is_unchanged(inner)


def test_a_folder_without_states(tmp_path, trajectory):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        WeightTrajectory(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"trajectory\.json"):
        WeightTrajectory(tmp_path)
    with pytest.raises(FileExistsError, match="already has a trajectory"):
        WeightTrajectory.create(trajectory.path)
    with pytest.raises(TrajectoryError, match="no finished state"):
        _ = WeightTrajectory.create(tmp_path / "new").names
    assert not (tmp_path / "new").exists()


def reverse_states(content):
    content["states"] = [{**state, "index": 4 - state["index"]} for state in reversed(content["states"])]


def swap_states(folder):
    for old, new in (("state-0", "x"), ("state-4", "state-0"), ("x", "state-4")):
        (folder / old).rename(folder / new)


def rewrite(path, change):
    path.write_bytes(change(path.read_bytes()))


WEIGHTS = "model.safetensors"
DAMAGE = [
    # reported when the trajectory is opened
    (lambda f: edit_manifest(f, reverse_states), r"state 1 .* 8 examples, state 0 on 4.* reverse", "open"),
    (lambda f: edit_manifest(f, lambda c: c["states"].reverse()), "position 0 has index 4", "open"),
    (
        lambda f: rewrite(f / "state-2" / WEIGHTS, lambda data: data[:-100]),
        rf"state-2/{WEIGHTS} has \d+ bytes",
        "open",
    ),
    (lambda f: (f / "state-3" / WEIGHTS).unlink(), rf"state-3/{WEIGHTS} is missing", "open"),
    (lambda f: (f / "config.json").unlink(), "config.json is missing", "open"),
    # when tensors are read
    (lambda f: rewrite(f / "state-1" / WEIGHTS, lambda data: b"x" * len(data)), rf"state 1 .*{WEIGHTS}", "read"),
    (lambda f: rewrite_state(f, 3, lambda t: t.pop(NAME)), rf"'{NAME}' .* missing in state 3", "read"),
    (lambda f: rewrite_state(f, 3, lambda t: t.update(extra=torch.ones(1))), "'extra' .* missing in state 0", "read"),
    (
        lambda f: rewrite_state(f, 3, lambda t: t.update({NAME: t[NAME][:3]})),
        r"\(3, 16\) .*state 3 .*\(4, 16\)",
        "read",
    ),
    (
        lambda f: rewrite_state(f, 3, lambda t: t.update({NAME: t[NAME].half()})),
        "float16 in state 3 .*float32",
        "read",
    ),
    (lambda f: edit_manifest(f, lambda c: c["roles"].pop(NAME)), f"role .*'{NAME}'", "read"),
    # by verify
    (swap_states, rf"state-0/{WEIGHTS} .*SHA-256", "verify"),
    (
        lambda f: rewrite(f / "state-0" / WEIGHTS, lambda data: data[:-1] + b"\xff"),
        rf"state-0/{WEIGHTS} .*SHA-256",
        "verify",
    ),
]


@pytest.mark.parametrize(("damage", "message", "stage"), DAMAGE)
def test_damage_is_reported(trajectory_copy, damage, message, stage):
    damage(trajectory_copy)
    if stage != "open":
        trajectory = WeightTrajectory(trajectory_copy)
    if stage == "verify":
        for part in (0, 1):  # the first file is the config of the model, the second that of state 0
            trajectory.verify(part, 100)
    with pytest.raises(TrajectoryError, match=message):
        if stage == "open":
            WeightTrajectory(trajectory_copy)
        elif stage == "read":
            _ = trajectory.names
        else:
            trajectory.verify()


def test_scalars_and_empty_tensors_are_inspected(record_states):
    module = nn.Linear(2, 2)
    module.scale, module.none = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.empty(0))
    summary = inspect_trajectory(record_states(module, num_states=2))
    assert (summary.tensors["kept"], summary.parameters["kept"]) == (2, 1)
    assert summary.displacement["kept"][0] == 0 < summary.displacement["kept"][1]


@pytest.mark.parametrize("state", [-1, 5])
def test_a_state_that_does_not_exist_is_named(trajectory, state):
    module = make_resnet()
    calls = (
        lambda: trajectory.load_model(state),
        lambda: trajectory.load_into(module, state),
        lambda: trajectory.tensor(NAME, state),
        lambda: trajectory.read(NAME, 0, 1, state),
    )
    for call in calls:
        with pytest.raises(TrajectoryError, match=rf"state {state} .*does not exist.* 0 to 4"):
            call()


def test_a_tensor_that_does_not_exist_is_named(trajectory):
    for method in (trajectory.tensor, trajectory.shape, trajectory.dtype, trajectory.history):
        with pytest.raises(TrajectoryError, match="no tensor 'nope'"):
            method("nope")
