"""Examples of a suite: each split is prepared once, cached beside the datasets, and divided by seeds."""

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

from ...checkpoint import apply_umask
from ...extras import missing
from ..fine_tuning import Examples, trimmed

DIGITS = "sklearn/digits"  # scikit-learn ships this dataset
_POSITION_SEED = 7


@dataclass(frozen=True)
class Inputs:
    """Model inputs that rows are converted to: images or texts.

    Args:
        image_size (`int`, *optional*):
            Height and width in pixels.
        channels (`int`, *optional*, defaults to `1`):
            1 for grey images, 3 for colour images.
        mean (`float`, *optional*, defaults to `0.5`):
            Subtracted from pixels in [0, 1].
        std (`float`, *optional*, defaults to `0.5`):
            Divisor of the pixels after that.
        max_length (`int`, *optional*):
            Number of tokens of a text.
        next_byte (`bool`, *optional*, defaults to `False`):
            Whether a language model predicts each byte of the texts from those before. Labels are then not read: the
            rows are joined by line breaks and cut into examples of `max_length` bytes.
    """

    image_size: int | None = None
    channels: int = 1
    mean: float = 0.5
    std: float = 0.5
    max_length: int | None = None
    next_byte: bool = False

    def __post_init__(self) -> None:
        if (self.image_size is None) == (self.max_length is None):
            sizes = f"image_size={self.image_size} and max_length={self.max_length}"
            raise ValueError(f"give either image_size or max_length, got {sizes}")
        if self.next_byte and self.max_length is None:
            raise ValueError("next_byte needs texts; give max_length instead of image_size")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")


@dataclass(frozen=True)
class Side:
    """Examples of one side of a suite: the source task or the target task.

    Args:
        dataset (`str`):
            Hub id, or `"sklearn/digits"`.
        train (`int`):
            Number of training examples.
        validation (`int`):
            Number of examples that choices are made on.
        test (`int`, *optional*):
            Number of test examples. Defaults to all remaining examples.
        pool (`str`, *optional*, defaults to `"train"`):
            Split that training examples are drawn from.
        unseen (`str`, *optional*):
            Split that validation and test examples are drawn from; it must not overlap with `pool`. Defaults to
            `pool`, of which each example is then used once.
        column (`str`, *optional*):
            Column with the image or text. Defaults to `"image"` or `"text"`.
        label (`str`, *optional*, defaults to `"label"`):
            Column with the class.
        classes (`tuple[int, ...]`, *optional*):
            Classes to use. Defaults to all.
        config (`str`, *optional*):
            Configuration of the dataset.
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
                    raise ValueError(f"{DIGITS} is a single set of images, got {name}={value!r}; remove {name}")


@dataclass(frozen=True)
class PreparedSplit:
    """A split on disk, and the classes of it that the suite uses.

    The file has `labels` `(N,)` and 8-bit images or tokens. The classes are numbered from 0 in ascending order; there
    are none if each byte is a label.
    """

    path: Path
    classes: tuple[int, ...]
    inputs: Inputs

    def rows(self, seed: Sequence[int]) -> np.ndarray:
        """Return the indices of all examples of the classes, shuffled by the seed, with the classes taking turns."""
        labels = _load(self.path)["labels"].numpy()
        if not self.classes:
            return np.random.RandomState(list(seed)).permutation(len(labels))
        return class_turns(labels, self.classes, seed)

    def stored(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return examples as stored, with classes numbered from 0."""
        examples = {name: tensor[rows] for name, tensor in _load(self.path).items()}
        if self.classes:
            examples["labels"] = torch.from_numpy(np.searchsorted(np.sort(self.classes), examples["labels"].numpy()))
        return examples

    def take(self, rows: np.ndarray) -> Examples:
        """Return examples as model inputs."""
        return as_inputs(self.stored(rows), self.inputs)


class StoredExamples(Dataset[dict[str, Tensor]]):
    """Stored examples for a `Trainer`, converted a batch at a time: one by one, a small model would wait for them."""

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
    """Convert stored examples to model inputs: 8-bit images become normalised floats."""
    examples = dict(stored)
    if "pixel_values" in examples:
        examples["pixel_values"] = (examples["pixel_values"].float() / 255 - inputs.mean) / inputs.std
    return examples


def class_turns(labels: np.ndarray, classes: Sequence[int], seed: Sequence[int]) -> np.ndarray:
    """Return the indices of all examples of some classes, shuffled so that the classes take turns."""
    members = np.flatnonzero(np.isin(labels, classes))
    members = members[np.random.RandomState(list(seed)).permutation(len(members))]
    turn = np.empty(len(members), dtype=int)
    for label in classes:
        of_class = np.flatnonzero(labels[members] == label)
        turn[of_class] = np.arange(len(of_class))
    return members[np.argsort(turn, kind="stable")]


def digits_in_frames(frame: int) -> tuple[np.ndarray, np.ndarray]:
    """Place each of scikit-learn's 8×8 digits at a random but fixed position in a larger frame.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: images `(1797, 1, frame, frame)`, float32 in [0, 1], and digits `(1797,)`.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing(DIGITS, "scikit-learn", "demo") from error

    digits = load_digits()
    positions = np.random.RandomState(_POSITION_SEED).randint(0, frame - 8 + 1, size=(len(digits.images), 2))
    pixels = np.zeros((len(digits.images), 1, frame, frame), dtype=np.float32)
    for image, scan, (row, column) in zip(pixels, digits.images / 16, positions, strict=True):
        image[0, row : row + 8, column : column + 8] = scan
    return pixels, digits.target


def prepare(
    side: Side, split: str, inputs: Inputs, dataset_paths: Mapping[str, str], tokenizer: str | None
) -> PreparedSplit:
    """Read a split and store it as tensors in the cache of `datasets`, unless it is there already.

    `dataset_paths` has folders or other Hub ids to read datasets from, by their ids; `tokenizer` is the model whose
    tokenizer reads the texts.

    Raises:
        `ValueError`: if a column is missing or of another kind, a class of the suite has no example, or a label is
            negative.
    """
    if side.dataset == DIGITS:
        key: list[Any] = [DIGITS]
    else:
        rows = datasets.load_dataset(dataset_paths.get(side.dataset, side.dataset), side.config, split=split)
        column = side.column or ("image" if inputs.image_size else "text")
        _check_columns(rows, f"split {split!r} of {side.dataset}", column, inputs, side.label)
        key = [rows._fingerprint, column, side.label, tokenizer]  # noqa: SLF001  datasets has no public name for it
    key += [inputs.image_size, inputs.channels, inputs.max_length, *(["next_byte"] if inputs.next_byte else [])]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "know_hf_suites"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}.safetensors"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            if side.dataset == DIGITS:
                pixels, labels = digits_in_frames(inputs.image_size or 8)
                tensors = {"pixel_values": torch.from_numpy(pixels).mul(255).round().to(torch.uint8)}
            elif inputs.next_byte:
                tensors = {"input_ids": _windows(rows[column], inputs.max_length or 1)}
                labels = tensors["input_ids"].numpy().copy()
            else:
                labels = np.array(rows[side.label][:])
                convert = _images if inputs.image_size else _texts
                tensors = convert(rows[column], inputs, tokenizer)
            tensors["labels"] = torch.from_numpy(np.asarray(labels, dtype=np.int64))
            partial = path.with_suffix(".partial")
            save_file(tensors, partial)
            apply_umask(partial)
            partial.replace(path)
    if inputs.next_byte:
        return PreparedSplit(path, (), inputs)
    present, name = sorted(set(_load(path)["labels"].tolist())), f"split {split!r} of {side.dataset}"
    classes = tuple(present) if side.classes is None else side.classes
    if side.classes is None and present[0] < 0:
        raise ValueError(f"{name} has unlabelled examples (class {present[0]}); list the classes to use")
    if absent := set(classes) - set(present):
        raise ValueError(f"{name} has no example of class {min(absent)}; its classes are {present}")
    return PreparedSplit(path, classes, inputs)


def _check_columns(rows: datasets.Dataset, name: str, column: str, inputs: Inputs, label: str) -> None:
    for key, wanted in (("column", column), ("label", column if inputs.next_byte else label)):
        if wanted not in rows.column_names:
            names = ", ".join(rows.column_names)
            raise ValueError(f"{name} has no column {wanted!r}, only {names}; name it in the suite with the key {key}")
    kinds = {key: getattr(feature, "dtype", type(feature).__name__) for key, feature in rows.features.items()}
    if inputs.image_size and not isinstance(rows.features[column], datasets.Image):
        raise ValueError(f"column {column!r} of {name} holds {kinds[column]}, not images; cast it to datasets.Image()")
    if not inputs.next_byte and not kinds[label].startswith(("int", "uint", "bool")):
        hint = "number the classes, for example with Dataset.class_encode_column"
        raise ValueError(f"labels in column {label!r} of {name} are {kinds[label]}, not integers; {hint}")


@cache
def _load(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def _images(images: Any, inputs: Inputs, tokenizer: str | None) -> dict[str, Tensor]:
    size, mode = inputs.image_size or 0, {1: "L", 3: "RGB"}[inputs.channels]
    pixels = torch.empty(len(images), inputs.channels, size, size, dtype=torch.uint8)
    for index, image in enumerate(images):
        array = np.array(image.convert(mode).resize((size, size)))  # PIL copies an image that has this size
        pixels[index] = torch.from_numpy(array.reshape(size, size, -1)).permute(2, 0, 1)
    return {"pixel_values": pixels}


def _windows(texts: Any, length: int) -> Tensor:
    """Return the bytes of the joined texts in rows `(N, length)`; a shorter rest is left out."""
    text = np.frombuffer("\n".join(texts).encode(), np.uint8)
    return torch.from_numpy(text[: len(text) - len(text) % length].astype(np.int64)).view(-1, length)


def _texts(texts: Any, inputs: Inputs, tokenizer: str | None) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    if tokenizer is None:
        raise ValueError("a suite of texts needs model.pretrained, whose tokenizer reads them")
    tokens = AutoTokenizer.from_pretrained(tokenizer)(
        list(texts), truncation=True, padding="max_length", max_length=inputs.max_length, return_tensors="pt"
    )
    return {name: tensor.contiguous() for name, tensor in tokens.items()}
