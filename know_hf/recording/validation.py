"""Checks and warnings of a recording: what cannot be recorded, resumed or read back is refused before any training."""

import copy
from contextlib import nullcontext
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments, initialization
from transformers.utils import logging

from ..distributed import check_sharding
from ..model_tensors import converted_names, is_adapter, tied_names, unsharded_shape, unwrapped
from ..trajectory import check_recordable
from .optimizers import check_created_again
from .recorded_arguments import argument_text

logger = logging.get_logger(__name__)

_SCHEDULERS_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau")
_STEPS_IN_HOOKS = ("_layerwise", "lomo")  # endings of the names of such optimizers
_PEFT_COPIES = {"modules_to_save", "original_module"}  # modules of peft that hold the adapter, or an unused original


def check_trainer(trainer: Trainer) -> None:
    """Raise an error unless the trainer can train stage after stage."""
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
    check_sharding(trainer)
    check_arguments(trainer.args)
    check_recordable(trainer.model)
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
        raise ValueError(
            f"no parameter of this {type(trainer.model).__name__} trains; set requires_grad, or load an adapter with"
            " PeftModel.from_pretrained(…, is_trainable=True)"
        )
    if getattr(trainer.model, "_hf_peft_config_loaded", False):
        raise ValueError("the model has an adapter from add_adapter; wrap the model with peft.get_peft_model instead")
    check_created_again(trainer)


def check_arguments(args: TrainingArguments) -> None:
    """Raise a `ValueError` for an argument that ends a training early, rounds the weights or keeps old optimizers."""
    if getattr(args, "enable_jit_checkpoint", False):  # missing in older versions of transformers
        raise ValueError(
            "enable_jit_checkpoint=True ends a training early on SIGTERM; turn it off, recordings resume without it"
        )
    if (optim := argument_text(args.optim)).endswith(_STEPS_IN_HOOKS):
        raise ValueError(
            f"optim={optim} trains in hooks of the parameters, which stay when the next stage begins; use another"
            " optimizer"
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ValueError(f"{name}=True rounds the weights at every evaluation; use {name[:4]}=True instead")


def check_reloadable(model: nn.Module) -> None:
    """Warn when the config does not describe the model, so that `from_pretrained` cannot load the states.

    Raises a `ValueError` when, in addition, saving splits or merges tensors: only a model built from its config reads
    them back.
    """
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        return
    name = type(model).__name__
    try:
        rebuilt = _rebuild(model)
    except Exception as error:
        problem = f"{name} cannot be built from its config alone ({error})"
        if converted := converted_names(model):
            raise ValueError(
                f"{problem}, so a resumed run could not read {min(converted)!r}; use a class that needs only a config"
            ) from error
    else:
        shapes, rebuilt_shapes = (
            {key: unsharded_shape(tensor) for key, tensor in each.state_dict(keep_vars=True).items()}
            for each in (model, rebuilt)
        )
        keys = shapes.keys() | rebuilt_shapes.keys()
        differing = sorted(key for key in keys if shapes.get(key) != rebuilt_shapes.get(key))
        if not differing:
            _warn_about_ties(name, tied_names(model), tied_names(rebuilt))
            return
        problem = f"a {name} built from its config has a different tensor {differing[0]!r}"
    logger.warning(
        f"{problem}: from_pretrained and load_model cannot load states and predictions. Build the model the same way"
        " and call load_into(model) of the trajectory or the prediction result"
    )


def _warn_about_ties(kind: str, tied: dict[str, str], tied_by_config: dict[str, str]) -> None:
    """Warn about weights that are tied by hand, of which a state holds one."""
    if by_hand := tied.keys() - tied_by_config.keys():
        name = min(by_hand)
        logger.warning(
            f"{name!r} is tied to {tied[name]!r}, but the config of this {kind} does not tie them: a state holds one,"
            " and from_pretrained would initialise the other at random. If they are the embeddings, set"
            " model.config.tie_word_embeddings=True before recording; otherwise build the model in the same way and"
            " call load_into(model) of the trajectory or the prediction result"
        )


def warn_about_warmup(args: TrainingArguments, state: TrainerState) -> None:
    """Warn when the warmup is at least as long as the stage."""
    warmup = args.get_warmup_steps(state.max_steps)
    if argument_text(args.lr_scheduler_type) in _SCHEDULERS_WITHOUT_WARMUP or not 0 < state.max_steps <= warmup:
        return
    advice = "Set it to a share of the steps, such as 0.1" if args.warmup_steps >= 1 else "Set it to 0"
    logger.warning(
        f"warmup_steps={args.warmup_steps} applies to every stage, and this one has only {state.max_steps} steps: the"
        f" learning rate never reaches its maximum and little is forgotten. {advice}"
    )


def warn_about_statistics(model: nn.Module) -> None:
    """Warn when the training of an adapter changes BatchNorm statistics of its base, which no state holds."""
    moving = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
    ]
    moving = [name for name in moving if not _PEFT_COPIES & set(name.split("."))]
    if is_adapter(unwrapped(model)) and moving:
        logger.warning(
            f"{len(moving)} BatchNorm layers of the base model are in training mode, such as {moving[0]!r}. Training"
            " changes their running statistics, but a state holds only the adapter: resumed runs end in other weights,"
            " and loaded adapters have the statistics of the base. Add these layers to modules_to_save of the adapter"
            " config, or override train() of the model to keep them in evaluation mode"
        )


def _rebuild(model: PreTrainedModel) -> PreTrainedModel:
    """Build a model on the meta device from the config as it is saved, like `from_pretrained`."""
    safely = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)
    with TemporaryDirectory() as folder:
        copy.deepcopy(model.config).save_pretrained(folder)
        config = type(model.config).from_pretrained(folder)
    with torch.random.fork_rng(devices=[]), torch.device("meta"), safely():
        return type(model)(config)
