"""Steps, cost and disk of a recording, before it runs."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..checkpoint.files import free_disk
from ..markdown import size as format_bytes
from ..model_tensors import unsharded_shape
from ..trajectory import state_nbytes
from ..trajectory.snapshot import recorded_tensors
from .arguments import RecordArguments
from .trainer_parts import prepare_task


@dataclass(frozen=True)
class RecordingPlan:
    """What a recording will train and write; `str` gives a table."""

    num_examples: list[int]  # of every state, full data first, and of every branch
    steps: list[int]  # optimizer steps of each; 0 for a state 0 that is not trained
    epochs: list[float]
    examples_seen: int  # over all trainings, each counted as often as it is seen
    relative_cost: float  # one epoch on every subset, in epochs on all data
    parameters: int  # of one state; those of the adapter if there is one
    bytes_per_state: int
    free_bytes: int  # on the disk of the output folder
    num_branches: int = 0  # the last of the trainings
    tail_states: int = 0
    has_start: bool = True  # whether the weights before the training are recorded too

    @property
    def bytes_needed(self) -> int:
        """Upper bound of the bytes of everything recorded; tensors that do not change are stored once."""
        return self.bytes_per_state * (len(self.num_examples) + self.tail_states + self.has_start)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {**asdict(self), "bytes_needed": self.bytes_needed}

    def __str__(self) -> str:
        num_states = len(self.num_examples) - self.num_branches
        names = [*map(str, range(num_states)), *(f"branch-{index}" for index in range(self.num_branches))]
        rows = [f"{'state':>8}  {'examples':>10}  {'epochs':>6}  {'steps':>9}"]
        for row in zip(names, self.num_examples, self.epochs, self.steps, strict=True):
            rows.append("{:>8}  {:>10,}  {:>6.3g}  {:>9,}".format(*row))
        epochs = self.examples_seen / self.num_examples[0]
        cost = f"cost: {sum(self.steps):,} steps, {self.examples_seen:,} examples = {epochs:.2f} epochs on all data"
        if self.epochs[0]:
            cost += f", {epochs / self.epochs[0]:.2f} times the training of state 0"
        counts = {"states": num_states, "tail states": self.tail_states, "branches": self.num_branches}
        recorded = [f"{count} {what if count > 1 else what[:-1]}" for what, count in counts.items() if count]
        recorded += ["the start"] * self.has_start
        disk = (
            f"disk: {', '.join(recorded)}, each {format_bytes(self.bytes_per_state)} ({self.parameters:,}"
            f" parameters) = {format_bytes(self.bytes_needed)}, {format_bytes(self.free_bytes)} free"
        )
        return "\n".join([*rows, "", f"{cost} (one epoch on every subset: {self.relative_cost:.2f})", disk])


def plan_task(args: RecordArguments) -> RecordingPlan:
    """Load all that a recording needs and plan its cost, without training; errors as [`record_task`]."""
    parts = prepare_task(args)
    training, schedule = parts.args, args.schedule
    batch = training.train_batch_size * training.world_size
    num_examples, step = len(parts.train_dataset), batch * training.gradient_accumulation_steps
    sizes = schedule.sizes(num_examples, step)
    if schedule.kind == "complementary":
        sizes += [len(half) for half in schedule.halves(num_examples, batch_size=step)]
    lengths = [(args.epochs, training.max_steps) if args.start == "train" else (0.0, -1)]
    lengths += [schedule.stage_length(args.epochs, training.max_steps)] * (schedule.num_stages - 1)
    steps, epochs = [], []
    for size, (num_epochs, max_steps) in zip(sizes, lengths, strict=True):
        of_epoch = steps_per_epoch(size, batch, training)
        steps.append(max_steps if max_steps > 0 else math.ceil(num_epochs * of_epoch))
        epochs.append(max_steps / of_epoch if max_steps > 0 else num_epochs)
    schedule.tail_steps(steps[0])  # checks them
    return RecordingPlan(
        num_examples=sizes,
        steps=steps,
        epochs=epochs,
        examples_seen=round(sum(size * length for size, length in zip(sizes, epochs, strict=True))),
        relative_cost=schedule.relative_cost,
        parameters=sum(unsharded_shape(tensor).numel() for tensor in recorded_tensors(parts.model)),
        bytes_per_state=state_nbytes(parts.model)[0],
        free_bytes=free_disk(Path(args.output_dir)),
        num_branches=len(sizes) - schedule.num_states,
        tail_states=schedule.tail_states,
        has_start=args.start == "train" and args.start_weights != "none",
    )


def steps_per_epoch(size: int, batch: int, training: TrainingArguments) -> int:
    """Return the optimizer steps of an epoch on `size` examples in batches of `batch`, those of all processes."""
    batches = size // batch if training.dataloader_drop_last else math.ceil(size / batch)
    return max(math.ceil(batches / training.gradient_accumulation_steps), 1)
