"""Record structured forgetting, learn to run it backwards, and write knowledge-overflowed checkpoints.

The public names are imported on first use, so that `import know_hf` needs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0.dev0"

_PUBLIC = {
    "ForgettingSchedule": "schedule",
    "CrossFit": "prediction",
    "Gate": "prediction",
    "WeightTransitionCallback": "recording",
    "induce_forgetting": "recording",
    "RecordArguments": "tasks.arguments",
    "record_task": "tasks.record",
    "WeightTrajectory": "trajectory",
    "tensor_roles": "roles",
    "KNOWNConfig": "known",
    "KNOWNModel": "known",
    "TransitionDataset": "meta_learning",
    "meta_train": "meta_learning",
    "Predictor": "predictors",
    "get_predictor": "predictors",
    "register_predictor": "predictors",
    "compare_arms": "evaluation",
    "compare_checkpoints": "evaluation.checkpoints",
    "merge_adapters": "trajectory.merging",
    "plan_prediction": "prediction",
    "predict_overflowed_weights": "predict",
    "pull": "hub",
    "push": "hub",
    "run_suite": "evaluation",
    "recalibrate_batch_norm": "batch_norm",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from .batch_norm import recalibrate_batch_norm as recalibrate_batch_norm
    from .evaluation import compare_arms as compare_arms
    from .evaluation import run_suite as run_suite
    from .evaluation.checkpoints import compare_checkpoints as compare_checkpoints
    from .hub import pull as pull
    from .hub import push as push
    from .known.configuration_known import KNOWNConfig as KNOWNConfig
    from .known.modeling_known import KNOWNModel as KNOWNModel
    from .meta_learning import TransitionDataset as TransitionDataset
    from .meta_learning import meta_train as meta_train
    from .predict import predict_overflowed_weights as predict_overflowed_weights
    from .prediction import CrossFit as CrossFit
    from .prediction import Gate as Gate
    from .prediction import plan_prediction as plan_prediction
    from .predictors import Predictor as Predictor
    from .predictors import get_predictor as get_predictor
    from .predictors import register_predictor as register_predictor
    from .recording import WeightTransitionCallback as WeightTransitionCallback
    from .recording import induce_forgetting as induce_forgetting
    from .roles import tensor_roles as tensor_roles
    from .schedule import ForgettingSchedule as ForgettingSchedule
    from .tasks.arguments import RecordArguments as RecordArguments
    from .tasks.record import record_task as record_task
    from .trajectory import WeightTrajectory as WeightTrajectory
    from .trajectory.merging import merge_adapters as merge_adapters


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'know_hf' has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
