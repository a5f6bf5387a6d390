"""Recording: structured forgetting with a `Trainer`, every state handed to a [`WeightTrajectory`].

[`WeightTransitionCallback`] holds the one idea: when a training ends, its weights are the next state.
[`induce_forgetting`] runs the stages with a given `Trainer` and resumes where an earlier run stopped.
"""

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset, Subset
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy

from .schedule import ForgettingSchedule
from .trajectory import StateRecord, WeightTrajectory

_FINGERPRINT_ROWS = 64


class WeightTransitionCallback(TrainerCallback):
    """Records the weights at the end of every training as the next state of one trajectory.

    [`induce_forgetting`] uses it; it also works alone, in a loop of one's own that trains on ever smaller subsets:

    ```python
    callback = WeightTransitionCallback("trajectory/", schedule)
    for indices in schedule.indices(len(dataset)):
        Trainer(model, args, train_dataset=dataset.select(indices), callbacks=[callback]).train()
    ```

    Args:
        output_dir (`str` or `Path`): The trajectory's folder; one that holds a trajectory is continued.
        schedule ([`ForgettingSchedule`], *optional*): Kept in `trajectory.json` and compared when continuing.

    Attributes:
        trajectory ([`WeightTrajectory`]): The states recorded so far.

    Raises:
        `ValueError`: when the folder's trajectory was recorded with another schedule; before a training, when its
            subset is not smaller than that of the last state; after it, when a weight is not finite.
    """

    def __init__(self, output_dir: str | Path, schedule: ForgettingSchedule | None = None) -> None:
        if WeightTrajectory.exists(output_dir):
            self.trajectory = WeightTrajectory(output_dir)
            if schedule is not None and self.trajectory.schedule != schedule:
                raise ValueError(
                    f"{output_dir} was recorded with {self.trajectory.schedule}, not with {schedule}; continue with"
                    " the same schedule or record to another folder"
                )
        else:
            self.trajectory = WeightTrajectory.create(output_dir, schedule)
        self.subset_fingerprint: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        size, last = _num_examples(kwargs), self.trajectory.states[-1:]
        if last and size >= last[0].num_examples:
            raise ValueError(
                f"state {self.trajectory.num_states} of {self.trajectory.path} would be trained on {size} examples,"
                f" but state {last[0].index} saw {last[0].num_examples}; every stage trains on fewer examples"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.record(
                kwargs["model"],
                num_examples=_num_examples(kwargs),
                steps=state.global_step,
                seed=args.seed,
                processing_class=kwargs.get("processing_class"),
            )

    def record(self, model: nn.Module, **kwargs: Any) -> StateRecord:
        """Records the model as it is as the next state; arguments as [`WeightTrajectory.record`]."""
        index = self.trajectory.num_states
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(
                    f"tensor {name!r} is not finite at the end of the training of state {index}: it diverged;"
                    f" lower its learning rate. The {index} states before it are kept in {self.trajectory.path}."
                )
        return self.trajectory.record(model, subset_fingerprint=self.subset_fingerprint, **kwargs)


def induce_forgetting(
    trainer: Trainer,
    schedule: ForgettingSchedule,
    output_dir: str | Path,
    start: Literal["train", "current"] = "train",
) -> WeightTrajectory:
    """Trains a model on ever smaller nested subsets of its data and records every state (KNOW paper, §3).

    Each stage starts from the weights of the stage before, with a fresh optimizer and scheduler made from the
    trainer's own arguments, and is seeded with `trainer.args.seed + state`. Finished states are never trained again:
    called again with the same folder, the run goes on with the first state that is missing, and ends in the same
    weights as a run that was never interrupted. Where the trainer has an `eval_dataset`, every state is evaluated.

    Afterwards the trainer has its own dataset, arguments and callbacks again, and its model holds Θ0, the weights
    after training on all data.

    Args:
        trainer (`Trainer`): With a map-style `train_dataset`, on one process.
        schedule ([`ForgettingSchedule`]): The subsets.
        output_dir (`str` or `Path`): The trajectory's folder.
        start (`"train"` or `"current"`, *optional*, defaults to `"train"`):
            `"train"` makes Θ0 by training on all data, just as `trainer.train()` would; `"current"` takes the weights
            that the model has.

    Returns:
        [`WeightTrajectory`]: with `schedule.num_states` states.

    Raises:
        `ValueError`: when the subsets are too small, the dataset can't be divided, the trainer's optimizer can't be
            made afresh, a state is not finite, or the folder holds a trajectory of another schedule or other data.
    """
    if start not in ("train", "current"):
        raise ValueError(f"start must be 'train' or 'current', got {start!r}")
    dataset = _check(trainer)
    labels = _labels(dataset, schedule.stratify_by)
    batch_size = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
    members = schedule.indices(len(dataset), labels, batch_size)
    callback = WeightTransitionCallback(output_dir, schedule)
    trajectory = callback.trajectory
    fingerprints = [_fingerprint(dataset, indices) for indices in members]
    for state in trajectory.states:
        if state.subset_fingerprint != fingerprints[state.index]:
            raise ValueError(
                f"state {state.index} of {trajectory.path} was trained on other data: {state.num_examples} examples"
                f" with fingerprint {state.subset_fingerprint}, now {len(members[state.index])} with"
                f" {fingerprints[state.index]}; give the same dataset or record to another folder"
            )

    if trajectory.num_states:
        trajectory.load_into(trainer.model, trajectory.num_states - 1)
    with (
        _borrowed(trainer),
        tqdm(total=schedule.num_states, initial=trajectory.num_states, desc="forgetting", unit="state") as bar,
    ):
        _evaluate(trainer, trajectory)
        for index in range(trajectory.num_states, schedule.num_states):
            bar.set_postfix_str(f"state {index}: {len(members[index])} examples")
            callback.subset_fingerprint = fingerprints[index]
            if index == 0 and start == "current":
                callback.record(
                    trainer.model, num_examples=len(dataset), steps=0, processing_class=trainer.processing_class
                )
            else:
                _train_stage(trainer, index, schedule, _subset(dataset, members[index]), callback)
            _evaluate(trainer, trajectory)
            bar.update()
    trajectory.load_into(trainer.model, 0)
    return trajectory


def _check(trainer: Trainer) -> Any:
    if trainer.args.world_size > 1 or trainer.args.n_gpu > 1:
        raise ValueError(
            f"recording runs on one process and device for now, this is one of {trainer.args.world_size} processes"
            f" with {trainer.args.n_gpu} devices; launch with --num_processes 1 and CUDA_VISIBLE_DEVICES=0"
        )
    if type(trainer.model).__module__.startswith("peft."):
        raise ValueError(
            f"recording adapters ({type(trainer.model).__name__}) is not there yet; merge the adapter with"
            " merge_and_unload() and record the whole model"
        )
    dataset = trainer.train_dataset
    if dataset is None:
        raise ValueError("the trainer has no train_dataset; structured forgetting needs one to divide")
    if isinstance(dataset, IterableDataset | datasets.IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"the trainer's {type(dataset).__name__} has no length and no index; give a map-style train_dataset"
        )
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if optimizer is not None:
        kind, options = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(
            trainer.args, trainer.model
        )
        if type(optimizer) is not kind or any(optimizer.defaults.get(k, v) != v for k, v in options.items()):
            raise ValueError(
                f"the trainer was given its own {type(optimizer).__name__}, but each stage needs a fresh one; pass"
                " optimizer_cls_and_kwargs=(class, options) to the Trainer instead of optimizers="
            )
    return dataset


def _labels(dataset: Any, column: str | None) -> np.ndarray | None:
    if column is None:
        return None
    if isinstance(dataset, datasets.Dataset):
        if column not in dataset.column_names:
            raise ValueError(f"the dataset has no column {column!r} to stratify by; it has {dataset.column_names}")
        return np.asarray(dataset.with_format(None)[column][:])
    return np.asarray([dataset[index][column] for index in range(len(dataset))])


def _subset(dataset: Any, indices: np.ndarray) -> Any:
    return dataset.select(indices) if isinstance(dataset, datasets.Dataset) else Subset(dataset, indices.tolist())


def _fingerprint(dataset: Any, indices: np.ndarray) -> str:
    digest = hashlib.sha256(indices.astype("<i8").tobytes())
    digest.update(str(len(dataset)).encode())
    if isinstance(dataset, datasets.Dataset):
        # Stored rows, not transformed ones: the same whatever a random transform does, and the dataset's own
        # fingerprint is random when a transform can't be pickled.
        rows = np.unique(np.linspace(0, len(dataset) - 1, _FINGERPRINT_ROWS).astype(int))
        for batch in dataset.select(rows).with_format("arrow")[:].to_pylist():
            digest.update(repr(sorted(batch.items())).encode())
    return digest.hexdigest()[:16]


@contextmanager
def _borrowed(trainer: Trainer) -> Iterator[None]:
    """Gives the trainer back as it was, whatever happens; stages change nothing else of it."""
    names = ("args", "train_dataset", "model_init", "optimizer", "lr_scheduler", "state", "control")
    before = {name: getattr(trainer, name) for name in names}
    trainer.model_init = None  # or every stage would start from new weights
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)


def _train_stage(
    trainer: Trainer, index: int, schedule: ForgettingSchedule, subset: Any, callback: WeightTransitionCallback
) -> None:
    args = trainer.args
    stage = copy.copy(args)
    stage.seed = args.seed + index
    if index:
        stage.num_train_epochs = schedule.epochs_per_stage
        stage.max_steps = -1
        stage.save_strategy = SaveStrategy.NO
        stage.load_best_model_at_end = False
    trainer.args, trainer.train_dataset = stage, subset
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.add_callback(callback)
    set_seed(stage.seed)
    try:
        trainer.train()
    finally:
        trainer.remove_callback(callback)
        trainer.args = args


def _evaluate(trainer: Trainer, trajectory: WeightTrajectory) -> None:
    if trainer.eval_dataset is None or not trajectory.states or trajectory.states[-1].metrics:
        return
    metrics: Mapping[str, Any] = trainer.evaluate()
    timing = ("_runtime", "_per_second")
    kept = {k: float(v) for k, v in metrics.items() if k.startswith("eval_") and not k.endswith(timing)}
    trajectory.update_metrics(trajectory.num_states - 1, kept)


def _num_examples(kwargs: Mapping[str, Any]) -> int:
    return len(kwargs["train_dataloader"].dataset)
