"""Whether a trainer and its model can be recorded, told before anything is trained."""

import copy
from contextlib import nullcontext
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments, initialization
from transformers.utils import logging

from ..distributed import check_gathering
from ..model_tensors import converted_names, is_adapter, whole_shape
from ..trajectory import WeightTrajectory, check_adapter

logger = logging.get_logger(__name__)

# what decides, besides data and seed, where a training ends
_TRAINING_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
)
_WITHOUT_MOMENTS = ("sgd", "rmsprop", "adagrad", "adafactor")
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau")


def check_trainer(trainer: Trainer) -> None:
    """Raises an error when a trainer can't be used for stage after stage."""
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"trainer is a {type(trainer).__name__}, no transformers.Trainer; make one with the model in it"
        )
    check_gathering(trainer)
    check_arguments(trainer.args)
    check_adapter(trainer.model)
    if getattr(trainer.model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"the {type(trainer.model).__name__} has an adapter inside (add_adapter); wrap the model with"
            " peft.get_peft_model instead, so that the trajectory is one of the adapter"
        )
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if optimizer is not None:  # a trainer that was trained before has that of its training
        kind, options = _fresh_optimizer(trainer)
        if type(optimizer) is not kind or any(optimizer.defaults.get(k, v) != v for k, v in options.items()):
            raise ValueError(
                f"the trainer was given its own {type(optimizer).__name__}, but each stage needs a fresh one; pass"
                " optimizer_cls_and_kwargs=(class, options) to the Trainer instead of optimizers="
            )


def _fresh_optimizer(trainer: Trainer) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Class and options of the optimizer that a stage will be trained with."""
    if getattr(trainer.create_optimizer, "__func__", None) is Trainer.create_optimizer:
        return trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    given, trainer.optimizer = trainer.optimizer, None
    try:
        trainer.create_optimizer()
        fresh: Any = trainer.optimizer
    finally:
        trainer.optimizer = given
    return type(fresh), fresh.defaults


def check_arguments(args: TrainingArguments) -> None:
    """Raises an error when a training with these arguments would not end in the weights that are to be recorded."""
    if getattr(args, "enable_jit_checkpoint", False):  # older versions of transformers have none
        raise ValueError(
            "enable_jit_checkpoint=True ends a training early on SIGTERM as if it were done, and half of it would be"
            " recorded as a whole state; switch it off: a recording goes on with the state it was stopped in"
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ValueError(
                f"{name}=True rounds the model's own weights at every evaluation, and the next stage would go on from"
                " the rounded ones; switch it off: with bf16 or fp16 evaluation is in half precision too"
            )


def examples_per_step(args: TrainingArguments) -> int:
    """Examples of one optimizer step, on all processes."""
    processes = 1 if getattr(args.accelerator_config, "split_batches", False) else args.world_size
    return args.train_batch_size * args.gradient_accumulation_steps * processes


def training_facts(args: TrainingArguments) -> dict[str, str]:
    """The arguments that decide where a training ends, as text."""
    values = {name: getattr(args, name) for name in _TRAINING_ARGUMENTS}
    if args.max_steps > 0:
        del values["num_train_epochs"]
    texts = {name: _text(value) for name, value in values.items()}
    if texts["optim"] in _WITHOUT_MOMENTS:
        texts = {name: text for name, text in texts.items() if not name.startswith("adam_")}
    return {"examples_per_step": str(examples_per_step(args)), **texts}


def check_same_training(trajectory: WeightTrajectory, index: int, args: TrainingArguments) -> None:
    """Raises a `ValueError` when a recorded state was trained with other arguments than these."""
    state = trajectory.states[index]
    if not state.training:  # taken as it was
        return
    recorded = {"seed": str(state.seed), **state.training}
    for name, value in {"seed": str(args.seed), **training_facts(args)}.items():
        if not _same(recorded.get(name, value), value):
            hint = " (per device × accumulation × processes)" if name == "examples_per_step" else ""
            raise ValueError(
                f"state {index} of {trajectory.path} was trained with {name} {recorded[name]}, the trainer would with"
                f" {value}{hint}: the trajectory would be a mixture; give the same arguments or record to another"
                " folder"
            )


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))  # enumerations, for which a string may have been set later


def _same(text: str, other: str) -> bool:
    try:
        return float(text) == float(other)  # 1 is 1.0
    except ValueError:
        return text == other


def warn_of_warmup(args: TrainingArguments, state: TrainerState) -> None:
    """Says so where the learning rate rises until the stage ends."""
    steps = args.get_warmup_steps(state.max_steps)
    if _text(args.lr_scheduler_type) in _WITHOUT_WARMUP or not 0 < state.max_steps <= steps:
        return
    mend = "a share of the stage's steps instead, such as warmup_steps=0.1" if args.warmup_steps >= 1 else "none"
    logger.warning(
        f"warmup_steps={args.warmup_steps} is for every stage, and this one has {state.max_steps} steps: its learning"
        f" rate never reaches learning_rate, and little is forgotten; give {mend}"
    )


def warn_of_early_end(index: int, state: TrainerState) -> None:
    """Says so where a training ended before its last step."""
    if state.global_step < state.max_steps:
        logger.warning(
            f"the training of state {index} ended after {state.global_step} of {state.max_steps} steps, and is"
            " recorded as it is: a callback stopped it, or its data came to an end"
        )


def warn_of_changes(model: nn.Module) -> None:
    """Says so where a model's config, as it is written, does not describe it, such as where its head was replaced.

    Raises:
        `ValueError`: when, besides, it has tensors that only a model made from the config can read back.
    """
    if not isinstance(model, PreTrainedModel):
        return
    kind = type(model).__name__
    safely = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)  # as from_pretrained makes it
    try:
        with TemporaryDirectory() as folder:
            copy.deepcopy(model.config).save_pretrained(folder)
            config = type(model.config).from_pretrained(folder)
        with torch.random.fork_rng(devices=[]), torch.device("meta"), safely():
            made = type(model)(config)
    except Exception as error:
        reason = f"no {kind} can be made from its config alone ({error})"
        if converted := converted_names(model):
            raise ValueError(
                f"{reason}, and saving splits or merges tensors such as {min(converted)!r}, which only such a model"
                " reads back: the recording could neither be resumed nor end; give a class that takes its config alone"
            ) from error
    else:
        here, there = (
            {name: whole_shape(tensor) for name, tensor in one.state_dict(keep_vars=True).items()}
            for one in (model, made)
        )
        differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        if not differing:
            return
        reason = f"a {kind} made from its config has not the same tensor {differing[0]!r}"
    logger.warning(
        f"{reason}: from_pretrained and load_model will load neither the states nor what is predicted from them. The"
        " recording goes on; make the model the same way again and use load_into(model), of the trajectory and of a"
        " prediction's result. A class that makes the whole model in its __init__ does not need it"
    )


def warn_of_statistics(model: nn.Module) -> None:
    """Says so where an adapter's training moves statistics of its base, which are in no state."""
    if not is_adapter(model):
        return
    moving = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.training
        and module.track_running_stats
        # peft's names of what an adapter holds, and of what it holds instead of
        and not {"modules_to_save", "original_module"} & set(name.split("."))
    ]
    if moving:
        logger.warning(
            f"{len(moving)} BatchNorm layers below the adapter are in training mode, such as {moving[0]!r}. The"
            " training moves their running statistics, which no state of an adapter holds: a resumed run ends in other"
            " weights, the model given back as Θ0 has the statistics of the last stage, and reloaded adapters have"
            " those of the base. Put these layers into modules_to_save of the adapter's config, or keep them in"
            " evaluation mode (override train(), which every step of a Trainer calls)"
        )
