"""Transitions of trajectories: windows, roles, sampling and errors."""

import numpy as np
import pytest
import torch
from test_trajectory import rewrite_state
from torch import nn
from torch.utils.data import DataLoader

from know_hf.meta_learning.transitions import BalancedBatchSampler, TransitionDataset
from know_hf.trajectory import WeightTrajectory


def test_windows_and_targets(tmp_path):
    record(tmp_path / "a", num_states=7)
    trajectory = WeightTrajectory(tmp_path / "a")
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


def test_items_and_batches_agree(tmp_path):
    record(tmp_path / "a", num_states=4)
    dataset = TransitionDataset([tmp_path / "a"], num_states=3, progress=False)
    order = [len(dataset) - 1, 0, 40, 1]
    batch = dataset.__getitems__(order)
    assert list(batch) == ["conv", "fc", "bias"]
    for index, (role, place) in zip(order, [("bias", 0), ("conv", 0), ("fc", 0), ("conv", 1)], strict=True):
        item = dataset[index]
        assert item["role"] == role
        assert torch.equal(item["history"], batch[role]["history"][place])
        assert torch.equal(item["labels"], batch[role]["labels"][place])
    assert torch.equal(dataset[-1]["history"], dataset[len(dataset) - 1]["history"])
    with pytest.raises(IndexError, match=rf"item {len(dataset)} of a dataset with {len(dataset)} transitions"):
        dataset[len(dataset)]


def test_frozen_and_other_roles_are_left_out(tmp_path):
    record(tmp_path / "a", num_states=6, frozen=("fc.weight",))
    dataset = TransitionDataset([tmp_path / "a"], progress=False)
    names = {block.tensor for block in dataset.blocks}
    assert names == {"conv.weight", "conv.bias", "fc.bias"}
    assert "norm.running_mean" in WeightTrajectory(tmp_path / "a").names
    assert dataset.roles == ["conv", "bias"]


def test_at_most_max_per_tensor_scalars_drawn_by_seed(tmp_path):
    record(tmp_path / "a", num_states=6)
    every = TransitionDataset([tmp_path / "a"], max_per_tensor=None, progress=False)
    some = TransitionDataset([tmp_path / "a"], max_per_tensor=5, seed=1, progress=False)
    again = TransitionDataset([tmp_path / "a"], max_per_tensor=5, seed=1, progress=False)
    other = TransitionDataset([tmp_path / "a"], max_per_tensor=5, seed=2, progress=False)
    assert [block.stop - block.start for block in some.blocks] == [5, 5, 4, 3]
    drawn, all_rows = some.block(some.blocks[0])[0], every.block(every.blocks[0])[0]
    assert len({tuple(row.tolist()) for row in drawn}) == 5
    assert all((row == all_rows).all(dim=1).any() for row in drawn)
    assert all(torch.equal(some[i]["history"], again[i]["history"]) for i in range(len(some)))
    assert not torch.equal(drawn, other.block(other.blocks[0])[0])


def test_batches_are_balanced_and_seeded(tmp_path):
    record(tmp_path / "small", num_states=6)
    record(tmp_path / "wide", num_states=7, width=32, seed=1)
    dataset = TransitionDataset([tmp_path / "small", tmp_path / "wide"], progress=False)
    sampler = BalancedBatchSampler(dataset, batch_size=3000, num_batches=2, seed=0)
    batches = list(sampler)
    assert len(sampler) == len(batches) == 2
    assert batches == list(sampler) and batches[0] != batches[1]
    assert batches[0] != next(iter(BalancedBatchSampler(dataset, 3000, 1, seed=1)))
    items = np.array(batches[0])
    counts = [((block.start <= items) & (items < block.stop)).sum() for block in dataset.blocks]
    shares = {(b.role, b.trajectory, b.tensor): n / 3000 for b, n in zip(dataset.blocks, counts, strict=True)}
    for (role, _, _), share in shares.items():
        assert share == pytest.approx(0.25 if role == "bias" else 0.5, abs=0.05)
    assert all(len(part["labels"]) == 3000 for part in dataset.__getitems__(batches[0]).values())


def test_data_loader_gives_whole_batches(tmp_path):
    record(tmp_path / "a", num_states=6)
    dataset = TransitionDataset([tmp_path / "a"], progress=False)
    sampler = BalancedBatchSampler(dataset, batch_size=8, num_batches=3)
    batches = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=lambda batch: batch))
    assert [batch["fc"]["history"].shape for batch in batches] == [(8, 5)] * 3
    assert torch.equal(batches[1]["bias"]["labels"], dataset.__getitems__(list(sampler)[1])["bias"]["labels"])


def test_describe(tmp_path):
    record(tmp_path / "a", num_states=6)
    dataset = TransitionDataset([tmp_path / "a"], progress=False)
    description = dataset.describe()
    history, labels = dataset.block(dataset.blocks[0])
    moved = (labels - history[:, -1]).abs()
    assert description["conv"] == {
        "trajectories": 1,
        "tensors": 1,
        "transitions": 36,
        "largest_weight": max(history.abs().max().item(), labels.abs().max().item()),
        "largest_displacement": moved.max().item(),
        "mean_displacement": pytest.approx(moved.mean().item()),
    }


def test_too_few_states(tmp_path):
    record(tmp_path / "short", num_states=5)
    with pytest.raises(ValueError, match=r"short has 5 states, a transition needs 6.*num_states=6"):
        TransitionDataset([tmp_path / "short"], progress=False)


def test_value_that_is_not_finite(tmp_path):
    record(tmp_path / "diverged", num_states=6)
    rewrite_state(tmp_path / "diverged", 2, lambda tensors: tensors["fc.weight"][0].fill_(float("nan")))
    with pytest.raises(
        ValueError, match=r"tensor 'fc.weight' of state 2 of .*diverged has values that are not finite"
    ):
        TransitionDataset([tmp_path / "diverged"], progress=False)


def test_nothing_moves(tmp_path):
    record(tmp_path / "a", num_states=6, frozen=("conv.weight", "conv.bias", "fc.weight", "fc.bias"))
    with pytest.raises(ValueError, match=r"no tensor of the roles conv, fc, bias moves in .*were all weights frozen"):
        TransitionDataset([tmp_path / "a"], progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trajectories": []}, "no trajectory was given"),
        ({"trajectories": "folder"}, "'folder' is a single one; pass a list"),
        ({"trajectories": ["a"], "num_states": 1}, "num_states=1: a history has at least 2 states"),
        ({"trajectories": ["a"], "max_per_tensor": 0}, "max_per_tensor=0: choose at least 1, or None"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TransitionDataset(**arguments, progress=False)


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 3)


def record(path, num_states, width=4, seed=0, frozen=()):
    """A trajectory whose weights take a random step from state to state."""
    generator = torch.Generator().manual_seed(seed)
    model, trajectory = Net(width), WeightTrajectory.create(path)
    for state in range(num_states):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in frozen:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        trajectory.record(model, num_examples=1000 - state, steps=1)
