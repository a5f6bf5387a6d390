"""Texts: tokenized once, padded and augmented per batch."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from know_hf.checkpoint import atomic_folder

AUGMENTATIONS = ("token_dropout",)
_DROPPED_SHARE = 0.1
_ROWS = 1000
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LONGEST_WORD = 20  # upper bound of the mean word length, to skip the rest of a long text


class TextBatches:
    """
    Convert stored tokens to `input_ids` and `attention_mask` `(B, L)`, L the longest length, with `labels`.

    Args:
        augmentation (`Sequence[str]`):
            `"token_dropout"` replaces a tenth of the tokens, but no special ones, by the mask token or, without one,
            by the unknown token. Uses torch's global random state, which the Trainer seeds.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the texts.
    """

    def __init__(self, augmentation: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        if unknown := set(augmentation) - set(AUGMENTATIONS):
            raise ValueError(
                f"unknown augmentation {sorted(unknown)} of texts; choose from {', '.join(AUGMENTATIONS)}"
            )
        self.augmentation = augmentation
        self.special = torch.tensor(tokenizer.all_special_ids)
        mask = tokenizer.mask_token_id
        self.replacement = tokenizer.unk_token_id if mask is None else mask

    def __call__(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        lengths = stored["lengths"]
        tokens = stored["input_ids"][:, : int(lengths.max())].long()
        if self.augmentation:
            dropped = (torch.rand(tokens.shape) < _DROPPED_SHARE) & ~torch.isin(tokens, self.special)
            tokens = tokens.masked_fill(dropped, self.replacement)
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        return {"input_ids": tokens, "attention_mask": mask.long(), "labels": stored["labels"]}


def tokenize(
    split: datasets.Dataset, source: dict[str, str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Tensor]:
    """
    Tokenize all texts of a split. `source` names its columns `text` and `label`.

    Returns:
        `dict[str, Tensor]`: `input_ids` `(N, max_length)` int32, `lengths` `(N,)` int64 and `labels` `(N,)` int64.
    """
    tokens = torch.empty(len(split), max_length, dtype=torch.int32)
    lengths = torch.empty(len(split), dtype=torch.int64)
    for start in range(0, len(split), _ROWS):
        texts = split[start : start + _ROWS][source["text"]]
        padding = {"padding": "max_length", "padding_side": "right", "return_tensors": "pt"}
        batch = tokenizer(texts, truncation=True, max_length=max_length, **padding)
        tokens[start : start + _ROWS] = batch["input_ids"]
        lengths[start : start + _ROWS] = batch["attention_mask"].sum(1)
    return {"input_ids": tokens, "lengths": lengths, "labels": torch.tensor(split[source["label"]][:])}


def make_tokenizer(
    split: datasets.Dataset, column: str, num_words: int, max_length: int, folder: Path
) -> PreTrainedTokenizerBase:
    """
    Create a tokenizer of the most frequent words. Unlike a trained tokenizer, it is the same on every machine.

    Args:
        split (`datasets.Dataset`):
            Rows with a text.
        column (`str`):
            Column of the texts.
        num_words (`int`):
            Size of the vocabulary, including five special tokens.
        max_length (`int`):
            Number of words counted per text.
        folder (`Path`):
            Folder of the tokenizer. If it exists, the tokenizer is loaded from it.
    """
    if not folder.exists():
        normalizer, words = BertNormalizer(), BertPreTokenizer()
        counts: Counter[str] = Counter()
        for start in range(0, len(split), _ROWS):
            for text in split[start : start + _ROWS][column]:
                text = normalizer.normalize_str(text[: _LONGEST_WORD * max_length])
                counts.update(word for word, _ in words.pre_tokenize_str(text)[:max_length])
        frequent = sorted(counts, key=lambda word: (-counts[word], word))
        vocabulary = [*_SPECIAL, *frequent][:num_words]  # no word is a special token: punctuation is split off
        tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, words
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[(name, _SPECIAL.index(name)) for name in ("[CLS]", "[SEP]")]
        )
        names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, _SPECIAL, strict=True)))
        with atomic_folder(folder) as work:
            fast.save_pretrained(work)
    return PreTrainedTokenizerFast.from_pretrained(folder)
