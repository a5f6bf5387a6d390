"""Transitions: histories of scalar weights with the state that came before the forgetting, from many trajectories.

A trajectory of T states gives T - S transitions for each scalar weight: with T = 7 and S = 5 the window Θ6 … Θ2 has
the target Θ1, and Θ5 … Θ1 has Θ0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm

from ..roles import PREDICTED_ROLES
from ..trajectory import WeightTrajectory


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
    """

    role: str
    trajectory: str
    tensor: str
    start: int
    stop: int


class TransitionDataset(Dataset):
    """
    All transitions of some trajectories, scalar by scalar: item i is
    `{"history": (S,), "labels": (), "role": str}`, most forgotten state first.

    Only tensors of the roles conv, fc and bias that move are taken; those equal in all states are left out. Every
    tensor is read once, when the dataset is made; what is kept takes `4 * (S + 1) * (T - S)` bytes for each scalar, of
    which there are at most `max_per_tensor` a tensor, so memory does not grow with the size of the nets. Items stand
    role by role, and within a role tensor by tensor, as `blocks` says; [`BalancedBatchSampler`] draws from them.

    Args:
        trajectories (sequence of [`WeightTrajectory`], `str` or `Path`):
            The trajectories, each with at least S + 1 states.
        num_states (`int`, *optional*, defaults to `5`):
            Length S of a history.
        max_per_tensor (`int`, *optional*, defaults to `4096`):
            Scalars drawn from a tensor that has more; `None` takes all of them.
        seed (`int`, *optional*, defaults to `0`):
            Seed of that draw.
        progress (`bool`, *optional*, defaults to `True`):
            Whether a bar shows the reading.

    Attributes:
        trajectories (`list[str]`): Paths of the trajectories.
        blocks (`list[TransitionBlock]`): Where the transitions of each tensor are.
        roles (`list[str]`): The roles that have transitions.

    Raises:
        `ValueError`: when no trajectory is given, one has too few states or a value that is not finite, or nothing
        moves in any of them; the message names trajectory, tensor and state.
    """

    def __init__(
        self,
        trajectories: Sequence[WeightTrajectory | str | Path],
        num_states: int = 5,
        max_per_tensor: int | None = 4096,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        _check_arguments(trajectories, num_states, max_per_tensor)
        opened = [t if isinstance(t, WeightTrajectory) else WeightTrajectory(t) for t in trajectories]
        for trajectory in opened:
            _check_length(trajectory, num_states)
        self.num_states = num_states
        self.trajectories = [str(trajectory.path) for trajectory in opened]
        rng = np.random.default_rng(seed)
        tensors: dict[str, list[tuple[str, str, torch.Tensor]]] = {role: [] for role in PREDICTED_ROLES}
        for trajectory in tqdm(opened, desc="reading trajectories", disable=not progress):
            for name in trajectory.names:
                role = trajectory.roles[name].role
                if role in tensors and (states := _states(trajectory, name, max_per_tensor, rng)) is not None:
                    windows = states.unfold(1, num_states + 1, 1).reshape(-1, num_states + 1)
                    tensors[role].append((str(trajectory.path), name, windows))
        self.blocks: list[TransitionBlock] = []
        for role, entries in tensors.items():
            for path, name, windows in entries:
                start = self.blocks[-1].stop if self.blocks else 0
                self.blocks.append(TransitionBlock(role, path, name, start, start + len(windows)))
        if not self.blocks:
            raise ValueError(
                f"no tensor of the roles {', '.join(PREDICTED_ROLES)} moves in {', '.join(self.trajectories)}; "
                "were all weights frozen?"
            )
        self._windows = torch.cat([windows for role in tensors for _, _, windows in tensors[role]])
        self._ranges = {
            role: (min(b.start for b in blocks), max(b.stop for b in blocks))
            for role in PREDICTED_ROLES
            if (blocks := [block for block in self.blocks if block.role == role])
        }

    @property
    def roles(self) -> list[str]:
        return list(self._ranges)

    def __repr__(self) -> str:
        counts = ", ".join(f"{role}={stop - start:,}" for role, (start, stop) in self._ranges.items())
        return f"TransitionDataset({len(self.trajectories)} trajectories, num_states={self.num_states}, {counts})"

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of a dataset with {len(self)} transitions")
        index %= len(self)
        role = next(role for role, (start, stop) in self._ranges.items() if start <= index < stop)
        return {"history": self._windows[index, :-1], "labels": self._windows[index, -1], "role": role}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, dict[str, torch.Tensor]]:
        """
        Many items at once, sorted by role; a `DataLoader` calls this for each batch of a batch sampler.

        Args:
            indices (sequence of `int`):
                Items.

        Returns:
            `dict[str, dict[str, torch.Tensor]]`: from the role to `history` `(N_role, S)` and `labels` `(N_role,)`, in
            the order of `indices`; roles without an item are left out.
        """
        items = torch.as_tensor(indices, dtype=torch.int64)
        batch = {}
        for role, (start, stop) in self._ranges.items():
            windows = self._windows[items[(items >= start) & (items < stop)]]
            if len(windows):
                batch[role] = {"history": windows[:, :-1], "labels": windows[:, -1]}
        return batch

    def block(self, block: TransitionBlock) -> tuple[torch.Tensor, torch.Tensor]:
        """All transitions of one tensor: histories `(N, S)` and targets `(N,)`, views of the dataset's memory."""
        windows = self._windows[block.start : block.stop]
        return windows[:, :-1], windows[:, -1]

    def describe(self) -> dict[str, dict[str, int | float]]:
        """
        What the dataset covers, by role, JSON values only: numbers of trajectories, tensors and transitions, the
        largest weight, and the largest and mean displacement `|target - full-data state|` of a scalar weight.
        """
        description = {}
        for role, (start, stop) in self._ranges.items():
            blocks = [block for block in self.blocks if block.role == role]
            windows = self._windows[start:stop]
            displacement = (windows[:, -1] - windows[:, -2]).abs()
            description[role] = {
                "trajectories": len({block.trajectory for block in blocks}),
                "tensors": len({(block.trajectory, block.tensor) for block in blocks}),
                "transitions": stop - start,
                "largest_weight": windows.abs().max().item(),
                "largest_displacement": displacement.max().item(),
                "mean_displacement": displacement.mean(dtype=torch.float64).item(),
            }
        return description


class BalancedBatchSampler(Sampler[list[int]]):
    """
    Batches with the same number of transitions of every role; within a role every trajectory is as likely as any
    other, within a trajectory every tensor, within a tensor every transition. Drawn with replacement.

    The n-th batch depends on the dataset, `batch_size`, `seed` and n alone.

    Args:
        dataset ([`TransitionDataset`]):
            Where the items are.
        batch_size (`int`):
            Transitions of each role in a batch.
        num_batches (`int`):
            Length of one pass.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw; every pass gives the same batches.
    """

    def __init__(self, dataset: TransitionDataset, batch_size: int, num_batches: int, seed: int = 0) -> None:
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.seed = seed
        self.drop_last = False
        self._draws = [_Draw.of([block for block in dataset.blocks if block.role == role]) for role in dataset.roles]

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.num_batches):
            rng = np.random.default_rng((self.seed, number))
            yield np.concatenate([draw(rng, self.batch_size) for draw in self._draws]).tolist()


@dataclass(frozen=True)
class _Draw:
    """Draws items of one role: first a tensor by its probability, then one of its transitions."""

    starts: np.ndarray
    lengths: np.ndarray
    cumulative: np.ndarray

    @classmethod
    def of(cls, blocks: list[TransitionBlock]) -> "_Draw":
        tensors_of = {block.trajectory: 0 for block in blocks}
        for block in blocks:
            tensors_of[block.trajectory] += 1
        probabilities = np.array([1 / (len(tensors_of) * tensors_of[block.trajectory]) for block in blocks])
        return cls(
            starts=np.array([block.start for block in blocks]),
            lengths=np.array([block.stop - block.start for block in blocks]),
            cumulative=probabilities.cumsum()[:-1],
        )

    def __call__(self, rng: np.random.Generator, size: int) -> np.ndarray:
        chosen = np.searchsorted(self.cumulative, rng.random(size), side="right")
        return self.starts[chosen] + rng.integers(self.lengths[chosen])


def _check_arguments(trajectories: Sequence[Any], num_states: int, max_per_tensor: int | None) -> None:
    if isinstance(trajectories, (str, Path, WeightTrajectory)):
        raise ValueError(f"trajectories={trajectories!r} is a single one; pass a list of trajectories")
    if not len(trajectories):
        raise ValueError("no trajectory was given; record some with induce_forgetting")
    if num_states < 2:
        raise ValueError(f"num_states={num_states}: a history has at least 2 states")
    if max_per_tensor is not None and max_per_tensor < 1:
        raise ValueError(f"max_per_tensor={max_per_tensor}: choose at least 1, or None for all scalars")


def _check_length(trajectory: WeightTrajectory, num_states: int) -> None:
    if trajectory.num_states < num_states + 1:
        raise ValueError(
            f"{trajectory.path} has {trajectory.num_states} states, a transition needs {num_states + 1}: "
            f"{num_states} of history and a target; record it with ForgettingSchedule(num_states={num_states + 1}) or "
            "more"
        )


def _states(
    trajectory: WeightTrajectory, name: str, max_per_tensor: int | None, rng: np.random.Generator
) -> torch.Tensor | None:
    """The scalars of one tensor, sampled, `(N, T)`; `None` when the tensor is equal in all states."""
    history = trajectory.history(name).flatten(1)
    finite = history.isfinite().all(dim=1)
    if not finite.all():
        state = trajectory.num_states - 1 - int(finite.logical_not().nonzero()[0])
        raise ValueError(
            f"tensor {name!r} of state {state} of {trajectory.path} has values that are not finite; "
            "leave this trajectory out, its training diverged"
        )
    if torch.equal(history, history[:1].expand_as(history)):
        return None
    if max_per_tensor is not None and history.shape[1] > max_per_tensor:
        chosen = np.sort(rng.choice(history.shape[1], max_per_tensor, replace=False, shuffle=False))
        history = history[:, torch.from_numpy(chosen)]
    return history.T.contiguous()
