"""Recording: structured forgetting with a `Trainer`, every state handed to a [`WeightTrajectory`].

[`WeightTransitionCallback`] holds the one idea: when a training ends, its weights are the next state.
[`induce_forgetting`] runs the stages with a given `Trainer` and resumes where an earlier run stopped.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from .checkpoint import check_free_disk
from .distributed import check_gathering, gather_state_dict, is_sharded, on_main_process, reshard
from .inspection import displacement
from .roles import is_adapter
from .schedule import ForgettingSchedule
from .subsets import Subset, divide
from .trajectory import StateRecord, WeightTrajectory, state_nbytes

logger = logging.get_logger(__name__)


class WeightTransitionCallback(TrainerCallback):
    """Records the weights at the end of every training as the next state of one trajectory.

    [`induce_forgetting`] uses it; it also works alone, in a loop of one's own that trains on ever smaller subsets:

    ```python
    callback = WeightTransitionCallback("trajectory/", schedule)
    for indices in schedule.indices(len(dataset)):
        Trainer(model, args, train_dataset=dataset.select(indices), callbacks=[callback]).train()
    ```

    The weights are copied, and where the schedule has more states to come, a thread writes them while the training
    goes on. An error of the writing is logged at once and raised when the next training begins or ends, or the
    trajectory is read.

    Args:
        output_dir (`str` or `Path`): The trajectory's folder; one that holds a trajectory is continued.
        schedule ([`ForgettingSchedule`], *optional*): Kept in `trajectory.json` and compared when continuing. Streams
            need it: state k is then recorded as trained on the share `ratio**k`.
        trainer (`Trainer`, *optional*): Needed where no process holds the whole weights (FSDP, ZeRO-3).
        dtype (`torch.dtype`, *optional*): Floating-point dtype to store, such as `torch.bfloat16`; by default that of
            each weight. A run that resumes goes on from what was stored.

    Attributes:
        trajectory ([`WeightTrajectory`]): The states recorded so far. Only the main process writes.

    Raises:
        `ValueError`: when the folder's trajectory was recorded with another schedule; before a training, when its
            subset is not smaller than that of the last state, is a stream without a schedule, or
            `enable_jit_checkpoint` is on; after it, when a weight is not finite or no process holds all weights.
    """

    def __init__(
        self,
        output_dir: str | Path,
        schedule: ForgettingSchedule | None = None,
        *,
        trainer: Trainer | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if WeightTrajectory.exists(output_dir):
            self.trajectory = WeightTrajectory(output_dir)
            if schedule is not None and self.trajectory.schedule != schedule:
                raise ValueError(
                    f"{output_dir} was recorded with {self.trajectory.schedule}, not with {schedule}; continue with"
                    " the same schedule or record to another folder"
                )
        else:
            self.trajectory = WeightTrajectory.create(output_dir, schedule)
        self.trainer = trainer
        self.dtype = dtype
        self._sizes = [state.num_examples for state in self.trajectory.states]
        self._stepped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _check_arguments(args)
        size = _num_examples(kwargs)
        if size is None and self.trajectory.schedule is None:
            raise ValueError(
                f"a state of {self.trajectory.path} would be trained on a stream, which has no size to compare with"
                " that of the state before; give the callback the schedule that divided the stream:"
                " WeightTransitionCallback(output_dir, schedule)"
            )
        if not state.is_world_process_zero:
            return
        self.trajectory.check()
        last = self._sizes[-1] if self._sizes else None
        if size is not None and last is not None and size >= last:
            raise ValueError(
                f"state {len(self._sizes)} of {self.trajectory.path} would be trained on {size} examples, but state"
                f" {len(self._sizes) - 1} saw {last}; every stage trains on fewer examples"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not self._stepped:
            _warn_of_statistics(kwargs["model"])  # not before: each step sets the mode of every layer
        self._stepped = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state_dict = gather_state_dict(kwargs["model"], self.trainer)  # takes every process
        if state.is_world_process_zero:
            self.record(
                kwargs["model"],
                state_dict=state_dict,
                num_examples=_num_examples(kwargs),
                steps=state.global_step,
                seed=args.seed,
                processing_class=kwargs.get("processing_class"),
            )

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        reshard(kwargs["model"])  # the optimizer of the next training is made before any event of it

    def record(self, model: nn.Module, **facts: Any) -> None:
        """Copies the weights and lets a thread write the next state; arguments as [`WeightTrajectory.record`].

        The last state of the schedule is waited for, and so is every state without one: what comes after the loop
        finds the trajectory whole.
        """
        schedule = self.trajectory.schedule
        if schedule is not None and facts["num_examples"] is None:
            facts.setdefault("fraction", schedule.ratio ** len(self._sizes))
        more = schedule is not None and len(self._sizes) + 1 < schedule.num_states
        self.trajectory.record(model, dtype=self.dtype, background=more, **facts)
        self._sizes.append(facts["num_examples"])


class _StageCallback(WeightTransitionCallback):
    """The callback as [`induce_forgetting`] uses it: told what a stage is, its errors kept for all processes."""

    def __init__(self, output_dir: str | Path, schedule: ForgettingSchedule, **options: Any) -> None:
        super().__init__(output_dir, schedule, **options)
        self.subset: Subset | None = None
        self.on_written: Callable[[StateRecord], object] | None = None
        self.failure: Exception | None = None
        self._loaded: tuple[Subset, int | None] | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The sizes were looked at before the first stage; whether the loader follows them shows only now."""
        assert self.subset is not None
        last, found = self._loaded, _num_examples(kwargs)
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
    called again with the same folder, the run goes on with the first state that is missing, and ends in the same
    weights as a run that was never interrupted. Where the trainer has an `eval_dataset`, every state is evaluated.
    Size, displacement and metrics of every state go to the trainer's loggers under `forgetting/`.

    To be called on every process of a distributed training; the main one writes, and its errors come out on all.

    Afterwards the trainer has its own dataset, arguments and callbacks again, and its model holds Θ0, the weights
    after training on all data (under FSDP and ZeRO-3 it keeps those of the last state).

    Adapters hold no statistics of the BatchNorm layers below them. Where these are in training mode, they stay as the
    last stage left them and a resumed run ends in other weights: a warning says so. Layers in `modules_to_save`, or in
    evaluation mode, are not concerned. A recording under ZeRO-3 can't be resumed.

    Args:
        trainer (`Trainer`): Any trainer of transformers' kind with a `train_dataset`. Of a `PeftModel` the adapter is
            recorded.
        schedule ([`ForgettingSchedule`]): The subsets.
        output_dir (`str` or `Path`): The trajectory's folder.
        start (`"train"` or `"current"`, *optional*, defaults to `"train"`):
            `"train"` makes Θ0 by training on all data, just as `trainer.train()` would; `"current"` takes the weights
            that the model has.
        dtype (`torch.dtype`, *optional*): Floating-point dtype to store, see [`WeightTransitionCallback`].

    Returns:
        [`WeightTrajectory`]: with `schedule.num_states` states.

    Raises:
        `ValueError`: when the subsets are too small, the dataset can't be divided, the trainer's optimizer can't be
            made afresh, `enable_jit_checkpoint`, `bf16_full_eval` or `fp16_full_eval` is on, the trainer's loader does
            not follow its `train_dataset`, a state is not finite, or the folder holds a trajectory of another schedule
            or other data, or one to go on with under ZeRO-3.
        `OSError`: before the training, when the disk has not the space that all states need.
        `TrajectoryBusyError`: when another process records to the folder.
    """
    if start not in ("train", "current"):
        raise ValueError(f"start must be 'train' or 'current', got {start!r}")
    _check(trainer)
    batch_size = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
    subsets = divide(trainer.train_dataset, schedule, batch_size)
    callback = _StageCallback(output_dir, schedule, trainer=trainer, dtype=dtype)
    trajectory = callback.trajectory
    with ExitStack() as stack:
        done = on_main_process(trainer.accelerator, lambda: _begin(stack, trajectory, subsets, trainer.model, dtype))
        if done:
            trajectory.load_into(trainer.model, done - 1)
        stack.enter_context(_borrowed(trainer))
        progress = stack.enter_context(_Progress(trainer, trajectory, schedule.num_states))
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


def _check(trainer: Trainer) -> None:
    check_gathering(trainer)
    _check_arguments(trainer.args)
    if getattr(trainer.model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"the {type(trainer.model).__name__} has an adapter inside (add_adapter); wrap the model with"
            " peft.get_peft_model instead, so that the trajectory is one of the adapter"
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


def _check_arguments(args: TrainingArguments) -> None:
    if getattr(args, "enable_jit_checkpoint", False):  # older versions of transformers have none
        raise ValueError(
            "enable_jit_checkpoint=True ends a training early on SIGTERM as if it were done, and half of it would be"
            " recorded as a whole state; switch it off: a recording goes on with the state it was stopped in"
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ValueError(
                f"{name}=True rounds the model's own weights at every evaluation, and the next stage would go on from"
                " the rounded ones; switch it off: with bf16 or fp16 evaluation is in half precision too"
            )


def _warn_of_statistics(model: nn.Module) -> None:
    """Says so where an adapter's training moves statistics of its base, which are in no state."""
    if not is_adapter(model):
        return
    moving = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.training
        and module.track_running_stats
        # peft's names of what an adapter holds, and of what it holds instead of
        and not {"modules_to_save", "original_module"} & set(name.split("."))
    ]
    if moving:
        logger.warning(
            f"{len(moving)} BatchNorm layers below the adapter are in training mode, such as {moving[0]!r}. The"
            " training moves their running statistics, which no state of an adapter holds: a resumed run ends in other"
            " weights, the model given back as Θ0 has the statistics of the last stage, and reloaded adapters have"
            " those of the base. Put these layers into modules_to_save of the adapter's config, or keep them in"
            " evaluation mode (override train(), which every step of a Trainer calls)"
        )


def _begin(
    stack: ExitStack, trajectory: WeightTrajectory, subsets: list[Subset], model: nn.Module, dtype: torch.dtype | None
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
    first, further = state_nbytes(model, dtype)
    missing = len(subsets) - trajectory.num_states
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


def _train_stage(
    trainer: Trainer, index: int, schedule: ForgettingSchedule, subset: Subset, callback: _StageCallback
) -> None:
    args = trainer.args
    stage = copy.copy(args)
    stage.seed = args.seed + index
    if index:
        stage.num_train_epochs = schedule.epochs_per_stage
        stage.max_steps = schedule.steps_per_stage or -1
        stage.save_strategy = SaveStrategy.NO
        stage.load_best_model_at_end = False
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


class _Progress:
    """Bar, evaluation and logs of the stages."""

    def __init__(self, trainer: Trainer, trajectory: WeightTrajectory, num_states: int) -> None:
        self._trainer, self._trajectory = trainer, trajectory
        self._steps = {state.index: state.steps for state in trajectory.states}
        self._metrics: dict[int, dict[str, float]] = {}
        self._written: dict[int, dict[str, float]] = {}
        self._moved = ""
        main = trainer.accelerator.is_main_process
        self._bar = tqdm(
            total=num_states, initial=trajectory.num_states, desc="forgetting", unit="state", disable=not main
        )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def begin(self, index: int, subset: Subset) -> None:
        self._log()
        self._bar.set_postfix_str(f"state {index}: {subset.size}{self._moved}")

    def written(self, record: StateRecord) -> None:
        """Called by the thread that wrote a state."""
        moved = displacement(self._trajectory, record.index)
        values = {"state": record.index, "displacement": moved, "num_examples": record.num_examples}
        self._steps[record.index] = record.steps
        self._moved = f", state {record.index} moved by {moved:.1%}" if record.index else ""
        self._written[record.index] = {key: value for key, value in values.items() if value is not None}
        self._bar.update()

    def evaluate(self, index: int) -> None:
        """Evaluates the state that the model holds, while it is being written."""
        if self._trainer.eval_dataset is None:
            return
        timing = ("_runtime", "_per_second", "_preparation_time")
        found: Mapping[str, Any] = self._trainer.evaluate()
        metrics = {}
        for name in [name for name in found if name.startswith("eval_") and not name.endswith(timing)]:
            number = _finite_number(found[name])
            if number is None:
                logger.warning(f"{name} of state {index} is {found[name]!r}, no finite number, and is not recorded")
            else:
                metrics[name] = number
        self._metrics[index] = metrics
        on_main_process(self._trainer.accelerator, lambda: self._trajectory.update_metrics(index, metrics))
        self._log()

    def finish(self) -> None:
        """Waits for the last state, and raises what went wrong with it."""
        self._trajectory.check(wait=True)
        self._log()

    def _log(self) -> None:
        state = self._trainer.state
        step = state.global_step
        for index in sorted(self._written):
            values = {**self._written.pop(index), **self._metrics.pop(index, {})}
            # every stage counts its steps from 0; loggers want them to rise
            state.global_step = sum(self._steps[k] for k in range(index + 1))
            self._trainer.log({f"forgetting/{name}": value for name, value in values.items()})
        state.global_step = step


def _finite_number(value: Any) -> float | None:
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _num_examples(kwargs: Mapping[str, Any]) -> int | None:
    dataset = kwargs["train_dataloader"].dataset
    try:
        return len(dataset)
    except TypeError:  # a stream; accelerate's share of one for a process has a __len__ that fails
        return None
