"""[`chance_warning`]: whether Θ0 is a better classifier than guessing."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
from transformers import Trainer

from ..data.rows import labels_of
from ..model_tensors import without_adapter

_CLASSIFIERS = tuple(f"For{kind}Classification" for kind in ("Sequence", "Image", "Audio", "Video"))
_CLEARLY_BELOW = 0.95  # of the loss of guessing


def chance_warning(trainer: Trainer, metrics: Mapping[str, float]) -> str | None:
    """Return a warning if the metrics of Θ0 are about those of guessing from the frequencies of the classes.

    Only a classifier that is evaluated on a `datasets.Dataset` with a class per row is judged.
    """
    labels = _classes(trainer)
    loss, accuracy = metrics.get("eval_loss"), metrics.get("eval_accuracy")
    if len(set(labels)) < 2 or (loss is None and accuracy is None):
        return None
    shares = np.array(list(Counter(labels).values())) / len(labels)
    entropy, most = float(-(shares * np.log(shares)).sum()), float(shares.max())
    texts = []
    if loss is not None:
        if loss < _CLEARLY_BELOW * entropy:
            return None
        texts.append(f"eval_loss is {loss:.3f}, and guessing from the class frequencies gives {entropy:.3f}")
    if accuracy is not None:
        if accuracy > most + 2 * (most * (1 - most) / len(labels)) ** 0.5:
            return None
        texts.append(f"eval_accuracy is {accuracy:.3f}, and the most frequent class alone gives {most:.3f}")
    return (
        f"Θ0 is at chance: {'; '.join(texts)}. There is nothing to forget: train Θ0 longer, or check learning rate and"
        " labels"
    )


def _classes(trainer: Trainer) -> list[Any]:
    """Return the class of each evaluated row; empty if there is none."""
    model, dataset = trainer.accelerator.unwrap_model(trainer.model), trainer.eval_dataset
    name = type(without_adapter(model)).__name__
    if not name.endswith(_CLASSIFIERS) or not isinstance(dataset, datasets.Dataset):
        return []
    for column in sorted({*(trainer.label_names or ()), "label", "labels"} & dataset.features.keys()):
        kind = dataset.features[column]
        is_integer = str(getattr(kind, "dtype", "")).startswith(("int", "uint"))
        if isinstance(kind, datasets.ClassLabel) or (isinstance(kind, datasets.Value) and is_integer):
            return labels_of(dataset, column)
    return []
