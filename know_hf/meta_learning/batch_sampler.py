"""Which transitions make a batch, on one process or several."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from .dataset import TransitionBlock, TransitionDataset


class BalancedBatchSampler(Sampler[np.ndarray]):
    """
    Batches with the same number of transitions of every role; within a role every trajectory is as likely as any
    other, within a trajectory every tensor, within a tensor every transition. Drawn with replacement.

    The n-th batch depends on the dataset, `batch_size`, `seed` and n alone. Several processes draw the same batches
    and take each their part of every one: together they see what one process would.

    Args:
        dataset ([`TransitionDataset`]):
            Where the items are.
        batch_size (`int`):
            Transitions of each role in a batch, over all processes.
        num_batches (`int`):
            Length of one pass.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw; every pass gives the same batches.
        start (`int`, *optional*, defaults to `0`):
            Batch that a pass begins with; nothing is drawn or read of those before it.
        process_index, num_processes (`int`, *optional*):
            Which part of each batch to give, and of how many.

    Raises:
        `ValueError`: when `batch_size` is not a multiple of `num_processes`.
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
            larger = batch_size + -batch_size % num_processes
            raise ValueError(
                f"batch_size={batch_size} can't be shared by {num_processes} processes; choose {larger}, which is a"
                " multiple of their number"
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
