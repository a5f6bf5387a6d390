"""[`WeightTransitionCallback`]: when a training ends, its weights become the next state."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging

from ..checkpoint import check_output
from ..distributed import gathering, is_marked_prepared, on_every_process, reshard, unmark_prepared
from ..local_paths import loaded_from
from ..schedule import ForgettingSchedule
from ..trajectory import WeightTrajectory, check_recordable
from ..trajectory.recorder import check_savable
from ..trajectory.start import StartWeights
from .loaders import num_examples
from .optimizers import check_trains, evaluated_weights, use_evaluated_weights
from .recorded_arguments import recorded_arguments
from .validation import check_arguments, check_reloadable, warn_about_statistics, warn_about_warmup

logger = logging.get_logger(__name__)


class WeightTransitionCallback(TrainerCallback):
    """Record the weights at the end of every training as the next state of a trajectory.

    Use it without [`induce_forgetting`] in any loop that trains on smaller and smaller subsets:

    ```python
    callback = WeightTransitionCallback("trajectory/", schedule)
    for indices in schedule.indices(len(dataset)):
        Trainer(model, args, train_dataset=dataset.select(indices), callbacks=[callback]).train()
    ```

    The weights are copied. Unless the state is the last of the schedule, a thread writes them during the next
    training. The type of a write error is logged at once. The error itself is raised when the next training begins or
    ends, or when the trajectory is read.

    An optimizer with an evaluation mode, such as a schedule-free one, is put into it, so the recorded weights are
    those used for evaluation. Callbacks that come before this one, such as an exponential moving average, may change
    the weights in `on_train_end`; the changed weights are recorded.

    Args:
        output_dir (`str` or `Path`):
            Folder of the trajectory; an existing trajectory is continued.
        schedule ([`ForgettingSchedule`], *optional*):
            Stored in `trajectory.json`, and compared with it when a recording continues. Required for streams, where
            state k is recorded as trained on the share `ratio**k`.
        trainer (`Trainer`, *optional*):
            The trainer whose `optimizer_cls_and_kwargs` are recorded. Errors of a tail state are raised on all of its
            processes.
        dtype (`torch.dtype`, *optional*):
            Floating-point dtype to store, such as `torch.bfloat16`; defaults to the dtype of each weight. A resumed
            run continues from the stored weights.
        start_weights (`"reference"`, `"full"` or `"none"`, *optional*, defaults to `"reference"`):
            How to record the start, the weights before the first training. `"reference"` stores tensors that equal
            those of a base model in the Hub cache as a reference to its id and commit, `"full"` copies them, and
            `"none"` records no start. A training that resumes from a checkpoint has no start.

    Attributes:
        trajectory ([`WeightTrajectory`]):
            The states recorded so far. Only the main process writes.

    Raises:
        `FileExistsError`:
            When the folder holds a model.
        `ValueError`:
            When the trajectory in the folder has another schedule, or the folder is inside another trajectory. Before
            a training, when its subset is not smaller than that of the last state or is a stream without a schedule;
            a state could not hold the weights that train; the folder is inside that of the model; the generation
            config or the processing class cannot be saved; the optimizer does not train the model; DDP does not wrap
            the model because it was evaluated before the callback was added; or `enable_jit_checkpoint`,
            `bf16_full_eval` or `fp16_full_eval` is on. After a training, when a weight is not finite or no process
            holds all weights.
        `OSError`:
            Before a training, when the folder cannot be written.
        `TrajectoryBusyError`:
            Before a training, when another process records to the folder.
    """

    def __init__(
        self,
        output_dir: str | Path,
        schedule: ForgettingSchedule | None = None,
        *,
        trainer: Trainer | None = None,
        dtype: torch.dtype | None = None,
        start_weights: StartWeights = "reference",
    ) -> None:
        if WeightTrajectory.exists(output_dir):
            self.trajectory = WeightTrajectory(output_dir)
            if schedule is not None and self.trajectory.schedule != schedule:
                raise ValueError(
                    f"{output_dir} was recorded with {self.trajectory.schedule}, not {schedule}; use the same schedule"
                    " to resume, or record to another folder"
                )
        else:
            self.trajectory = WeightTrajectory.create(output_dir, schedule)
        self.trainer = trainer
        self.dtype = dtype
        self.start_weights = start_weights
        self._trainings = 0
        self._sizes = [state.num_examples for state in self.trajectory.trained]
        self._stage = len(self._sizes)  # known on every process, unlike _sizes
        self._stepped = False

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        unmark_prepared(kwargs["model"])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        check_arguments(args)
        if is_marked_prepared(kwargs["model"]):
            raise ValueError(
                f"{type(kwargs['model']).__name__} was evaluated before this callback was added, and accelerate does"
                " not wrap an evaluated model for DDP: every process would train its own weights; pass the callback"
                " when the trainer is created: Trainer(callbacks=[...])"
            )
        check_recordable(kwargs["model"])
        self.check_optimizer(state, **kwargs)
        size = num_examples(kwargs["train_dataloader"])
        if size is None and self.trajectory.schedule is None:
            raise ValueError(
                "the training data is a stream of unknown size; pass the schedule that divides it:"
                " WeightTransitionCallback(output_dir, schedule)"
            )
        if (schedule := self.trajectory.schedule) is not None and schedule.kind == "complementary":
            raise ValueError("the branches of kind='complementary' begin from Θ0; record them with induce_forgetting")
        # a collective call: whether it is the first training is known on every process
        self.check_tail(state)
        begins = state.global_step == 0 and not self._trainings and self.start_weights != "none"
        self._trainings += 1
        if state.is_world_process_zero:
            self._check_stage(size, args, state, **kwargs)
        if begins:
            with gathering(kwargs["model"]) as state_dict:
                if state.is_world_process_zero and not self._sizes:
                    self.record_start(kwargs["model"], state_dict)

    def _check_stage(self, size: int | None, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """Check the folder, the number of examples and whether state 0 can be saved; on the main process."""
        self.trajectory.check()
        if not self._sizes:
            check_output(self.trajectory.path, [loaded_from(kwargs["model"])], replaces=False)
        if not self._stepped:
            with self.trajectory.recording():  # an error now if the folder cannot be written
                pass
        last = self._sizes[-1] if self._sizes else None
        if size is not None and last is not None and size >= last:
            raise ValueError(
                f"state {len(self._sizes)} of {self.trajectory.path} would be trained on {size} examples, the previous"
                f" state on {last}; every stage needs fewer examples than the one before"
            )
        warn_about_warmup(args, state)
        if not self._sizes:
            check_reloadable(kwargs["model"])
            check_savable(self.trajectory.path, kwargs["model"], kwargs.get("processing_class"))

    def check_optimizer(self, state: TrainerState, **kwargs: Any) -> None:
        """Check that the optimizer of a training trains the model, and warn once when it trains more."""
        check_trains(kwargs["optimizer"], kwargs["model"], warn=state.is_world_process_zero and not self._stepped)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and not self._stepped:
            warn_about_statistics(kwargs["model"])  # not earlier: each step sets the mode of every layer
        self._stepped = True
        schedule = self.trajectory.schedule
        if self._stage or schedule is None or not schedule.tail_states:
            return
        steps = schedule.tail_steps(state.max_steps)
        if state.global_step in steps:
            self.record_tail(steps.index(state.global_step), args, state, **kwargs)

    def record_tail(self, index: int, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        """Write the weights in the training of state 0 as a tail state; every process must call it."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]

        def write() -> None:
            with gathering(model) as state_dict:
                if state.is_world_process_zero:
                    self.trajectory.record_tail(
                        model, index, state.global_step, state_dict=state_dict, dtype=self.dtype
                    )

        with evaluated_weights(optimizer):
            on_every_process(None if self.trainer is None else self.trainer.accelerator, write)
        reshard(model)

    def check_tail(self, state: TrainerState) -> None:
        """Raise a `ValueError` when the training of state 0 has too few steps for the tail states of the schedule."""
        if not self._stage and (schedule := self.trajectory.schedule) is not None:
            schedule.tail_steps(state.max_steps)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        use_evaluated_weights(kwargs["optimizer"], args, state)
        with gathering(kwargs["model"]) as state_dict:
            if state.is_world_process_zero:
                if state.global_step < state.max_steps:
                    logger.warning(
                        f"the training of state {len(self._sizes)} ended after {state.global_step} of"
                        f" {state.max_steps} steps, because a callback stopped it or its data ran out; the state is"
                        " recorded"
                    )
                self.record(
                    kwargs["model"],
                    state_dict=state_dict,
                    num_examples=num_examples(kwargs["train_dataloader"]),
                    steps=state.global_step,
                    seed=args.seed,
                    training=recorded_arguments(
                        args, {"optimizer_cls_and_kwargs": getattr(self.trainer, "optimizer_cls_and_kwargs", None)}
                    ),
                    processing_class=kwargs.get("processing_class"),
                )
        self._stage += 1

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        reshard(kwargs["model"])  # the next training creates its optimizer before any of its events
        unmark_prepared(kwargs["model"])

    on_predict = on_evaluate

    def record_start(self, model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None) -> None:
        """Write the weights before the first training; see [`WeightTrajectory.record_start`]."""
        self.trajectory.record_start(model, state_dict=state_dict, dtype=self.dtype, weights=self.start_weights)

    def record(self, model: nn.Module, **details: Any) -> None:
        """Copy the weights and write them as the next state; takes the arguments of [`WeightTrajectory.record`].

        Without a schedule, and for its last state, this waits for the write: the trajectory is complete when the loop
        ends.
        """
        schedule = self.trajectory.schedule
        if schedule is not None and schedule.kind == "complementary" and self._sizes:
            details["kind"] = "branch"
        if schedule is not None and details["num_examples"] is None:
            details.setdefault("fraction", schedule.ratio ** len(self._sizes))
        is_last = schedule is None or len(self._sizes) + 1 >= schedule.num_stages
        self.trajectory.record(model, dtype=self.dtype, background=not is_last, **details)
        self._sizes.append(details["num_examples"])
