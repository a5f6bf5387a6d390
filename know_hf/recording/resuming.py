"""Training arguments that determine the trained weights: recorded with every state, compared on resuming."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments

from ..data.subsets import Subset
from ..trajectory import WeightTrajectory

_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
)
_OPTIMIZERS_WITHOUT_ADAM_ARGUMENTS = ("sgd", "rmsprop", "adagrad", "adafactor")


def recorded_arguments(args: TrainingArguments) -> dict[str, str]:
    """Return the training arguments that determine the trained weights, as text."""
    values = {name: getattr(args, name) for name in _ARGUMENTS}
    if args.max_steps > 0:
        del values["num_train_epochs"]
    texts = {name: argument_text(value) for name, value in values.items()}
    if texts["optim"] in _OPTIMIZERS_WITHOUT_ADAM_ARGUMENTS:
        texts = {name: text for name, text in texts.items() if not name.startswith("adam_")}
    return {"examples_per_step": str(examples_per_step(args)), **texts}


def examples_per_step(args: TrainingArguments) -> int:
    """Return the number of examples of one optimizer step, over all processes."""
    processes = 1 if getattr(args.accelerator_config, "split_batches", False) else args.world_size
    return args.train_batch_size * args.gradient_accumulation_steps * processes


def argument_text(value: Any) -> str:
    """Return an argument as text, and an enumeration by its value, because scripts also set it as a string."""
    return str(getattr(value, "value", value))


def check_same_recording(
    trajectory: WeightTrajectory, subsets: Sequence[Subset], stage_arguments: Sequence[TrainingArguments]
) -> None:
    """Raise a `ValueError` for the first recorded state with other data or training arguments than its stage has."""
    for state, subset, args in zip(trajectory.states, subsets, stage_arguments, strict=False):
        if state.subset_fingerprint != subset.fingerprint:
            raise ValueError(
                f"state {state.index} of {trajectory.path} was trained on other data: {state.size} with fingerprint"
                f" {state.subset_fingerprint}, now {subset.size}; use the same dataset to resume, or another folder"
            )
        if not state.training:  # state 0 with start="current"
            continue
        recorded = {"seed": str(state.seed), **state.training}
        for name, value in {"seed": str(args.seed), **recorded_arguments(args)}.items():
            if not _same(recorded.get(name, value), value):
                hint = " (per device × accumulation × processes)" if name == "examples_per_step" else ""
                raise ValueError(
                    f"state {state.index} of {trajectory.path} was trained with {name}={recorded[name]}, but the"
                    f" trainer has {value}{hint}; use the same arguments to resume, or another folder"
                )


def _same(text: str, other: str) -> bool:
    try:
        return float(text) == float(other)  # 1 is 1.0
    except ValueError:
        return text == other
