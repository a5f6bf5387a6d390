"""Samples of trajectories: the draw, the cache, and several processes that share it."""

import pickle
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from doubles.toy_trajectories import record_walk
from filelock import FileLock
from torch.utils.data import DataLoader

from know_hf.meta_learning import BalancedBatchSampler, TransitionDataset, state_samples
from know_hf.meta_learning.state_readers import TensorInfo
from know_hf.trajectory import WeightTrajectory


def test_cache_holds_the_same_values_and_is_drawn_once(tmp_path, monkeypatch):
    record_walk(tmp_path / "a", num_states=6)
    record_walk(tmp_path / "b", num_states=7, width=8)
    folders = [tmp_path / "a", tmp_path / "b"]
    in_memory = TransitionDataset(folders, max_per_tensor=20, progress=False)
    cached = TransitionDataset(folders, max_per_tensor=20, cache_dir=tmp_path / "cache", progress=False)

    def fail(*_):
        pytest.fail("a tensor was read again")

    monkeypatch.setattr(WeightTrajectory, "read_history", fail)
    again = TransitionDataset(folders[::-1], max_per_tensor=20, cache_dir=tmp_path / "cache", progress=False)
    shorter = TransitionDataset(folders, 3, max_per_tensor=20, cache_dir=tmp_path / "cache", progress=False)
    assert cached.fingerprint == in_memory.fingerprint != again.fingerprint
    assert len({in_memory.fingerprint, again.fingerprint, shorter.fingerprint}) == 3
    assert cached.describe() == in_memory.describe() == again.describe()
    sampler = BalancedBatchSampler(in_memory, batch_size=40, num_batches=2)
    for items in sampler:
        for role, expected in in_memory.by_role(items).items():
            for name, values in cached.by_role(items)[role].items():
                assert torch.equal(values, expected[name])
    workers = DataLoader(pickle.loads(pickle.dumps(cached)), batch_sampler=sampler, num_workers=1)
    for batch, items in zip(workers, sampler, strict=True):
        by_role = in_memory.by_role(items).values()
        assert torch.equal(batch["history"], torch.cat([part["history"] for part in by_role]))
    assert len(pickle.dumps(cached)) < len(pickle.dumps(in_memory))


def test_damaged_cache(tmp_path):
    record_walk(tmp_path / "a", num_states=6)
    TransitionDataset([tmp_path / "a"], cache_dir=tmp_path / "cache", progress=False)
    (numbers,) = (tmp_path / "cache").glob("*.float32")
    numbers.write_bytes(numbers.read_bytes()[:-4])
    dataset = TransitionDataset([tmp_path / "a"], cache_dir=tmp_path / "cache", progress=False)
    with pytest.raises(ValueError, match=r"a-.*\.float32 .*1316 bytes.*1320"):
        dataset[0]


def test_processes_share_the_draw(tmp_path, monkeypatch):
    for name in ("a", "b"):
        record_walk(tmp_path / name, num_states=6)
    TransitionDataset([tmp_path / "a"], cache_dir=tmp_path / "cache", progress=False)
    (description,) = (tmp_path / "cache").glob("a-*.json")
    description.unlink()
    drawn = []
    draw_all = state_samples._draw_all

    def record_and_draw(reader, *arguments):
        drawn.append(reader.path.name)
        return draw_all(reader, *arguments)

    monkeypatch.setattr(state_samples, "_draw_all", record_and_draw)
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


@pytest.mark.parametrize(("size", "count", "complete"), [(50, 8, 64), (50, 8, 10), (45, 40, 10), (45, 5, 10)])
def test_every_scalar_is_as_likely_as_any_other(monkeypatch, size, count, complete):
    """For single scalars and for runs, the last of which is shorter."""
    monkeypatch.setattr(state_samples, "COMPLETE_SCALARS", complete)
    monkeypatch.setattr(state_samples, "RUN_SCALARS", 4)
    history = torch.arange(size, dtype=torch.float32).expand(2, -1)
    read = []

    def read_piece(name, start, stop):
        read.append(stop - start)
        return history[:, start:stop]

    reader = SimpleNamespace(read=read_piece)
    counts = np.zeros(size)
    for seed in range(3000):
        read.clear()
        drawn = state_samples._draw(reader, TensorInfo("t", "fc", size), count, np.random.default_rng(seed))
        scalars = drawn[0].long().numpy()
        assert len(set(scalars)) == len(scalars) <= count
        assert sum(read) == (size if size <= complete else len(scalars))
        counts[scalars] += 1
    assert counts.min() > 0.8 * counts.mean() and counts.max() < 1.2 * counts.mean()


def test_at_most_max_per_tensor_scalars_drawn_by_seed(tmp_path):
    record_walk(tmp_path / "a", num_states=6)
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
