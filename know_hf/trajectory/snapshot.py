"""Copy the weights of a model, and save them as a state."""

import copy
import json
from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from ..checkpoint import INDEX_NAME, WEIGHTS_NAME, CheckpointReader, write_json
from ..checkpoint.header import DTYPES
from ..model_tensors import (
    is_adapter,
    is_partitioned,
    memory_key,
    names_on_disk,
    recorded_adapter,
    unsharded_shape,
    unwrapped,
)
from ..roles import TensorRole, role_by_shape, tensor_roles
from .adapters import check_recordable
from .manifest import TrajectoryError

WORTH_SHARING = 0.01  # share of a state's bytes; if less is unchanged, the state stores everything itself


@dataclass
class Snapshot:
    """The weights of a model at one moment, on the CPU."""

    model: nn.Module  # without wrappers, for its config and save_pretrained; its weights may have changed since
    state_dict: dict[str, torch.Tensor]  # copies by names in memory; tensors share memory as in the model
    on_disk: dict[str, str]  # from names in memory to names on disk, of tensors that saving only renames
    roles: dict[str, TensorRole]  # by names in memory
    generation_config: GenerationConfig | None = None  # copy of the model's, which generate changes while it runs
    adapter: str | None = None  # recorded adapter of a PeftModel

    @classmethod
    def of(
        cls,
        model: nn.Module,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
        reuse: Mapping[str, torch.Tensor] | None = None,
    ) -> "Snapshot":
        """Copy the weights of a model.

        `state_dict` has all of its weights by their names in memory, when the model has only a part of them (FSDP2,
        ZeRO-3); it is read once, in its order. `dtype` replaces floating-point dtypes. The memory of `reuse`, the
        `state_dict` of a snapshot that is no longer needed, is overwritten, which is several times faster than
        allocating new memory.

        Raises:
            `TrajectoryError`: when the weights are sharded and no `state_dict` is given, or safetensors has no dtype
                for a tensor.
            `ValueError`: when a state could not hold the weights, see [`check_recordable`].
        """
        model = unwrapped(model)
        if state_dict is None and is_partitioned(model):
            raise TrajectoryError(
                f"the weights of this {type(model).__name__} are sharded (FSDP2, ZeRO-3); pass all as state_dict="
            )
        check_recordable(model)
        _check_dtypes(model, dtype)
        adapter = recorded_adapter(model) if is_adapter(model) else None
        # Not in the writer thread: under FSDP, state_dict() gathers and reshards, as the training does meanwhile.
        on_disk, roles = names_on_disk(model), tensor_roles(model)
        source = model.state_dict() if state_dict is None else state_dict
        copies: dict[Hashable, torch.Tensor] = {}
        copied: dict[str, torch.Tensor] = {}
        overwritten: set[int] = set()
        for name, tensor in source.items():
            if adapter is not None and name not in on_disk:
                continue
            first = roles[name].tied_to if name in roles else None
            if first in copied:
                copied[name] = copied[first]  # gathering gives each tied tensor its own memory
                continue
            # a gathered tensor is freed here, and the next one may get its memory
            key = memory_key(tensor) if state_dict is None else name
            if key not in copies:
                old = (reuse or {}).get(name)
                # names that share memory in the old snapshot may not share it in the model
                copies[key] = _copy(tensor, dtype, None if id(old) in overwritten else old)
                overwritten.add(id(copies[key]))
            copied[name] = copies[key]
        generation_config = copy.deepcopy(getattr(model, "generation_config", None))
        return cls(model, copied, on_disk, roles, generation_config, adapter)

    def check_finite(self, state: str, earlier: Path | None) -> None:
        """Raise a `TrajectoryError` for a tensor that is not finite. Buffers, such as masks, may be infinite.

        The message names the state, and the folder of earlier states if there are any.
        """
        kept = "" if earlier is None else f" Earlier states are kept in {earlier}."
        for name, tensor in self.state_dict.items():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            values = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no isfinite
            is_buffer = name in self.roles and self.roles[name].role == "copied"
            if values.isnan().any() if is_buffer else not values.isfinite().all():
                reason = "the training diverged; lower the learning rate"
                if tensor.dtype == torch.float16:
                    reason = "float16 is too narrow; train and record float32 weights, with fp16=True for speed"
                raise TrajectoryError(f"tensor {name!r} contains NaN or infinite values in {state}: {reason}.{kept}")

    def save(self, folder: Path, previous: CheckpointReader | None = None) -> set[str]:
        """Write config and weights as `save_pretrained` does into an empty folder beside that of the previous state.

        Tensors that equal the previous state's are left out, and `model.safetensors.index.json` refers to the files
        that have them. Returns their names on disk.
        """
        # an adapter is one file, and peft initialises what is missing: nothing can be left out
        unchanged = set() if previous is None or self.adapter is not None else self._equal_to(previous)
        left_out = {id(self.state_dict[name]) for name, saved in self.on_disk.items() if saved in unchanged}
        stored = {name: tensor for name, tensor in self.state_dict.items() if id(tensor) not in left_out}
        if not stored:  # nothing changed, but a state without weights could not be loaded
            unchanged, stored = set(), dict(self.state_dict)
        if isinstance(self.model, PreTrainedModel):
            for name in self._tied_by_hand():
                stored.pop(name, None)
            self.model.save_pretrained(folder, state_dict=stored)
            if self.generation_config is not None and (folder / GENERATION_CONFIG_NAME).exists():
                self.generation_config.save_pretrained(folder)
        elif self.adapter is not None:
            _save_adapter(self.model, self.adapter, stored, folder)
        else:
            save_torch_state_dict(stored, folder, metadata={"format": "pt"})
        if previous is not None and unchanged:
            write_index(folder, {name: Path(previous.file(name)) for name in unchanged})
        return unchanged

    def _tied_by_hand(self) -> set[str]:
        """Names in memory of a `PreTrainedModel` that are tied to another one without its class declaring this.

        `save_pretrained` drops duplicates of declared ties, and fails on others.
        """
        declared: dict[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        known = {*declared, *declared.values()}
        groups: defaultdict[str, list[str]] = defaultdict(list)
        for name, role in self.roles.items():
            groups[role.tied_to or name].append(name)
        kept = {name for names in groups.values() for name in (known.intersection(names) or names[:1])}
        return self.roles.keys() - kept

    def _equal_to(self, previous: CheckpointReader) -> set[str]:
        """Names on disk of the tensors that equal the previous state's, if they are worth leaving out."""
        equal: set[str] = set()
        size = 0
        for name, tensor in self.state_dict.items():
            saved = self.on_disk.get(name, "")
            if saved in previous and equal_bits(previous, saved, tensor):
                equal.add(saved)
                size += tensor.nbytes
        total = sum(tensor.nbytes for tensor in {id(t): t for t in self.state_dict.values()}.values())
        return equal if size > WORTH_SHARING * total else set()


def recorded_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Return the tensors of a state, tied ones once; of a `PeftModel`, those of the adapter."""
    model = unwrapped(model)
    on_disk = names_on_disk(model)
    state = model.state_dict(keep_vars=True).items()
    tensors = [tensor for name, tensor in state if name in on_disk or not is_adapter(model)]
    return list({memory_key(tensor): tensor for tensor in tensors}.values())


def state_nbytes(model: nn.Module, dtype: torch.dtype | None = None) -> tuple[int, int]:
    """Return the bytes on disk of the first state and of each further one, from shapes and dtypes."""
    model = unwrapped(model)
    _check_dtypes(model, dtype)
    total = frozen = 0
    on_disk = names_on_disk(model)
    renamed = {memory_key(tensor) for name, tensor in model.state_dict(keep_vars=True).items() if name in on_disk}
    for tensor in recorded_tensors(model):
        stored = _stored_dtype(tensor, dtype)
        size = unsharded_shape(tensor).numel() * stored.itemsize
        total += size
        # tensors that saving splits or merges, such as experts, are stored each time
        is_frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        frozen += size if is_frozen and memory_key(tensor) in renamed else 0
    is_shared = not is_adapter(model) and frozen > WORTH_SHARING * total
    return total, total - frozen if is_shared else total


def roles_on_disk(snapshot: Snapshot, reader: CheckpointReader) -> tuple[dict[str, TensorRole], dict[str, str]]:
    """Return the roles of the tensors on disk, and the names that are tied to them, all by names on disk."""
    roles: dict[str, TensorRole] = {}
    tied: dict[str, str] = {}
    first: dict[str, str] = {}  # of tied names in memory, the first that is on disk
    for name, role in snapshot.roles.items():
        if (saved := snapshot.on_disk.get(name)) is not None and saved in reader:
            tied_to = first.setdefault(role.tied_to or name, saved)
            untied = snapshot.roles[role.tied_to or name]
            reason = untied.reason if tied_to == saved else f"tied to {tied_to}"
            roles[saved] = replace(untied, reason=reason, tied_to=None if tied_to == saved else tied_to)
    for name, role in snapshot.roles.items():
        leader = role.tied_to or name
        if (saved := snapshot.on_disk.get(name)) is not None and saved not in reader and leader in first:
            tied[saved] = first[leader]
    for name in set(reader.names) - roles.keys():
        roles[name] = role_by_shape(name, reader.shape(name), reader.dtype(name).is_floating_point)
    return {name: roles[name] for name in reader.names}, tied


def _check_dtypes(model: nn.Module, dtype: torch.dtype | None) -> None:
    on_disk = names_on_disk(model) if is_adapter(model) else None
    for name, tensor in model.state_dict(keep_vars=True).items():
        stored = _stored_dtype(tensor, dtype)
        if stored not in DTYPES.values() and (on_disk is None or name in on_disk):
            raise TrajectoryError(
                f"tensor {name!r} has dtype {stored}, which safetensors cannot store; convert it before recording"
            )


def _stored_dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _copy(tensor: torch.Tensor, dtype: torch.dtype | None, memory: torch.Tensor | None) -> torch.Tensor:
    stored = _stored_dtype(tensor, dtype)
    if memory is None or memory.shape != tensor.shape or memory.dtype != stored:
        memory = torch.empty(tensor.shape, dtype=stored)
    return memory.copy_(tensor.detach())


def write_index(folder: Path, elsewhere: Mapping[str, Path]) -> None:
    """Lead `from_pretrained` to the files of a state and of earlier states beside it."""
    index = folder / INDEX_NAME
    if index.exists():
        files = json.loads(index.read_text())["weight_map"]
    else:
        # from_pretrained ignores an index beside a model.safetensors
        shard = "model-00001-of-00001.safetensors"
        files = {}
        if (folder / WEIGHTS_NAME).exists():
            (folder / WEIGHTS_NAME).rename(folder / shard)
            files = dict.fromkeys(CheckpointReader([folder / shard]).names, shard)
    files |= {name: f"../{path.parent.name}/{path.name}" for name, path in elsewhere.items()}
    write_json(index, {"metadata": {}, "weight_map": dict(sorted(files.items()))})


def _save_adapter(model: Any, adapter: str, state_dict: dict[str, torch.Tensor], folder: Path) -> None:
    model.save_pretrained(folder, state_dict=state_dict, selected_adapters=[adapter])
    (folder / "README.md").unlink(missing_ok=True)  # the same in every state
    # peft puts an adapter that is not named "default" into a folder of its own
    if (named := folder / adapter).is_dir():
        for path in named.iterdir():
            path.rename(folder / path.name)
        named.rmdir()


def equal_bits(reader: CheckpointReader, name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor of a checkpoint has the shape, dtype and bits of another one."""
    if (reader.shape(name), reader.dtype(name)) != (tensor.shape, tensor.dtype):
        return False
    return torch.equal(_bytes(reader.tensor(name)), _bytes(tensor))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
