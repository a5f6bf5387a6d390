"""Steps, cost and disk of a recording, before it runs."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments

from ..markdown import size as format_bytes
from ..model_tensors import unsharded_shape
from ..trajectory import state_nbytes
from ..trajectory.snapshot import recorded_tensors
from .arguments import RecordArguments
from .trainer_parts import prepare_task


@dataclass(frozen=True)
class RecordingPlan:
    """What a recording will train and write.

    Attributes:
        num_examples (`list[int]`):
            Examples of every state, full data first.
        steps (`list[int]`):
            Optimizer steps of every state; 0 for a state 0 that is not trained.
        epochs (`list[float]`):
            Epochs of every state.
        examples_seen (`int`):
            Examples of all trainings, each counted as often as it is seen.
        relative_cost (`float`):
            Σ r^k: one epoch on every subset, in epochs on all data.
        parameters (`int`):
            Parameters of one state; those of the adapter if there is one.
        bytes_per_state (`int`):
            Bytes of one state.
        free_bytes (`int`):
            Free bytes on the disk of the output folder.
    """

    num_examples: list[int]
    steps: list[int]
    epochs: list[float]
    examples_seen: int
    relative_cost: float
    parameters: int
    bytes_per_state: int
    free_bytes: int

    @property
    def bytes_needed(self) -> int:
        """Upper bound of the bytes of all states and the start; tensors that do not change are stored once."""
        return self.bytes_per_state * (len(self.num_examples) + self.has_start)

    @property
    def has_start(self) -> bool:
        """Whether the weights before the training are recorded too: state 0 is trained."""
        return self.epochs[0] > 0

    def __str__(self) -> str:
        rows = [f"{'state':>5}  {'examples':>10}  {'epochs':>6}  {'steps':>9}"]
        for state, row in enumerate(zip(self.num_examples, self.epochs, self.steps, strict=True)):
            rows.append("{:>5}  {:>10,}  {:>6.3g}  {:>9,}".format(state, *row))
        epochs = self.examples_seen / self.num_examples[0]
        cost = f"cost: {sum(self.steps):,} steps, {self.examples_seen:,} examples = {epochs:.2f} epochs on all data"
        if self.epochs[0]:
            cost += f", {epochs / self.epochs[0]:.2f} times the training of state 0"
        states = f"{len(self.num_examples)} states{' and the start' if self.has_start else ''}"
        disk = (
            f"disk: {states} of {format_bytes(self.bytes_per_state)} ({self.parameters:,}"
            f" parameters) = {format_bytes(self.bytes_needed)}, {format_bytes(self.free_bytes)} free"
        )
        return "\n".join([*rows, "", f"{cost} (Σ r^k = {self.relative_cost:.2f})", disk])


def plan_task(args: RecordArguments) -> RecordingPlan:
    """Load everything that a recording needs, and plan its cost. Trains and writes nothing.

    Args:
        args ([`RecordArguments`]):
            The task; raises the same errors as [`record_task`].

    Returns:
        [`RecordingPlan`]: `str` gives a table.
    """
    parts = prepare_task(args)
    training, schedule = parts.args, args.schedule
    batch = training.train_batch_size * training.world_size
    sizes = schedule.sizes(len(parts.train_dataset), batch * training.gradient_accumulation_steps)
    lengths = [(args.epochs, training.max_steps) if args.start == "train" else (0.0, -1)]
    lengths += [(args.epochs_per_stage, args.steps_per_stage or -1)] * (args.num_states - 1)
    steps, epochs = [], []
    for size, (num_epochs, max_steps) in zip(sizes, lengths, strict=True):
        steps_per_epoch = _steps_per_epoch(size, batch, training)
        steps.append(max_steps if max_steps > 0 else math.ceil(num_epochs * steps_per_epoch))
        epochs.append(max_steps / steps_per_epoch if max_steps > 0 else num_epochs)
    return RecordingPlan(
        num_examples=sizes,
        steps=steps,
        epochs=epochs,
        examples_seen=round(sum(size * length for size, length in zip(sizes, epochs, strict=True))),
        relative_cost=schedule.relative_cost,
        parameters=sum(unsharded_shape(tensor).numel() for tensor in recorded_tensors(parts.model)),
        bytes_per_state=state_nbytes(parts.model)[0],
        free_bytes=_free_bytes(Path(args.output_dir).absolute()),
    )


def _steps_per_epoch(size: int, batch: int, training: TrainingArguments) -> int:
    batches = size // batch if training.dataloader_drop_last else math.ceil(size / batch)
    return max(math.ceil(batches / training.gradient_accumulation_steps), 1)


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free
