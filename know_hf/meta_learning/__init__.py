"""Meta-learning: transitions of many trajectories, and the training of KNOWN on them.

Names are imported on first use, so that a script's `--help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "BalancedBatchSampler": "transitions",
    "MetaTrainingArguments": "arguments",
    "MetaTrainingResult": "training",
    "RoleSkill": "training",
    "TransitionDataset": "transitions",
    "meta_train": "training",
    "retrodiction_skill": "training",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from .arguments import MetaTrainingArguments as MetaTrainingArguments
    from .training import MetaTrainingResult as MetaTrainingResult
    from .training import RoleSkill as RoleSkill
    from .training import meta_train as meta_train
    from .training import retrodiction_skill as retrodiction_skill
    from .transitions import BalancedBatchSampler as BalancedBatchSampler
    from .transitions import TransitionDataset as TransitionDataset


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'know_hf.meta_learning' has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value
