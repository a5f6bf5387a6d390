"""[`induce_forgetting`]: train stage after stage with a given `Trainer`, and resume an interrupted recording."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from ..checkpoint import check_free_disk, check_output
from ..data.rows import restart_collator
from ..data.subsets import Subset, divide
from ..distributed import check_shared, gathering, on_every_process, on_main_process, reshard, unmark_prepared
from ..local_paths import loaded_from
from ..schedule import ForgettingSchedule
from ..trajectory import StateRecord, WeightTrajectory, state_nbytes
from ..trajectory.recorder import check_savable
from ..trajectory.start import StartWeights
from .callback import WeightTransitionCallback
from .loaders import check_loader
from .optimizers import use_evaluated_weights
from .progress import Progress, other_checksums, warn_about_others, weights_checksum
from .recorded_arguments import examples_per_step, recorded_arguments, trainer_arguments
from .resuming import check_same_recording
from .validation import check_reloadable, check_trainer, warn_about_warmup

logger = logging.get_logger(__name__)


def induce_forgetting(
    trainer: Trainer,
    schedule: ForgettingSchedule,
    output_dir: str | Path,
    start: Literal["train", "current"] = "train",
    *,
    dtype: torch.dtype | None = None,
    start_weights: StartWeights = "reference",
) -> WeightTrajectory:
    """Train a model on smaller and smaller nested subsets of its data and record every state (KNOW paper, §3).

    Each stage starts from the weights of the stage before, with a new optimizer and scheduler from the trainer's
    arguments and the seed `trainer.args.seed + state`. If the trainer has an `eval_dataset`, every state is evaluated.
    The trainer's loggers receive size, displacement and metrics of every state under `forgetting/`. A table of the
    metrics is printed at the end, unless the trainer has `disable_tqdm=True` or `logging_strategy="no"`.

    A second call with the same folder and arguments resumes at the first missing state. It ends with the same weights
    as an uninterrupted run, unless `dtype` rounds the stored weights. All training arguments that can change the
    weights must be the same, as must the data collator, the loss function and the frozen weights. Batch size,
    accumulation and number of processes may change if their product does not.

    In distributed training, call it on every process. The main process writes, and its errors are raised on all.

    Afterwards the trainer has its own dataset, arguments and callbacks again, and its model holds Θ0, the weights
    trained on all data.

    Warns when Θ0 is a classifier at chance level, a warmup is longer than a stage, or a stage ends early. Also warns
    when the config does not describe the model or its tied weights, so that states load only with `load_into`; and
    when the training changes something that no state holds (BatchNorm statistics below an adapter, parameters of the
    optimizer outside the model, another model of the trainer), so that a resumed run ends with other weights.

    Args:
        trainer (`Trainer`):
            Any `transformers.Trainer` with a `train_dataset`; its model may be compiled. For a `PeftModel`, only the
            adapter that trains is recorded, as peft saves it; other adapters must be frozen.
        schedule ([`ForgettingSchedule`]):
            The subsets.
        output_dir (`str` or `Path`):
            Folder of the trajectory.
        start (`"train"` or `"current"`, *optional*, defaults to `"train"`):
            `"train"` trains state 0 on all data, like `trainer.train()`; `"current"` uses the model's current weights
            as state 0.
        dtype, start_weights (*optional*):
            See [`WeightTransitionCallback`]. With `start="current"`, the weights before the training are unknown, so
            no start is recorded.

    Returns:
        [`WeightTrajectory`]: with `schedule.num_states` states.

    Raises:
        `TypeError`:
            When `trainer` or `schedule` has the wrong type.
        `ValueError`:
            Before the training, when the subsets are too small; the dataset cannot be divided; the trainer's loader or
            sampler does not follow its `train_dataset`; a state could not hold the weights that train (two trainable
            adapters, prompts, AdaLoRA, weights that peft does not save or changes in the base at random, weights that
            partly share memory); the generation config or the processing class cannot be saved; the trainer would not
            create its optimizer or scheduler again; the optimizer does not train the model or is layer-wise;
            `enable_jit_checkpoint`, `bf16_full_eval`, `fp16_full_eval` or FSDP1 is on; the DeepSpeed config has an
            optimizer or scheduler; the folder holds a trajectory of another schedule, other data or other training
            arguments, or is inside another trajectory or the folder of the model. After a training, when a state is
            not finite.
        `FileExistsError`:
            When the folder holds a model.
        `FileNotFoundError`:
            Before the training, when the nodes do not share the folder.
        `OSError`:
            Before the training, when the folder cannot be written or the disk has too little space for all states.
        `TrajectoryBusyError`:
            When another process records to the folder.
    """
    check_trainer(trainer)
    if not isinstance(schedule, ForgettingSchedule):
        raise TypeError(f"schedule must be a ForgettingSchedule, got {schedule!r}")
    subsets = divide(trainer.train_dataset, schedule, examples_per_step(trainer.args))
    check_loader(trainer, subsets[: schedule.num_states + 1])  # halves are of equal size
    arguments = [_stage_arguments(trainer.args, index, schedule) for index in range(schedule.num_stages)]
    of_trainer = trainer_arguments(trainer)
    start_weights = _start_weights(start, start_weights, schedule)
    callback = _StageCallback(output_dir, schedule, trainer=trainer, dtype=dtype, start_weights=start_weights)
    trajectory = callback.trajectory
    with ExitStack() as stack:

        def begin() -> int:
            if not trajectory.num_states:
                check_output(trajectory.path, [loaded_from(trainer.model)], replaces=False)
            stack.enter_context(trajectory.recording())
            check_same_recording(trajectory, subsets, arguments, of_trainer)
            trajectory.check_base(trainer.model)
            _check_missing_states(trajectory, trainer, schedule, dtype, start_weights)
            return len(trajectory.trained)

        num_recorded = on_main_process(trainer.accelerator, begin)
        check_shared(trainer.accelerator, trajectory.path)
        use_evaluated_weights(trainer.optimizer, trainer.args, trainer.state)
        last = trajectory.trained[-1:]
        if num_recorded:
            trajectory.load_into(trainer.model, last[0].name)
        stack.enter_context(_restored(trainer))
        progress = stack.enter_context(closing(Progress(trainer, trajectory, schedule.num_stages)))
        callback.on_written = progress.on_written
        if num_recorded and on_main_process(trainer.accelerator, lambda: not last[0].metrics):
            progress.evaluate(num_recorded - 1)
        for index in range(num_recorded, schedule.num_stages):
            callback.begin(index, subsets[index])
            progress.begin(index, subsets[index])
            if index == 0 and start == "current":
                callback.record_current()
            else:
                if index == 0 and start_weights != "none":
                    callback.record_before_training()
                callback.training = recorded_arguments(arguments[index], of_trainer)
                _train_stage(trainer, arguments[index], subsets[index], callback)
            on_main_process(trainer.accelerator, callback.raise_failure)
            progress.evaluate(index, callback.weights)
        on_main_process(trainer.accelerator, progress.finish)
    trajectory = WeightTrajectory(output_dir)
    trajectory.load_into(trainer.model, 0)
    return trajectory


class _StageCallback(WeightTransitionCallback):
    """The callback of [`induce_forgetting`]: records the subset, and keeps errors to raise them on all processes."""

    trainer: Trainer
    subset: Subset
    training: dict[str, str]
    on_written: Callable[[StateRecord], object]
    weights: list[int] | None = None
    has_warned_about_others = False
    _failure: Exception | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        """Check the optimizer and the length of the stage; everything else was checked before the first stage."""
        self.check_optimizer(state, **kwargs)
        self.check_tail(state)
        if state.is_world_process_zero:
            warn_about_warmup(args, state)

    def record(self, model: nn.Module, **details: Any) -> None:
        details |= {"num_examples": self.subset.num_examples, "fraction": self.subset.fraction}
        details |= {"subset_fingerprint": self.subset.fingerprint, "on_written": self.on_written}
        # from the start of the stage: auto_find_batch_size may change the arguments
        details |= {"training": self.training if details["steps"] else {}}
        self.weights = weights_checksum(self.trainer)
        try:
            super().record(model, **details)
        except Exception as error:
            self._failure = error

    def begin(self, stage: int, subset: Subset) -> None:
        """Take the subset of a stage, and the weights that it begins from into the model if it is a branch."""
        self._stage, self.subset = stage, subset
        schedule = self.trajectory.schedule
        if stage and schedule is not None and schedule.kind == "complementary":
            on_main_process(self.trainer.accelerator, lambda: self.trajectory.check(wait=True))
            WeightTrajectory(self.trajectory.path).load_into(self.trainer.model, schedule.branch_from)
            self.weights = weights_checksum(self.trainer)

    def record_before_training(self) -> None:
        """Record the weights of the trainer's model as the start, on every process."""
        trainer = self.trainer

        def write() -> None:
            with gathering(trainer.model) as state_dict:
                if trainer.accelerator.is_main_process:
                    self.record_start(trainer.model, state_dict)

        on_every_process(trainer.accelerator, write)

    def record_current(self) -> None:
        """Record the current weights as state 0, without training."""
        trainer = self.trainer
        with gathering(trainer.model) as state_dict:
            if trainer.accelerator.is_main_process:
                self.record(trainer.model, state_dict=state_dict, steps=0, processing_class=trainer.processing_class)

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        self.trajectory.check()


def _start_weights(start: str, weights: StartWeights, schedule: ForgettingSchedule) -> StartWeights:
    if start not in ("train", "current"):
        raise ValueError(f"start must be 'train' or 'current', got {start!r}")
    weights = weights if start == "train" else "none"
    if schedule.branch_from == "start" and weights == "none":
        raise ValueError("branch_from='start' needs the start; record it: start='train' and start_weights='reference'")
    return weights


def _check_missing_states(
    trajectory: WeightTrajectory,
    trainer: Trainer,
    schedule: ForgettingSchedule,
    dtype: torch.dtype | None,
    start_weights: StartWeights,
) -> None:
    missing = schedule.num_stages - len(trajectory.trained)
    if not missing:
        logger.warning(f"{trajectory.path} is complete; nothing is trained")
    if not trajectory.num_states:
        check_reloadable(trainer.model)
        check_savable(trajectory.path, trainer.model, trainer.processing_class)
    first, further = state_nbytes(trainer.model, dtype)
    once = 0 if trajectory.num_states else first - further + first * ((start_weights != "none") + schedule.tail_states)
    check_free_disk(trajectory.path, missing * further + once)


@contextmanager
def _restored(trainer: Trainer) -> Iterator[None]:
    """Restore every attribute of the trainer that the stages change."""
    names = ("args", "train_dataset", "model_init", "optimizer", "lr_scheduler", "state", "control")
    before = {name: getattr(trainer, name) for name in names}
    trainer.model_init = None  # otherwise every stage would start from new weights
    trainer.optimizer = trainer.lr_scheduler = None  # created by every stage; an evaluation would change its mode
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)


def _stage_arguments(args: TrainingArguments, index: int, schedule: ForgettingSchedule) -> TrainingArguments:
    stage = copy.copy(args)
    stage.seed = args.seed + index
    if index:
        stage.num_train_epochs, stage.max_steps = schedule.stage_length(args.num_train_epochs, args.max_steps)
        stage.save_strategy = SaveStrategy.NO
        stage.load_best_model_at_end = False
    return stage


def _train_stage(trainer: Trainer, args: TrainingArguments, subset: Subset, callback: _StageCallback) -> None:
    before = trainer.args
    trainer.args, trainer.train_dataset = args, subset.dataset
    reshard(trainer.model)
    if trainer.is_deepspeed_enabled:  # the Trainer destroys the engine of the last stage, but would train with it
        trainer.model_wrapped, trainer.deepspeed = trainer.model, None
    elif trainer.model_wrapped is trainer.model:
        unmark_prepared(trainer.model)
    if callback.weights is not None and callback.weights != weights_checksum(trainer):
        logger.warning(
            "the weights changed after the last state was recorded; a resumed run starts from the recorded weights and"
            " ends in others. Change weights in on_train_end of a callback"
        )
    trainer.add_callback(callback)
    set_seed(args.seed)
    restart_collator(trainer.data_collator)  # as in a resumed run
    others = {} if callback.has_warned_about_others else other_checksums(trainer)
    try:
        trainer.train()
        callback.has_warned_about_others |= warn_about_others(trainer, others)
    finally:
        trainer.remove_callback(callback)
        trainer.args = before
        trainer.optimizer = trainer.lr_scheduler = None
