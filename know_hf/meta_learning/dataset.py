"""Transitions: histories of scalar weights with the next less forgotten state as their target, from many trajectories.

A trajectory of T states has T - S transitions per scalar weight: with T = 7 and S = 5, the window Θ6 … Θ2 has the
target Θ1, and Θ5 … Θ1 has Θ0.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from filelock import Timeout
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm

from ..roles import PREDICTED_ROLES
from ..trajectory import WeightTrajectory
from .state_readers import open_states
from .state_samples import StateSample, sample_states


@dataclass(frozen=True)
class TransitionBlock:
    """Transitions of one tensor: items `start` to `stop - 1` of a [`TransitionDataset`]."""

    role: str  # conv, fc or bias
    trajectory: str  # path of the trajectory
    tensor: str  # name of the tensor
    start: int
    stop: int
    share: float  # share of the tensor's scalars that was drawn
    no_change: float  # mean |Θ0 - Θ(-1)| of the transitions, the error of the prediction that nothing changes


class TransitionDataset(Dataset):
    """Map-style dataset of transitions. Item i is `{"history": (S,), "labels": (), "no_change": (), "role": str}`,
    most forgotten state first.

    ```python
    for batch in DataLoader(dataset, batch_size=8, shuffle=True):
        batch["history"], batch["labels"], batch["role"]  # (8, S), (8,) and a list of 8 names
    ```

    The dataset covers tensors of the roles conv, fc and bias that change. It omits parameters of normalization layers
    and tensors whose drawn scalars are equal in all states. At most `max_per_tensor` scalars per tensor are drawn;
    nothing else is read from large tensors. Drawn scalars take `4 * T` bytes each, in memory or in memory-mapped files
    in `cache_dir`. Items are ordered by role, then by tensor, see `blocks`. [`BalancedBatchSampler`] draws from them.

    Args:
        trajectories (sequence of [`WeightTrajectory`], `str` or `Path`):
            Trajectories with at least S + 1 states each: objects, folders, or `.h5` files in the layout of the
            published meta-dataset.
        num_states (`int`, *optional*, defaults to `5`):
            Length S of a history.
        max_per_tensor (`int`, *optional*, defaults to `4096`):
            Largest number of scalars drawn from a tensor; `None` takes all. From tensors with more than 262,144
            scalars, runs of 16 neighbors are drawn.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw, combined with the names of trajectory and tensor.
        cache_dir (`str` or `Path`, *optional*):
            Folder in which drawn scalars are cached for other processes, other S and later runs. Processes that create
            the dataset at the same time share the work.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Attributes:
        trajectories (`list[str]`):
            Paths of the trajectories.
        blocks (`list[TransitionBlock]`):
            Items of each tensor.
        roles (`list[str]`):
            Roles that have transitions.
        fingerprint (`str`):
            Hash of the transitions and their order, independent of where they were read.

    Raises:
        `ValueError`: If `trajectories` is empty, a trajectory has too few states, a drawn value is not finite, or no
        tensor changes.
    """

    def __init__(
        self,
        trajectories: Sequence[WeightTrajectory | str | Path],
        num_states: int = 5,
        max_per_tensor: int | None = 4096,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        _check_arguments(trajectories, num_states, max_per_tensor)
        self.num_states = num_states
        self._samples = _sample_all(trajectories, num_states, max_per_tensor, seed, cache_dir, progress)
        self.trajectories = [sample.path for sample in self._samples]
        keys = [sample.key for sample in self._samples]
        self.fingerprint = sha256(repr((num_states, keys)).encode()).hexdigest()
        self._layout = _Layout.of(self._samples, num_states, {role: role for role in PREDICTED_ROLES})
        if not self.blocks:
            raise ValueError(
                f"no tensor of the roles {', '.join(PREDICTED_ROLES)} changes in {', '.join(self.trajectories)}; "
                "record a training that updates such weights"
            )

    def with_one_role(self, role: str) -> "TransitionDataset":
        """Return the same transitions with a single role, for one network that predicts all tensors."""
        if role not in PREDICTED_ROLES:
            raise ValueError(f"unknown role {role!r}; choose one of {', '.join(PREDICTED_ROLES)}")
        merged = copy(self)
        vars(merged).update(
            _layout=_Layout.of(self._samples, self.num_states, dict.fromkeys(PREDICTED_ROLES, role)),
            fingerprint=sha256(f"{self.fingerprint} as {role}".encode()).hexdigest(),
        )
        return merged

    @property
    def blocks(self) -> list[TransitionBlock]:
        return self._layout.blocks

    @property
    def roles(self) -> list[str]:
        return list(self._layout.ranges)

    def __repr__(self) -> str:
        counts = ", ".join(f"{role}={stop - start:,}" for role, (start, stop) in self._layout.ranges.items())
        return f"TransitionDataset({len(self.trajectories)} trajectories, num_states={self.num_states}, {counts})"

    def __len__(self) -> int:
        return self.blocks[-1].stop

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} transitions")
        ((role, transitions),) = self.by_role([index % len(self)]).items()
        return {**{name: values[0] for name, values in transitions.items()}, "role": role}

    def by_role(self, indices: Sequence[int] | np.ndarray) -> dict[str, dict[str, torch.Tensor]]:
        """Return a batch by role, much faster than reading its items one by one.

        Each role that occurs has `history` `(N_role, S)`, `labels` `(N_role,)` and `no_change` `(N_role,)`, the mean
        `|Θ0 - Θ(-1)|` of the tensor of each transition, in the order of `indices`.
        """
        layout = self._layout
        items = np.asarray(indices, np.int64)
        block = np.searchsorted(layout.starts, items, side="right") - 1
        length = layout.lengths[block]
        row, window = np.divmod(items - layout.starts[block], length - self.num_states)
        first = (layout.first_rows[block] + row) * length + window
        windows = self._read_windows(layout.samples[block], first)
        no_change = layout.no_change[block]
        batch = {}
        for role, (start, stop) in layout.ranges.items():
            in_role = (items >= start) & (items < stop)
            if in_role.any():
                of_role = torch.from_numpy(windows[in_role])
                batch[role] = {
                    "history": of_role[:, :-1],
                    "labels": of_role[:, -1],
                    "no_change": torch.from_numpy(no_change[in_role]),
                }
        return batch

    def _read_windows(self, sample: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Read S + 1 values of each item's sample, beginning at `first`: `(N, S + 1)`."""
        order = np.argsort(sample, kind="stable")
        positions = first[order, None] + np.arange(self.num_states + 1)
        numbers, starts = np.unique(sample[order], return_index=True)
        ends = [*starts[1:].tolist(), len(order)]
        values = np.empty(positions.shape, np.float32)
        for number, start, end in zip(numbers.tolist(), starts.tolist(), ends, strict=True):
            # All positions are valid; "clip" avoids the copy that take() makes to check them.
            self._samples[number].values.take(positions[start:end], out=values[start:end], mode="clip")
        windows = np.empty_like(values)
        windows[order] = values
        return windows

    def block(self, block: TransitionBlock) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all transitions of one tensor: histories `(N, S)` and targets `(N,)`."""
        position = int(np.searchsorted(self._layout.starts, block.start))
        values = self._samples[self._layout.samples[position]].values
        windows_per_row = values.shape[1] - self.num_states
        first = self._layout.first_rows[position]
        rows = values[first : first + (block.stop - block.start) // windows_per_row]
        windows = np.array(sliding_window_view(rows, self.num_states + 1, axis=1)).reshape(-1, self.num_states + 1)
        return torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, -1])

    def mean_no_change(self) -> dict[str, float]:
        """Return the mean `|Θ0 - Θ(-1)|` by role; trajectories, and tensors within a trajectory, weigh the same."""
        errors: dict[str, dict[str, list[float]]] = {role: defaultdict(list) for role in self.roles}
        for block in self.blocks:
            errors[block.role][block.trajectory].append(block.no_change)
        return {role: mean(map(mean, by_trajectory.values())) for role, by_trajectory in errors.items()}

    def describe(self) -> dict[str, dict[str, int | float]]:
        """Summarize the dataset by role, with JSON values only: numbers of trajectories, tensors and transitions, the
        largest weight, and the largest and mean displacement `|target - full-data state|` of a scalar weight.
        """
        tensors = {(sample.path, tensor.name): tensor for sample in self._samples for tensor in sample.tensors}
        description = {}
        for role, (start, stop) in self._layout.ranges.items():
            blocks = [block for block in self.blocks if block.role == role]
            sampled = [tensors[block.trajectory, block.tensor] for block in blocks]
            displacements = [block.no_change * (block.stop - block.start) for block in blocks]
            description[role] = {
                "trajectories": len({block.trajectory for block in blocks}),
                "tensors": len(blocks),
                "transitions": stop - start,
                "largest_weight": max(tensor.largest for tensor in sampled),
                "largest_displacement": max(max(tensor.largest_steps[self.num_states - 1 :]) for tensor in sampled),
                "mean_displacement": sum(displacements) / (stop - start),
            }
        return description


class BalancedBatchSampler(Sampler[np.ndarray]):
    """Sampler of batches with the same number of transitions of each role.

    Within a role, all trajectories are equally likely; within a trajectory, all tensors; within a tensor, all
    transitions. They are drawn with replacement. The n-th batch, of `num_batches` in a pass, depends only on the
    dataset, `batch_size` (transitions of each role, over all processes), `seed` and n; those before `start` are
    neither drawn nor read. All processes draw the same batches and take their part of each, so that together they see
    the same data as one process.

    Raises:
        `ValueError`: if `batch_size` is not a multiple of `num_processes`.
    """

    def __init__(
        self,
        dataset: TransitionDataset,
        batch_size: int,
        num_batches: int,
        seed: int = 0,
        start: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        if batch_size % num_processes:
            raise ValueError(
                f"batch_size must be a multiple of the number of processes ({num_processes}), got {batch_size}; "
                f"choose {batch_size + -batch_size % num_processes}"
            )
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.seed = seed
        self.start = start
        self._part = slice(process_index, None, num_processes)
        self._draws = [_Draw.of([block for block in dataset.blocks if block.role == role]) for role in dataset.roles]

    def __len__(self) -> int:
        return self.num_batches - self.start

    def __iter__(self) -> Iterator[np.ndarray]:
        for number in range(self.start, self.num_batches):
            rng = np.random.default_rng((self.seed, number))
            yield np.concatenate([draw(rng, self.batch_size)[self._part] for draw in self._draws])


@dataclass(frozen=True)
class _Draw:
    """Random draw of the items of one role: first a tensor by its probability, then one of its transitions."""

    starts: np.ndarray
    lengths: np.ndarray
    cumulative: np.ndarray

    @classmethod
    def of(cls, blocks: list[TransitionBlock]) -> "_Draw":
        num_tensors = Counter(block.trajectory for block in blocks)
        probabilities = np.array([1 / (len(num_tensors) * num_tensors[block.trajectory]) for block in blocks])
        return cls(
            starts=np.array([block.start for block in blocks]),
            lengths=np.array([block.stop - block.start for block in blocks]),
            cumulative=probabilities.cumsum()[:-1],
        )

    def __call__(self, rng: np.random.Generator, size: int) -> np.ndarray:
        tensor = np.searchsorted(self.cumulative, rng.random(size), side="right")
        return self.starts[tensor] + rng.integers(self.lengths[tensor])


@dataclass(frozen=True)
class _Layout:
    """Items of each tensor, ordered by role, trajectory and tensor; the arrays have one entry per block."""

    blocks: list[TransitionBlock]
    ranges: dict[str, tuple[int, int]]  # first item of each role, and its last plus one
    starts: np.ndarray
    samples: np.ndarray  # number of the sample
    first_rows: np.ndarray  # first row in the sample
    lengths: np.ndarray  # states of the sample
    no_change: np.ndarray

    @classmethod
    def of(cls, samples: list[StateSample], num_states: int, role_of: dict[str, str]) -> "_Layout":
        entries = []
        for number, sample in enumerate(samples):
            first_row = 0
            for tensor in sample.tensors:
                steps = tensor.mean_steps[num_states - 1 :]
                count, share = tensor.rows * len(steps), tensor.rows / tensor.size
                role, no_change = role_of[tensor.role], sum(steps) / len(steps)
                block = TransitionBlock(role, sample.path, tensor.name, 0, count, share, no_change)
                entries.append((block, number, first_row))
                first_row += tensor.rows
        entries.sort(key=lambda entry: PREDICTED_ROLES.index(entry[0].role))
        blocks: list[TransitionBlock] = []
        ranges: dict[str, tuple[int, int]] = {}
        for block, *_ in entries:
            start = blocks[-1].stop if blocks else 0
            blocks.append(replace(block, start=start, stop=start + block.stop))
            ranges[block.role] = (ranges.get(block.role, (start, 0))[0], start + block.stop)
        numbers = np.array([number for _, number, _ in entries], np.int64)
        return cls(
            blocks=blocks,
            ranges=ranges,
            starts=np.array([block.start for block in blocks], np.int64),
            samples=numbers,
            first_rows=np.array([first_row for *_, first_row in entries], np.int64),
            lengths=np.array([sample.num_states for sample in samples], np.int64)[numbers],
            no_change=np.array([block.no_change for block in blocks], np.float32),
        )


def _sample_all(
    trajectories: Sequence[WeightTrajectory | str | Path],
    num_states: int,
    max_per_tensor: int | None,
    seed: int,
    cache_dir: str | Path | None,
    progress: bool,
) -> list[StateSample]:
    folder = None if cache_dir is None else Path(cache_dir)
    samples: dict[int, StateSample] = {}
    with tqdm(total=len(trajectories), desc="reading trajectories", disable=not progress) as bar:
        # Samples that another process is drawing are left to the second pass, which waits for them.
        for wait in (False, True):
            for number, trajectory in enumerate(trajectories):
                if number in samples:
                    continue
                reader = open_states(trajectory)
                if reader.num_states < num_states + 1:
                    reader.close()
                    raise ValueError(
                        f"{reader.path} has {reader.num_states} states, but a transition needs {num_states + 1} "
                        f"(a history of {num_states} and a target); record it with ForgettingSchedule(num_states="
                        f"{num_states + 1}) or more"
                    )
                try:
                    samples[number] = sample_states(reader, max_per_tensor, seed, folder, wait)
                except Timeout:
                    continue
                bar.update()
    return [samples[number] for number in range(len(trajectories))]


def _check_arguments(trajectories: Sequence[Any], num_states: int, max_per_tensor: int | None) -> None:
    if isinstance(trajectories, (str, Path, WeightTrajectory)):
        raise ValueError(f"trajectories must be a list, got the single trajectory {trajectories!r}")
    if not len(trajectories):
        raise ValueError("trajectories is empty; record some with induce_forgetting")
    if num_states < 2:
        raise ValueError(f"num_states must be at least 2, got {num_states}")
    if max_per_tensor is not None and max_per_tensor < 1:
        raise ValueError(f"max_per_tensor must be at least 1, or None for all scalars, got {max_per_tensor}")
