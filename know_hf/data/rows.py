"""Read rows and columns of any dataset with a length, and repeat the random numbers of its transforms."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch


def labels_of(dataset: Any, column: str) -> list[Any]:
    """Read the class of each row. A `ValueError` names the first row without one."""
    return _scalars(dataset, column, "stratify")


def groups_of(dataset: Any, column: str) -> list[Any]:
    """Read the group of each row. A `ValueError` names the first row without one."""
    return _scalars(dataset, column, "group")


def read_cell(row: Any, column: str, verb: str) -> Any:
    """Read one column of a row. A `ValueError` names the columns of a row without it."""
    if isinstance(row, Mapping) and column in row:
        return row[column]
    columns = list(row) if isinstance(row, Mapping) else f"rows of type {type(row).__name__} without named columns"
    raise ValueError(f"the dataset has no column {column!r} to {verb} by; it has {columns}")


@contextmanager
def random_seeds(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch (CPU), and restore their states afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def restart_collator(collator: Any) -> None:
    """Let a collator that draws from a generator of its own, such as masks with `seed`, begin from its seed again."""
    if getattr(collator, "generator", None) is not None and hasattr(collator, "seed"):
        collator.generator = None


def _scalars(dataset: Any, column: str, verb: str) -> list[Any]:
    values = []
    for row, value in enumerate(_column(dataset, column, verb)):
        value = value.tolist() if isinstance(value, torch.Tensor | np.generic | np.ndarray) else value
        if verb == "stratify" and isinstance(value, list) and len(value) == 1:  # a class as a tensor (1,)
            value = value[0]
        if isinstance(value, list | dict):
            kind = type(value).__name__
            raise ValueError(f"column {column!r} holds a {kind}, {str(value)[:80]}; {verb} by single values")
        if value is None or (verb == "group" and value != value):
            noun = "class" if verb == "stratify" else "group"
            raise ValueError(f"column {column!r} has no {noun} in row {row} (from 0) but {value}; remove such rows")
        values.append(value)
    return values


def _column(dataset: Any, column: str, verb: str) -> list[Any]:
    if isinstance(dataset, datasets.Dataset):
        read_cell(dict.fromkeys(dataset.column_names), column, verb)
        return dataset.with_format(None)[column][:]
    with random_seeds(0):
        return [read_cell(dataset[index], column, verb) for index in range(len(dataset))]
