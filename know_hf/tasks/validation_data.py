"""The data of a [`Gate`] for a trajectory, and of a [`CrossFit`] for a trajectory of `know-hf record`."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from transformers import PreTrainedModel

from ..checkpoint.safe_loading import load_config
from ..data.subsets import divide
from ..prediction import CrossFit, Gate
from ..prediction.choosing.gate import gate_batch_size
from ..trajectory import WeightTrajectory
from ..trajectory.merging import load_base
from .arguments import IMAGE, LABELS, LM, TEXT, RecordArguments
from .preprocessing import has_processor, load_preprocessing, processor_source
from .record import read_arguments
from .task_data import VALIDATION_SPLITS, class_numbers, find_split, load_splits, overlap, split_names, splits_in
from .trainer_parts import load_model

RECORDED = "recorded"
_TASKS = {  # by the end of the name of the model's class
    "ForSequenceClassification": TEXT,
    "ForImageClassification": IMAGE,
    "ForCausalLM": LM,
    "LMHeadModel": LM,
}


@dataclass(frozen=True)
class ValidationData:
    """Examples to evaluate the candidates of a gate on, preprocessed as in the recording."""

    dataset: datasets.Dataset
    data_collator: Callable[[list[Any]], Any]
    base_model: PreTrainedModel | None = None  # of a trajectory of adapters

    def make_gate(self, **options: Any) -> Gate:
        """Return a [`Gate`] on the data, with batches of 8 examples, or fewer so that there are enough."""
        return Gate(**{"batch_size": gate_batch_size(len(self.dataset)), **vars(self), **options})


def load_validation_data(
    trajectory: WeightTrajectory | str | Path,
    dataset: str = RECORDED,
    *,
    split: str | None = None,
    max_examples: int | None = None,
    base_model: str | Path | None = None,
) -> ValidationData:
    """Load validation data for a trajectory, preprocessed for its model.

    For a trajectory of `know-hf record`, task, columns, classes and preprocessing are those of the recording. For
    others, the class of the model tells the task, columns are detected by name, classes are those of the model's
    config, and tokenizer or image processor come with the trajectory or with the base model of its adapters.

    Args:
        trajectory ([`WeightTrajectory`], `str` or `Path`):
            The trajectory. `know-hf record` writes `record.json` beside it.
        dataset (`str`, *optional*, defaults to `"recorded"`):
            Hub id or folder of a dataset with the columns of the recording, or `"recorded"`: the split that the
            recording evaluated its states on, such as the held-out tenth.
        split, max_examples (*optional*):
            Split of `dataset`; slices work. By default its validation split, or its only one. Rows are drawn with the
            seed of the recording; by default all, or as many as the recording drew.
        base_model (`str` or `Path`, *optional*):
            Hub id or folder of the base model of adapters; by default the recorded one.

    Raises:
        `FileNotFoundError`: if `dataset` is `"recorded"` and there is no `record.json` beside the trajectory.
        `ValueError`: if the recording has no validation split, or its evaluation split is the test split, the split of
            `dataset` is unknown or was trained on, columns or classes differ from those of the recording or the model,
            the model is of another task, or the dataset of the recording changed.
    """
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples={max_examples}: must be at least 1")
    trajectory = trajectory if isinstance(trajectory, WeightTrajectory) else WeightTrajectory(trajectory)
    if dataset != RECORDED and not _record_path(trajectory).is_file():
        with PartialState().main_process_first():
            return _for_model(trajectory, dataset, split, max_examples, base_model)
    args = _recording(trajectory)
    if base_model is not None:
        args = replace(args, model=str(base_model), model_revision=None)
    with PartialState().main_process_first():
        validation = _recorded(args, split) if dataset == RECORDED else _other(args, dataset, split)
        if max_examples is not None:
            validation = replace(validation, max_eval_examples=max_examples)
        trained, rows, classes = load_splits(args, validation)
        if rows is None:
            raise ValueError(f"{trajectory.path} has no validation split; name a dataset instead of {RECORDED!r}")
        if dataset == RECORDED:
            _check_unchanged(trajectory, args, load_preprocessing(args).prepare(trained))
        return _prepare(trajectory, args, rows, classes)


def has_validation_split(trajectory: WeightTrajectory | str | Path) -> bool:
    """Whether `know-hf record` evaluated the states on a split that is not the test split."""
    trajectory = trajectory if isinstance(trajectory, WeightTrajectory) else WeightTrajectory(trajectory)
    if not _record_path(trajectory).is_file() or "eval_loss" not in trajectory.states[0].metrics:
        return False
    return "test" not in splits_in(_recording(trajectory).eval_split)


def load_cross_fit(trajectory: WeightTrajectory | str | Path, **options: Any) -> CrossFit:
    """Return a [`CrossFit`] on the training rows of a trajectory that lies beside its `record.json`."""
    trajectory = trajectory if isinstance(trajectory, WeightTrajectory) else WeightTrajectory(trajectory)
    args = _recording(trajectory, "choose on validation data, or pass gate=CrossFit(dataset=train_set) in Python")
    with PartialState().main_process_first():
        rows, _, classes = load_splits(args)
        data = _prepare(trajectory, args, rows, classes)
    return CrossFit(**{"batch_size": gate_batch_size(len(data.dataset) // 2), **vars(data), **options})


def _record_path(trajectory: WeightTrajectory) -> Path:
    return trajectory.path.absolute().with_name("record.json")


def _recording(trajectory: WeightTrajectory, instead: str = "name a dataset") -> RecordArguments:
    path = _record_path(trajectory)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, so the data of {trajectory.path} is unknown; {instead}")
    args = read_arguments(path)
    if not trajectory.is_adapter and has_processor(trajectory.path):  # the model that was fine-tuned may be gone
        args = replace(args, model=str(trajectory.path), model_revision=None)
    return args


def _for_model(
    trajectory: WeightTrajectory,
    dataset: str,
    split: str | None,
    max_examples: int | None,
    base_model: str | Path | None,
) -> ValidationData:
    """Load a dataset for the model of a trajectory that `know-hf record` did not make."""
    in_python = "call predict_overflowed_weights(..., gate=Gate(dataset=validation_set)) in Python"
    try:
        base = load_base(trajectory, base_model) if trajectory.is_adapter else None
    except ValueError as error:
        raise ValueError(f"{error}; or {in_python}, with the base model in the gate") from error
    config = load_config(str(trajectory.path), "main") if base is None else base.config
    name = type(base).__name__ if base is not None else (config.architectures or ["unknown"])[0]
    task = next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
    if task is None:
        raise ValueError(f"{trajectory.path} has a {name}, for which know_hf prepares no data; {in_python}")
    source = processor_source(trajectory.path, base)
    args = RecordArguments(task, source, dataset, output_dir="", train_split="")
    split = _other(args, dataset, split).eval_split or ""
    args = replace(args, train_split=split, eval_split=None, max_examples=max_examples)
    rows, _, classes = load_splits(args)
    if classes is not None:
        numbers = class_numbers(classes, config, f"split {split} of {dataset}")
        labels = [numbers[label] for label in rows.with_format(None)[LABELS][:]]
        rows = rows.remove_columns(LABELS).add_column(LABELS, labels)
    preprocessing = load_preprocessing(args, config)
    return ValidationData(preprocessing.prepare(rows), preprocessing.collator, base)


def _prepare(
    trajectory: WeightTrajectory, args: RecordArguments, rows: datasets.Dataset, classes: list[str] | None
) -> ValidationData:
    preprocessing = load_preprocessing(args)
    base = load_model(args, classes, preprocessing.processor)[0] if trajectory.is_adapter else None
    return ValidationData(preprocessing.prepare(rows), preprocessing.collator, base)


def _check_unchanged(trajectory: WeightTrajectory, args: RecordArguments, train_dataset: datasets.Dataset) -> None:
    """Raise a `ValueError` if other rows than those of the recording would be held out."""
    subset, recorded = divide(train_dataset, args.schedule)[0], trajectory.states[0]
    if subset.fingerprint != recorded.subset_fingerprint:
        raise ValueError(
            f"{args.dataset} changed: it has {subset.size} to train on with the fingerprint {subset.fingerprint}, and"
            f" the recording had {recorded.size} with {recorded.subset_fingerprint}, so {RECORDED!r} could hold rows"
            " that were trained on; name other data"
        )


def _recorded(args: RecordArguments, split: str | None) -> RecordArguments:
    if split is not None:
        raise ValueError(f"{RECORDED!r} has the split of the recording; remove split {split!r} or name a dataset")
    if "test" in splits_in(args.eval_split):
        raise ValueError(
            "the recording was evaluated on its test split, which should stay unseen for reporting; name other data"
            f" instead of {RECORDED!r}, or {args.dataset!r} with the split 'test' to choose on it anyway"
        )
    return args


def _other(args: RecordArguments, dataset: str, split: str | None) -> RecordArguments:
    """Return arguments that name another dataset or split to evaluate on."""
    is_same = os.path.realpath(dataset) == os.path.realpath(args.dataset)
    other = replace(args, dataset=dataset, max_eval_examples=None)
    if not is_same:
        other = replace(other, dataset_config=None, dataset_revision=None, train_split="")
    names = split_names(other)
    if split is None:
        split = find_split(other, VALIDATION_SPLITS) or (names[0] if len(names) == 1 else None)
        if split is None:
            raise ValueError(f"{dataset} has no validation split, only {', '.join(names)}; pass one as split=")
    elif unknown := splits_in(split) - {*names, "all"}:
        raise ValueError(f"{dataset} has no split {min(unknown)!r}, only {', '.join(names)}; pass one as split=")
    if is_same and overlap(args, split):
        raise ValueError(
            f"split {split} of {dataset} was trained on, so a choice on it would favour Θ0; use {RECORDED!r} or other"
            " data"
        )
    return replace(other, eval_split=split)
