"""From rows to the inputs of a model: processor, preprocessing and collator of a task."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from ..checkpoint.safe_loading import load_config
from ..local_paths import loaded_from
from .arguments import IMAGE, LM, RecordArguments
from .task_data import CausalCollator, process_images, tokenize

_DEFAULT_MAX_LENGTH = 512
Processor: TypeAlias = PreTrainedTokenizerBase | BaseImageProcessor


@dataclass(frozen=True)
class Preprocessing:
    """How the rows of [`load_splits`] become inputs of the model."""

    processor: Processor  # tokenizer or image processor
    prepare: Callable[[datasets.Dataset], datasets.Dataset]  # maps the rows to examples
    collator: Callable[[list[Any]], Any]  # collates a list of examples into a batch


def load_preprocessing(args: RecordArguments, config: PreTrainedConfig | None = None) -> Preprocessing:
    """Load the preprocessing of a task, for a config if the checkpoint has none.

    Raises:
        `ValueError`: when the tokenizer is empty or has no token to pad with, or the model takes fewer tokens than
            `max_length`.
    """
    revision = args.model_revision or "main"
    config = config or load_config(args.model, revision)
    if args.task == IMAGE:
        # The PIL backend gives the same pixels whether torchvision is installed or not.
        images = AutoImageProcessor.from_pretrained(args.model, backend="pil", revision=revision)
        channels = getattr(config, "num_channels", 3)
        prepare = partial(process_images, processor=images, channels=channels)
        return Preprocessing(images, prepare, default_data_collator)
    tokenizer, causal = _load_tokenizer(args), args.task == LM
    length = _max_length(args, tokenizer, config)
    prepare = partial(tokenize, tokenizer=tokenizer, max_length=length, causal=causal, pack=args.pack)
    return Preprocessing(tokenizer, prepare, (CausalCollator if causal else DataCollatorWithPadding)(tokenizer))


def processor_source(folder: Path, base: PreTrainedModel | None) -> str:
    """Return the folder of a checkpoint, or the base model of its adapter if only that has a processor."""
    return str(folder) if has_processor(folder) or base is None else loaded_from(base) or str(folder)


def has_processor(folder: Path) -> bool:
    """Whether a tokenizer or an image processor is saved in a folder."""
    return any((folder / name).exists() for name in ("tokenizer_config.json", "preprocessor_config.json"))


def _load_tokenizer(args: RecordArguments) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.model_revision or "main")
    # transformers makes an empty tokenizer, to which all words are unknown, for a folder without one
    if len(tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens}) <= 1:
        raise ValueError(f"{args.model} has no tokenizer; save it there with tokenizer.save_pretrained")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {args.model} has neither pad_token nor eos_token; save it with one")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _max_length(args: RecordArguments, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    if args.max_length is None:
        return min(limit, _DEFAULT_MAX_LENGTH)
    if args.max_length > limit:
        raise ValueError(f"max_length={args.max_length}: {args.model} takes at most {limit} tokens")
    return args.max_length
