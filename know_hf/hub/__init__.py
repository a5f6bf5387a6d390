"""Push checkpoints, trajectories and KNOWN weights to the Hub, and pull them, completely or not at all."""

from ..hub_client import HubError
from .pull import pull, pull_checkpoint, pull_trajectory
from .push import push, push_checkpoint, push_known, push_trajectory
from .push_target import PushOptions, check_push
from .repo_contents import architecture_of

__all__ = [
    "HubError",
    "PushOptions",
    "architecture_of",
    "check_push",
    "pull",
    "pull_checkpoint",
    "pull_trajectory",
    "push",
    "push_checkpoint",
    "push_known",
    "push_trajectory",
]
