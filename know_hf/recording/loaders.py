"""The data loaders of a `Trainer`: their size, and whether they follow its `train_dataset`."""

from collections.abc import Iterator
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from transformers import Trainer

from ..data.subsets import Subset
from ..distributed import on_every_process


def num_examples(loader: Any) -> int | None:
    """Return the size of the data of a loader; `None` for a stream."""
    try:
        return len(loader.dataset)
    except TypeError:  # a stream, or accelerate's shard of one, whose __len__ fails
        return None


def check_loader(trainer: Trainer, subsets: list[Subset]) -> None:
    """Raise a `ValueError` if the trainer's loader or sampler reads other data than its `train_dataset`.

    Tries the two smallest subsets, which every process must do. Reads no rows.
    """
    given, loaders = trainer.train_dataset, []
    try:
        for subset in subsets[-2:]:
            trainer.train_dataset = subset.dataset
            loaders.append(trainer.get_train_dataloader())
    finally:
        trainer.train_dataset = given
    on_every_process(trainer.accelerator, lambda: _check(loaders, subsets[-2:]))


def _check(loaders: list[Any], subsets: list[Subset]) -> None:
    larger, size = map(num_examples, loaders)
    same_data = _dataset(loaders[0]) is _dataset(loaders[1])
    if same_data or (size is not None and larger is not None and size >= larger):
        raise ValueError(
            f"the trainer's loader has {'the same data' if size is None else f'{size} examples'} for a subset of"
            f" {subsets[1].size} as for one of {subsets[0].size}: it does not follow trainer.train_dataset; read"
            " self.train_dataset in get_train_dataloader"
        )
    if size is None:
        return
    # an endless sampler is read in part
    outside = [index for index in islice(_indices(loaders[1]), 2 * size + 1000) if not -size <= index < size]
    if outside:
        raise ValueError(
            f"the trainer's sampler draws index {outside[0]} of {size} examples, a subset of {subsets[1].size}: it"
            " does not follow trainer.train_dataset; build it from self.train_dataset, or from the dataset that"
            " _get_train_sampler gets"
        )


def _dataset(loader: Any) -> Any:
    dataset = loader.dataset
    return dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset


def _indices(loader: Any) -> Iterator[int]:
    """The indices that a loader would read in an epoch, if its sampler gives numbers."""
    for batch in loader.sampler if loader.batch_sampler is None else loader.batch_sampler:
        for index in batch if isinstance(batch, list | tuple) else [batch]:
            if isinstance(index, Integral | torch.Tensor):
                yield int(index)
