"""[`compare_on_dataset`]: [`compare_checkpoints`] on a dataset of the Hub or a folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...tasks import RecordArguments
from ...trajectory.importing import local_folder
from ..fine_tuning import Examples
from .checkpoint_data import are_equal, as_examples, load_checkpoint
from .compare_checkpoints import CheckpointComparison, compare_checkpoints


def compare_on_dataset(
    a: str | Path,
    b: str | Path,
    dataset: str,
    *,
    train_split: str | None = "train",
    test_split: str | None = None,
    max_examples: int = 1000,
    base_model: str | Path | None = None,
    **options: Any,
) -> CheckpointComparison:
    """Compare two checkpoints on a dataset, prepared by their tokenizer or image processor.

    The heads are new if they do not have as many classes as the dataset. Otherwise, classes are found in the models by
    name (`label2id`), or by position if they have other names, which a note says. Of adapters, the names are those of
    their base model.

    Args:
        a, b (`str` or `Path`):
            See [`compare_checkpoints`].
        dataset (`str`):
            Hub id or folder, as `datasets.load_dataset` reads it. Columns are found as by `know-hf record`.
        train_split (`str`, *optional*, defaults to `"train"`):
            Split to fine-tune on, such as `"train[:80%]"`; `None` compares without fine-tuning.
        test_split (`str`, *optional*):
            Split to test on; test or else validation by default.
        max_examples (`int`, *optional*, defaults to `1000`):
            Number of rows of each split to use, drawn at random.
        base_model (`str` or `Path`, *optional*):
            See [`compare_checkpoints`].
        options (*optional*):
            `draws` and `protocol` of [`compare_checkpoints`].

    Raises:
        `ValueError`: If the checkpoints prepare the examples differently, the dataset has no split to test on
            or it shares rows with that to fine-tune on, a column cannot be detected, the models number the classes
            differently, and as [`compare_checkpoints`].
        `FileNotFoundError`: If a checkpoint does not exist.
    """
    from ...tasks.task_data import class_numbers

    models = [load_checkpoint(checkpoint, base_model) for checkpoint in (a, b)]
    args: dict[str, Any] = {"dataset": dataset, "train_split": train_split or "", "output_dir": ""}
    args |= {"eval_split": test_split, "max_examples": max_examples, "max_eval_examples": max_examples}
    (train, test, classes), other = (
        _examples(checkpoint, model, args, train_split) for checkpoint, model in zip((a, b), models, strict=True)
    )
    if not are_equal(test, other[1]):
        raise ValueError(
            f"{a} and {b} prepare the examples of {dataset} differently, with another tokenizer or image processor;"
            " compare checkpoints of one base model"
        )
    num_labels = None if {model.config.num_labels for model in models} == {len(classes)} else len(classes)
    notes: list[str] = []
    if num_labels is None:
        of_a, of_b = (torch.tensor(class_numbers(classes, model.config, dataset)) for model in models)
        if not torch.equal(of_a, of_b):
            raise ValueError(f"{a} and {b} number the classes of {dataset} differently; give both one label2id")
        train, test = ({**examples, "labels": of_a[examples["labels"]]} for examples in (train, test))
        for name, model in zip("AB", models, strict=True):
            known = model.config.label2id or {}
            if unnamed := [label for label in classes if label not in known and not label.isdecimal()]:
                notes.append(f"{name} has no class {unnamed[0]!r} in its config; its classes are taken by position.")
    elif train_split is None:
        raise ValueError(f"{dataset} has {num_labels} classes, but not the heads; give a split to train new heads on")
    trained = None if train_split is None else train
    options |= {"num_labels": num_labels, "base_model": base_model}
    result = compare_checkpoints(a, b, train=trained, test=test, **options)
    return replace(result, notes=(*notes, *result.notes))


def _examples(
    checkpoint: str | Path, model: Any, options: dict[str, Any], train_split: str | None
) -> tuple[Examples, Examples, list[str]]:
    from ...tasks.preprocessing import load_preprocessing, processor_source
    from ...tasks.task_data import VALIDATION_SPLITS, find_split, load_splits, overlap

    task = "image-classification" if model.main_input_name == "pixel_values" else "text-classification"
    folder = local_folder(checkpoint)
    base = model if (folder / "adapter_config.json").exists() else None
    args = RecordArguments(task=task, model=processor_source(folder, base), **options)
    split = args.eval_split or find_split(args, ("test", *VALIDATION_SPLITS))
    if split is None:
        raise ValueError(f"{args.dataset} has no split to test on; name both, such as train[:80%] and train[80%:]")
    if train_split is not None and overlap(args, split):
        raise ValueError(f"splits {train_split} and {split} of {args.dataset} share rows; test on other rows")
    train, test, classes = load_splits(replace(args, train_split=train_split or split, eval_split=split))
    assert test is not None and classes is not None
    data = load_preprocessing(args, model.config)
    trained, tested = (as_examples(data.prepare(rows), model, data.collator) for rows in (train, test))
    return trained, tested, classes
