"""Which examples each stage of structured forgetting trains on: ever smaller nested subsets of one dataset.

Every subset is a prefix of one seeded ordering of the examples, so that each lies inside the one before whatever the
sizes are. For a stratified schedule the ordering spreads every class evenly, so that each prefix holds the same share
of every class, rounded to whole examples. A grouped schedule orders the groups, and takes those that fit.
"""

import operator
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
            Epochs trained on each of the S - 1 smaller subsets, unless `steps_per_stage` is given.
        stratify_by (`str`, *optional*):
            Column of the dataset with the class of each example; its balance is then kept in every subset, as far as
            whole examples allow (see [`indices`]).
        seed (`int`, *optional*, defaults to `0`):
            Chooses the examples. The same seed chooses the same examples on every machine.
        group_by (`str`, *optional*):
            Column of the dataset that says what an example belongs to (a document, a patient). All examples of a
            group are in a subset or none is; sizes are then as near to round(r^k · |D0|) as whole groups, taken in
            random order, come.
        steps_per_stage (`int`, *optional*):
            Optimizer steps on each of the S - 1 smaller subsets, instead of `epochs_per_stage`. Streaming datasets
            need it: they have no length to count epochs with.
        key_column (`str`, *optional*):
            For streaming datasets: the column that identifies an example. What it holds decides whether the example is
            in a subset; without it the content of the whole example does. See [`~know_hf.data.subsets.divide`].

    Raises:
        `ValueError`: for a ratio outside (0, 1), fewer than two states, a stage of no length, a length in both epochs
            and steps, numbers that should be whole and aren't, or columns that can't go together.
    """

    ratio: float = 0.5
    num_states: int = 5
    epochs_per_stage: float = 1
    stratify_by: str | None = None
    seed: int = 0
    group_by: str | None = None
    steps_per_stage: int | None = None
    key_column: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(
                f"ratio must lie strictly between 0 and 1, got {self.ratio}; published values are 0.5, 0.33"
            )
        if (num_states := _whole(self.num_states)) is None or num_states < 2:
            raise ValueError(f"num_states must be a whole number of at least 2, got {self.num_states}")
        if not self.epochs_per_stage > 0:
            raise ValueError(f"epochs_per_stage must be positive, got {self.epochs_per_stage}")
        if (seed := _whole(self.seed)) is None or not 0 <= seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32) and be a whole number, got {self.seed}")
        steps_per_stage = None
        if self.steps_per_stage is not None:
            if (steps_per_stage := _whole(self.steps_per_stage)) is None or steps_per_stage < 1:
                raise ValueError(f"steps_per_stage must be a whole number of at least 1, got {self.steps_per_stage!r}")
            if self.epochs_per_stage != 1:
                raise ValueError(
                    f"a stage has one length, got steps_per_stage={self.steps_per_stage} and"
                    f" epochs_per_stage={self.epochs_per_stage}; leave one of them out"
                )
        if self.group_by is not None and self.stratify_by is not None:
            raise ValueError(
                f"got group_by={self.group_by!r} and stratify_by={self.stratify_by!r}, but whole groups can't be dealt"
                " out by class; leave one of them out"
            )
        if self.group_by is not None and self.key_column is not None:
            raise ValueError(
                f"got group_by={self.group_by!r} and key_column={self.key_column!r}, but the group is the key of its"
                " examples; leave key_column out"
            )
        # NumPy's numbers become Python's: trajectory.json takes no others.
        epochs = self.epochs_per_stage if type(self.epochs_per_stage) is int else float(self.epochs_per_stage)
        numbers = {"ratio": float(self.ratio), "num_states": num_states, "epochs_per_stage": epochs, "seed": seed}
        for name, number in (numbers | {"steps_per_stage": steps_per_stage}).items():
            object.__setattr__(self, name, number)

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
        self.check_sizes(sizes, f"{num_examples} examples", batch_size)
        return sizes

    def check_sizes(self, sizes: Sequence[int], source: str, batch_size: int = 1) -> None:
        """Refuses sizes that can't be trained on; `source` says in the message what was divided.

        Raises:
            `ValueError`: as [`sizes`].
        """
        sizes = list(sizes)
        if sizes[-1] < max(batch_size, 1):
            raise ValueError(
                f"the subsets of {source} have sizes {sizes}; the last is smaller than one batch of {batch_size}. Use"
                f" more data, a smaller batch, fewer states than {self.num_states}, or a ratio above {self.ratio}."
            )
        if any(small >= large for large, small in pairwise(sizes)):
            raise ValueError(
                f"the subsets of {source} have sizes {sizes}, which do not shrink at every stage. Use more data, fewer"
                f" states than {self.num_states}, or a ratio below {self.ratio}."
            )

    def indices(
        self,
        num_examples: int,
        labels: Sequence[Any] | np.ndarray | None = None,
        batch_size: int = 1,
        groups: Sequence[Any] | np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """Indices of every subset.

        Args:
            num_examples (`int`): |D0|, the number of examples of the whole dataset.
            labels (sequence of length `num_examples`, *optional*): The class of each example. With it every subset
                holds the same share of each class, rounded. Of n examples in C classes, a class of m is then off its
                share of the subset by at most ½·(1 + C·m/n) examples: by one where classes are of equal size, by more
                for a large class beside very many small ones, which are all rounded the same way.
            batch_size (`int`, *optional*, defaults to `1`): Examples of one optimizer step, see [`sizes`].
            groups (sequence of length `num_examples`, *optional*): The group of each example, hashable. With it every
                subset is made of whole groups.

        Returns:
            `list[np.ndarray]`: `num_states` sorted int64 arrays, each a subset of the one before; the first is
            `arange(num_examples)`.

        Raises:
            `ValueError`: as [`sizes`], for the sizes that whole groups give too; when the schedule is stratified but
                no labels, or grouped but no groups, or too few of them, are given; and for labels with groups.
        """
        sizes = self.sizes(num_examples, batch_size)
        if labels is None and self.stratify_by is not None:
            raise ValueError(f"the schedule is stratified by {self.stratify_by!r}, but no labels were given")
        if labels is not None and len(labels) != num_examples:
            raise ValueError(
                f"got {len(labels)} labels for {num_examples} examples; there must be one label an example"
            )
        if groups is None and self.group_by is not None:
            raise ValueError(f"the schedule is grouped by {self.group_by!r}, but no groups were given")
        if groups is not None:
            if labels is not None:
                raise ValueError("got both labels and groups; whole groups can't be dealt out by class")
            if len(groups) != num_examples:
                raise ValueError(
                    f"got {len(groups)} groups for {num_examples} examples; there must be one group an example"
                )
            return self._grouped(sizes, groups, batch_size)
        order = self._order(num_examples, labels)
        return [np.sort(order[:size]) for size in sizes]

    def _grouped(self, sizes: list[int], groups: Sequence[Any] | np.ndarray, batch_size: int) -> list[np.ndarray]:
        # Numbered as they come, not by value: "7" and 7 name the same groups.
        numbers: dict[Any, int] = {}
        values = groups.tolist() if isinstance(groups, np.ndarray) else groups
        group = np.array([numbers.setdefault(value, len(numbers)) for value in values])
        counts = np.bincount(group)
        chosen = np.argsort(np.random.RandomState(self.seed).random_sample(len(counts)), kind="stable")
        subsets = [np.arange(len(group))]
        for size in sizes[1:]:
            chosen = chosen[_nearest(counts[chosen].tolist(), size)]
            subsets.append(np.flatnonzero(np.isin(group, chosen)))
        name = "" if self.group_by is None else f" of {self.group_by!r}"
        source = f"{len(group)} examples in {len(counts)} whole groups{name}, the largest of {counts.max()},"
        self.check_sizes([len(subset) for subset in subsets], source, batch_size)
        return subsets

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


def _whole(value: Any) -> int | None:
    """A whole number of any library as Python's; `None` for what is none, booleans too."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _nearest(counts: list[int], size: int) -> list[int]:
    """Positions of the counts that, taken in order wherever they still fit, sum up nearest to `size`."""
    total, taken, larger = 0, [], None
    for position, count in enumerate(counts):
        if total + count <= size:
            total += count
            taken.append(position)
            if total == size:
                return taken
        elif larger is None or count < counts[larger]:
            larger = position
    if larger is not None and total + counts[larger] - size < size - total:
        taken.append(larger)
    return sorted(taken)


def size_in_words(num_examples: int | None, fraction: float | None) -> str:
    """`64 examples`, or for streams `0.25 of the stream`."""
    if num_examples is not None:
        return f"{num_examples} examples"
    return "a stream" if fraction is None else f"{fraction:.3g} of the stream" if fraction < 1 else "the whole stream"
