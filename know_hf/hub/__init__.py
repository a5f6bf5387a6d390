"""The Hub: enhanced checkpoints, trajectories and KNOWN weights are pushed whole and pulled whole, or not at all."""

from ..hub_client import HubError
from .checking import check_push
from .contents import architecture_of
from .known import push_known
from .pulling import pull, pull_checkpoint, pull_trajectory
from .pushing import push, push_checkpoint, push_trajectory

__all__ = [
    "HubError",
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
