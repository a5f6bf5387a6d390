"""Examples in memory: prepared once per collection, sampled by each trajectory."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from filelock import FileLock
from images import ImageBatches, decode
from jobs import Job, result
from safetensors.torch import load_file, save_file
from space import Recipe
from texts import TextBatches, make_tokenizer, tokenize
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase

from know_hf.checkpoint import write_json

DATA_NAME = ".data.json"

Tensors = dict[str, Tensor]


class Examples(Dataset):
    """Rows of prepared tensors, including `labels` `(N,)`.

    An index returns a stored example. A list of indices returns a batch for the model, with augmentation.
    """

    def __init__(self, tensors: Tensors, make_batch: Callable[[Tensors], Tensors]) -> None:
        self.tensors = tensors
        self.make_batch = make_batch

    def __len__(self) -> int:
        return len(self.tensors["labels"])

    def __getitem__(self, index: int) -> Tensors:
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def __getitems__(self, indices: Sequence[int]) -> Tensors:
        return self.make_batch({name: tensor[indices] for name, tensor in self.tensors.items()})

    @property
    def fingerprint(self) -> str:
        """Hash of all examples."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            digest.update(self.tensors[name].numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class RecipeData:
    """Training and evaluation examples of a recipe, and the tokenizer of texts."""

    train: Examples
    evaluation: Examples
    num_labels: int
    tokenizer: PreTrainedTokenizerBase | None


def load_examples(recipe: Recipe, source: dict[str, str], models: dict[str, str], folder: Path) -> RecipeData:
    """Load training and evaluation examples of a recipe.

    Args:
        recipe ([`Recipe`]):
            Number and form of the examples; its seed selects them.
        source (`dict[str, str]`):
            Hub id or folder as `path`, names of columns and splits.
        models (`dict[str, str]`):
            Folders to take instead of Hub ids of models.
        folder (`Path`):
            Cache of prepared data, shared by all processes.

    Raises:
        `ValueError`: if a split has fewer examples than the recipe needs.
    """
    folder.mkdir(exist_ok=True)
    train, test = (_load_split(source["path"], source[split]) for split in ("train", "eval"))
    feature = train.features[source["label"]]
    num_labels = getattr(feature, "num_classes", None) or len(set(train[source["label"]]))
    tokenizer = _tokenizer(recipe, source, models, folder)
    splits = []
    # evaluation examples depend on the dataset only, so that accuracies of trajectories can be compared
    for split, count, seed in ((train, recipe.num_examples, recipe.seed), (test, recipe.num_eval_examples, 0)):
        if count > len(split):
            raise ValueError(
                f"{recipe.name} needs {count} examples, but {source['path']} has {len(split)} in this split; use"
                " a larger dataset, or raise the lower bound of ratio in the space"
            )
        prepared = _prepare(split, source, recipe, tokenizer, folder)
        order = np.argsort(np.random.RandomState(seed % 2**32).random_sample(len(split)), kind="stable")
        rows = np.sort(order[:count])
        splits.append({name: tensor[rows] for name, tensor in prepared.items()})
    make_batch = ImageBatches if tokenizer is None else partial(TextBatches, tokenizer=tokenizer)
    return RecipeData(
        train=Examples(splits[0], make_batch(recipe.augmentation)),
        evaluation=Examples(splits[1], make_batch([])),
        num_labels=num_labels,
        tokenizer=tokenizer,
    )


def check_same_data(job: Job) -> None:
    """Check that the datasets are those that the folder was recorded from, before any training.

    `.data.json` of the folder stores a hash of the prepared examples of each dataset; new datasets are added. Several
    processes may call this at the same time.

    Args:
        job ([`Job`]):
            The job. Datasets of finished trajectories are not needed.

    Raises:
        `ValueError`: if a dataset differs.
    """
    path, locks, cache = (job.output_dir / name for name in (DATA_NAME, ".locks", ".cache"))
    for folder in (locks, cache):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / "data.lock"):
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        found: dict[str, str] = {}
        for recipe in job.recipes:
            inputs = json.dumps(recipe.inputs, sort_keys=True)
            prepared = " ".join(filter(None, (recipe.dataset, inputs, recipe.pretrained)))
            if prepared in found or result(job.output_dir, recipe.name):
                continue
            source = job.sources[recipe.dataset]
            found[prepared] = _fingerprint(recipe, source, job.models, cache)
            if kept.get(prepared, found[prepared]) != found[prepared]:
                raise ValueError(
                    f"{path}: the folder was recorded from another {recipe.dataset!r} than {source['path']}"
                    f" (fingerprint {kept[prepared]}, now {found[prepared]}); give the same dataset or another"
                    " --output-dir"
                )
        write_json(path, kept | found)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the accuracy; `predictions` are classes, see [`arg_max`]."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def arg_max(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(-1)


def _fingerprint(recipe: Recipe, source: dict[str, str], models: dict[str, str], folder: Path) -> str:
    """Hash the examples of both splits; independent of where they are read from."""
    tokenizer = _tokenizer(recipe, source, models, folder)
    digest = hashlib.sha256()
    for name in ("train", "eval"):
        split = _prepare(_load_split(source["path"], source[name]), source, recipe, tokenizer, folder)
        digest.update(Examples(split, lambda batch: batch).fingerprint.encode())
    return digest.hexdigest()[:16]


@cache
def _load_split(path: str, split: str) -> datasets.Dataset:
    return datasets.load_dataset(path, split=split)


def _tokenizer(
    recipe: Recipe, source: dict[str, str], models: dict[str, str], folder: Path
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of the pretrained model, or one of the most frequent training words; `None` for images."""
    if "text" not in source:
        return None
    if recipe.pretrained is not None:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(models.get(recipe.pretrained, recipe.pretrained))
    train = _load_split(source["path"], source["train"])
    num_words, max_length = recipe.inputs["num_words"], recipe.inputs["max_length"]
    place = folder / f"tokenizer-{_key(train, source['text'], num_words, max_length)}"
    with FileLock(f"{place}.lock"):
        return make_tokenizer(train, source["text"], num_words, max_length, place)


def _prepare(
    split: datasets.Dataset,
    source: dict[str, str],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
) -> Tensors:
    """Return all rows of a split as tensors, from the cache if possible."""
    maker = recipe.pretrained or recipe.inputs.get("num_words")
    path = folder / f"examples-{_key(split, dict(source), dict(recipe.inputs), maker)}.safetensors"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            if tokenizer is None:
                tensors = decode(split, source, recipe.inputs)
            else:
                tensors = tokenize(split, source, tokenizer, recipe.inputs["max_length"])
            partial = path.with_suffix(".partial")
            save_file(tensors, partial)
            partial.replace(path)
    return load_file(path)


def _key(split: datasets.Dataset, *facts: Any) -> str:
    fingerprint = split._fingerprint  # noqa: SLF001 - datasets has no public name for it
    return hashlib.sha256(json.dumps([fingerprint, *facts], sort_keys=True).encode()).hexdigest()[:16]
