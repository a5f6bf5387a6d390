"""Recordings of common tasks from a YAML file, flags or a few arguments."""

from .arguments import LoraArguments, RecordArguments

__all__ = ["LoraArguments", "RecordArguments"]
