"""Several processes: actions with results and errors on all of them, and sharded weights."""

from collections.abc import Callable
from pathlib import Path
from socket import gethostname
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

from .model_tensors import is_partitioned

T = TypeVar("T")


def on_main_process(accelerator: Accelerator | None, action: Callable[[], T]) -> T:
    """Run an action on the main process and return its result on every process; errors as [`on_every_process`]."""
    is_main = accelerator is None or accelerator.is_main_process
    return on_every_process(accelerator, lambda: action() if is_main else None)[0]  # type: ignore[return-value]


def on_every_process(accelerator: Accelerator | None, action: Callable[[], T]) -> list[T]:
    """Run an action on every process and return all results, by rank, on every process.

    Args:
        accelerator (`Accelerator`, *optional*):
            The accelerator of the run. By default there is one process.
        action (`Callable[[], T]`):
            The action. Its result must be picklable.

    Raises:
        The error of the action on the processes where it failed, a `RuntimeError` with the text of the first error on
        the others, so that no process waits for a failed one.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return [action()]
    try:
        result = action()
    except Exception as error:
        gather_object([(None, f"{type(error).__name__}: {error}")])
        raise
    outcomes: list[tuple[T, str | None]] = gather_object([(result, None)])
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise RuntimeError(f"process {rank} failed with {failure}")
    return [result for result, _ in outcomes]


def check_shared(accelerator: Accelerator | None, folder: Path) -> None:
    """Raise an error on all processes if one of them does not see a folder that the main process created.

    Raises:
        `FileNotFoundError` on the processes, such as those of another node, that lack it; see [`on_every_process`].
    """

    def check() -> None:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}, which the main process created, does not exist on {gethostname()}; give a folder that all"
                " nodes share"
            )

    on_every_process(accelerator, check)


def is_sharded(trainer: Trainer) -> bool:
    """Whether the weights are sharded over the processes."""
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        return trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    return trainer.accelerator.distributed_type == DistributedType.FSDP


def check_gathering(trainer: Trainer) -> None:
    """Raise a `ValueError` if the DeepSpeed config keeps ZeRO-3 from gathering the weights after the training."""
    if trainer.accelerator.distributed_type != DistributedType.DEEPSPEED or not is_sharded(trainer):
        return
    zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
    if not zero.get(name := "stage3_gather_16bit_weights_on_model_save", False):
        raise ValueError(
            f"ZeRO-3 does not gather its weights; set zero_optimization.{name}=true in the DeepSpeed config"
        )


def gather_state_dict(model: nn.Module, trainer: Trainer | None) -> dict[str, torch.Tensor] | None:
    """Gather sharded weights on the main process; every process must call it.

    Returns:
        `dict[str, torch.Tensor]`, possibly empty on other processes, or `None` if the weights are not sharded.

    Raises:
        `ValueError`:
            If the weights are sharded and `trainer` is missing.
    """
    if trainer is None:
        if type(model).__name__.startswith(("FSDP", "FullyShardedDataParallel")) or is_partitioned(model):
            raise ValueError(
                f"the weights of this {type(model).__name__} are sharded; use"
                " WeightTransitionCallback(output_dir, trainer=trainer)"
            )
        return None
    if not is_sharded(trainer):
        return None
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped, unwrap=False)
    # compiled modules add a part to the names; ZeRO-3 returns None on other processes
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in (state_dict or {}).items()}


def reshard(model: nn.Module) -> None:
    """Shard weights again that FSDP2 has gathered; other modules stay unchanged.

    FSDP2 keeps the outermost weights gathered after an evaluation. An optimizer created then would train these copies
    and leave the model unchanged.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
