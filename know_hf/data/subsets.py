"""The nested subsets of any dataset that a `Trainer` accepts, divided by a [`ForgettingSchedule`]."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from torch.utils.data import IterableDataset
from torch.utils.data import Subset as TorchSubset

from ..schedule import ForgettingSchedule, size_in_words
from .row_hashes import NoContentError, content_hash
from .rows import groups_of, labels_of, random_seeds
from .streams import FINGERPRINT_ROWS, divide_stream


@dataclass(frozen=True)
class Subset:
    """The data of one stage."""

    dataset: Any  # for trainer.train_dataset
    num_examples: int | None  # |Dk|, or None for a stream
    fraction: float  # r^k, the share of all data
    fingerprint: str  # identifies this subset of this data, see [`divide`]

    @property
    def size(self) -> str:
        """Size of the subset in words."""
        return size_in_words(self.num_examples, self.fraction)


def divide(dataset: Any, schedule: ForgettingSchedule, batch_size: int = 1) -> list[Subset]:
    """Divide a dataset into the nested subsets of a schedule.

    **Datasets with a length.** [`ForgettingSchedule.indices`] chooses the rows. A `datasets.Dataset` is divided with
    `select`, other datasets with `torch.utils.data.Subset`.

    **Streams.** A hash of the key of a row decides; equal keys are in the same subsets. The key is the `group_by`
    column, the `key_column`, or the content of the row, which also replaces an empty column. Stored images and audio
    files count by their bytes, or by file name if only a path is stored. Images that a `map` or `filter` has decoded
    count by their pixels, which differ between JPEG decoders: set `key_column` if other machines must choose the same
    rows. Of n rows a subset has n·r^k ± √(n·r^k·(1 - r^k)). The stream is read until the last subset has one batch. A
    `datasets.IterableDataset` keeps sharding, workers, `set_epoch` and `state_dict`; other streams are wrapped.

    **Fingerprints** cover the members and 64 rows: evenly spaced ones, or the first of a stream. The stored rows of a
    `datasets.Dataset` count, whatever its transform or format. Rows of other datasets are read twice with the same
    global seeds; if the readings differ, or objects have no canonical content, only the length counts. Streams are
    read twice with different seeds: the content counts if it is equal, else the keys if they are, else neither, so a
    stream shuffled without a seed has another fingerprint in every process.

    `batch_size` is the number of examples of one optimizer step on all processes. The first subset holds the dataset
    itself, which is not changed.

    Raises:
        `ValueError`: if the dataset is missing, empty, or neither sized nor a stream; a column of the schedule is
            missing, does not suit the kind of dataset, or lacks single values; a subset is smaller than one batch; or
            a stream has no `steps_per_stage`, or no key that is equal at every reading.
    """
    if dataset is None:
        raise ValueError("the trainer has no train_dataset; pass one to divide")
    if isinstance(dataset, datasets.IterableDataset | IterableDataset):
        if schedule.kind == "complementary":
            raise ValueError("kind='complementary' divides a dataset with a length, not a stream; use kind='nested'")
        parts = divide_stream(dataset, schedule, batch_size)
        return [Subset(part, None, schedule.ratio**k, fingerprint) for k, (part, fingerprint) in enumerate(parts)]
    if isinstance(dataset, Mapping):
        raise ValueError(f"got a {type(dataset).__name__} of {sorted(map(str, dataset))}; pass one of its splits")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"cannot divide a {type(dataset).__name__}, which is not an IterableDataset and has no length; pass a"
            " dataset with __len__ and __getitem__, or wrap it in a torch.utils.data.IterableDataset"
        )
    return _divide_sized(dataset, schedule, batch_size)


def _divide_sized(dataset: Any, schedule: ForgettingSchedule, batch_size: int) -> list[Subset]:
    if schedule.key_column is not None:
        kind = type(dataset).__name__
        raise ValueError(f"key_column={schedule.key_column!r} is for streams, but this {kind} has a length; remove it")
    labels = None if schedule.stratify_by is None else np.asarray(labels_of(dataset, schedule.stratify_by))
    groups = None if schedule.group_by is None else groups_of(dataset, schedule.group_by)
    members = schedule.indices(len(dataset), labels, batch_size, groups)
    is_halved = schedule.kind == "complementary"
    if is_halved:
        members += schedule.halves(len(dataset), labels, batch_size)
    content = str(len(dataset)).encode() + _content(dataset)
    subsets = []
    for state, indices in enumerate(members):
        part = dataset
        if state:
            is_hub = isinstance(dataset, datasets.Dataset)
            part = dataset.select(indices) if is_hub else TorchSubset(dataset, indices.tolist())
        fraction = schedule.ratio ** (min(state, 1) if is_halved else state)
        # fixed order and bytes: recorded trajectories could not resume with others
        digest = hashlib.sha256(indices.astype("<i8").tobytes() + content)
        subsets.append(Subset(part, len(indices), fraction, digest.hexdigest()[:16]))
    return subsets


def _content(dataset: Any) -> bytes:
    positions = np.unique(np.linspace(0, len(dataset) - 1, FINGERPRINT_ROWS).astype(int))
    if isinstance(dataset, datasets.Dataset):
        # its own fingerprint is random if a transform cannot be pickled
        rows = dataset.select(positions).with_format("arrow")[:].to_pylist()
        return b"".join(repr(sorted(row.items())).encode() for row in rows)
    readings = []
    for _ in range(2):
        with random_seeds(0):
            try:
                readings.append([content_hash(dataset[position]) for position in positions.tolist()])
            except NoContentError:
                return b""
    return b"".join(readings[0]) if readings[0] == readings[1] else b""
