"""Examples in memory: prepared once per collection, sampled by each trajectory."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import datasets
import numpy as np
from filelock import FileLock
from images import ImageBatches, decode
from jobs import Job
from safetensors.torch import load_file, save_file
from space import Recipe
from texts import TextBatches, make_tokenizer, tokenize
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase

from know_hf.checkpoint import apply_umask, read_json_object, write_json

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


def load_examples(job: Job, recipe: Recipe) -> RecipeData:
    """
    Load the training and evaluation examples of a recipe.

    Args:
        job ([`Job`]):
            Path, columns and splits of the dataset.
        recipe ([`Recipe`]):
            Number and form of the examples; its seed selects them.

    Raises:
        `ValueError`: If a split has fewer examples than the recipe needs.
    """
    source = job.sources[recipe.dataset]
    train = _load_split(source, "train")
    feature = train.features[source["label"]]
    num_labels = getattr(feature, "num_classes", None) or len(set(train[source["label"]]))
    tokenizer = _load_tokenizer(job, recipe)
    splits = []
    # The seed of the evaluation examples is fixed, so that accuracies on a dataset can be compared.
    for name, count, seed in (("train", recipe.num_examples, recipe.seed), ("eval", recipe.num_eval_examples, 0)):
        available = len(_load_split(source, name))
        if count > available:
            raise ValueError(
                f"{recipe.name} needs {count} examples, but {source['path']} has {available} in this split; use"
                " a larger dataset, or raise the lower bound of ratio in the space"
            )
        order = np.argsort(np.random.RandomState(seed % 2**32).random_sample(available), kind="stable")
        rows = np.sort(order[:count])
        splits.append({key: tensor[rows] for key, tensor in _prepare(job, recipe, name, tokenizer).items()})
    make_batch = ImageBatches if tokenizer is None else partial(TextBatches, tokenizer=tokenizer)
    return RecipeData(
        train=Examples(splits[0], make_batch(recipe.augmentation)),
        evaluation=Examples(splits[1], make_batch([])),
        num_labels=num_labels,
        tokenizer=tokenizer,
    )


def check_same_data(job: Job) -> None:
    """
    Check that the datasets are those that the folder was recorded from, before any training.

    `.data.json` of the folder stores a hash of the prepared examples of each dataset; new datasets are added. Several
    processes may call this simultaneously. Datasets of recipes that are done are not needed.

    Raises:
        `ValueError`: If a dataset differs.
    """
    path = job.output_dir / ".data.json"
    with FileLock(job.output_dir / ".locks" / "data.lock"):
        stored = read_json_object(path) if path.exists() else {}
        hashes: dict[str, str] = {}
        for recipe in job.recipes:
            inputs = json.dumps(recipe.inputs, sort_keys=True)
            key = " ".join(filter(None, (recipe.dataset, inputs, recipe.pretrained)))
            if key in hashes or job.result(recipe):
                continue
            hashes[key] = _hash_dataset(job, recipe)
            if stored.get(key, hashes[key]) != hashes[key]:
                raise ValueError(
                    f"{path}: the folder was recorded from another {recipe.dataset!r} than"
                    f" {job.sources[recipe.dataset]['path']} (fingerprint {stored[key]}, now {hashes[key]}); use the"
                    " same dataset, or another --output-dir"
                )
        write_json(path, stored | hashes)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the accuracy; `predictions` are classes, see [`arg_max`]."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def arg_max(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(-1)


def _hash_dataset(job: Job, recipe: Recipe) -> str:
    """Hash the examples of both splits; independent of where they are read from."""
    tokenizer = _load_tokenizer(job, recipe)
    splits = [Examples(_prepare(job, recipe, name, tokenizer), lambda batch: batch) for name in ("train", "eval")]
    return hashlib.sha256("".join(split.fingerprint for split in splits).encode()).hexdigest()[:16]


def _load_split(source: dict[str, str], name: str) -> datasets.Dataset:
    return _load_dataset(source["path"], source[name])


@cache
def _load_dataset(path: str, split: str) -> datasets.Dataset:
    return datasets.load_dataset(path, split=split)


def _load_tokenizer(job: Job, recipe: Recipe) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of the pretrained model, or one of the most frequent training words; `None` for images."""
    source = job.sources[recipe.dataset]
    if "text" not in source:
        return None
    if recipe.pretrained is not None:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(job.model_path(recipe))
    train = _load_split(source, "train")
    num_words, max_length = recipe.inputs["num_words"], recipe.inputs["max_length"]
    folder = job.cache / f"tokenizer-{_key(train, source['text'], num_words, max_length)}"
    with FileLock(f"{folder}.lock"):
        return make_tokenizer(train, source["text"], num_words, max_length, folder)


def _prepare(job: Job, recipe: Recipe, name: str, tokenizer: PreTrainedTokenizerBase | None) -> Tensors:
    """Return all rows of a split as tensors, from the cache if possible."""
    source = job.sources[recipe.dataset]
    split = _load_split(source, name)
    vocabulary = recipe.pretrained or recipe.inputs.get("num_words")
    path = job.cache / f"examples-{_key(split, source, recipe.inputs, vocabulary)}.safetensors"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            if tokenizer is None:
                tensors = decode(split, source, recipe.inputs)
            else:
                tensors = tokenize(split, source, tokenizer, recipe.inputs["max_length"])
            partial_file = path.with_suffix(".partial")
            save_file(tensors, partial_file)
            apply_umask(partial_file)
            partial_file.replace(path)
    return load_file(path)


def _key(split: datasets.Dataset, *parts: Any) -> str:
    fingerprint = split._fingerprint  # noqa: SLF001 - datasets has no public name for it
    return hashlib.sha256(json.dumps([fingerprint, *parts], sort_keys=True).encode()).hexdigest()[:16]
