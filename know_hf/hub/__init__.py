"""The Hub: enhanced checkpoints, trajectories and KNOWN weights are pushed whole and pulled whole, or not at all."""

from ..hub_client import HubError
from .pull import pull, pull_checkpoint, pull_trajectory
from .push import push, push_checkpoint, push_trajectory
from .push_checks import PushOptions, check_push
from .push_known import push_known
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
