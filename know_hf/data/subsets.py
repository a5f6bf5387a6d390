"""The data of each stage: any dataset a `Trainer` takes, divided by a [`ForgettingSchedule`].

Datasets with a length are divided by position. Streams have none, so that there a seeded hash decides: it turns the
key of an example into a number in [0, 1), and the example is in Dk when this number is below r^k. The subsets are
nested, and the same on every machine, whatever the order, the sharding or the number of workers.
"""

import hashlib
import math
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from functools import partial
from itertools import islice, pairwise
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import IterableDataset
from torch.utils.data import Subset as TorchSubset

from ..schedule import ForgettingSchedule, size_in_words
from .row_hashes import NoContentError, content_hash

_FINGERPRINT_ROWS = 64
_PATIENCE = 1_000_000  # rows read at least before the last subset of a stream is called empty


@dataclass(frozen=True)
class Subset:
    """The data of one stage.

    Attributes:
        dataset (*any*): What goes into `trainer.train_dataset`.
        num_examples (`int`, *optional*): |Dk|; `None` for a stream.
        fraction (`float`): r^k, the share of all data that the schedule asks for.
        fingerprint (`str`): Tells this subset of this data from others, see [`divide`].
    """

    dataset: Any
    num_examples: int | None
    fraction: float
    fingerprint: str

    @property
    def size(self) -> str:
        """Its size in words."""
        return size_in_words(self.num_examples, self.fraction)


def divide(dataset: Any, schedule: ForgettingSchedule, batch_size: int = 1) -> list[Subset]:
    """Divides a dataset into the nested subsets of a schedule.

    **With a length**: a `datasets.Dataset` is divided with `select`, any other dataset with `__len__` and
    `__getitem__` with `torch.utils.data.Subset`; which rows are chosen is up to [`ForgettingSchedule.indices`].

    **Streams**: a `datasets.IterableDataset` is divided with its own `filter`, so that sharding, workers, `set_epoch`
    and `state_dict` go on working; any other `IterableDataset` is wrapped. The key of a row, whose hash decides, is
    its `group_by` column, its `key_column`, or else its whole content, also of a row whose column is empty; equal rows
    are in the same subsets. Images and audio files count as they are stored: by their bytes, or by the name of the
    file where only its path is stored.
    Where a `map` or `filter` of the stream has decoded them, images count by their pixels; as decoders of JPEG differ
    in the last bit, give `key_column` there when the subsets must be the same on another machine. Sizes are those of
    the schedule on average: n·r^k ± √(n·r^k·(1 - r^k)) for n rows. The stream is read up to the first batch of the
    last subset, to see that there is one.

    **Fingerprints** are made of the members and of 64 rows: spread evenly where there is a length, else the first in
    the order of epoch 0. The stored rows of a `datasets.Dataset` count, whatever its transform or format. Rows of
    other datasets with a length are read twice with the same global random seeds, so that random augmentation does no
    harm; when the two readings differ all the same, or hold objects that have no canonical content, only the length
    counts, and other data of the same length goes unnoticed. Streams are read twice with different seeds: the content
    counts where it is equal, else the keys where these are equal, else neither. A stream shuffled without a seed
    therefore has another fingerprint in every process.

    Args:
        dataset (*any*): The `train_dataset`; never changed. A stream is iterated from its start.
        schedule ([`ForgettingSchedule`]): The subsets.
        batch_size (`int`, *optional*, defaults to `1`): Examples of one optimizer step, on all processes.

    Returns:
        `list[Subset]`: `schedule.num_states` subsets; the first holds `dataset` itself.

    Raises:
        `ValueError`: when the dataset is missing, empty, or neither sized nor a stream; when a column of the schedule
            is not in it, does not fit its kind, holds no single values, or lacks the class of a row; when a subset is
            smaller than one batch; when a stream has no `steps_per_stage`, or no key that is the same at every
            reading.
    """
    if dataset is None:
        raise ValueError("there is no train_dataset; structured forgetting needs one to divide")
    if isinstance(dataset, datasets.IterableDataset | IterableDataset):
        return _divide_stream(dataset, schedule, batch_size)
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"got a {type(dataset).__name__} of {sorted(map(str, dataset))}; give one of them, such as its train split"
        )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"a {type(dataset).__name__} has no length with an index and is no IterableDataset, so it can't be"
            " divided; give a dataset with __len__ and __getitem__, or wrap it in a torch.utils.data.IterableDataset"
        )
    return _divide_sized(dataset, schedule, batch_size)


# Datasets with a length


def _divide_sized(dataset: Any, schedule: ForgettingSchedule, batch_size: int) -> list[Subset]:
    if schedule.key_column is not None:
        raise ValueError(
            f"key_column={schedule.key_column!r} is for streams, but this {type(dataset).__name__} has a length and is"
            " divided by position; leave key_column out"
        )
    labels = groups = None
    if schedule.stratify_by is not None:
        labels = np.asarray(_labels(dataset, schedule.stratify_by))
    if schedule.group_by is not None:
        groups = _groups(dataset, schedule.group_by)
    members = schedule.indices(len(dataset), labels, batch_size, groups)
    content = _sized_content(dataset)
    subsets = []
    for state, indices in enumerate(members):
        # This order and these bytes are those of the first trajectories; another form would not let them resume.
        digest = hashlib.sha256(indices.astype("<i8").tobytes())
        digest.update(str(len(dataset)).encode() + content)
        part = dataset
        if state:
            is_hub = isinstance(dataset, datasets.Dataset)
            part = dataset.select(indices) if is_hub else TorchSubset(dataset, indices.tolist())
        subsets.append(Subset(part, len(indices), schedule.ratio**state, digest.hexdigest()[:16]))
    return subsets


def _column(dataset: Any, column: str, verb: str) -> list[Any]:
    if isinstance(dataset, datasets.Dataset):
        if column not in dataset.column_names:
            raise ValueError(f"the dataset has no column {column!r} to {verb} by; it has {dataset.column_names}")
        return dataset.with_format(None)[column][:]
    with _random_seeds(0):
        return [_cell(dataset[index], column, verb) for index in range(len(dataset))]


def _cell(row: Any, column: str, verb: str) -> Any:
    if isinstance(row, Mapping) and column in row:
        return row[column]
    columns = list(row) if isinstance(row, Mapping) else f"rows of type {type(row).__name__}, without named columns"
    raise ValueError(f"the dataset has no column {column!r} to {verb} by; it has {columns}")


def _labels(dataset: Any, column: str) -> list[Any]:
    labels = _scalars(dataset, column, "stratify")
    if None in labels:
        raise ValueError(
            f"column {column!r} holds no class in row {labels.index(None)}, counted from 0; leave out the rows without"
            " one, or stratify by another column"
        )
    return labels


def _groups(dataset: Any, column: str) -> list[Any]:
    groups = _scalars(dataset, column, "group")
    for row, group in enumerate(groups):
        if group is None or group != group:
            raise ValueError(
                f"column {column!r} holds no group in row {row}, counted from 0: {group}; give such rows a group, one"
                " each where they belong to nothing, or leave them out"
            )
    return groups


def _scalars(dataset: Any, column: str, verb: str) -> list[Any]:
    values = []
    for value in _column(dataset, column, verb):
        value = value.tolist() if isinstance(value, torch.Tensor | np.generic | np.ndarray) else value
        if verb == "stratify" and isinstance(value, list) and len(value) == 1:  # a class as a tensor (1,)
            value = value[0]
        if isinstance(value, list | dict):
            raise ValueError(
                f"column {column!r} holds a {type(value).__name__}, {str(value)[:80]}; {verb} by single values"
            )
        values.append(value)
    return values


def _sized_content(dataset: Any) -> bytes:
    positions = np.unique(np.linspace(0, len(dataset) - 1, _FINGERPRINT_ROWS).astype(int))
    if isinstance(dataset, datasets.Dataset):
        # Stored rows, not transformed ones: the same whatever a random transform does, and the dataset's own
        # fingerprint is random when a transform can't be pickled.
        rows = dataset.select(positions).with_format("arrow")[:].to_pylist()
        return b"".join(repr(sorted(row.items())).encode() for row in rows)
    readings = []
    for _ in range(2):
        with _random_seeds(0):
            try:
                readings.append([content_hash(dataset[position]) for position in positions.tolist()])
            except NoContentError:
                return b""
    return b"".join(readings[0]) if readings[0] == readings[1] else b""


# Streams


@dataclass(frozen=True)
class _Membership:
    """Whether a row of a stream is in the subset of a fraction. A plain object, as workers get a pickled copy."""

    seed: int
    fraction: float
    column: str | None
    verb: str

    def __call__(self, row: Any) -> bool:
        return self.position(row) < self.fraction

    def position(self, row: Any) -> float:
        """The hash of the row's key, in [0, 1)."""
        key = row if self.column is None else _cell(row, self.column, self.verb)
        if key is None or (isinstance(key, float) and math.isnan(key)):
            key = row  # or all rows without one would share a fate
        digest = hashlib.blake2b(content_hash(key), digest_size=8, key=self.seed.to_bytes(4, "little")).digest()
        return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


class _FilteredStream(IterableDataset[Any]):
    """The rows of a stream that are members. All else, such as `set_epoch` and `state_dict`, is the stream's own."""

    def __init__(self, dataset: Any, member: _Membership) -> None:
        self.dataset = dataset
        self.member = member

    def __iter__(self) -> Iterator[Any]:
        return filter(self.member, self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _divide_stream(dataset: Any, schedule: ForgettingSchedule, batch_size: int) -> list[Subset]:
    kind = type(dataset).__name__
    if schedule.stratify_by is not None:
        raise ValueError(
            f"the {kind} is a stream and can't be stratified by {schedule.stratify_by!r}: the hash that chooses its"
            " examples keeps the balance on average only; leave stratify_by out or give a dataset with a length"
        )
    if schedule.steps_per_stage is None:
        raise ValueError(
            f"the {kind} is a stream, whose epochs have no known length; give the schedule steps_per_stage, the"
            " optimizer steps of each stage"
        )
    column, verb = schedule.key_column, "choose"
    if schedule.group_by is not None:
        column, verb = schedule.group_by, "group"
    is_hub = isinstance(dataset, datasets.IterableDataset)
    source, restore = _stored(dataset) if is_hub else (dataset, None)
    members = [_Membership(schedule.seed, schedule.ratio**k, column, verb) for k in range(schedule.num_states)]
    content = _stream_content(source, schedule, members, batch_size)
    subsets = []
    for state, member in enumerate(members):
        settings = f"stream seed={schedule.seed} fraction={member.fraction!r} key={column!r} "
        fingerprint = hashlib.sha256(settings.encode() + content).hexdigest()[:16]
        part = dataset
        if state:
            part = restore(source.filter(member)) if restore else _FilteredStream(dataset, member)
        subsets.append(Subset(part, None, member.fraction, fingerprint))
    return subsets


def _stored(dataset: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The rows of a stream as stored, and what gives a part of them the format and the decoding of the stream back."""
    plain = dataset.with_format(None)
    features = plain.features
    stored = plain.decode(False) if features else plain
    encoded = stored.features != features and all(_is_plain(row) for row in islice(_undivided(stored), 1))
    formatting = getattr(dataset, "_formatting", None)  # an IterableDataset does not tell its format otherwise

    def restore(part: Any) -> Any:
        if encoded:
            # not decode() or cast(): they leave rows undecoded that went through a filter
            tokens = getattr(dataset, "_token_per_repo_id", None)
            part = part.map(partial(features.decode_example, token_per_repo_id=tokens), features=features)
        return part.with_format(formatting.format_type) if formatting else part

    return stored if encoded else plain, restore


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | bytes | date | time | timedelta | Decimal)


def _undivided(source: Any) -> Any:
    """A fresh copy at epoch 0 for all processes, so that each of them reads the same rows."""
    if isinstance(source, datasets.IterableDataset):
        source = source.with_format(None)
        source._distributed = None
    return source


def _stream_content(source: Any, schedule: ForgettingSchedule, members: list[_Membership], batch_size: int) -> bytes:
    """Checks that a stream can be divided; returns what of it goes into the fingerprints."""
    last = members[-1]
    limit = max(_PATIENCE, int(100 * batch_size / last.fraction))
    sizes = [0] * len(members)
    head: list[tuple[float, bytes]] = []
    with _rows(source, seed=0) as rows:
        for row in rows:
            position = last.position(row)
            sizes = [size + (position < member.fraction) for size, member in zip(sizes, members, strict=True)]
            if len(head) < _FINGERPRINT_ROWS:
                head.append((position, _content_or_nothing(row)))
            elif sizes[-1] >= batch_size and all(small < large for large, small in pairwise(sizes)):
                break
            elif sizes[0] >= limit:
                raise ValueError(
                    f"of the first {limit} rows of the {type(source).__name__} the subsets hold {sizes}; each should"
                    f" hold fewer than the one before, and the last one batch of {batch_size}. Do too many rows share"
                    f" one value of {last.column!r}? Use a column with more values."
                )
        else:
            if not head:
                raise ValueError(
                    f"the {type(source).__name__} is empty; a stream that can be read only once ends here"
                )
            schedule.check_sizes(sizes, f"the {type(source).__name__}, which ends after {sizes[0]} rows,", batch_size)
    with _rows(source, seed=1) as rows:
        again = [(last.position(row), _content_or_nothing(row)) for row in islice(rows, len(head))]
    if again == head:
        return b"".join(content or struct.pack("<d", position) for position, content in head)
    if last.column is None:
        raise ValueError(
            f"the first {len(head)} rows of the {type(source).__name__} are others when read again, so that their"
            " content can't say which subset they are in: its transform or its order is random, or it can be read only"
            " once. Give the schedule key_column, a column that identifies a row whatever is done to the others."
        )
    keys = [position for position, _ in head]
    return struct.pack(f"<{len(keys)}d", *keys) if keys == [position for position, _ in again] else b""


def _content_or_nothing(row: Any) -> bytes:
    try:
        return content_hash(row)
    except NoContentError:
        return b""


@contextmanager
def _rows(source: Any, seed: int) -> Iterator[Iterator[Any]]:
    with _random_seeds(seed):
        rows = iter(_undivided(source))
        try:
            yield rows
        finally:
            if hasattr(rows, "close"):
                rows.close()


@contextmanager
def _random_seeds(seed: int) -> Iterator[None]:
    """Seeds the global random states of Python, NumPy and torch's CPU, and puts them back as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
