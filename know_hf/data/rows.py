"""Reading of rows and columns from any dataset with a length."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch


def labels_of(dataset: Any, column: str) -> list[Any]:
    """Read the class of each row. A `ValueError` names the first row without one."""
    labels = _scalars(dataset, column, "stratify")
    if None in labels:
        raise ValueError(
            f"column {column!r} has no class in row {labels.index(None)} (counted from 0); remove rows without one, or"
            " stratify by another column"
        )
    return labels


def groups_of(dataset: Any, column: str) -> list[Any]:
    """Read the group of each row. A `ValueError` names the first row without one."""
    groups = _scalars(dataset, column, "group")
    for row, group in enumerate(groups):
        if group is None or group != group:
            raise ValueError(
                f"column {column!r} has no group in row {row} (counted from 0) but {group}; remove rows without"
                " one, or give each a group of its own"
            )
    return groups


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
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


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


def _column(dataset: Any, column: str, verb: str) -> list[Any]:
    if isinstance(dataset, datasets.Dataset):
        if column not in dataset.column_names:
            raise ValueError(f"the dataset has no column {column!r} to {verb} by; it has {dataset.column_names}")
        return dataset.with_format(None)[column][:]
    with random_seeds(0):
        return [read_cell(dataset[index], column, verb) for index in range(len(dataset))]
