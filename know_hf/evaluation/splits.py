"""The data that arms are compared on: what a draw gives, what tells it from other data, and whether it can be used."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..data.row_hashes import content_hash
from .fine_tuning import Examples

_IGNORED = -100  # the label that the losses of torch leave out


@dataclass(frozen=True)
class Split:
    """The data of one task, of one draw.

    Attributes:
        train, validation, test (mapping of tensors): Examples. Choices are made on `validation`, `test` is reported.
        num_labels (`int`, *optional*): Classes of the new head; by default the model's head is kept.
    """

    train: Examples
    validation: Examples
    test: Examples
    num_labels: int | None = None

    def content(self) -> str:
        """Hash of all that it holds, the same on every machine."""
        return content_hash(vars(self)).hex()


def check_split(split: Any, what: str, classifies: bool) -> Split:
    """Gives the split back, if it can be used.

    Args:
        split (`Any`): What a callable of the task gave.
        what (`str`): Where it comes from, for errors.
        classifies (`bool`): Whether accuracy and loss of a classifier are measured on it.

    Raises:
        `ValueError`: when it is no [`Split`], does not hold tensors of the same length, has no test examples, or as
            [`check_labels`].
    """
    if not isinstance(split, Split):
        raise ValueError(f"{what} gave a {_kind(split)}; give a Split(train=…, validation=…, test=…)")
    for part in ("train", "validation", "test"):
        examples = getattr(split, part)
        if not isinstance(examples, Mapping):
            raise ValueError(
                f"{part} of {what} is a {_kind(examples)}, not a mapping of tensors; of a datasets.Dataset give"
                " dataset.with_format('torch')[:]"
            )
        for name, tensor in examples.items():
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(
                    f"{part} of {what} has a {_kind(tensor)} as {name!r}; give one tensor, whose first axis counts the"
                    " examples"
                )
        lengths = {name: len(tensor) if tensor.ndim else 0 for name, tensor in examples.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"the tensors in {part} of {what} have different lengths, {lengths}; give the same examples"
            )
        if part == "test" and not any(lengths.values()):
            raise ValueError(f"test of {what} holds no examples; nothing can be measured on it")
        if classifies and "label" in examples and "labels" not in examples:
            raise ValueError(f"{part} of {what} has 'label', which models take as 'labels'; rename it")
    check_labels(split, what, split.num_labels, classifies)
    return split


def check_labels(split: Split, what: str, num_labels: int | None, classifies: bool = True) -> None:
    """Tells which labels are none of a classifier's, before torch does without saying where.

    Args:
        split ([`Split`]): The data.
        what (`str`): Where it comes from, for errors.
        num_labels (`int`, *optional*): Classes, if they are known.
        classifies (`bool`, *optional*, defaults to `True`): Whether labels must be classes: a task with measures of
            its own may have others.

    Raises:
        `ValueError`: when labels are no integers of torch's default, or beyond the classes.
    """
    for part in ("train", "validation", "test"):
        labels = getattr(split, part).get("labels")
        if labels is None:
            continue
        if labels.dtype != torch.int64:
            if not classifies:
                continue
            raise ValueError(
                f"labels in {part} of {what} are {labels.dtype}, accuracy and loss are of classes in torch.int64; give"
                " labels.long(), or for other tasks than classification evaluate and measures of your own"
            )
        if num_labels is None or labels.ndim != 1 or (num_labels == 1 and not classifies):  # one is a regression
            continue
        beyond = labels[((labels < 0) | (labels >= num_labels)) & (labels != _IGNORED)]
        if len(beyond):
            raise ValueError(
                f"{part} of {what} has the label {int(beyond[0])}, but the head has {num_labels} classes, 0 to"
                f" {num_labels - 1}; count labels from 0, or give Split the num_labels there are"
            )


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
