"""Record structured forgetting, learn to run it backwards, and write knowledge-overflowed checkpoints.

The public names are imported on first use, so that `import know_hf` needs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "ForgettingSchedule": "schedule",
    "Gate": "gate",
    "WeightTransitionCallback": "recording",
    "induce_forgetting": "recording",
    "RecordArguments": "task_arguments",
    "record_task": "tasks",
    "WeightTrajectory": "trajectory",
    "tensor_roles": "roles",
    "KNOWNConfig": "configuration_known",
    "KNOWNModel": "modeling_known",
    "TransitionDataset": "meta_learning",
    "meta_train": "meta_learning",
    "get_predictor": "predictors",
    "compare_arms": "evaluation",
    "merge_adapters": "merging",
    "plan_prediction": "prediction",
    "predict_overflowed_weights": "prediction",
    "pull": "hub",
    "push": "hub",
    "run_suite": "evaluation",
    "recalibrate_batch_norm": "batch_norm",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from .batch_norm import recalibrate_batch_norm as recalibrate_batch_norm
    from .configuration_known import KNOWNConfig as KNOWNConfig
    from .evaluation import compare_arms as compare_arms
    from .evaluation import run_suite as run_suite
    from .gate import Gate as Gate
    from .hub import pull as pull
    from .hub import push as push
    from .merging import merge_adapters as merge_adapters
    from .meta_learning import TransitionDataset as TransitionDataset
    from .meta_learning import meta_train as meta_train
    from .modeling_known import KNOWNModel as KNOWNModel
    from .prediction import plan_prediction as plan_prediction
    from .prediction import predict_overflowed_weights as predict_overflowed_weights
    from .predictors import get_predictor as get_predictor
    from .recording import WeightTransitionCallback as WeightTransitionCallback
    from .recording import induce_forgetting as induce_forgetting
    from .roles import tensor_roles as tensor_roles
    from .schedule import ForgettingSchedule as ForgettingSchedule
    from .task_arguments import RecordArguments as RecordArguments
    from .tasks import record_task as record_task
    from .trajectory import WeightTrajectory as WeightTrajectory


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'know_hf' has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
