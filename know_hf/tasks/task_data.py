"""The datasets of a recording: splits, columns, classes, and what turns rows into the inputs of a model."""

import logging as python_logging
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from transformers import BaseImageProcessor, DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.utils import logging

from .arguments import IMAGE, LABELS, LM, RecordArguments

logger: python_logging.Logger = logging.get_logger(__name__)

# Lower case, of any public dataset that calls a column so; two of one kind in one dataset are ambiguous.
_TEXTS = ("text", "sentence", "content", "review", "document")
_IMAGES = ("image", "img")
_CLASSES = ("label", "labels", "class", "target")
_EVAL_SPLITS = ("validation", "valid", "val", "dev", "test")


def load_splits(args: RecordArguments) -> tuple[datasets.Dataset, datasets.Dataset | None, list[str] | None]:
    """Loads what a task trains and evaluates on, with the columns it needs and no other.

    Args:
        args ([`RecordArguments`]): Names the dataset, its splits, columns and how many rows are drawn from each.

    Returns:
        The training split, the evaluation split, if there is one, and the names of the classes, if the task has any.
        Columns are `text` and `text_pair`, or `image`; and `labels`, integers from 0.

    Raises:
        `ValueError`: when a column can't be told by its name, is missing, is of the wrong kind, holds no classes, or
            is empty in a row.
    """
    splits = [_load(args, args.train_split)]
    if (eval_split := _eval_split(args)) is not None:
        splits.append(_load(args, eval_split))
    found: dict[str, str | None]
    found = {LABELS: None} if args.task == LM else {LABELS: _column(splits[0], "label", args.label_column, _CLASSES)}
    if args.task == IMAGE:
        found["image"] = _column(splits[0], "image", args.image_column, _IMAGES)
    else:
        found["text"] = _column(splits[0], "text", args.text_column, _TEXTS)
        if args.text_pair_column is not None:
            found["text_pair"] = _column(splits[0], "text_pair", args.text_pair_column, ())
    columns = {column: name for name, column in found.items() if column is not None}
    splits = [_select(split, columns, args) for split in splits]
    names = None
    if args.task != LM:
        splits, names = _encode_classes(splits, found[LABELS], args)
    limits = (args.max_examples, args.max_eval_examples)
    drawn = [_draw(split, limit, args.seed) for split, limit in zip(splits, limits, strict=False)]
    for split in drawn:
        _refuse_empty(split, columns, args)
    return drawn[0], drawn[1] if len(drawn) > 1 else None, names


def tokenize(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, causal: bool, pack: bool
) -> datasets.Dataset:
    """Replaces the texts of a dataset by their tokens, at most `max_length` an example.

    Args:
        dataset (`datasets.Dataset`): With `text`, perhaps `text_pair` and `labels`.
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        max_length (`int`): Tokens after which a text is cut.
        causal (`bool`): Whether the texts are for language modelling. Each then ends with the end-of-text token, if it
            was not cut and the tokenizer has one, and texts of fewer than two tokens, which predict nothing, are left
            out.
        pack (`bool`): Whether the texts are joined, a thousand at a time, and cut into examples of `max_length`
            tokens; what is left of each thousand is dropped.

    Raises:
        `ValueError`: when no example is left.
    """

    def classify(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return dict(tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length))

    def model(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        length = None if pack else max_length
        texts = tokenizer(batch["text"], truncation=not pack, max_length=length, verbose=False)["input_ids"]
        end = tokenizer.eos_token_id
        for tokens in texts:
            if end is not None and (pack or len(tokens) < max_length) and tokens[-1:] != [end]:
                tokens.append(end)
        if pack:
            joined = [token for tokens in texts for token in tokens]
            texts = [joined[i : i + max_length] for i in range(0, len(joined) - max_length + 1, max_length)]
        texts = [tokens for tokens in texts if len(tokens) > 1]
        return {"input_ids": texts, "attention_mask": [[1] * len(tokens) for tokens in texts]}

    texts = [name for name in ("text", "text_pair") if name in dataset.column_names]
    tokens = dataset.map(model if causal else classify, batched=True, remove_columns=texts, desc="tokenizing")
    if not len(tokens):
        raise ValueError(
            f"none of the {len(dataset)} texts gives an example of max_length={max_length} tokens; lower max_length,"
            " give more texts, or leave pack out"
        )
    if causal and not pack and len(tokens) < len(dataset):
        logger.warning(f"{len(dataset) - len(tokens)} of {len(dataset)} texts have fewer than two tokens: left out")
    return tokens


def process_images(dataset: datasets.Dataset, processor: BaseImageProcessor, channels: int) -> datasets.Dataset:
    """Makes a dataset of images give `pixel_values`, made when they are asked for.

    Args:
        dataset (`datasets.Dataset`): With `image` and `labels`.
        processor (`BaseImageProcessor`): The model's.
        channels (`int`): Channels the model takes: 1 for grey images, else images become RGB.
    """
    return dataset.with_transform(_ImageTransform(processor, "L" if channels == 1 else "RGB"))


class _ImageTransform:  # no closure: workers that are spawned get it pickled
    def __init__(self, processor: BaseImageProcessor, mode: str) -> None:
        self.processor = processor
        self.mode = mode

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        # With an axis for the channels even where there is one: processors do not guess well.
        images = [np.atleast_3d(np.asarray(image.convert(self.mode))) for image in batch["image"]]
        pixels = self.processor(images, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, LABELS: batch[LABELS]}


class CausalCollator:
    """Pads examples and takes their tokens as labels; padding is left out of the loss, ends of text are not.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a padding token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Mapping[str, torch.Tensor]:
        batch = self.pad(examples)
        # Not by the padding token, as transformers' own collator does: it is often that of the end of text.
        batch[LABELS] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch


def _load(args: RecordArguments, split: str) -> datasets.Dataset:
    return datasets.load_dataset(args.dataset, args.dataset_config, split=split, revision=args.dataset_revision)


def _eval_split(args: RecordArguments) -> str | None:
    if args.eval_split != "auto":
        return args.eval_split
    names = datasets.get_dataset_split_names(args.dataset, args.dataset_config, revision=args.dataset_revision)
    trained = {part.partition("[")[0] for part in args.train_split.split("+")}
    for name in _EVAL_SPLITS:
        if name in names and not trained & {name, "all"}:
            return name
    logger.warning(
        f"{args.dataset} has the splits {', '.join(names)}, none to evaluate on: states are recorded without metrics."
        " Give an eval_split; train_split=train[:90%] and eval_split=train[90%:] divide one."
    )
    return None


def _column(dataset: datasets.Dataset, kind: str, given: str | None, usual: Sequence[str]) -> str:
    columns = dataset.column_names
    if given is not None:
        if given not in columns:
            raise ValueError(f"{kind}_column={given!r} is not in the dataset; its columns are {', '.join(columns)}")
        return given
    found = [column for column in columns if column.lower() in usual]
    if len(found) != 1:
        why = f"{' and '.join(found)} may hold it" if found else f"none is called {', '.join(usual)}"
        raise ValueError(
            f"the {kind} can't be told from the dataset's columns {', '.join(columns)} ({why}); give {kind}_column"
        )
    return found[0]


def _select(split: datasets.Dataset, columns: Mapping[str, str], args: RecordArguments) -> datasets.Dataset:
    if missing := [column for column in columns if column not in split.column_names]:
        raise ValueError(
            f"split {split.split} of {args.dataset} has no column {missing[0]!r};"
            f" it has {', '.join(split.column_names)}"
        )
    for column, name in columns.items():
        feature = split.features[column]
        kind = getattr(feature, "dtype", type(feature).__name__)
        if name == "image" and not isinstance(feature, datasets.Image):
            raise ValueError(f"image_column={column!r} holds {kind}, not images; cast it to datasets.Image()")
        if name.startswith("text") and kind not in ("string", "large_string"):
            raise ValueError(f"{name}_column={column!r} holds {kind}, not text; name another")
    return split.select_columns(list(columns)).rename_columns({k: v for k, v in columns.items() if k != v})


def _refuse_empty(split: datasets.Dataset, columns: Mapping[str, str], args: RecordArguments) -> None:
    for column, name in columns.items():
        if not split.data.column(name).null_count:  # of all rows, drawn or not; none is read for it
            continue
        cells = split.select_columns(name).with_format("arrow")[:].column(name)
        if cells.null_count:
            row = cells.is_null().index(True)
            raise ValueError(
                f"split {split.split} of {args.dataset}, column {column!r}: row {row} of those used, counted from 0,"
                f" is empty, as are {cells.null_count} in all; fill them in or leave them out"
            )


def _encode_classes(
    splits: list[datasets.Dataset], column: str | None, args: RecordArguments
) -> tuple[list[datasets.Dataset], list[str]]:
    """The splits with classes counted from 0 as `labels`, and the names of the classes."""
    feature = splits[0].features[LABELS]
    values = [split.with_format(None)[LABELS][:] for split in splits]
    where = [f"split {split.split} of {args.dataset}, column {column!r}" for split in splits]
    if isinstance(feature, datasets.ClassLabel):
        names, number = list(feature.names), {index: index for index in range(feature.num_classes)}
    else:
        if not isinstance(values[0][0], str | int):
            raise ValueError(f"{where[0]}: {values[0][0]!r} is no class; give a label_column of integers or strings")
        classes = sorted({value for value in values[0] if value is not None})
        names, number = [str(value) for value in classes], {value: index for index, value in enumerate(classes)}
    for value, place in zip(values, where, strict=True):
        if unknown := [item for item in value if item not in number]:
            raise ValueError(
                f"{place}: {len(unknown)} rows have the class {unknown[0]!r}, which is none of {_some(names)}; rows"
                " without a class (often -1 in test splits) can't be used, name another split"
            )
    is_bool = getattr(feature, "dtype", None) == "bool"  # False == 0, but no model takes False for a class
    if is_bool or any(value != index for value, index in number.items()):
        splits = [
            split.remove_columns(LABELS).add_column(LABELS, [number[item] for item in value])
            for split, value in zip(splits, values, strict=True)
        ]
    return splits, names


def _draw(split: datasets.Dataset, limit: int | None, seed: int) -> datasets.Dataset:
    if limit is None or limit >= len(split):
        return split
    # As the schedule orders its examples: the same rows on every machine.
    order = np.argsort(np.random.RandomState(seed).random_sample(len(split)), kind="stable")
    return split.select(np.sort(order[:limit]))


def _some(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
