"""Several processes: who writes, how an error of one reaches all, and who holds the weights."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

from .model_tensors import is_partitioned

T = TypeVar("T")


def on_main_process(accelerator: Accelerator | None, action: Callable[[], T]) -> T:
    """Runs an action on the main process; its result, or its error, comes out on every process.

    Args:
        accelerator (`Accelerator`, *optional*): Says which processes there are; on one the action is just run.
        action (`Callable[[], T]`): Called on the main process; what it returns is sent to the others.

    Returns:
        What the action returned.

    Raises:
        The action's error on the main process, a `RuntimeError` with its text on the others: no process is left
        waiting for one that failed.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return action()
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except Exception as error:
            failure = error
            outcome[1] = f"{type(error).__name__}: {error}"
    broadcast_object_list(outcome, from_process=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise RuntimeError(f"the main process failed with {outcome[1]}")
    return outcome[0]


def on_every_process(accelerator: Accelerator | None, action: Callable[[], T]) -> list[T]:
    """Runs an action on every process at once; all results, or an error where any failed, come out on every process.

    Args:
        accelerator (`Accelerator`, *optional*): Says which processes there are; on one the action is just run.
        action (`Callable[[], T]`): Called on each process.

    Returns:
        `list[T]`: What the action returned on each process, in the order of their ranks.

    Raises:
        The action's error on the processes where it failed, a `RuntimeError` with the text of the first on the others.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return [action()]
    result: T | None = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    text = None if failure is None else f"{type(failure).__name__}: {failure}"
    outcomes: list[tuple[T, str | None]] = gather_object([(result, text)])
    if failure is not None:
        raise failure
    for rank, (_, text) in enumerate(outcomes):
        if text is not None:
            raise RuntimeError(f"process {rank} failed with {text}")
    return [result for result, _ in outcomes]


def is_sharded(trainer: Trainer) -> bool:
    """Whether each process holds only a part of the weights."""
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        return trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    return trainer.accelerator.distributed_type == DistributedType.FSDP


def check_gathering(trainer: Trainer) -> None:
    """Fails before the training where ZeRO-3 could not give its weights after it.

    Raises:
        `ValueError`: when gathering is switched off in the DeepSpeed config.
    """
    if trainer.accelerator.distributed_type != DistributedType.DEEPSPEED or not is_sharded(trainer):
        return
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    name = "stage3_gather_16bit_weights_on_model_save"
    if not config.get("zero_optimization", {}).get(name, False):
        raise ValueError(
            f"ZeRO-3 does not gather its weights: zero_optimization.{name} is off in the DeepSpeed config, so no state"
            " could be recorded; set it to true"
        )


def gather_state_dict(model: nn.Module, trainer: Trainer | None) -> dict[str, torch.Tensor] | None:
    """The whole weights where each process holds a part of them; to be called on every process.

    Args:
        model (`nn.Module`): The model as a callback gets it.
        trainer (`Trainer`, *optional*): Its trainer.

    Returns:
        `dict[str, torch.Tensor]` on the main process (elsewhere it may be empty), or `None` where the model itself
        holds all of its weights.

    Raises:
        `ValueError`: when the weights are in parts and no trainer was given.
    """
    if trainer is None:
        if type(model).__name__.startswith(("FSDP", "FullyShardedDataParallel")) or is_partitioned(model):
            raise ValueError(
                f"no process holds the whole weights of this {type(model).__name__}; give the callback its trainer:"
                " WeightTransitionCallback(output_dir, trainer=trainer)"
            )
        return None
    if not is_sharded(trainer):
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped, unwrap=False)


def reshard(model: nn.Module) -> None:
    """Gives each process its part of the weights again, where FSDP2 has put them together.

    The outermost weights stay whole after an evaluation; an optimizer made then would train these copies, and the
    model would keep its old weights.

    Args:
        model (`nn.Module`): Any model; one without FSDP2 is left as it is.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
