"""Several processes: actions with results and errors on all of them, and sharded weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from pathlib import Path
from socket import gethostname
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer

from .model_tensors import is_adapter, is_partitioned, names_on_disk, unwrapped

T = TypeVar("T")
_LONGEST_ACTION = timedelta(days=1)
_FSDP1 = "the weights of FSDP1 cannot be recorded; set fsdp_version: 2 in the accelerate config"


def on_main_process(accelerator: Accelerator | None, action: Callable[[], T]) -> T:
    """Run an action on the main process and return its result on every process; errors as [`on_every_process`]."""
    is_main = accelerator is None or accelerator.is_main_process
    return on_every_process(accelerator, lambda: action() if is_main else None)[0]  # type: ignore[return-value]


def on_every_process(accelerator: Accelerator | None, action: Callable[[], T]) -> list[T]:
    """Run an action on every process and return all results, by rank, on every process.

    Processes wait for the others up to a day, whatever the timeout of the process group is. Results must be picklable.
    Without an accelerator there is one process.

    Raises:
        The error of the action on the processes where it failed, a `RuntimeError` with the text of the first error on
        the others, so that no process waits for a failed one.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return [action()]
    group = _waiting_group(distributed.group.WORLD)
    outcomes: list[Any] = [None] * accelerator.num_processes
    try:
        result = action()
    except Exception as error:
        distributed.all_gather_object(outcomes, (None, f"{type(error).__name__}: {error}"), group=group)
        raise
    distributed.all_gather_object(outcomes, (result, None), group=group)
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise RuntimeError(f"process {rank} failed with {failure}")
    return [result for result, _ in outcomes]


@cache
def _waiting_group(world: Any) -> Any:
    """Return all processes as a group with a timeout that the evaluation or upload of one process does not exceed."""
    return distributed.new_group(timeout=_LONGEST_ACTION)


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
    """Whether the weights are sharded over the processes while they train."""
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        return trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    return trainer.accelerator.distributed_type == DistributedType.FSDP


def check_sharding(trainer: Trainer) -> None:
    """Raise a `ValueError` for FSDP1, which does not gather single tensors, and for a DeepSpeed config that has an
    optimizer or scheduler, which DeepSpeed fits to the first training alone.
    """
    if trainer.accelerator.distributed_type == DistributedType.FSDP and not trainer.accelerator.is_fsdp2:
        raise ValueError(_FSDP1)
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        for section in ("optimizer", "scheduler"):
            if section in config:
                raise ValueError(
                    f"the DeepSpeed config has the section {section!r}, but each stage needs its own; remove it, and"
                    " set optim and lr_scheduler_type of the TrainingArguments"
                )


@contextmanager
def gathering(model: nn.Module) -> Iterator[Mapping[str, torch.Tensor] | None]:
    """Give the main process the weights that a state holds of a sharded model, one tensor at a time.

    Every process must enter and leave the block. A process that does not read a tensor takes part in gathering it when
    it leaves, also after an error. The mapping is read once, in its order.

    Returns:
        A mapping for `state_dict=` of [`WeightTrajectory.record`]: names in memory to complete tensors on the device
        of the model; `None` if the weights are not sharded.

    Raises:
        `ValueError`: under FSDP1.
    """
    if isinstance(model, FullyShardedDataParallel):
        raise ValueError(_FSDP1)
    model = unwrapped(model)
    if not is_partitioned(model):
        yield None
        return
    weights = _GatheredWeights(model)
    try:
        yield weights
    except Exception:
        weights.gather_rest()
        raise
    weights.gather_rest()


class _GatheredWeights(Mapping[str, torch.Tensor]):
    """Gathers each tensor when it is read."""

    def __init__(self, model: nn.Module) -> None:
        state = model.state_dict(keep_vars=True)
        recorded = names_on_disk(model) if is_adapter(model) else state
        self._tensors = {name: tensor for name, tensor in state.items() if name in recorded}
        self._rest = dict.fromkeys(self._tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        del self._rest[name]
        return _gather(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def gather_rest(self) -> None:
        for name in list(self._rest):
            self[name]


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return a complete tensor; of a buffer, which is not sharded, that of the main process on all processes."""
    values = tensor.detach()
    if isinstance(values, DTensor):
        on_device: Any = values.to(values.device_mesh.device_type)  # elsewhere with CPU offload
        complete: torch.Tensor = on_device.full_tensor()
        return complete
    if not isinstance(tensor, nn.Parameter):
        distributed.broadcast(values, src=0)
        return values
    with _complete(tensor):
        return tensor.detach().clone()


def set_values(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Write a complete tensor into one of `state_dict(keep_vars=True)`, which may be sharded.

    Every process must call it with the same values.
    """
    with torch.no_grad():
        if isinstance(tensor, DTensor):
            tensor.copy_(distribute_tensor(values, tensor.device_mesh, tensor.placements))
        else:
            with _complete(tensor, modifier_rank=0):
                tensor.copy_(values)


def _complete(tensor: torch.Tensor, **options: Any) -> AbstractContextManager[object]:
    """Gather a parameter that ZeRO-3 partitions in a `with` block."""
    if not hasattr(tensor, "ds_shape"):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters([tensor], **options)
    return context


def is_replicated(trainer: Trainer) -> bool:
    """Whether several processes hold all weights each."""
    return trainer.accelerator.num_processes > 1 and not is_sharded(trainer)


def is_marked_prepared(model: nn.Module) -> bool:
    """Whether several processes hold the model and accelerate will not wrap it for DDP.

    An evaluation before the first training marks a model as prepared; every process would then train its own weights.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return False
    is_marked = getattr(model, "_is_accelerate_prepared", False)
    return is_marked and not isinstance(model, FullyShardedDataParallel) and not is_partitioned(model)


def unmark_prepared(model: Any) -> None:
    """Let accelerate wrap a model for DDP; see [`is_marked_prepared`]."""
    if is_marked_prepared(model):
        model._is_accelerate_prepared = False  # noqa: SLF001 - accelerate has no public name for it


def share_buffers(trainer: Trainer) -> None:
    """Give all processes the buffers of the main one, whose state is recorded; every process must call it.

    DDP copies BatchNorm statistics only before a forward pass in training, so an evaluation would use other ones.
    """
    if is_replicated(trainer):
        for buffer in trainer.model.buffers():
            broadcast(buffer)


def reshard(model: nn.Module) -> None:
    """Shard weights again that FSDP2 has gathered; other modules stay unchanged.

    FSDP2 keeps the outermost weights gathered after an evaluation. An optimizer created then would train these copies
    and leave the model unchanged.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
