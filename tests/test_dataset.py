"""Transitions of trajectories: windows, roles, batches and errors."""

import numpy as np
import pytest
import torch
from doubles.toy_trajectories import record_walk
from torch.utils.data import DataLoader

from know_hf.meta_learning import BalancedBatchSampler, TransitionDataset
from know_hf.trajectory import WeightTrajectory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trajectory of 6 states: one transition of each scalar for histories of 5."""
    return record_walk(tmp_path_factory.mktemp("walk") / "a", num_states=6).path


@pytest.fixture(scope="module")
def dataset(folder):
    return TransitionDataset([folder], progress=False)


def test_windows_and_targets(tmp_path):
    trajectory = record_walk(tmp_path / "a", num_states=7)
    dataset = TransitionDataset([trajectory], progress=False)
    assert dataset.roles == ["conv", "fc", "bias"]
    assert [(block.role, block.tensor) for block in dataset.blocks] == [
        ("conv", "conv.weight"),
        ("fc", "fc.weight"),
        ("bias", "conv.bias"),
        ("bias", "fc.bias"),
    ]
    for block in dataset.blocks:
        states = [trajectory.tensor(block.tensor, state).flatten() for state in range(7)]
        history, labels = dataset.block(block)
        history, labels = history.unflatten(0, (-1, 2)), labels.unflatten(0, (-1, 2))
        assert torch.equal(history[:, 0], torch.stack([states[k] for k in (6, 5, 4, 3, 2)], dim=1))
        assert torch.equal(history[:, 1], torch.stack([states[k] for k in (5, 4, 3, 2, 1)], dim=1))
        assert torch.equal(labels, torch.stack([states[1], states[0]], dim=1))
    assert len(dataset) == 2 * (4 * 9 + 4 * 3 + 4 + 3)
    assert "1 trajectories, num_states=5, conv=72" in repr(dataset)


def test_items_and_batches_agree(folder):
    dataset = TransitionDataset([folder], num_states=3, progress=False)
    order = [len(dataset) - 1, 0, 3 * 40, 1]
    batch = dataset.by_role(order)
    assert list(batch) == ["conv", "fc", "bias"]
    for index, (role, position) in zip(order, [("bias", 0), ("conv", 0), ("fc", 0), ("conv", 1)], strict=True):
        item = dataset[index]
        assert item["role"] == role
        assert torch.equal(item["history"], batch[role]["history"][position])
        assert torch.equal(item["labels"], batch[role]["labels"][position])
    assert torch.equal(dataset[-1]["history"], dataset[len(dataset) - 1]["history"])
    with pytest.raises(IndexError, match=str(len(dataset))):
        dataset[len(dataset)]


def test_a_plain_loader(dataset):
    batches = list(DataLoader(dataset, batch_size=8, shuffle=True))
    assert sum(len(batch["role"]) for batch in batches) == len(dataset)
    assert batches[0]["history"].shape == (8, 5) and batches[0]["labels"].shape == (8,)
    (batch,) = DataLoader(dataset, batch_size=len(dataset))
    assert batch["role"] == [dataset[i]["role"] for i in range(len(dataset))]
    assert torch.equal(batch["labels"], torch.cat([dataset.block(block)[1] for block in dataset.blocks]))


def test_frozen_tensors_and_other_roles_are_left_out(tmp_path):
    trajectory = record_walk(tmp_path / "a", num_states=6, frozen=("fc.weight",))
    dataset = TransitionDataset([tmp_path / "a"], progress=False)
    assert {block.tensor for block in dataset.blocks} == {"conv.weight", "conv.bias", "fc.bias"}
    assert {"norm.running_mean", "fc.weight"} < set(trajectory.names)
    assert dataset.roles == ["conv", "bias"]
    record_walk(tmp_path / "b", num_states=6, frozen=("conv.weight", "conv.bias", "fc.weight", "fc.bias"))
    with pytest.raises(ValueError, match=r"conv, fc, bias"):
        TransitionDataset([WeightTrajectory(tmp_path / "b")], progress=False)


def test_batches_are_balanced_and_seeded(folder, tmp_path):
    record_walk(tmp_path / "wide", num_states=7, width=32, seed=1)
    dataset = TransitionDataset([folder, tmp_path / "wide"], progress=False)
    sampler = BalancedBatchSampler(dataset, batch_size=3000, num_batches=2, seed=0)
    batches = list(sampler)
    assert len(sampler) == len(batches) == 2
    assert np.array_equal(batches, list(sampler)) and not np.array_equal(*batches)
    assert not np.array_equal(batches[0], next(iter(BalancedBatchSampler(dataset, 3000, 1, seed=1))))
    for block in dataset.blocks:
        share = ((block.start <= batches[0]) & (batches[0] < block.stop)).sum() / 3000
        assert share == pytest.approx(0.25 if block.role == "bias" else 0.5, abs=0.05)
    assert all(len(part["labels"]) == 3000 for part in dataset.by_role(batches[0]).values())


def test_processes_share_every_batch_from_any_start(dataset):
    complete = list(BalancedBatchSampler(dataset, 8, 5))
    parts = [list(BalancedBatchSampler(dataset, 8, 5, start=2, process_index=k, num_processes=2)) for k in range(2)]
    assert [len(part) for part in parts] == [3, 3]
    for expected, *halves in zip(complete[2:], *parts, strict=True):
        assert not np.array_equal(*halves)
        for role in range(3):
            of_role = [half[4 * role : 4 * role + 4] for half in halves]
            assert np.array_equal(np.stack(of_role, axis=1).ravel(), expected[8 * role : 8 * role + 8])
    with pytest.raises(ValueError, match=r"batch_size.*\(3\).*8.*9"):
        BalancedBatchSampler(dataset, 8, 5, num_processes=3)


def test_no_change_of_tensors(tmp_path):
    record_walk(tmp_path / "a", num_states=7)
    dataset = TransitionDataset([tmp_path / "a"], progress=False)
    for block in dataset.blocks:
        history, labels = dataset.block(block)
        expected = (history[:, -1] - labels).abs().mean().item()
        assert block.no_change == pytest.approx(expected)
        assert dataset[block.start]["no_change"].item() == pytest.approx(expected)
    biases = [block.no_change for block in dataset.blocks if block.role == "bias"]
    assert dataset.mean_no_change()["bias"] == pytest.approx(sum(biases) / 2)


def test_with_one_role(dataset):
    merged = dataset.with_one_role("fc")
    assert dataset.roles == ["conv", "fc", "bias"] and merged.roles == ["fc"]
    assert len(merged) == len(dataset) and merged.fingerprint != dataset.fingerprint
    rows = {tuple(dataset[index]["history"].tolist()) for index in range(len(dataset))}
    assert rows == {tuple(merged[index]["history"].tolist()) for index in range(len(merged))}
    with pytest.raises(ValueError, match="'norm'"):
        dataset.with_one_role("norm")


def test_describe(dataset):
    history, labels = dataset.block(dataset.blocks[0])
    moved = (labels - history[:, -1]).abs()
    assert dataset.describe()["conv"] == {
        "trajectories": 1,
        "tensors": 1,
        "transitions": 36,
        "largest_weight": max(history.abs().max().item(), labels.abs().max().item()),
        "largest_displacement": moved.max().item(),
        "mean_displacement": pytest.approx(moved.mean().item()),
    }


def test_too_few_states(folder):
    with pytest.raises(ValueError, match=r"6 states.* 7 .*num_states=7"):
        TransitionDataset([folder], num_states=6, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trajectories": []}, "trajectories is empty"),
        ({"trajectories": "folder"}, "list.*'folder'"),
        ({"trajectories": ["a"], "num_states": 1}, "num_states.*1"),
        ({"trajectories": ["a"], "max_per_tensor": 0}, "max_per_tensor.*0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TransitionDataset(**arguments, progress=False)
