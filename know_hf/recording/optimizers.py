"""Optimizers and schedulers of the stages: each stage needs new ones, and they must train the model that is recorded.

A `Trainer` creates its optimizer once and keeps it, so every stage makes it create another. What the trainer would not
create again the same way is refused before the first training.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

_OF_PARAMETERS = ("params", "param_names", "initial_lr")  # in a group, beside the options
_TAKEN_OUT = ("params", "model", "optimizer_dict")  # the Trainer pops these from the options


def check_created_again(trainer: Trainer) -> None:
    """Raise a `ValueError` unless the trainer creates the same optimizer and scheduler for every stage."""
    _, options = trainer.optimizer_cls_and_kwargs or (None, {})
    if taken := [name for name in _TAKEN_OUT if name in options]:
        raise ValueError(
            f"optimizer_cls_and_kwargs has the option {taken[0]!r}, which the Trainer takes out in its first training;"
            " override create_optimizer of the Trainer instead"
        )
    _check_scheduler(trainer)
    held = _unwrapped(trainer.optimizer)
    is_deepspeed = isinstance(trainer.optimizer, DeepSpeedOptimizerWrapper)
    if is_deepspeed or (held is None and not _overrides_create_optimizer(trainer)):
        return  # DeepSpeed's is created for every training
    first = _create(trainer) if held is None else held
    created = _create(trainer)
    if created is first:
        raise ValueError(
            f"create_optimizer returns the same {type(first).__name__} again, but each stage needs a new optimizer;"
            " create the object in create_optimizer"
        )
    # a trainer that has trained before holds the optimizer it created itself, which is fine
    trained = isinstance(trainer.optimizer, AcceleratedOptimizer)
    if held is not None and (type(held) is not type(created) or _options(held, trained) != _options(created, trained)):
        raise ValueError(
            f"the trainer has a {type(held).__name__} object, but each stage needs a new optimizer, and the trainer"
            f" would create a {type(created).__name__} with other parameters or options. Pass"
            " optimizer_cls_and_kwargs=(class, options) to the Trainer instead of optimizers=, or override"
            " create_optimizer; set trainer.optimizer = None if it is left over from an earlier training"
        )


def own_optimizer(trainer: Trainer) -> list[Any] | None:
    """Return the class and the options per group of the optimizer that a subclass of `Trainer` creates."""
    if not _overrides_create_optimizer(trainer):
        return None
    optimizer = _create(trainer)
    groups = [{k: v for k, v in group.items() if k not in _OF_PARAMETERS} for group in optimizer.param_groups]
    return [type(optimizer), groups]


def check_trains(optimizer: Any, model: nn.Module, warn: bool) -> None:
    """Check which parameters an optimizer trains, before it does.

    Raises a `ValueError` if none of them are the model's, and warns, if asked to, when some are not: no state holds
    them.
    """
    if isinstance(optimizer, DeepSpeedOptimizerWrapper):  # trains flat copies of the weights
        return
    owned = {id(parameter) for parameter in model.parameters()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    others = [parameter for parameter in trained if id(parameter) not in owned]
    if len(others) == len(trained):
        raise ValueError(
            f"the optimizer {type(_unwrapped(optimizer)).__name__} holds no parameter of the model: later stages could"
            " not replace what trains it. Use an optimizer of model.parameters()"
        )
    if others and warn:
        logger.warning(
            f"the optimizer trains {len(others)} parameters that are not in the model, such as one of shape"
            f" {list(others[0].shape)}. No state holds them: a resumed run ends in other weights, and metrics that"
            " depend on them cannot be computed from the states. Make them part of the model"
        )


def use_evaluated_weights(optimizer: Any, args: TrainingArguments, state: TrainerState) -> None:
    """Put the weights into the model that an evaluation uses, if the optimizer trains others (schedule-free ones)."""
    has_best_weights = args.load_best_model_at_end and state.best_model_checkpoint is not None
    if not has_best_weights and callable(evaluate := getattr(optimizer, "eval", None)):
        evaluate()


@contextmanager
def evaluated_weights(optimizer: Any) -> Iterator[None]:
    """Put the weights into the model that an evaluation uses during the block, within a training."""
    has_modes = callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))
    if has_modes:
        optimizer.eval()
    try:
        yield
    finally:
        if has_modes:
            optimizer.train()


def _check_scheduler(trainer: Trainer) -> None:
    scheduler = trainer.lr_scheduler
    is_created = getattr(trainer, "_created_lr_scheduler", False) or isinstance(scheduler, AcceleratedScheduler)
    # a subclass creates its scheduler after the optimizer was wrapped, a script before
    if scheduler is None or is_created or isinstance(getattr(scheduler, "optimizer", None), AcceleratedOptimizer):
        return
    raise ValueError(
        f"the trainer has a {type(scheduler).__name__} object, but each stage needs a new scheduler; set"
        " lr_scheduler_type and lr_scheduler_kwargs instead of optimizers=, or override create_scheduler"
    )


def _overrides_create_optimizer(trainer: Trainer) -> bool:
    return getattr(trainer.create_optimizer, "__func__", None) is not Trainer.create_optimizer


def _create(trainer: Trainer) -> Any:
    given, trainer.optimizer = trainer.optimizer, None
    try:
        trainer.create_optimizer()
        return _unwrapped(trainer.optimizer)
    finally:
        trainer.optimizer = given


def _unwrapped(optimizer: Any) -> Any:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _options(optimizer: Any, trained: bool) -> dict[int, dict[str, Any]]:
    """The options of every parameter, with the learning rate that the scheduler starts from.

    Of an optimizer that has trained, those that its constructor takes; others may count steps.
    """
    constructors = [vars(cls)["__init__"] for cls in type(optimizer).__mro__ if "__init__" in vars(cls)]
    settable = {name for constructor in constructors for name in signature(constructor).parameters}
    options: dict[int, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        names = [name for name in group if name in settable or not trained]
        shared = {name: group[name] for name in names if name not in _OF_PARAMETERS}
        shared["lr"] = group.get("initial_lr", group.get("lr"))
        options |= {id(parameter): shared for parameter in group["params"]}
    return options
