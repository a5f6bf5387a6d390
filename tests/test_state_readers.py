"""States of recorded trajectories and of files in the published layout."""

import h5py
import numpy as np
import pytest
import torch
from doubles.small_trainers import make_adapter
from doubles.toy_trajectories import record_walk

from know_hf.meta_learning import TransitionDataset, state_samples
from know_hf.trajectory import WeightTrajectory


def test_published_layout(tmp_path):
    random = np.random.default_rng(0)
    arrays = {
        "ConvWeights": random.normal(size=(3, 3, 50, 7)).astype(np.float32),
        "FCWeights": random.normal(size=(40, 7)),
        "Bias": random.normal(size=(6, 7)).astype(np.float32),
    }
    with h5py.File(tmp_path / "net.h5", "w") as file:
        for name, array in arrays.items():
            file[name] = array
    dataset = TransitionDataset([tmp_path / "net.h5"], max_per_tensor=None, progress=False)
    assert [(block.role, block.tensor) for block in dataset.blocks] == [
        ("conv", "ConvWeights"),
        ("fc", "FCWeights"),
        ("bias", "Bias"),
    ]
    for block in dataset.blocks:
        states = torch.from_numpy(arrays[block.tensor].reshape(-1, 7)).float()
        history, labels = dataset.block(block)
        # Index 0 is the smallest subset, as in the history.
        assert torch.equal(history[0::2], states[:, 0:5]) and torch.equal(labels[0::2], states[:, 5])
        assert torch.equal(history[1::2], states[:, 1:6]) and torch.equal(labels[1::2], states[:, 6])
    some = TransitionDataset([tmp_path / "net.h5"], max_per_tensor=30, progress=False)
    drawn, complete = some.block(some.blocks[0])[1], dataset.block(dataset.blocks[0])[1]
    assert len(drawn) == 60 and torch.isin(drawn, complete).all()


def test_published_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(state_samples, "PIECE_SCALARS", 7)
    states = np.random.default_rng(0).normal(size=(3, 3, 5, 7)).astype(np.float32)
    with h5py.File(tmp_path / "net.h5", "w") as file:
        file["ConvWeights"] = states
    dataset = TransitionDataset([tmp_path / "net.h5"], max_per_tensor=None, progress=False)
    assert np.array_equal(dataset.block(dataset.blocks[0])[1][1::2], states.reshape(-1, 7)[:, 6])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": np.zeros(3)}, "net.h5 .*ConvWeights, FCWeights, Bias"),
        ({"Bias": np.zeros((3, 7), int)}, "'Bias' of .*int64"),
        ({"FCWeights": None}, "'FCWeights' of .*group"),
        ({"FCWeights": np.zeros((3, 7)), "Bias": np.zeros((3, 6))}, "'FCWeights': 7, 'Bias': 6"),
        ({"Bias": np.array([[np.nan, 0, 0, 0, 0, 0, 0]])}, "'Bias' of state 6"),
        ({"Bias": np.zeros((3, 5))}, "5 states"),
        ({"Bias": h5py.ExternalLink("b.h5", "Bias")}, r"'Bias' of .*net\.h5 is a link"),
        (None, r"net\.h5 .*HDF5"),
    ],
)
def test_damaged_published_files(tmp_path, arrays, message):
    if arrays is None:
        (tmp_path / "net.h5").write_text("not HDF5")
    else:
        with h5py.File(tmp_path / "net.h5", "w") as file:
            for name, array in arrays.items():
                if array is None:
                    file.create_group(name)
                else:
                    file[name] = array
    with pytest.raises(ValueError, match=message):
        TransitionDataset([tmp_path / "net.h5"], progress=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trajectories_of_half_precision(tmp_path, dtype):
    record_walk(tmp_path / "a", num_states=6, dtype=dtype)
    dataset = TransitionDataset([tmp_path / "a"], progress=False)
    history = WeightTrajectory(tmp_path / "a").tensor("fc.weight", 0).flatten()
    assert history.dtype == dtype
    block = next(block for block in dataset.blocks if block.tensor == "fc.weight")
    assert torch.equal(dataset.block(block)[1], history.float())


def test_trajectories_of_adapters(tmp_path):
    model = make_adapter("lora")
    trajectory = WeightTrajectory.create(tmp_path / "a")
    for state in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += parameter.requires_grad * 0.01 * (state + 1)
        trajectory.record(model, num_examples=10 - state, steps=1)
    dataset = TransitionDataset([tmp_path / "a"], num_states=3, progress=False)
    assert {(block.role, block.tensor.split(".")[-2]) for block in dataset.blocks} == {
        ("fc", "lora_A"),
        ("fc", "lora_B"),
    }
