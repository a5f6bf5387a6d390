"""Checks before a recording: what cannot be recorded, resumed or read back is refused before any training.

A new refusal is a function that raises a `ValueError`, called by [`check_trainer`] if it needs the trainer, by
[`check_arguments`] or [`check_model`] if not.
"""

import copy
from contextlib import nullcontext
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, initialization
from transformers.utils import logging

from ..distributed import check_gathering
from ..model_tensors import converted_names, unsharded_shape
from ..trajectory import check_adapter

logger = logging.get_logger(__name__)


def check_trainer(trainer: Trainer) -> None:
    """Raise an error unless the trainer can train stage after stage."""
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
    check_gathering(trainer)
    check_arguments(trainer.args)
    check_model(trainer.model)
    _check_optimizer(trainer)


def check_arguments(args: TrainingArguments) -> None:
    """Raise a `ValueError` for an argument that ends a training early or rounds the weights."""
    if getattr(args, "enable_jit_checkpoint", False):  # missing in older versions of transformers
        raise ValueError(
            "enable_jit_checkpoint=True ends a training early on SIGTERM, and its weights would be recorded as a"
            " finished state; turn it off, a recording resumes without it"
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ValueError(
                f"{name}=True rounds the weights of the model at every evaluation, and the next stage would start from"
                f" the rounded weights; turn it off and use {name[:4]}=True, which also evaluates in half precision"
            )


def check_model(model: nn.Module) -> None:
    """Raise a `ValueError` for an adapter that cannot be saved on its own."""
    check_adapter(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"the {type(model).__name__} has an adapter added by add_adapter; wrap the model with peft.get_peft_model"
            " instead, so that the adapter is recorded"
        )


def check_reloadable(model: nn.Module) -> None:
    """Warn when `from_pretrained` cannot load the states, because the config does not describe the model.

    Raises a `ValueError` when, in addition, saving splits or merges tensors: only a model built from its config reads
    them back.
    """
    if not isinstance(model, PreTrainedModel):
        return
    name = type(model).__name__
    try:
        rebuilt = _rebuild(model)
    except Exception as error:
        problem = f"cannot build a {name} from its config alone ({error})"
        if converted := converted_names(model):
            raise ValueError(
                f"{problem}, and saving splits or merges tensors such as {min(converted)!r}, which only such a model"
                " reads back: the recording could not be resumed; use a class that takes only its config"
            ) from error
    else:
        shapes, rebuilt_shapes = (
            {key: unsharded_shape(tensor) for key, tensor in each.state_dict(keep_vars=True).items()}
            for each in (model, rebuilt)
        )
        keys = shapes.keys() | rebuilt_shapes.keys()
        differing = sorted(key for key in keys if shapes.get(key) != rebuilt_shapes.get(key))
        if not differing:
            return
        problem = f"a {name} built from its config has a different tensor {differing[0]!r}"
    logger.warning(
        f"{problem}: from_pretrained and load_model cannot load the states or predictions from them. The recording"
        " continues. To load a state or a prediction, build the model the same way and call load_into(model) of the"
        " trajectory or the prediction result, or use a class that builds the complete model in its __init__"
    )


def _rebuild(model: PreTrainedModel) -> PreTrainedModel:
    """Build a model on the meta device from the config as it is saved, like `from_pretrained`."""
    safely = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)
    with TemporaryDirectory() as folder:
        copy.deepcopy(model.config).save_pretrained(folder)
        config = type(model.config).from_pretrained(folder)
    with torch.random.fork_rng(devices=[]), torch.device("meta"), safely():
        return type(model)(config)


def _check_optimizer(trainer: Trainer) -> None:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if optimizer is None:
        return
    # A trainer that has trained before holds the optimizer it created itself, which is fine.
    optimizer_class, options = _new_optimizer(trainer)
    if type(optimizer) is not optimizer_class or any(optimizer.defaults.get(k, v) != v for k, v in options.items()):
        raise ValueError(
            f"the trainer was given its own {type(optimizer).__name__}, but each stage needs a new optimizer; pass"
            " optimizer_cls_and_kwargs=(class, options) to the Trainer instead of optimizers="
        )


def _new_optimizer(trainer: Trainer) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return class and options of the optimizer that the trainer creates for a stage."""
    if getattr(trainer.create_optimizer, "__func__", None) is Trainer.create_optimizer:
        return trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    given, trainer.optimizer = trainer.optimizer, None
    try:
        trainer.create_optimizer()
        created: Any = trainer.optimizer
    finally:
        trainer.optimizer = given
    return type(created), created.defaults
