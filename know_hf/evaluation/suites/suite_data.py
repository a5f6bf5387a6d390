"""The examples of a suite: prepared once, kept in the cache of datasets, and divided by seeds."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from ...checkpoint import file_sha256
from ..fine_tuning import Examples, trimmed

DIGITS = "sklearn/digits"  # the id of scikit-learn's digits, which come with it
_PLACES_SEED = 7


@dataclass(frozen=True)
class Inputs:
    """What rows become, one of images and texts.

    Args:
        image_size (`int`, *optional*): Height and width in pixels.
        channels (`int`, *optional*, defaults to `1`): 1 for grey images, 3 for colours.
        mean, std (`float`, *optional*, default to `0.5`): Of pixels in [0, 1]; what the model is given is less the
            mean, by the standard deviation.
        max_length (`int`, *optional*): Tokens of a text.
    """

    image_size: int | None = None
    channels: int = 1
    mean: float = 0.5
    std: float = 0.5
    max_length: int | None = None

    def __post_init__(self) -> None:
        if (self.image_size is None) == (self.max_length is None):
            raise ValueError(
                "inputs need either image_size or max_length, got"
                f" image_size={self.image_size} and max_length={self.max_length}"
            )
        if self.channels not in (1, 3):
            raise ValueError(f"channels={self.channels}: images have 1 or 3")


@dataclass(frozen=True)
class Side:
    """Where the examples of one side, source or target, come from, and how many there are.

    Args:
        dataset (`str`): Hub id, or `"sklearn/digits"`.
        train, validation (`int`): Examples to train on, and to make choices by.
        test (`int`, *optional*): Examples that are reported on; by default all that are left.
        pool (`str`, *optional*, defaults to `"train"`): Split that training examples are drawn from.
        unseen (`str`, *optional*): Split that the others are drawn from, which must not overlap with `pool`; by
            default the same, of which each example is used once.
        column (`str`, *optional*): Of image or text; by default `"image"` or `"text"`.
        label (`str`, *optional*, defaults to `"label"`): Column of the class.
        classes (`tuple[int, ...]`, *optional*): The classes that are used; by default all.
        config (`str`, *optional*): Configuration of a dataset that has several.
    """

    dataset: str
    train: int
    validation: int
    test: int | None = None
    pool: str = "train"
    unseen: str | None = None
    column: str | None = None
    label: str = "label"
    classes: tuple[int, ...] | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        if self.dataset == DIGITS:
            for name in ("pool", "unseen", "column", "label", "config"):
                if (value := getattr(self, name)) != getattr(Side, name):
                    raise ValueError(f"{DIGITS} has no {name} {value!r}: it is one set of images; leave {name} out")


@dataclass(frozen=True)
class Prepared:
    """A prepared split on disk, and the classes of it that are used.

    Args:
        path (`Path`): A safetensors file with `labels` `(N,)` and images as bytes, or tokens.
        classes (`tuple[int, ...]`): Labels that are used; they are counted from 0 in this order.
        inputs ([`Inputs`]): What images become.
    """

    path: Path
    classes: tuple[int, ...]
    inputs: Inputs

    def rows(self, seed: Sequence[int]) -> np.ndarray:
        """Indices of all examples of the classes, in an order of the seed's own in which classes take turns."""
        return class_turns(_load(self.path)["labels"].numpy(), self.classes, seed)

    def stored(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Some examples as they are stored, classes counted from 0."""
        chosen = {name: tensor[rows] for name, tensor in _load(self.path).items()}
        chosen["labels"] = torch.from_numpy(np.searchsorted(np.sort(self.classes), chosen["labels"].numpy()))
        return chosen

    def take(self, rows: np.ndarray) -> Examples:
        """Some examples as the model takes them."""
        return as_inputs(self.stored(rows), self.inputs)


class Rows(Dataset[dict[str, Tensor]]):
    """Stored examples for a `Trainer`, made into whole batches at once: so small a model would wait for them."""

    def __init__(self, stored: dict[str, Tensor], inputs: Inputs) -> None:
        self.stored = stored
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.stored["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return as_inputs({name: tensor[index] for name, tensor in self.stored.items()}, self.inputs)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return trimmed(as_inputs({name: tensor[indices] for name, tensor in self.stored.items()}, self.inputs))


def as_inputs(stored: Mapping[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """What the model takes of stored examples: images as floats, the rest as it is."""
    taken = dict(stored)
    if "pixel_values" in taken:
        taken["pixel_values"] = (taken["pixel_values"].float() / 255 - inputs.mean) / inputs.std
    return taken


def class_turns(labels: np.ndarray, classes: Sequence[int], seed: Sequence[int]) -> np.ndarray:
    """Indices of all examples of some classes in a random order in which the classes take turns.

    Args:
        labels (`np.ndarray` of shape `(N,)`): Class of every example.
        classes (`Sequence[int]`): Those that are used.
        seed (`Sequence[int]`): Of the order.
    """
    members = np.flatnonzero(np.isin(labels, classes))
    members = members[np.random.RandomState(list(seed)).permutation(len(members))]
    turn = np.empty(len(members), dtype=int)
    for label in classes:
        of_class = np.flatnonzero(labels[members] == label)
        turn[of_class] = np.arange(len(of_class))
    return members[np.argsort(turn, kind="stable")]


def digits_in_frames(frame: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's scans of digits, each at a place of its own in a larger frame.

    Args:
        frame (`int`): Height and width of the frame, at least 8.

    Returns:
        Images `(1797, 1, frame, frame)`, float32 in [0, 1], and digits `(1797,)`. Places are the same in every call.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    places = np.random.RandomState(_PLACES_SEED).randint(0, frame - 8 + 1, size=(len(digits.images), 2))
    pixels = np.zeros((len(digits.images), 1, frame, frame), dtype=np.float32)
    for image, scan, (row, column) in zip(pixels, digits.images / 16, places, strict=True):
        image[0, row : row + 8, column : column + 8] = scan
    return pixels, digits.target


def prepare(side: Side, split: str, inputs: Inputs, sources: Mapping[str, str], tokenizer: str | None) -> Prepared:
    """Reads a split and keeps it as tensors in the cache of datasets, where it is found again.

    Args:
        side ([`Side`]): Names the dataset and its columns.
        split (`str`): The split.
        inputs ([`Inputs`]): What rows become.
        sources (`Mapping[str, str]`): Folders, or other Hub ids, to read datasets from, by their ids.
        tokenizer (`str`, *optional*): Model whose tokenizer texts need.

    Raises:
        `ValueError`: when a class that is used has no example, or a class is negative: no label was given.
    """
    if side.dataset == DIGITS:
        facts: list[Any] = [DIGITS]
    else:
        rows = datasets.load_dataset(sources.get(side.dataset, side.dataset), side.config, split=split)
        column = side.column or ("image" if inputs.image_size else "text")
        facts = [rows._fingerprint, column, side.label, tokenizer]
    facts += [inputs.image_size, inputs.channels, inputs.max_length]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "know_hf_suites"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.safetensors"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            if side.dataset == DIGITS:
                pixels, labels = digits_in_frames(inputs.image_size or 8)
                tensors = {"pixel_values": torch.from_numpy(pixels).mul(255).round().to(torch.uint8)}
            else:
                labels = np.array(rows[side.label][:])
                if inputs.image_size:
                    tensors = _images(rows[column], inputs)
                else:
                    tensors = _texts(rows[column], inputs, tokenizer)
            tensors["labels"] = torch.from_numpy(np.asarray(labels, dtype=np.int64))
            partial = path.with_suffix(".partial")
            save_file(tensors, partial)
            partial.replace(path)
    present = sorted(set(_load(path)["labels"].tolist()))
    if side.classes is None and present[0] < 0:
        raise ValueError(
            f"split {split!r} of {side.dataset} has examples without a label (class {present[0]}); use another split,"
            " or name the classes"
        )
    classes = tuple(present) if side.classes is None else side.classes
    if missing := set(classes) - set(present):
        raise ValueError(
            f"split {split!r} of {side.dataset} has no example of class {min(missing)}, of {present} only"
        )
    return Prepared(path, classes, inputs)


def content_hash(prepared: Prepared) -> str:
    """What tells other examples from these."""
    return file_sha256(prepared.path)[:20]


@cache
def _load(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def _images(images: Any, inputs: Inputs) -> dict[str, Tensor]:
    size, mode = inputs.image_size or 0, {1: "L", 3: "RGB"}[inputs.channels]
    pixels = torch.empty(len(images), inputs.channels, size, size, dtype=torch.uint8)
    for index, image in enumerate(images):
        image = image.convert(mode)
        image = image if image.size == (size, size) else image.resize((size, size))
        pixels[index] = torch.from_numpy(np.array(image).reshape(size, size, -1)).permute(2, 0, 1)
    return {"pixel_values": pixels}


def _texts(texts: Any, inputs: Inputs, tokenizer: str | None) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    if tokenizer is None:
        raise ValueError("texts need a pretrained model, whose tokenizer they are read with")
    tokens = AutoTokenizer.from_pretrained(tokenizer)(
        list(texts), truncation=True, padding="max_length", max_length=inputs.max_length, return_tensors="pt"
    )
    return {name: tensor.contiguous() for name, tensor in tokens.items()}
