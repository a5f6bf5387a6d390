"""[`induce_forgetting`] runs the stages with a given `Trainer` and resumes where an earlier run stopped."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from ..checkpoint import check_free_disk
from ..data.subsets import Subset, divide
from ..distributed import gather_state_dict, is_sharded, on_main_process, reshard
from ..schedule import ForgettingSchedule
from ..trajectory import StateRecord, WeightTrajectory, state_nbytes
from .callback import WeightTransitionCallback, num_examples_of
from .progress import Progress
from .validation import (
    check_same_training,
    check_trainer,
    examples_per_step,
    training_facts,
    warn_of_changes,
    warn_of_warmup,
)

logger = logging.get_logger(__name__)


class _StageCallback(WeightTransitionCallback):
    """The callback as [`induce_forgetting`] uses it: told what a stage is, its errors kept for all processes."""

    def __init__(self, output_dir: str | Path, schedule: ForgettingSchedule, **options: Any) -> None:
        super().__init__(output_dir, schedule, **options)
        self.subset: Subset | None = None
        self.training: dict[str, str] = {}
        self.on_written: Callable[[StateRecord], object] | None = None
        self.failure: Exception | None = None
        self._loaded: tuple[Subset, int | None] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        """The sizes were looked at before the first stage; whether the loader follows them shows only now."""
        assert self.subset is not None
        if state.is_world_process_zero:
            warn_of_warmup(args, state)
        last, found = self._loaded, num_examples_of(kwargs)
        self._loaded = self.subset, found
        if last is None or last[0] is self.subset:  # begun again with a smaller batch, by auto_find_batch_size
            return
        if found is not None and last[1] is not None and found >= last[1]:
            raise ValueError(
                f"the trainer's loader has {found} examples for the subset of {self.subset.size}, and had"
                f" {last[1]} for the state before: it does not follow trainer.train_dataset; let get_train_dataloader"
                " read self.train_dataset, which is the subset of each stage"
            )

    def record(self, model: nn.Module, **facts: Any) -> None:
        assert self.subset is not None
        facts |= {"num_examples": self.subset.num_examples, "fraction": self.subset.fraction}
        facts |= {"subset_fingerprint": self.subset.fingerprint, "on_written": self.on_written}
        # not those of its end: auto_find_batch_size may have changed them
        facts |= {"training": self.training if facts["steps"] else {}}
        try:
            super().record(model, **facts)
        except Exception as error:
            self.failure = error

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure
        self.trajectory.check()


def induce_forgetting(
    trainer: Trainer,
    schedule: ForgettingSchedule,
    output_dir: str | Path,
    start: Literal["train", "current"] = "train",
    *,
    dtype: torch.dtype | None = None,
) -> WeightTrajectory:
    """Trains a model on ever smaller nested subsets of its data and records every state (KNOW paper, §3).

    Each stage starts from the weights of the stage before, with a fresh optimizer and scheduler made from the
    trainer's own arguments, and is seeded with `trainer.args.seed + state`. Finished states are never trained again:
    called again with the same folder and arguments, the run goes on with the first state that is missing, and ends in
    the same weights as a run that was never interrupted, unless `dtype` rounds what is stored. Where the trainer has
    an `eval_dataset`, every state is evaluated. Size, displacement and metrics of every state go to the trainer's
    loggers under `forgetting/`.

    To be called on every process of a distributed training; the main one writes, and its errors come out on all.

    Afterwards the trainer has its own dataset, arguments and callbacks again, and its model holds Θ0, the weights
    after training on all data (under FSDP and ZeRO-3 it keeps those of the last state).

    Adapters hold no statistics of the BatchNorm layers below them. Where these are in training mode, they stay as the
    last stage left them and a resumed run ends in other weights: a warning says so. Layers in `modules_to_save`, or in
    evaluation mode, are not concerned. A recording under ZeRO-3 can't be resumed.

    Warned of are also a model that its config does not describe, such as with another head: it is recorded and
    resumed, but not loaded by `from_pretrained`; a warmup longer than a stage; and a stage that ends before its last
    step.

    Args:
        trainer (`Trainer`): Any trainer of transformers' kind with a `train_dataset`. Of a `PeftModel` the adapter is
            recorded: one, and none that learns a prompt.
        schedule ([`ForgettingSchedule`]): The subsets.
        output_dir (`str` or `Path`): The trajectory's folder.
        start (`"train"` or `"current"`, *optional*, defaults to `"train"`):
            `"train"` makes Θ0 by training on all data, just as `trainer.train()` would; `"current"` takes the weights
            that the model has.
        dtype (`torch.dtype`, *optional*): Floating-point dtype to store, see [`WeightTransitionCallback`].

    Returns:
        [`WeightTrajectory`]: with `schedule.num_states` states.

    Raises:
        `TypeError`: when trainer or schedule are something else.
        `ValueError`: when the subsets are too small, the dataset can't be divided, an adapter can't be recorded, the
            trainer's optimizer can't be made afresh, `enable_jit_checkpoint`, `bf16_full_eval` or `fp16_full_eval` is
            on, the trainer's loader does not follow its `train_dataset`, a state is not finite, or the folder holds a
            trajectory of another schedule, other data or other training arguments, or one to go on with under ZeRO-3.
        `FileExistsError`: when the folder holds a model.
        `OSError`: before the training, when the disk has not the space that all states need.
        `TrajectoryBusyError`: when another process records to the folder.
    """
    if start not in ("train", "current"):
        raise ValueError(f"start must be 'train' or 'current', got {start!r}")
    check_trainer(trainer)
    if not isinstance(schedule, ForgettingSchedule):
        raise TypeError(f"schedule={schedule!r} is no ForgettingSchedule; give ForgettingSchedule(ratio=0.5)")
    subsets = divide(trainer.train_dataset, schedule, examples_per_step(trainer.args))
    callback = _StageCallback(output_dir, schedule, trainer=trainer, dtype=dtype)
    trajectory = callback.trajectory
    with ExitStack() as stack:
        done = on_main_process(
            trainer.accelerator, lambda: _begin(stack, trajectory, subsets, trainer, schedule, dtype)
        )
        if done:
            trajectory.load_into(trainer.model, done - 1)
        stack.enter_context(_borrowed(trainer))
        progress = stack.enter_context(Progress(trainer, trajectory, schedule.num_states))
        callback.on_written = progress.written
        if done and on_main_process(trainer.accelerator, lambda: not trajectory.states[-1].metrics):
            progress.evaluate(done - 1)
        for index in range(done, schedule.num_states):
            callback.subset = subsets[index]
            progress.begin(index, subsets[index])
            if index == 0 and start == "current":
                state_dict = gather_state_dict(trainer.model, trainer)
                if trainer.accelerator.is_main_process:
                    callback.record(
                        trainer.model, state_dict=state_dict, steps=0, processing_class=trainer.processing_class
                    )
            else:
                _train_stage(trainer, index, schedule, subsets[index], callback)
            on_main_process(trainer.accelerator, callback.raise_failure)
            progress.evaluate(index)
        on_main_process(trainer.accelerator, progress.finish)
    trajectory = WeightTrajectory(output_dir)
    if not is_sharded(trainer):
        trajectory.load_into(trainer.model, 0)
    return trajectory


def _begin(
    stack: ExitStack,
    trajectory: WeightTrajectory,
    subsets: list[Subset],
    trainer: Trainer,
    schedule: ForgettingSchedule,
    dtype: torch.dtype | None,
) -> int:
    """Whether the run can go on and end, told before anything is trained; returns the number of finished states."""
    stack.enter_context(trajectory.recording())
    for state, subset in zip(trajectory.states, subsets, strict=False):
        if state.subset_fingerprint != subset.fingerprint:
            raise ValueError(
                f"state {state.index} of {trajectory.path} was trained on other data: {state.size} with fingerprint"
                f" {state.subset_fingerprint}, now {subset.size} with {subset.fingerprint}; give the same dataset or"
                " record to another folder"
            )
        check_same_training(trajectory, state.index, _stage_arguments(trainer.args, state.index, schedule))
    missing = len(subsets) - trajectory.num_states
    if not missing:
        logger.warning(
            f"{trajectory.path} holds all {trajectory.num_states} states already: nothing is trained; record to"
            " another folder to train anew"
        )
    if not trajectory.num_states:
        warn_of_changes(trainer.model)
    first, further = state_nbytes(trainer.model, dtype)
    check_free_disk(trajectory.path, missing * further + (0 if trajectory.num_states else first - further))
    return trajectory.num_states


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


def _stage_arguments(args: TrainingArguments, index: int, schedule: ForgettingSchedule) -> TrainingArguments:
    stage = copy.copy(args)
    stage.seed = args.seed + index
    if index:
        stage.num_train_epochs = schedule.epochs_per_stage
        stage.max_steps = schedule.steps_per_stage or -1
        stage.save_strategy = SaveStrategy.NO
        stage.load_best_model_at_end = False
    return stage


def _train_stage(
    trainer: Trainer, index: int, schedule: ForgettingSchedule, subset: Subset, callback: _StageCallback
) -> None:
    args = trainer.args
    stage = _stage_arguments(args, index, schedule)
    callback.training = training_facts(stage)
    trainer.args, trainer.train_dataset = stage, subset.dataset
    trainer.optimizer = trainer.lr_scheduler = None
    reshard(trainer.model)
    trainer.add_callback(callback)
    set_seed(stage.seed)
    try:
        trainer.train()
    finally:
        trainer.remove_callback(callback)
        trainer.args = args
