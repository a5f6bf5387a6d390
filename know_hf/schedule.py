"""The subsets of structured forgetting: ever smaller, nested, and the same on every machine.

Every subset is a prefix of one seeded order of the examples. A stratified schedule spreads each class evenly over the
order, so each prefix holds the same share of each class, rounded to examples. A grouped schedule orders the groups and
takes those that fit.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, Literal

import numpy as np

Values = Sequence[Any] | np.ndarray

_MOST_STATES = 1000
_MOST_EPOCHS = 1_000_000


@dataclass(frozen=True)
class ForgettingSchedule:
    """Sizes and members of the nested subsets D0 ⊃ D1 ⊃ … ⊃ D(S-1), with |Dk| = round(r^k · |D0|) (KNOW paper, §3).

    Args:
        ratio (`float`, *optional*, defaults to `0.5`):
            The sampling rate r, the share of the examples that each stage keeps. Published values are 0.5 and 0.33.
        num_states (`int`, *optional*, defaults to `5`):
            Number of states S, including the one trained on all data.
        epochs_per_stage (`float`, *optional*, defaults to `1`):
            Epochs on each of the S - 1 smaller subsets, unless `steps_per_stage` is set.
        stratify_by (`str`, *optional*):
            Column with the class of each example. Every subset keeps the class balance (see [`indices`]).
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order of the examples.
        group_by (`str`, *optional*):
            Column with the group of each example, for example its document or patient. Groups are never divided.
            Sizes come as near to round(r^k · |D0|) as groups in random order allow.
        steps_per_stage (`int`, *optional*):
            Optimizer steps on each of the S - 1 smaller subsets, instead of `epochs_per_stage`. Required for streaming
            datasets, whose epochs have no known length.
        key_column (`str`, *optional*):
            Column of a streaming dataset whose value decides whether an example is in a subset. By default, the
            content of the example decides. See [`~know_hf.data.subsets.divide`].
        tail_states (`int`, *optional*, defaults to `0`):
            Number of tail states: equally spaced snapshots in the second half of the training of state 0. The first
            is taken halfway through; the end of the training is Θ0.
        kind (`"nested"` or `"complementary"`, *optional*, defaults to `"nested"`):
            `"nested"` trains one state after the other on smaller subsets. `"complementary"` trains two branches, each
            on one half of the data for the same number of steps; `num_states` is then 1 and `ratio` 0.5.
        branch_from (`"state-0"` or `"start"`, *optional*, defaults to `"state-0"`):
            Where branches begin. From `"start"`, the weights before the training, they train for as many epochs as
            state 0, and neither sees the other half, as [`CrossFit`] requires. Together they cost as much as the
            training of state 0.

    Raises:
        `ValueError`: if a number is out of range or not an integer, both lengths of a stage are set, or two columns
            cannot be combined.
    """

    ratio: float = 0.5
    num_states: int = 5
    epochs_per_stage: float = 1
    stratify_by: str | None = None
    seed: int = 0
    group_by: str | None = None
    steps_per_stage: int | None = None
    key_column: str | None = None
    tail_states: int = 0
    kind: Literal["nested", "complementary"] = "nested"
    branch_from: Literal["state-0", "start"] = "state-0"

    def __post_init__(self) -> None:
        ratio, epochs = self.ratio, self.epochs_per_stage
        if not (isinstance(ratio, Real) and 0 < ratio < 1):
            raise ValueError(f"ratio must be a number between 0 and 1 (exclusive), got {ratio!r:.60}; try 0.5 or 0.33")
        if not (isinstance(epochs, Real) and 0 < epochs <= _MOST_EPOCHS):
            raise ValueError(
                f"epochs_per_stage must be a number above 0, at most {_MOST_EPOCHS:,}, got {epochs!r:.60}"
            )
        if self.steps_per_stage is not None and self.epochs_per_stage != 1:
            lengths = f"steps_per_stage={self.steps_per_stage} and epochs_per_stage={self.epochs_per_stage}"
            raise ValueError(f"got both {lengths}; remove one of them")
        for name in ("stratify_by", "key_column") if self.group_by is not None else ():
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"group_by={self.group_by!r} excludes {name}={value!r}; remove one of them")
        # trajectory.json stores Python numbers, not those of NumPy
        numbers: dict[str, float] = {"ratio": float(self.ratio)}
        if type(self.epochs_per_stage) is not int:
            numbers["epochs_per_stage"] = float(self.epochs_per_stage)
        if self.steps_per_stage is not None:
            numbers["steps_per_stage"] = _integer("steps_per_stage", self.steps_per_stage, 1)
        numbers["num_states"] = self._checked_num_states()
        numbers["tail_states"] = _integer("tail_states", self.tail_states, 0, _MOST_STATES)
        numbers["seed"] = _integer("seed", self.seed, 0)
        for name, number in numbers.items():
            object.__setattr__(self, name, number)

    def _checked_num_states(self) -> int:
        if self.branch_from not in ("state-0", "start"):
            raise ValueError(f"branch_from must be 'state-0' or 'start', got {self.branch_from!r}")
        if self.kind == "nested":
            if self.branch_from != "state-0":
                raise ValueError(f"branch_from={self.branch_from!r} is for kind='complementary'; remove it")
            return _integer("num_states", self.num_states, 2, _MOST_STATES)
        if self.kind != "complementary":
            raise ValueError(f"kind must be 'nested' or 'complementary', got {self.kind!r}")
        default = type(self)
        for name in ("epochs_per_stage", "steps_per_stage") if self.branch_from == "start" else ():
            if (value := getattr(self, name)) != getattr(default, name):
                raise ValueError(f"branches from the start train as long as state 0; remove {name}={value!r}")
        for name, allowed in (
            ("num_states", (default.num_states, 1)),
            ("ratio", (default.ratio,)),
            ("group_by", (None,)),
            ("key_column", (None,)),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"kind='complementary' divides the data into two halves; remove {name}={value!r}")
        return 1

    @property
    def num_stages(self) -> int:
        """Number of trainings: of the states, or of Θ0 and two branches."""
        return self.num_states if self.kind == "nested" else 3

    @property
    def relative_cost(self) -> float:
        """Cost of one epoch on every subset, including D0, in epochs on D0: Σ r^k; 2 with complementary halves."""
        if self.kind == "complementary":
            return 2.0
        return sum(self.ratio**k for k in range(self.num_states))

    def stage_length(self, epochs: float, max_steps: int) -> tuple[float, int]:
        """Return epochs and optimizer steps of each later stage (-1: given by the epochs), from those of state 0."""
        if self.branch_from == "start":
            return epochs, math.ceil(max_steps / 2) if max_steps > 0 else -1
        return self.epochs_per_stage, self.steps_per_stage or -1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sizes(self, num_examples: int, batch_size: int = 1) -> list[int]:
        """Return the number of examples of every subset, largest first, for steps of `batch_size` examples.

        Raises:
            `ValueError`: if the last subset is smaller than one batch, or the sizes do not shrink.
        """
        sizes = [round(self.ratio**k * num_examples) for k in range(self.num_states)]
        self.check_sizes(sizes, f"{num_examples} examples", batch_size)
        return sizes

    def check_sizes(self, sizes: Sequence[int], source: str, batch_size: int = 1) -> None:
        """Raise a `ValueError` as [`sizes`]; `source` describes the data in the message."""
        problem = None
        if sizes[-1] < max(batch_size, 1):
            problem, direction = f"the last is smaller than one batch of {batch_size}", "above"
        elif any(small >= large for large, small in pairwise(sizes)):
            problem, direction = "they do not shrink at every stage", "below"
        if problem:
            raise ValueError(
                f"the subsets of {source} have sizes {list(sizes)}: {problem}. Use more data, fewer states than"
                f" {self.num_states}, or a ratio {direction} {self.ratio}."
            )

    def indices(
        self, num_examples: int, labels: Values | None = None, batch_size: int = 1, groups: Values | None = None
    ) -> list[np.ndarray]:
        """Return the indices of the examples of every subset.

        Args:
            num_examples (`int`):
                Size of the dataset, |D0|.
            labels (sequence of length `num_examples`, *optional*):
                Class of each example, to stratify by. With n examples in C classes, a class of m examples differs
                from its share of a subset by at most ½·(1 + C·m/n) examples: one for equal classes, more for a large
                class beside many small ones, which are all rounded alike.
            batch_size (`int`, *optional*, defaults to `1`):
                Examples of one optimizer step, see [`sizes`].
            groups (sequence of length `num_examples`, *optional*):
                Hashable group of each example. Groups are never divided.

        Returns:
            `list[np.ndarray]`: `num_states` sorted int64 arrays, each a subset of the one before. The first is
            `arange(num_examples)`.

        Raises:
            `ValueError`: as [`sizes`]; also if both labels and groups are given, if the schedule has a column for
                them but they are missing, or if they do not have one value per example.
        """
        sizes = self.sizes(num_examples, batch_size)
        if labels is not None and groups is not None:
            raise ValueError("got both labels and groups; a subset cannot balance classes and keep groups together")
        for values, column, what in ((labels, self.stratify_by, "labels"), (groups, self.group_by, "groups")):
            if values is None and column is not None:
                raise ValueError(f"the schedule uses the column {column!r}; pass its values as {what}=")
            if values is not None and len(values) != num_examples:
                raise ValueError(f"got {len(values)} {what} for {num_examples} examples; pass one per example")
        if groups is not None:
            return self._grouped(sizes, groups, batch_size)
        order = self._order(num_examples, labels)
        return [np.sort(order[:size]) for size in sizes]

    def halves(self, num_examples: int, labels: Values | None = None, batch_size: int = 1) -> list[np.ndarray]:
        """Return the indices of the two equal halves of complementary branches; an odd example is left over.

        Arguments and errors as [`indices`].
        """
        size = num_examples // 2
        if size < max(batch_size, 1):
            raise ValueError(
                f"half of {num_examples} examples is smaller than one batch of {batch_size}; use more data"
            )
        order = self._order(num_examples, labels)
        return [np.sort(order[:size]), np.sort(order[size : 2 * size])]

    def tail_steps(self, max_steps: int) -> list[int]:
        """Return the optimizer steps of the training of state 0 after which tail states are recorded.

        Raises:
            `ValueError`: if the second half of the training has fewer steps than tail states.
        """
        count = self.tail_states
        if max_steps < 2 * count:
            raise ValueError(
                f"tail_states={count} needs at least {2 * count} optimizer steps in the training of state 0, which has"
                f" {max_steps}; train longer or record fewer"
            )
        return [max_steps - round((count - k) * max_steps / (2 * count)) for k in range(count)]

    def _grouped(self, sizes: list[int], groups: Values, batch_size: int) -> list[np.ndarray]:
        # groups are numbered by first appearance: "7" and 7 give the same subsets
        numbers: dict[Any, int] = {}
        values = groups.tolist() if isinstance(groups, np.ndarray) else groups
        group = np.array([numbers.setdefault(value, len(numbers)) for value in values])
        counts = np.bincount(group)
        remaining = np.argsort(np.random.RandomState(self.seed).random_sample(len(counts)), kind="stable")
        subsets = [np.arange(len(group))]
        for size in sizes[1:]:
            remaining = remaining[_fill(counts[remaining].tolist(), size)]
            subsets.append(np.flatnonzero(np.isin(group, remaining)))
        name = "" if self.group_by is None else f" of {self.group_by!r}"
        source = f"{len(group)} examples in {len(counts)} groups{name}, the largest of {counts.max()},"
        self.check_sizes([len(subset) for subset in subsets], source, batch_size)
        return subsets

    def _order(self, num_examples: int, labels: Values | None) -> np.ndarray:
        # RandomState.random_sample gives the same doubles on every platform and in every NumPy release
        shuffled = np.argsort(np.random.RandomState(self.seed).random_sample(num_examples), kind="stable")
        if labels is None:
            return shuffled
        _, classes = np.unique(np.asarray(labels)[shuffled], return_inverse=True)
        position = np.empty(num_examples)
        for members in (np.flatnonzero(classes == c) for c in range(classes.max() + 1)):
            position[members] = (np.arange(len(members)) + 0.5) / len(members)
        return shuffled[np.argsort(position, kind="stable")]


def size_in_words(num_examples: int | None, fraction: float | None) -> str:
    """Size of a subset: `64 examples`, or `0.25 of the stream`."""
    if num_examples is not None:
        return f"{num_examples} examples"
    return "a stream" if fraction is None else f"{fraction:.3g} of the stream" if fraction < 1 else "the full stream"


def _integer(name: str, value: Any, minimum: int, maximum: int = 2**32 - 1) -> int:
    is_integer = hasattr(value, "__index__") and not isinstance(value, bool)
    if not is_integer or not minimum <= operator.index(value) <= maximum:
        raise ValueError(f"{name} must be an integer from {minimum} to {maximum:,}, got {value!r:.60}")
    return operator.index(value)


def _fill(counts: list[int], size: int) -> list[int]:
    """Positions of counts with a sum close to `size`: all that still fit, in order, and one more if that is closer."""
    total, positions, larger = 0, [], None
    for position, count in enumerate(counts):
        if total + count <= size:
            total += count
            positions.append(position)
            if total == size:
                return positions
        elif larger is None or count < counts[larger]:
            larger = position
    if larger is not None and total + counts[larger] - size < size - total:
        positions.append(larger)
    return sorted(positions)
