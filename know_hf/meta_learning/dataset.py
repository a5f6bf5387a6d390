"""Transitions: histories of scalar weights with the state that came before the forgetting, from many trajectories.

A trajectory of T states gives T - S transitions for each scalar weight: with T = 7 and S = 5 the window Θ6 … Θ2 has
the target Θ1, and Θ5 … Θ1 has Θ0.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from filelock import Timeout
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..roles import PREDICTED_ROLES
from ..trajectory import WeightTrajectory
from .state_samples import StateSample, sample_states
from .transition_sources import open_source


@dataclass(frozen=True)
class TransitionBlock:
    """
    The transitions of one tensor: items `start` to `stop - 1` of a [`TransitionDataset`].

    Args:
        role (`str`): `"conv"`, `"fc"` or `"bias"`.
        trajectory (`str`): Path of its trajectory.
        tensor (`str`): Name of the tensor.
        start (`int`): First item.
        stop (`int`): One after its last item.
        share (`float`): Share of the tensor's scalars that was drawn.
        no_change (`float`): Mean `|Θ0 - Θ(-1)|` of its transitions, the error of predicting that nothing changes.
    """

    role: str
    trajectory: str
    tensor: str
    start: int
    stop: int
    share: float
    no_change: float


class TransitionDataset(Dataset):
    """
    All transitions of some trajectories, scalar by scalar: item i is
    `{"history": (S,), "labels": (), "no_change": (), "role": str}`, most forgotten state first.

    Only tensors of the roles conv, fc and bias that move are taken: parameters of normalisation layers, and tensors
    whose drawn scalars are equal in all states, are left out. At most `max_per_tensor` scalars of a tensor are drawn,
    and of large tensors nothing else is read; what is drawn takes `4 * T` bytes a scalar, in memory or in the files
    of `cache_dir`, which are mapped and not loaded. Items stand role by role, and within a role tensor by tensor, as
    `blocks` says; [`BalancedBatchSampler`] draws from them.

    Args:
        trajectories (sequence of [`WeightTrajectory`], `str` or `Path`):
            The trajectories, each with at least S + 1 states: objects, folders (recorded here or pulled from the Hub),
            or `.h5` files in the layout of the published meta-dataset.
        num_states (`int`, *optional*, defaults to `5`):
            Length S of a history.
        max_per_tensor (`int`, *optional*, defaults to `4096`):
            Scalars drawn from a tensor that has more; `None` takes all of them. Of tensors with more than 262,144
            scalars runs of 16 neighbours are drawn.
        seed (`int`, *optional*, defaults to `0`):
            Seed of that draw, together with the names of trajectory and tensor.
        cache_dir (`str` or `Path`, *optional*):
            Folder that keeps what was drawn, for other processes, other S and the next time. Processes that are made
            at the same time share the drawing.
        progress (`bool`, *optional*, defaults to `True`):
            Whether a bar shows the reading.

    Attributes:
        trajectories (`list[str]`): Paths of the trajectories.
        blocks (`list[TransitionBlock]`): Where the transitions of each tensor are.
        roles (`list[str]`): The roles that have transitions.
        fingerprint (`str`): The same for the same transitions in the same order, wherever they were read.

    Raises:
        `ValueError`: when no trajectory is given, one has too few states or a drawn value that is not finite, or
            nothing moves in any of them; the message names trajectory, tensor and state.
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
        self._lay_out({role: role for role in PREDICTED_ROLES})
        if not self.blocks:
            raise ValueError(
                f"no tensor of the roles {', '.join(PREDICTED_ROLES)} moves in {', '.join(self.trajectories)}; "
                "were all weights frozen?"
            )

    def _lay_out(self, role_of: dict[str, str]) -> None:
        """Gives every transition its item: role by role, trajectory by trajectory, tensor by tensor."""
        found: dict[str, list[tuple[int, int, TransitionBlock]]] = {role: [] for role in PREDICTED_ROLES}
        for number, sample in enumerate(self._samples):
            first_row = 0
            for tensor in sample.tensors:
                steps = tensor.mean_steps[self.num_states - 1 :]
                block = TransitionBlock(
                    role=role_of[tensor.role],
                    trajectory=sample.path,
                    tensor=tensor.name,
                    start=0,
                    stop=tensor.rows * len(steps),
                    share=tensor.rows / tensor.size,
                    no_change=sum(steps) / len(steps),
                )
                found[block.role].append((number, first_row, block))
                first_row += tensor.rows
        self.blocks: list[TransitionBlock] = []
        for *_, block in (entry for entries in found.values() for entry in entries):
            start = len(self)
            self.blocks.append(replace(block, start=start, stop=start + block.stop))
        self._ranges = {
            role: (min(b.start for b in blocks), max(b.stop for b in blocks))
            for role in PREDICTED_ROLES
            if (blocks := [block for block in self.blocks if block.role == role])
        }
        self._starts = np.array([block.start for block in self.blocks], np.int64)
        self._sample_of = np.array([number for entries in found.values() for number, *_ in entries], np.int64)
        self._first_row = np.array([row for entries in found.values() for _, row, _ in entries], np.int64)
        lengths = np.array([sample.num_states for sample in self._samples], np.int64)
        self._lengths = lengths[self._sample_of] if self.blocks else lengths
        self._no_change = np.array([block.no_change for block in self.blocks], np.float32)

    def with_one_role(self, role: str) -> "TransitionDataset":
        """The same transitions, all of one role, for one network that is to predict every tensor."""
        if role not in PREDICTED_ROLES:
            raise ValueError(f"unknown role {role!r}; choose one of {', '.join(PREDICTED_ROLES)}")
        merged = TransitionDataset.__new__(TransitionDataset)
        merged.__dict__.update(self.__dict__)
        merged._lay_out(dict.fromkeys(PREDICTED_ROLES, role))
        merged.fingerprint = sha256(f"{self.fingerprint} as {role}".encode()).hexdigest()
        return merged

    @property
    def roles(self) -> list[str]:
        return list(self._ranges)

    def __repr__(self) -> str:
        counts = ", ".join(f"{role}={stop - start:,}" for role, (start, stop) in self._ranges.items())
        return f"TransitionDataset({len(self.trajectories)} trajectories, num_states={self.num_states}, {counts})"

    def __len__(self) -> int:
        return self.blocks[-1].stop if self.blocks else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of a dataset with {len(self)} transitions")
        ((role, transitions),) = self.__getitems__([index % len(self)]).items()
        return {**{name: values[0] for name, values in transitions.items()}, "role": role}

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> dict[str, dict[str, torch.Tensor]]:
        """
        Many items at once, sorted by role; a `DataLoader` calls this for each batch of a batch sampler.

        Args:
            indices (sequence of `int`):
                Items.

        Returns:
            `dict[str, dict[str, torch.Tensor]]`: from the role to `history` `(N_role, S)`, `labels` `(N_role,)` and
            `no_change` `(N_role,)`, the mean `|Θ0 - Θ(-1)|` over the tensor that each transition is of, in the order
            of `indices`; roles without an item are left out.
        """
        items = np.asarray(indices, np.int64)
        block = np.searchsorted(self._starts, items, side="right") - 1
        length = self._lengths[block]
        row, window = np.divmod(items - self._starts[block], length - self.num_states)
        first = (self._first_row[block] + row) * length + window
        windows = self._read_windows(self._sample_of[block], first)
        no_change = self._no_change[block]
        batch = {}
        for role, (start, stop) in self._ranges.items():
            chosen = (items >= start) & (items < stop)
            if chosen.any():
                of_role = torch.from_numpy(windows[chosen])
                batch[role] = {
                    "history": of_role[:, :-1],
                    "labels": of_role[:, -1],
                    "no_change": torch.from_numpy(no_change[chosen]),
                }
        return batch

    def _read_windows(self, sample: np.ndarray, first: np.ndarray) -> np.ndarray:
        """The S + 1 numbers from `first` on of each item's sample, `(N, S + 1)`."""
        order = np.argsort(sample, kind="stable")
        places = first[order, None] + np.arange(self.num_states + 1)
        numbers, starts = np.unique(sample[order], return_index=True)
        ends = [*starts[1:].tolist(), len(order)]
        found = np.empty(places.shape, np.float32)
        for number, start, end in zip(numbers.tolist(), starts.tolist(), ends, strict=True):
            # "clip" only spares the copy that checking every place would take: none is out of range
            self._samples[number].values.take(places[start:end], out=found[start:end], mode="clip")
        windows = np.empty_like(found)
        windows[order] = found
        return windows

    def block(self, block: TransitionBlock) -> tuple[torch.Tensor, torch.Tensor]:
        """All transitions of one tensor: histories `(N, S)` and targets `(N,)`."""
        position = int(np.searchsorted(self._starts, block.start))
        values = self._samples[self._sample_of[position]].values
        windows_a_row = values.shape[1] - self.num_states
        first = self._first_row[position]
        rows = values[first : first + (block.stop - block.start) // windows_a_row]
        windows = np.array(sliding_window_view(rows, self.num_states + 1, axis=1)).reshape(-1, self.num_states + 1)
        return torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, -1])

    def mean_no_change(self) -> dict[str, float]:
        """Mean `|Θ0 - Θ(-1)|` by role, every trajectory weighing the same, and so every tensor within one."""
        means = {}
        for role in self.roles:
            by_trajectory: dict[str, list[float]] = defaultdict(list)
            for block in self.blocks:
                if block.role == role:
                    by_trajectory[block.trajectory].append(block.no_change)
            means[role] = mean(mean(errors) for errors in by_trajectory.values())
        return means

    def describe(self) -> dict[str, dict[str, int | float]]:
        """
        What the dataset covers, by role, JSON values only: numbers of trajectories, tensors and transitions, the
        largest weight, and the largest and mean displacement `|target - full-data state|` of a scalar weight.
        """
        tensors = {(sample.path, tensor.name): tensor for sample in self._samples for tensor in sample.tensors}
        description = {}
        for role, (start, stop) in self._ranges.items():
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
        # What another process is drawing comes last: until then it will be there.
        for wait in (False, True):
            for number, trajectory in enumerate(trajectories):
                if number in samples:
                    continue
                source = open_source(trajectory)
                if source.num_states < num_states + 1:
                    source.close()
                    raise ValueError(
                        f"{source.path} has {source.num_states} states, a transition needs {num_states + 1}: "
                        f"{num_states} of history and a target; record it with ForgettingSchedule(num_states="
                        f"{num_states + 1}) or more"
                    )
                try:
                    samples[number] = sample_states(source, max_per_tensor, seed, folder, wait)
                except Timeout:
                    continue
                bar.update()
    return [samples[number] for number in range(len(trajectories))]


def _check_arguments(trajectories: Sequence[Any], num_states: int, max_per_tensor: int | None) -> None:
    if isinstance(trajectories, (str, Path, WeightTrajectory)):
        raise ValueError(f"trajectories={trajectories!r} is a single one; pass a list of trajectories")
    if not len(trajectories):
        raise ValueError("no trajectory was given; record some with induce_forgetting")
    if num_states < 2:
        raise ValueError(f"num_states={num_states}: a history has at least 2 states")
    if max_per_tensor is not None and max_per_tensor < 1:
        raise ValueError(f"max_per_tensor={max_per_tensor}: choose at least 1, or None for all scalars")
