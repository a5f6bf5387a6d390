"""Warnings about a training that is recorded."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from ..model_tensors import is_adapter
from .resuming import argument_text

logger = logging.get_logger(__name__)

_SCHEDULERS_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau")
# Modules of peft whose tensors are those of the adapter, or of the base and unused.
_PEFT_COPIES = {"modules_to_save", "original_module"}


def warn_about_warmup(args: TrainingArguments, state: TrainerState) -> None:
    """Warn when the warmup lasts as long as the stage."""
    warmup = args.get_warmup_steps(state.max_steps)
    if argument_text(args.lr_scheduler_type) in _SCHEDULERS_WITHOUT_WARMUP or not 0 < state.max_steps <= warmup:
        return
    advice = "Set it to a share of the steps, such as 0.1" if args.warmup_steps >= 1 else "Set it to 0"
    logger.warning(
        f"warmup_steps={args.warmup_steps} applies to every stage, and this one has only {state.max_steps} steps: the"
        f" learning rate never reaches its maximum and little is forgotten. {advice}"
    )


def warn_about_early_end(index: int, state: TrainerState) -> None:
    """Warn when a training ended before its last step."""
    if state.global_step < state.max_steps:
        logger.warning(
            f"the training of state {index} ended after {state.global_step} of {state.max_steps} steps, because a"
            " callback stopped it or its data ran out; the state is recorded"
        )


def warn_about_statistics(model: nn.Module) -> None:
    """Warn when the training of an adapter moves BatchNorm statistics of its base, which no state holds."""
    if not is_adapter(model):
        return
    moving = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.training
        and module.track_running_stats
        and not _PEFT_COPIES & set(name.split("."))
    ]
    if moving:
        logger.warning(
            f"{len(moving)} BatchNorm layers of the base model are in training mode, such as {moving[0]!r}. Training"
            " moves their running statistics, but a state holds only the adapter: a resumed run ends in other weights,"
            " the model returned as Θ0 has the statistics of the last stage, and reloaded adapters have those of the"
            " base. Add these layers to modules_to_save of the adapter config, or keep them in evaluation mode"
            " (override train(), which every step of a Trainer calls)"
        )
