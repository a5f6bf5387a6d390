"""Comparison of a recording with the states that it continues."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainingArguments

from ..data.subsets import Subset
from ..trajectory import StateRecord, WeightTrajectory
from .recorded_arguments import ARGUMENTS_CLASS, compared_arguments


def check_same_recording(
    trajectory: WeightTrajectory,
    subsets: Sequence[Subset],
    stage_arguments: Sequence[TrainingArguments],
    of_trainer: Mapping[str, Any],
) -> None:
    """Raise a `ValueError` for the first recorded state with other data or training arguments than its stage has."""
    for state, subset, args in zip(trajectory.trained, subsets, stage_arguments, strict=False):
        if state.subset_fingerprint != subset.fingerprint:
            raise ValueError(
                f"{state.label} of {trajectory.path} was trained on other data: {state.size} with fingerprint"
                f" {state.subset_fingerprint}, now {subset.size}; use the same dataset to resume, or another folder"
            )
        # without arguments: state 0 with start="current"
        if state.training and (difference := _difference(state, args, of_trainer)):
            name, recorded, given = difference
            hint = " (per device × accumulation × processes)" if name == "examples_per_step" else ""
            raise ValueError(
                f"{state.label} of {trajectory.path} was trained with {name}={recorded}, but the trainer has"
                f" {given}{hint}; use the same arguments to resume, or another folder"
            )


def _difference(
    state: StateRecord, args: TrainingArguments, of_trainer: Mapping[str, Any]
) -> tuple[str, str, str] | None:
    """Return the first argument that differs: its name, the recorded text and the given one.

    A record of know_hf 0.2.0 or older names only a part of the arguments; the others are not compared. In a newer
    record, what is missing had its default.
    """
    recorded, is_complete = state.training, ARGUMENTS_CLASS in state.training
    compared = compared_arguments(args, of_trainer)
    if state.seed != args.seed:
        return "seed", str(state.seed), str(args.seed)
    for name, (text, default) in compared.items():
        old = recorded.get(name, default if is_complete else text)
        if not _same(old, text):
            return name, old, text
    missing = sorted(recorded.keys() - compared.keys() - {ARGUMENTS_CLASS}) if is_complete else []
    return (missing[0], recorded[missing[0]], f"none in its {type(args).__name__}") if missing else None


def _same(text: str, other: str) -> bool:
    try:
        return float(text) == float(other)  # 1 is 1.0
    except ValueError:
        return text == other
