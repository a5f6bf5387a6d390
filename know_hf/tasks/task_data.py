"""Datasets of a recording: splits, columns, classes and preprocessing."""

import logging as python_logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import datasets
import numpy as np
from transformers import BaseImageProcessor, DataCollatorWithPadding, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from ..schedule import ForgettingSchedule
from ..terminal import first_names
from .arguments import IMAGE, LABELS, LM, SINGLE_LABEL, RecordArguments

logger: python_logging.Logger = logging.get_logger(__name__)

# Column names of public datasets, in lower case.
_COLUMNS = {
    "text": ("text", "sentence", "content", "review", "document"),
    "image": ("image", "img"),
    "label": ("label", "labels", "class", "target"),
}
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
HELD_OUT = "held-out"
_FEWEST_HELD_OUT = 10  # a gate needs as many


def load_splits(
    args: RecordArguments, validation: RecordArguments | None = None
) -> tuple[datasets.Dataset, datasets.Dataset | None, list[str] | None]:
    """Load the splits to train and evaluate on, with the columns that the task needs.

    `validation` names another dataset and split to evaluate on; columns and classes are those of the training split.

    Returns:
        The training split, the evaluation split or `None`, and the names of the classes or `None`. The columns are
            `text` and `text_pair`, or `image`; and `labels`, integers from 0.

    Raises:
        `ValueError`: when a column cannot be detected, is missing, has the wrong type, holds no classes, or has an
            empty row.
    """
    validation = validation or args
    evaluated, class_names = _eval_split(validation), None
    sources = [(args, args.train_split)]
    if evaluated is not None and evaluated != HELD_OUT:
        sources.append((validation, evaluated))
    names = [f"split {split} of {source.dataset}" for source, split in sources]
    splits = [_load(source, split) for source, split in sources]
    columns = _detect_columns(splits[0], args)
    splits = [_select(split, columns, name) for split, name in zip(splits, names, strict=True)]
    if args.task != LM:
        splits, class_names = _encode_classes(splits, names)
    if evaluated == HELD_OUT:
        splits, names = _hold_out(splits[0], args), 2 * names
    limits = (args.max_examples, validation.max_eval_examples)
    drawn = [_draw(split, limit, args.seed) for split, limit in zip(splits, limits, strict=False)]
    for split, name in zip(drawn, names, strict=False):
        _check_no_empty_rows(split, columns, name)
    return drawn[0], drawn[1] if len(drawn) > 1 else None, class_names


def find_split(args: RecordArguments, names: Sequence[str]) -> str | None:
    """Return the first of the names that is a split of the dataset and not trained on."""
    trained = splits_in(args.train_split)
    others = [] if "all" in trained else [name for name in split_names(args) if name not in trained]
    return next((name for name in names if name in others), None)


def split_names(args: RecordArguments) -> list[str]:
    """Return the names of the splits of the dataset."""
    with _readable(args):
        return datasets.get_dataset_split_names(args.dataset, args.dataset_config, revision=args.dataset_revision)


def splits_in(expression: str | None) -> set[str]:
    """Return the names of the splits in an expression such as `train[:90%]+validation`."""
    return {part.partition("[")[0].strip() for part in (expression or "").split("+")}


def overlap(args: RecordArguments, split: str) -> bool:
    """Return whether rows of a split of the dataset are trained on."""
    both = (args.train_split, split)
    named = splits_in(args.train_split) & splits_in(split)
    if "all" in splits_in(args.train_split) | splits_in(split):
        return True
    if not named or not all("[" in expression for expression in both):
        return bool(named)
    sizes = {name: len(_load(args, name)) for expression in both for name in splits_in(expression)}
    trained, other = (datasets.ReadInstruction.from_spec(expression).to_absolute(sizes) for expression in both)
    return any(a.splitname == b.splitname and max(a.from_, b.from_) < min(a.to, b.to) for a in trained for b in other)


def class_numbers(names: list[str], config: PreTrainedConfig, source: str) -> list[int]:
    """Return the number of each class in a model: by its name, else the number that is its name, else its position.

    Raises:
        `ValueError`: when the model is for another problem than one class per example, or has other classes.
    """
    if config.problem_type not in (None, SINGLE_LABEL):
        raise ValueError(
            f"{source} has one class per example, and the model is for {config.problem_type} (problem_type in its"
            " config); use a model for one class per example"
        )
    known = config.label2id or {}
    if all(name in known for name in names):
        return [known[name] for name in names]
    if all(name.isdecimal() and int(name) < config.num_labels for name in names):
        return [int(name) for name in names]
    if len(names) != config.num_labels:
        raise ValueError(
            f"{source} has the classes {first_names(names, 10)}, and the model has {config.num_labels}:"
            f" {first_names(list(known), 10)}; name a dataset with the classes of the model"
        )
    return list(range(len(names)))


def tokenize(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, causal: bool, pack: bool
) -> datasets.Dataset:
    """Replace the columns `text` and `text_pair` of a dataset by tokens, at most `max_length` for an example.

    For language modelling (`causal`), texts that are not truncated end with the end-of-text token, if the tokenizer
    has one, and texts of fewer than two tokens are dropped. `pack` joins the texts, a thousand at a time, and cuts
    them into examples of `max_length` tokens; the rest of each thousand is dropped.

    Raises:
        `ValueError`: when no example is left.
    """

    def classification_inputs(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return dict(tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length))

    def causal_inputs(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        length = None if pack else max_length
        rows = tokenizer(batch["text"], truncation=not pack, max_length=length, verbose=False)["input_ids"]
        end = tokenizer.eos_token_id
        for row in rows:
            if end is not None and (pack or len(row) < max_length) and row[-1:] != [end]:
                row.append(end)
        if pack:
            joined = [token for row in rows for token in row]
            rows = [joined[i : i + max_length] for i in range(0, len(joined) - max_length + 1, max_length)]
        rows = [row for row in rows if len(row) > 1]
        return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}

    texts = [name for name in ("text", "text_pair") if name in dataset.column_names]
    inputs = causal_inputs if causal else classification_inputs
    tokens = dataset.map(inputs, batched=True, remove_columns=texts, desc="tokenizing")
    if not len(tokens):
        raise ValueError(
            f"{len(dataset)} texts produce no example of max_length={max_length} tokens; lower it or turn pack off"
        )
    if causal and not pack and len(tokens) < len(dataset):
        logger.warning(f"dropped {len(dataset) - len(tokens)} of {len(dataset)} texts with fewer than two tokens")
    return tokens


def process_images(dataset: datasets.Dataset, processor: BaseImageProcessor, channels: int) -> datasets.Dataset:
    """Return a dataset that computes `pixel_values` when its rows are read; for `channels != 1` images become RGB."""
    # not a closure: spawned workers could not unpickle it
    return dataset.with_transform(partial(_image_inputs, processor, "L" if channels == 1 else "RGB"))


class CausalCollator(DataCollatorWithPadding):
    """Pad examples and use their tokens as labels; padding is excluded from the loss, end-of-text tokens are not."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(features)
        # not by the padding token, as transformers' collator does: it is often the end-of-text token
        batch[LABELS] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch[LABELS][:, 0] = -100  # nothing predicts the first token, but Trainer counts it in the mean loss of GPT-2
        return batch


def _image_inputs(processor: BaseImageProcessor, mode: str, batch: Mapping[str, list[Any]]) -> dict[str, Any]:
    # grey images also get a channel axis, because processors guess it badly
    images = [np.atleast_3d(np.asarray(image.convert(mode))) for image in batch["image"]]
    pixels = processor(images, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, LABELS: batch[LABELS]}


@contextmanager
def _readable(args: RecordArguments) -> Iterator[None]:
    try:
        yield
    except (datasets.exceptions.DatasetBuildError, ValueError) as error:
        reason = " ".join(f"{error.__cause__ or error}"[:500].split())
        raise ValueError(f"dataset={args.dataset!r} cannot be read ({reason})") from error


def _load(args: RecordArguments, split: str) -> datasets.Dataset:
    with _readable(args):
        return datasets.load_dataset(args.dataset, args.dataset_config, split=split, revision=args.dataset_revision)


def _eval_split(args: RecordArguments) -> str | None:
    if args.eval_split != "auto":
        return args.eval_split
    return find_split(args, VALIDATION_SPLITS) or HELD_OUT


def _hold_out(split: datasets.Dataset, args: RecordArguments) -> list[datasets.Dataset]:
    """Return the rows to train on, and a tenth to evaluate on with the same class balance."""
    if len(split) < 10 * _FEWEST_HELD_OUT:
        logger.warning(
            f"{args.dataset} has no validation split, and a tenth of its {len(split)} training rows is too little:"
            f" states get no metrics. Set eval_split, or use {10 * _FEWEST_HELD_OUT} rows or more"
        )
        return [split]
    labels = split.with_format(None)[LABELS][:] if LABELS in split.column_names else None
    by = None if labels is None else LABELS
    kept = ForgettingSchedule(ratio=0.9, num_states=2, seed=args.seed, stratify_by=by).indices(len(split), labels)[1]
    return [split.select(kept), split.select(np.setdiff1d(np.arange(len(split)), kept))]


def _detect_columns(split: datasets.Dataset, args: RecordArguments) -> dict[str, str]:
    """Map the columns of the dataset to `text`, `text_pair`, `image` and `labels`."""
    kinds = ["image"] if args.task == IMAGE else ["text"]
    kinds += ["text_pair"] * (args.text_pair_column is not None) + ["label"] * (args.task != LM)
    columns = {_column(split, kind, getattr(args, f"{kind}_column")): kind for kind in kinds}
    return {column: LABELS if kind == "label" else kind for column, kind in columns.items()}


def _column(split: datasets.Dataset, kind: str, given: str | None) -> str:
    columns = split.column_names
    if given is not None:
        if given not in columns:
            raise ValueError(f"{kind}_column={given!r} is not a column of the dataset, which has {', '.join(columns)}")
        return given
    candidates = [column for column in columns if column.lower() in _COLUMNS[kind]]
    if len(candidates) != 1:
        reason = f"{' and '.join(candidates)} match" if candidates else f"none is called {', '.join(_COLUMNS[kind])}"
        raise ValueError(f"cannot detect the {kind} column among {', '.join(columns)} ({reason}); set {kind}_column")
    return candidates[0]


def _select(split: datasets.Dataset, columns: Mapping[str, str], source: str) -> datasets.Dataset:
    if missing := [column for column in columns if column not in split.column_names]:
        raise ValueError(f"{source} has no column {missing[0]!r}, only {', '.join(split.column_names)}")
    for column, name in columns.items():
        feature = split.features[column]
        kind = getattr(feature, "dtype", type(feature).__name__)
        if name == "image" and not isinstance(feature, datasets.Image):
            raise ValueError(f"image_column={column!r} holds {kind}, not images; cast it to datasets.Image()")
        if name.startswith("text") and kind not in ("string", "large_string"):
            raise ValueError(f"{name}_column={column!r} holds {kind}, not text; choose a text column")
    return split.select_columns(list(columns)).rename_columns({k: v for k, v in columns.items() if k != v})


def _encode_classes(splits: list[datasets.Dataset], sources: list[str]) -> tuple[list[datasets.Dataset], list[str]]:
    """Return the splits with `labels` counted from 0, and the names of the classes, which are those of the first."""
    feature = splits[0].features[LABELS]
    labels = [split.with_format(None)[LABELS][:] for split in splits]
    if isinstance(feature, datasets.ClassLabel):
        names, index_of = list(feature.names), {index: index for index in range(feature.num_classes)}
    else:
        if not isinstance(labels[0][0], str | int):
            raise ValueError(
                f"{sources[0]}: the label {labels[0][0]!r} is not a class; set label_column to a column of integers or"
                " strings. For regression and several labels per example, use your own Trainer, induce_forgetting and"
                " Gate in Python"
            )
        classes = sorted({label for label in labels[0] if label is not None})
        names, index_of = [str(label) for label in classes], {label: index for index, label in enumerate(classes)}
    index_of |= {name: index for index, name in enumerate(names)}
    encoded = []
    for split, values, source in zip(splits, labels, sources, strict=True):
        own = split.features[LABELS]
        if isinstance(own, datasets.ClassLabel) and own != feature:  # numbered in another order, perhaps
            values = [own.names[value] if value in range(own.num_classes) else value for value in values]
        if unknown := [value for value in values if value not in index_of]:
            raise ValueError(
                f"{source}: {len(unknown)} rows have the class {unknown[0]!r}, which is not among"
                f" {first_names(names, 10)}; choose another split, because test splits often have no classes"
            )
        indices = [index_of[value] for value in values]
        # False == 0, but no model takes False as a class
        if indices != values or getattr(own, "dtype", None) == "bool":
            split = split.remove_columns(LABELS).add_column(LABELS, indices)
        encoded.append(split)
    return encoded, names


def _draw(split: datasets.Dataset, limit: int | None, seed: int) -> datasets.Dataset:
    if limit is None or limit >= len(split):
        return split
    # as in ForgettingSchedule: the same rows on every machine
    order = np.argsort(np.random.RandomState(seed).random_sample(len(split)), kind="stable")
    return split.select(np.sort(order[:limit]))


def _check_no_empty_rows(split: datasets.Dataset, columns: Mapping[str, str], source: str) -> None:
    for column, name in columns.items():
        if not split.data.column(name).null_count:  # counts all rows, drawn or not, without reading one
            continue
        cells = split.select_columns(name).with_format("arrow")[:].column(name)
        if cells.null_count:
            raise ValueError(
                f"{source}, column {column!r}: {cells.null_count} of the rows in use are empty, first row"
                f" {cells.is_null().index(True)}; fill or remove them"
            )
