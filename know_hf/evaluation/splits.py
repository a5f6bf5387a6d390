"""Data of a comparison: the split of one draw and its checks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..data.row_hashes import content_hash
from .fine_tuning import Examples

_PARTS = ("train", "validation", "test")
_IGNORED = -100  # label that the losses of torch leave out


@dataclass(frozen=True)
class Split:
    """Data of one draw of a task.

    Args:
        train, validation, test (mapping of tensors):
            Examples; trials are chosen on `validation` and reported on `test`.
        num_labels (`int`, *optional*):
            Number of classes of the new head; the head of the model is kept by default.
    """

    train: Examples
    validation: Examples
    test: Examples
    num_labels: int | None = None

    def content(self) -> str:
        """Hash the content; the same on every machine."""
        return content_hash(vars(self)).hex()


def check_split(split: Any, what: str, classifies: bool) -> Split:
    """Return what a callable of the task returned, if it can be used; `what` names the call.

    Raises:
        `ValueError`: If it is not a [`Split`] of tensors of equal length, has no test examples, or as
            [`check_labels`].
    """
    if not isinstance(split, Split):
        raise ValueError(f"{what} returned a {type(split).__name__}; return Split(train=…, validation=…, test=…)")
    for part in _PARTS:
        _check_examples(getattr(split, part), f"{part} of {what}", classifies)
    if not any(len(tensor) for tensor in split.test.values()):
        raise ValueError(f"test of {what} has no examples; return at least one")
    check_labels(split, what, split.num_labels, classifies)
    return split


def check_labels(split: Split, what: str, num_labels: int | None, classifies: bool = True) -> None:
    """Check that labels are classes of the head, if their number is known.

    A task with its own measures (`classifies=False`) may have other labels than classes.

    Raises:
        `ValueError`: If labels are not int64, or exceed the classes of the head.
    """
    for part in _PARTS:
        labels = getattr(split, part).get("labels")
        if labels is None or (labels.dtype != torch.int64 and not classifies):
            continue
        if labels.dtype != torch.int64:
            hint = "use torch.int64 classes, or pass evaluate and measures for another task than classification"
            raise ValueError(f"labels in {part} of {what} are {labels.dtype}; {hint}")
        if num_labels is None or labels.ndim != 1 or (num_labels == 1 and not classifies):  # 1 is a regression
            continue
        beyond = labels[((labels < 0) | (labels >= num_labels)) & (labels != _IGNORED)]
        if len(beyond):
            hint = f"{num_labels} classes, 0 to {num_labels - 1}; count labels from 0, or set num_labels of the Split"
            raise ValueError(f"{part} of {what} has label {int(beyond[0])}, but the head has {hint}")


def _check_examples(examples: Any, what: str, classifies: bool) -> None:
    if not isinstance(examples, Mapping):
        hint = "pass a mapping of tensors, such as dataset.with_format('torch')[:]"
        raise ValueError(f"{what} is a {type(examples).__name__}; {hint}")
    for name, tensor in examples.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"{name!r} in {what} is a {type(tensor).__name__}; pass a tensor with one row per example"
            )
    lengths = {name: len(tensor) if tensor.ndim else 0 for name, tensor in examples.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the tensors in {what} have different lengths, {lengths}; pass the same examples in each")
    if classifies and "label" in examples and "labels" not in examples:
        raise ValueError(f"{what} has 'label', but models expect 'labels'; rename it")
