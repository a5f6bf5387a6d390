"""Subsets of streaming datasets, whose rows a seeded hash chooses.

The hash turns the key of a row into a number in [0, 1); the row is in Dk if this number is below r^k. The subsets are
nested and the same on every machine, whatever the order, the sharding or the number of workers.
"""

import hashlib
import math
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
from torch.utils.data import IterableDataset

from ..schedule import ForgettingSchedule
from .row_hashes import NoContentError, content_hash
from .rows import random_seeds, read_cell

FINGERPRINT_ROWS = 64
_PATIENCE = 1_000_000  # rows to read, at least, before the last subset counts as empty


def divide_stream(dataset: Any, schedule: ForgettingSchedule, batch_size: int) -> list[tuple[Any, str]]:
    """Divide a stream into datasets and fingerprints; see [`~know_hf.data.subsets.divide`]."""
    kind = type(dataset).__name__
    if schedule.stratify_by is not None:
        raise ValueError(
            f"the {kind} is a stream and cannot be stratified by {schedule.stratify_by!r}; remove stratify_by or use a"
            " dataset with a length"
        )
    if schedule.steps_per_stage is None:
        raise ValueError(f"the {kind} is a stream of unknown length; set steps_per_stage of the schedule")
    column, verb = (schedule.key_column, "choose") if schedule.group_by is None else (schedule.group_by, "group")
    source, restore = _stored(dataset) if isinstance(dataset, datasets.IterableDataset) else (dataset, None)
    members = [_Membership(schedule.seed, schedule.ratio**k, column, verb) for k in range(schedule.num_states)]
    content = _check_and_read(source, schedule, members, batch_size)
    parts = []
    for state, member in enumerate(members):
        settings = f"stream seed={schedule.seed} fraction={member.fraction!r} key={column!r} "
        part = dataset
        if state:
            part = restore(source.filter(member)) if restore else _FilteredStream(dataset, member)
        parts.append((part, hashlib.sha256(settings.encode() + content).hexdigest()[:16]))
    return parts


@dataclass(frozen=True)
class _Membership:
    """Whether a row of a stream is in the subset of a fraction; picklable, for workers."""

    seed: int
    fraction: float
    column: str | None
    verb: str

    def __call__(self, row: Any) -> bool:
        return self.position(row) < self.fraction

    def position(self, row: Any) -> float:
        """Hash of the key of the row, in [0, 1)."""
        key = row if self.column is None else read_cell(row, self.column, self.verb)
        if key is None or (isinstance(key, float) and math.isnan(key)):
            key = row  # otherwise all rows without a key would share one position
        digest = hashlib.blake2b(content_hash(key), digest_size=8, key=self.seed.to_bytes(4, "little")).digest()
        return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


class _FilteredStream(IterableDataset[Any]):
    """The members among the rows of a stream; other attributes, such as `set_epoch`, are those of the stream."""

    def __init__(self, dataset: Any, member: _Membership) -> None:
        self.dataset = dataset
        self.member = member

    def __iter__(self) -> Iterator[Any]:
        return filter(self.member, self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):  # missing during unpickling
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _stored(dataset: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The stored rows of a stream, and a function that restores format and decoding for a part of them."""
    plain = dataset.with_format(None)
    features = plain.features
    stored = plain.decode(False) if features else plain
    encoded = stored.features != features and all(_is_plain(row) for row in islice(_undivided(stored), 1))
    formatting = getattr(dataset, "_formatting", None)  # an IterableDataset has no public format

    def restore(part: Any) -> Any:
        if encoded:
            # decode() and cast() do not decode rows that went through a filter
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


def _check_and_read(source: Any, schedule: ForgettingSchedule, members: list[_Membership], batch_size: int) -> bytes:
    """Check that a stream can be divided, and return its content for the fingerprints."""
    last, kind = members[-1], type(source).__name__
    limit = max(_PATIENCE, int(100 * batch_size / last.fraction))
    sizes = [0] * len(members)
    head: list[tuple[float, bytes]] = []
    with _rows(source, seed=0) as rows:
        for row in rows:
            position = last.position(row)
            sizes = [size + (position < member.fraction) for size, member in zip(sizes, members, strict=True)]
            if len(head) < FINGERPRINT_ROWS:
                head.append((position, _content_or_nothing(row)))
            elif sizes[-1] >= batch_size and all(small < large for large, small in pairwise(sizes)):
                break
            elif sizes[0] >= limit:
                raise ValueError(
                    f"the subsets have {sizes} of the first {limit} rows of the {kind}; they must shrink, and the last"
                    f" needs one batch of {batch_size}. Use a column with more different values than {last.column!r}."
                )
        else:
            if not head:
                raise ValueError(f"the {kind} is empty; use a stream with rows that can be read repeatedly")
            schedule.check_sizes(sizes, f"the {kind}, which ends after {sizes[0]} rows,", batch_size)
    return _fingerprint_content(source, head, last)


def _fingerprint_content(source: Any, head: list[tuple[float, bytes]], last: _Membership) -> bytes:
    """Content of the first rows if a second reading with other seeds equals it, else their keys if these are equal."""
    with _rows(source, seed=1) as rows:
        again = [(last.position(row), _content_or_nothing(row)) for row in islice(rows, len(head))]
    if again == head:
        return b"".join(content or struct.pack("<d", position) for position, content in head)
    if last.column is None:
        raise ValueError(
            f"the first {len(head)} rows of the {type(source).__name__} differ in a second reading: transform or order"
            " are random, or they can be read only once. Set key_column to a column that identifies a row."
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
    with random_seeds(seed):
        rows = iter(_undivided(source))
        try:
            yield rows
        finally:
            if hasattr(rows, "close"):
                rows.close()


def _undivided(source: Any) -> Any:
    """A copy of the stream at epoch 0 and for all processes, so that every process reads the same rows."""
    if isinstance(source, datasets.IterableDataset):
        source = source.with_format(None)
        source._distributed = None  # noqa: SLF001 - datasets cannot undo split_dataset_by_node otherwise
    return source
