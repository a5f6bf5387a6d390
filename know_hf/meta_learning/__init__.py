"""Meta-learning: transitions of many trajectories, and the training of KNOWN on them.

Names are imported lazily, so that the `--help` of a script does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "BalancedBatchSampler": "dataset",
    "CollectedTrajectory": "collection",
    "MetaTrainingArguments": "training_arguments",
    "MetaTrainingResult": "training",
    "RoleSkill": "skill",
    "TransitionDataset": "dataset",
    "meta_train": "training",
    "read_collection": "collection",
    "retrodiction_skill": "skill",
    "split_collection": "collection",
    "start_processes": "processes",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from .collection import CollectedTrajectory as CollectedTrajectory
    from .collection import read_collection as read_collection
    from .collection import split_collection as split_collection
    from .dataset import BalancedBatchSampler as BalancedBatchSampler
    from .dataset import TransitionDataset as TransitionDataset
    from .processes import start_processes as start_processes
    from .skill import RoleSkill as RoleSkill
    from .skill import retrodiction_skill as retrodiction_skill
    from .training import MetaTrainingResult as MetaTrainingResult
    from .training import meta_train as meta_train
    from .training_arguments import MetaTrainingArguments as MetaTrainingArguments


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'know_hf.meta_learning' has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value
