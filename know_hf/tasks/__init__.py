"""Recordings of common tasks from a YAML file, flags or a few arguments."""

from .._moved import forward
from .arguments import LoraArguments, RecordArguments

__all__ = ["LoraArguments", "RecordArguments"]

__getattr__ = forward(
    __name__,
    record_task="know_hf.tasks.record",
    RecordingPlan="know_hf.tasks.recording_plan",
    plan_task="know_hf.tasks.recording_plan",
    prepare_task="know_hf.tasks.trainer_parts",
)
