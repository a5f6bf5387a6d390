"""Transitions of trajectories: windows, roles, what is drawn and read, caches, the published layout and errors."""

import pickle
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from test_recording_peft import PEFT_WARNING, make_adapter
from test_trajectory import rewrite_state
from torch import nn
from torch.utils.data import DataLoader

from know_hf.meta_learning import BalancedBatchSampler, TransitionDataset
from know_hf.meta_learning import state_samples as samples
from know_hf.meta_learning.transition_sources import SourceTensor
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
    assert np.array_equal(batches, list(sampler)) and not np.array_equal(*batches)
    assert not np.array_equal(batches[0], next(iter(BalancedBatchSampler(dataset, 3000, 1, seed=1))))
    items = batches[0]
    counts = [((block.start <= items) & (items < block.stop)).sum() for block in dataset.blocks]
    shares = {(b.role, b.trajectory, b.tensor): n / 3000 for b, n in zip(dataset.blocks, counts, strict=True)}
    for (role, _, _), share in shares.items():
        assert share == pytest.approx(0.25 if role == "bias" else 0.5, abs=0.05)
    assert all(len(part["labels"]) == 3000 for part in dataset.__getitems__(batches[0]).values())


def test_processes_share_every_batch_and_start_anywhere(tmp_path):
    record(tmp_path / "a", num_states=6)
    dataset = TransitionDataset([tmp_path / "a"], progress=False)
    whole = list(BalancedBatchSampler(dataset, 8, 5))
    parts = [list(BalancedBatchSampler(dataset, 8, 5, start=2, process_index=k, num_processes=2)) for k in range(2)]
    assert [len(part) for part in parts] == [3, 3]
    for expected, *found in zip(whole[2:], *parts, strict=True):
        assert not np.array_equal(*found)
        for role in range(3):
            of_role = [part[4 * role : 4 * role + 4] for part in found]
            assert np.array_equal(np.stack(of_role, axis=1).ravel(), expected[8 * role : 8 * role + 8])
    with pytest.raises(ValueError, match=r"batch_size=8 can't be shared by 3 processes; choose 9"):
        BalancedBatchSampler(dataset, 8, 5, num_processes=3)


def test_data_loader_gives_whole_batches(tmp_path):
    record(tmp_path / "a", num_states=6)
    dataset = TransitionDataset([tmp_path / "a"], progress=False)
    sampler = BalancedBatchSampler(dataset, batch_size=8, num_batches=3)
    batches = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=lambda batch: batch))
    assert [batch["fc"]["history"].shape for batch in batches] == [(8, 5)] * 3
    assert torch.equal(batches[1]["bias"]["labels"], dataset.__getitems__(list(sampler)[1])["bias"]["labels"])


def test_cache_gives_the_same_and_is_read_once(tmp_path, monkeypatch):
    record(tmp_path / "a", num_states=6)
    record(tmp_path / "b", num_states=7, width=8)
    folders = [tmp_path / "a", tmp_path / "b"]
    in_memory = TransitionDataset(folders, max_per_tensor=20, progress=False)
    cached = TransitionDataset(folders, max_per_tensor=20, cache_dir=tmp_path / "cache", progress=False)

    def nothing_is_read(*_):
        pytest.fail("a tensor was read again")

    monkeypatch.setattr(WeightTrajectory, "read_history", nothing_is_read)
    again = TransitionDataset(folders[::-1], max_per_tensor=20, cache_dir=tmp_path / "cache", progress=False)
    shorter = TransitionDataset(folders, 3, max_per_tensor=20, cache_dir=tmp_path / "cache", progress=False)
    assert cached.fingerprint == in_memory.fingerprint != again.fingerprint
    assert len({in_memory.fingerprint, again.fingerprint, shorter.fingerprint}) == 3
    assert cached.describe() == in_memory.describe() == again.describe()
    sampler = BalancedBatchSampler(in_memory, batch_size=40, num_batches=2)
    for items in sampler:
        for role, expected in in_memory.__getitems__(items).items():
            for name, values in cached.__getitems__(items)[role].items():
                assert torch.equal(values, expected[name])
    workers = DataLoader(pickle.loads(pickle.dumps(cached)), batch_sampler=sampler, collate_fn=as_is, num_workers=1)
    for found, items in zip(workers, sampler, strict=True):
        assert torch.equal(found["fc"]["history"], in_memory.__getitems__(items)["fc"]["history"])
    assert len(pickle.dumps(cached)) < len(pickle.dumps(in_memory))


def test_damaged_cache(tmp_path):
    record(tmp_path / "a", num_states=6)
    TransitionDataset([tmp_path / "a"], cache_dir=tmp_path / "cache", progress=False)
    (numbers,) = (tmp_path / "cache").glob("*.float32")
    numbers.write_bytes(numbers.read_bytes()[:-4])
    dataset = TransitionDataset([tmp_path / "a"], cache_dir=tmp_path / "cache", progress=False)
    with pytest.raises(ValueError, match=r"a-.*\.float32 has 329 numbers, expected 330; delete it"):
        dataset[0]


def test_processes_share_the_drawing(tmp_path, monkeypatch):
    for name in ("a", "b"):
        record(tmp_path / name, num_states=6)
    TransitionDataset([tmp_path / "a"], cache_dir=tmp_path / "cache", progress=False)
    (description,) = (tmp_path / "cache").glob("a-*.json")
    description.unlink()
    drawn = []
    draw_all = samples._draw_all

    def note_and_draw(source, *arguments):
        drawn.append(source.path.name)
        return draw_all(source, *arguments)

    monkeypatch.setattr(samples, "_draw_all", note_and_draw)
    with FileLock(description.with_suffix(".lock")) as other_process:
        thread = threading.Thread(
            target=TransitionDataset,
            args=([tmp_path / "a", tmp_path / "b"],),
            kwargs={"cache_dir": tmp_path / "cache", "progress": False},
        )
        thread.start()
        while not drawn:
            thread.join(0.01)
        assert drawn == ["b"] and thread.is_alive()
        other_process.release()
        thread.join()
    assert drawn == ["b", "a"]


@pytest.mark.parametrize(("size", "count", "whole"), [(50, 8, 64), (50, 8, 10), (45, 40, 10), (45, 5, 10)])
def test_every_scalar_is_as_likely_as_any_other(monkeypatch, size, count, whole):
    """Drawn one by one and in runs, the last of which is shorter."""
    monkeypatch.setattr(samples, "WHOLE_SCALARS", whole)
    monkeypatch.setattr(samples, "RUN_SCALARS", 4)
    history = torch.arange(size, dtype=torch.float32).expand(2, -1)
    read = []

    def read_piece(name, start, stop):
        read.append(stop - start)
        return history[:, start:stop]

    source = SimpleNamespace(read=read_piece)
    counts = np.zeros(size)
    for seed in range(3000):
        read.clear()
        drawn = samples._draw(source, SourceTensor("t", "fc", size), count, np.random.default_rng(seed))
        scalars = drawn[0].long().numpy()
        assert len(set(scalars)) == len(scalars) <= count
        assert sum(read) == (size if size <= whole else len(scalars))
        counts[scalars] += 1
    assert counts.min() > 0.8 * counts.mean() and counts.max() < 1.2 * counts.mean()


def test_no_change_of_tensors(tmp_path):
    record(tmp_path / "a", num_states=7)
    dataset = TransitionDataset([tmp_path / "a"], progress=False)
    for block in dataset.blocks:
        history, labels = dataset.block(block)
        expected = (history[:, -1] - labels).abs().mean().item()
        assert block.no_change == pytest.approx(expected)
        assert dataset[block.start]["no_change"].item() == pytest.approx(expected)
    biases = [block.no_change for block in dataset.blocks if block.role == "bias"]
    assert dataset.mean_no_change()["bias"] == pytest.approx(sum(biases) / 2)


def test_all_of_one_role(tmp_path):
    record(tmp_path / "a", num_states=6)
    dataset = TransitionDataset([tmp_path / "a"], progress=False)
    merged = dataset.with_one_role("fc")
    assert dataset.roles == ["conv", "fc", "bias"] and merged.roles == ["fc"]
    assert len(merged) == len(dataset) and merged.fingerprint != dataset.fingerprint
    rows = {tuple(dataset[index]["history"].tolist()) for index in range(len(dataset))}
    assert rows == {tuple(merged[index]["history"].tolist()) for index in range(len(merged))}
    with pytest.raises(ValueError, match="unknown role 'norm'"):
        dataset.with_one_role("norm")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trajectories_of_half_precision(tmp_path, dtype):
    record(tmp_path / "a", num_states=6, dtype=dtype)
    dataset = TransitionDataset([tmp_path / "a"], progress=False)
    history = WeightTrajectory(tmp_path / "a").tensor("fc.weight", 0).flatten()
    assert history.dtype == dtype
    block = next(block for block in dataset.blocks if block.tensor == "fc.weight")
    assert torch.equal(dataset.block(block)[1], history.float())


@PEFT_WARNING
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


def test_published_layout(tmp_path):
    h5py = pytest.importorskip("h5py")
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
        # Index 0 is the smallest subset: most forgotten first, as it is.
        assert torch.equal(history[0::2], states[:, 0:5]) and torch.equal(labels[0::2], states[:, 5])
        assert torch.equal(history[1::2], states[:, 1:6]) and torch.equal(labels[1::2], states[:, 6])
    some = TransitionDataset([tmp_path / "net.h5"], max_per_tensor=30, progress=False)
    drawn, whole = some.block(some.blocks[0])[1], dataset.block(dataset.blocks[0])[1]
    assert len(drawn) == 60 and torch.isin(drawn, whole).all()


def test_published_pieces(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    monkeypatch.setattr(samples, "PIECE_SCALARS", 7)
    states = np.random.default_rng(0).normal(size=(3, 3, 5, 7)).astype(np.float32)
    with h5py.File(tmp_path / "net.h5", "w") as file:
        file["ConvWeights"] = states
    dataset = TransitionDataset([tmp_path / "net.h5"], max_per_tensor=None, progress=False)
    assert np.array_equal(dataset.block(dataset.blocks[0])[1][1::2], states.reshape(-1, 7)[:, 6])


def test_damaged_published_files(tmp_path):
    h5py = pytest.importorskip("h5py")

    def error_of(**arrays):
        with h5py.File(tmp_path / "net.h5", "w") as file:
            for name, array in arrays.items():
                file.create_group(name) if array is None else file.create_dataset(name, data=array)
        with pytest.raises(ValueError) as error:
            TransitionDataset([tmp_path / "net.h5"], progress=False)
        return str(error.value)

    assert "net.h5 has none of the datasets ConvWeights, FCWeights, Bias" in error_of(other=np.zeros(3))
    assert "dataset 'Bias' of" in (message := error_of(Bias=np.zeros((3, 7), int))) and "is int64 of" in message
    assert "dataset 'FCWeights' of" in (message := error_of(FCWeights=None)) and "is a group" in message
    assert "'FCWeights': 7, 'Bias': 6" in error_of(FCWeights=np.zeros((3, 7)), Bias=np.zeros((3, 6)))
    assert "tensor 'Bias' of state 6 of" in error_of(Bias=np.array([[np.nan, 0, 0, 0, 0, 0, 0]]))
    assert "has 5 states, a transition needs 6" in error_of(Bias=np.zeros((3, 5)))
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(ValueError, match=r"text\.h5 is not a readable HDF5 file"):
        TransitionDataset([tmp_path / "text.h5"], progress=False)
    with pytest.raises(FileNotFoundError, match=r"gone\.h5 not found"):
        TransitionDataset([tmp_path / "gone.h5"], progress=False)


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


def as_is(batch):
    return batch


def record(path, num_states, width=4, seed=0, frozen=(), dtype=None):
    """A trajectory whose weights take a random step from state to state."""
    generator = torch.Generator().manual_seed(seed)
    model, trajectory = Net(width), WeightTrajectory.create(path)
    for state in range(num_states):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in frozen:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        trajectory.record(model, num_examples=1000 - state, steps=1, dtype=dtype)
