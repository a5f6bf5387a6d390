"""[`WeightTransitionCallback`] holds the one idea: when a training ends, its weights are the next state."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..distributed import gather_state_dict, reshard
from ..schedule import ForgettingSchedule
from ..trajectory import WeightTrajectory, check_adapter
from .validation import (
    check_arguments,
    training_facts,
    warn_of_changes,
    warn_of_early_end,
    warn_of_statistics,
    warn_of_warmup,
)


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
        `FileExistsError`: when the folder holds a model.
        `ValueError`: when the folder's trajectory was recorded with another schedule; before a training, when its
            subset is not smaller than that of the last state, is a stream without a schedule, the adapter can't be
            recorded, or `enable_jit_checkpoint`, `bf16_full_eval` or `fp16_full_eval` is on; after it, when a weight
            is not finite or no process holds all weights.
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
        check_arguments(args)
        check_adapter(kwargs["model"])
        size = num_examples_of(kwargs)
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
        warn_of_warmup(args, state)
        if not self._sizes:
            warn_of_changes(kwargs["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not self._stepped:
            warn_of_statistics(kwargs["model"])  # not before: each step sets the mode of every layer
        self._stepped = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state_dict = gather_state_dict(kwargs["model"], self.trainer)  # takes every process
        if state.is_world_process_zero:
            warn_of_early_end(len(self._sizes), state)
            self.record(
                kwargs["model"],
                state_dict=state_dict,
                num_examples=num_examples_of(kwargs),
                steps=state.global_step,
                seed=args.seed,
                training=training_facts(args),
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


def num_examples_of(kwargs: Mapping[str, Any]) -> int | None:
    """Number of examples that a training's loader has, from the arguments of its events; `None` of a stream."""
    dataset = kwargs["train_dataloader"].dataset
    try:
        return len(dataset)
    except TypeError:  # a stream; accelerate's share of one for a process has a __len__ that fails
        return None
