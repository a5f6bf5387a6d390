"""Which examples each stage of structured forgetting trains on: ever smaller nested subsets of one dataset.

Every subset is a prefix of one seeded ordering of the examples, so that each lies inside the one before whatever the
sizes are. For a stratified schedule the ordering spreads every class evenly, so that each prefix keeps the class
balance to within one example a class.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ForgettingSchedule:
    """Sizes and members of the nested subsets D0 ⊃ D1 ⊃ … ⊃ D(S-1), with |Dk| = round(r^k · |D0|) (KNOW paper, §3).

    Args:
        ratio (`float`, *optional*, defaults to `0.5`):
            The sampling rate r: the share of the examples that each stage keeps. Published values are 0.5 and 0.33.
        num_states (`int`, *optional*, defaults to `5`):
            S, the number of weight states, the one trained on all of the data among them.
        epochs_per_stage (`float`, *optional*, defaults to `1`):
            Epochs trained on each of the S - 1 smaller subsets.
        stratify_by (`str`, *optional*):
            Column of the dataset with the class of each example; its balance is then kept in every subset.
        seed (`int`, *optional*, defaults to `0`):
            Chooses the examples. The same seed chooses the same examples on every machine.

    Raises:
        `ValueError`: for a ratio outside (0, 1), fewer than two states, or a stage of no length.
    """

    ratio: float = 0.5
    num_states: int = 5
    epochs_per_stage: float = 1
    stratify_by: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(
                f"ratio must lie strictly between 0 and 1, got {self.ratio}; published values are 0.5, 0.33"
            )
        if int(self.num_states) != self.num_states or self.num_states < 2:
            raise ValueError(f"num_states must be a whole number of at least 2, got {self.num_states}")
        if not self.epochs_per_stage > 0:
            raise ValueError(f"epochs_per_stage must be positive, got {self.epochs_per_stage}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32), got {self.seed}")

    @property
    def relative_cost(self) -> float:
        """Examples seen by one epoch of every state, all data included, in units of one epoch on all data: Σ r^k."""
        return sum(self.ratio**k for k in range(self.num_states))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sizes(self, num_examples: int, batch_size: int = 1) -> list[int]:
        """Number of examples of every state.

        Args:
            num_examples (`int`): |D0|, the number of examples of the whole dataset.
            batch_size (`int`, *optional*, defaults to `1`): Examples of one optimizer step.

        Returns:
            `list[int]`: `num_states` sizes, strictly falling, all of the data first.

        Raises:
            `ValueError`: when the last subset is smaller than one batch, or two subsets are of the same size; the
            message names all sizes.
        """
        sizes = [round(self.ratio**k * num_examples) for k in range(self.num_states)]
        if sizes[-1] < max(batch_size, 1):
            raise ValueError(
                f"the subsets of {num_examples} examples have sizes {sizes}; the last is smaller than one batch of"
                f" {batch_size}. Use more data, a smaller batch, fewer states than {self.num_states}, or a ratio above"
                f" {self.ratio}."
            )
        if any(small >= large for large, small in pairwise(sizes)):
            raise ValueError(
                f"the subsets of {num_examples} examples have sizes {sizes}, which do not shrink at every stage."
                f" Use more data, fewer states than {self.num_states}, or a ratio below {self.ratio}."
            )
        return sizes

    def indices(
        self, num_examples: int, labels: Sequence[Any] | np.ndarray | None = None, batch_size: int = 1
    ) -> list[np.ndarray]:
        """Indices of every subset.

        Args:
            num_examples (`int`): |D0|, the number of examples of the whole dataset.
            labels (sequence of length `num_examples`, *optional*): The class of each example. With it every subset
                holds each class to within one example of its share of the whole.
            batch_size (`int`, *optional*, defaults to `1`): Examples of one optimizer step, see [`sizes`].

        Returns:
            `list[np.ndarray]`: `num_states` sorted int64 arrays, each a subset of the one before; the first is
            `arange(num_examples)`.

        Raises:
            `ValueError`: as [`sizes`], and when the schedule is stratified but no labels, or too few, are given.
        """
        sizes = self.sizes(num_examples, batch_size)
        if labels is None and self.stratify_by is not None:
            raise ValueError(f"the schedule is stratified by {self.stratify_by!r}, but no labels were given")
        if labels is not None and len(labels) != num_examples:
            raise ValueError(
                f"got {len(labels)} labels for {num_examples} examples; there must be one label an example"
            )
        order = self._order(num_examples, labels)
        return [np.sort(order[:size]) for size in sizes]

    def _order(self, num_examples: int, labels: Sequence[Any] | np.ndarray | None) -> np.ndarray:
        # RandomState.random_sample is frozen: the same doubles on every platform and in every numpy release.
        shuffled = np.argsort(np.random.RandomState(self.seed).random_sample(num_examples), kind="stable")
        if labels is None:
            return shuffled
        _, classes = np.unique(np.asarray(labels)[shuffled], return_inverse=True)
        position = np.empty(num_examples)
        for members in (np.flatnonzero(classes == c) for c in range(classes.max() + 1)):
            position[members] = (np.arange(len(members)) + 0.5) / len(members)
        return shuffled[np.argsort(position, kind="stable")]
