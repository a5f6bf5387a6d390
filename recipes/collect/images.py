"""Images of a dataset in memory, decoded once, and what a Trainer needs beside them."""

import hashlib
from collections.abc import Sequence
from functools import cached_property

import datasets
import numpy as np
import torch
from space import Recipe
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EvalPrediction


class Images(Dataset):
    """Images `(N, C, H, W)` uint8 with labels `(N,)` int64; items hold `pixel_values` in [-1, 1] and `labels`.

    A list of indices gives a whole batch at once, so that the training does not wait for its data.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__(index)

    def __getitems__(self, indices: Sequence[int] | int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[indices].float().div(127.5).sub(1), "labels": self.labels[indices]}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all images and labels."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:16]


def load_images(recipe: Recipe, source: dict[str, str]) -> tuple[Images, Images, int]:
    """The recipe's training and evaluation images and the number of classes.

    Args:
        recipe ([`Recipe`]): Says how many images, and with its seed which.
        source (`dict[str, str]`): Hub id or folder as `path`, names of the columns and of the splits.

    Raises:
        `ValueError`: when a split has fewer images than the recipe needs.
    """
    train = datasets.load_dataset(source["path"], split=source["train"])
    test = datasets.load_dataset(source["path"], split=source["eval"])
    feature = train.features[source["label"]]
    num_labels = getattr(feature, "num_classes", None) or len(set(train[source["label"]]))
    # Which images are evaluated on depends on the dataset alone: accuracies of two trajectories can be compared.
    return (
        _decode(train, recipe.num_examples, recipe.seed, recipe, source),
        _decode(test, recipe.num_eval_examples, 0, recipe, source),
        num_labels,
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right classes; `predictions` are classes already, see [`arg_max`]."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def arg_max(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(-1)


def _decode(split: datasets.Dataset, count: int, seed: int, recipe: Recipe, source: dict[str, str]) -> Images:
    if count > len(split):
        raise ValueError(
            f"{recipe.name} needs {count} images, but {source['path']} has {len(split)} in this split; take a larger"
            " dataset, or raise the ratio's lower bound in the space"
        )
    order = np.argsort(np.random.RandomState(seed % 2**32).random_sample(len(split)), kind="stable")
    rows = split.select(np.sort(order[:count]))
    mode = {1: "L", 3: "RGB"}[recipe.image_channels]
    size = (recipe.image_size, recipe.image_size)
    images = torch.empty(count, recipe.image_channels, *size, dtype=torch.uint8)
    for index, image in enumerate(rows[source["image"]]):
        image = image.convert(mode)
        pixels = np.array(image if image.size == size else image.resize(size), dtype=np.uint8)
        images[index] = torch.from_numpy(pixels).reshape(*size, recipe.image_channels).permute(2, 0, 1)
    return Images(images, torch.tensor(rows[source["label"]][:]))
