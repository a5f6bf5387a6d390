"""From a model in memory to the files of a state: a copy of its weights that training can't change, then files."""

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from ..checkpoint import INDEX_NAME, WEIGHTS_NAME, CheckpointReader, fsync, write_json
from ..model_tensors import is_adapter, is_partitioned, names_on_disk, whole_shape
from ..roles import TensorRole, role_by_shape, tensor_roles
from .manifest import FileRecord, TrajectoryError, recordable

WORTH_SHARING = 0.01  # share of a state's bytes below which its folder rather holds everything itself
_LIBRARIES = ("know_hf", "torch", "transformers", "datasets", "accelerate", "peft", "safetensors", "numpy")


@dataclass
class Snapshot:
    """A model's weights as they were, on the CPU.

    Attributes:
        model (`nn.Module`): The model, for its config and its way of saving; its weights may have moved on.
        state_dict (`dict[str, torch.Tensor]`): Copies of what belongs to a state, by their names in memory. Tensors
            that share memory in the model share it here.
        on_disk (`dict[str, str]`): From the names in memory to those on disk, where saving only renames.
        roles (`dict[str, TensorRole]`): Role of every tensor, by the names in memory.
        generation_config (`GenerationConfig`, *optional*): A copy of the model's, into which `generate` puts defaults
            for as long as it runs.
    """

    model: nn.Module
    state_dict: dict[str, torch.Tensor]
    on_disk: dict[str, str]
    roles: dict[str, TensorRole]
    generation_config: GenerationConfig | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
        reuse: Mapping[str, torch.Tensor] | None = None,
    ) -> "Snapshot":
        """Copies the weights.

        Args:
            model (`nn.Module`): The model without its wrappers.
            state_dict (`Mapping[str, torch.Tensor]`, *optional*): Its weights where they are not in the model itself
                (FSDP, ZeRO-3), whole and by the names in memory.
            dtype (`torch.dtype`, *optional*): Floating-point dtype to store; by default that of each tensor.
            reuse (`Mapping[str, torch.Tensor]`, *optional*): The `state_dict` of a snapshot that is done with: its
                memory is written over, several times faster than new memory is.

        Raises:
            `TrajectoryError`: when the weights are in parts (ZeRO-3) and no `state_dict` is given.
        """
        if state_dict is None and is_partitioned(model):
            raise TrajectoryError(
                f"no process holds the whole weights of this {type(model).__name__}, ZeRO-3 has them in parts; give"
                " them as state_dict="
            )
        check_adapter(model)
        # Here and not where the files are written: under FSDP state_dict() gathers and reshards, which must not happen
        # in a thread while the training does the same.
        on_disk, roles = names_on_disk(model), tensor_roles(model)
        source = model.state_dict() if state_dict is None else state_dict
        copies: dict[tuple[Any, ...], torch.Tensor] = {}
        copied: dict[str, torch.Tensor] = {}
        taken: set[int] = set()  # memory written over by this call
        adapter = is_adapter(model)
        for name, tensor in source.items():
            if adapter and name not in on_disk:
                continue
            if name in roles and (first := roles[name].tied_to) in copied:
                copied[name] = copied[first]  # gathering gave each its own tensor
                continue
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
            if place not in copies:
                kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                old = (reuse or {}).get(name)
                if old is None or id(old) in taken or old.shape != tensor.shape or old.dtype != kind:
                    old = torch.empty(tensor.shape, dtype=kind)
                copies[place] = old.copy_(tensor.detach())
                taken.add(id(old))
            copied[name] = copies[place]
        return cls(model, copied, on_disk, roles, copy.deepcopy(getattr(model, "generation_config", None)))

    def check_finite(self, path: Path, index: int) -> None:
        """Raises a `TrajectoryError` that names the first tensor with a value that is NaN or infinite.

        Buffers may be infinite, as attention masks are.
        """
        for name, tensor in self.state_dict.items():
            if not tensor.is_floating_point():
                continue
            is_buffer = name in self.roles and self.roles[name].role == "copied"
            if tensor.isnan().any() if is_buffer else not tensor.isfinite().all():
                raise TrajectoryError(
                    f"tensor {name!r} is not finite at the end of the training of state {index}: it diverged; lower"
                    f" its learning rate. The {index} states before it are kept in {path}."
                )

    def save(self, folder: Path, previous: CheckpointReader | None = None) -> set[str]:
        """Writes config and weights as `save_pretrained` does, but tensors equal to the previous state's only once.

        Args:
            folder (`Path`): An existing, empty folder beside that of the state before.
            previous ([`CheckpointReader`], *optional*): The state before.

        Returns:
            `set[str]`: names on disk of the tensors left out. A `model.safetensors.index.json` then leads
            `from_pretrained` to the files that hold them.
        """
        # an adapter is one file, and peft takes what is not in it as new: nothing may be left out
        unchanged = set() if previous is None or is_adapter(self.model) else self._equal_to(previous)
        out = {id(self.state_dict[name]) for name, saved in self.on_disk.items() if saved in unchanged}
        kept = {name: tensor for name, tensor in self.state_dict.items() if id(tensor) not in out}
        if not kept:  # nothing moved at all: a state of no file could not be loaded
            unchanged, kept = set(), self.state_dict
        if isinstance(self.model, PreTrainedModel):
            self.model.save_pretrained(folder, state_dict=kept)
            if self.generation_config is not None and (folder / GENERATION_CONFIG_NAME).exists():
                self.generation_config.save_pretrained(folder)
        elif is_adapter(self.model):
            _save_adapter(self.model, kept, folder)
        else:
            save_torch_state_dict(kept, folder, metadata={"format": "pt"})
        if previous is not None and unchanged:
            _write_index(folder, {name: Path(previous.file(name)) for name in unchanged})
        return unchanged

    def _equal_to(self, previous: CheckpointReader) -> set[str]:
        """Names on disk of the tensors that are those of the state before, where leaving them out is worth it."""
        equal, size = set(), 0
        for name, tensor in self.state_dict.items():
            saved = self.on_disk.get(name)
            if saved is None or saved not in previous or saved in equal:
                continue
            if (previous.shape(saved), previous.dtype(saved)) == (tensor.shape, tensor.dtype):
                if torch.equal(_bytes(previous.tensor(saved)), _bytes(tensor)):
                    equal.add(saved)
                    size += tensor.nbytes
        return equal if size > WORTH_SHARING * self.nbytes else set()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, those that share memory counted once."""
        return sum(tensor.nbytes for tensor in {id(t): t for t in self.state_dict.values()}.values())


def recorded_tensors(model: nn.Module) -> list[torch.Tensor]:
    """The tensors that a state holds, tied ones once; of a `PeftModel` the adapter's alone."""
    on_disk = names_on_disk(model)
    state = model.state_dict(keep_vars=True).items()
    return list({id(tensor): tensor for name, tensor in state if name in on_disk or not is_adapter(model)}.values())


def state_nbytes(model: nn.Module, dtype: torch.dtype | None = None) -> tuple[int, int]:
    """Bytes that the first state and each further one take on disk, from shapes and dtypes.

    Args:
        model (`nn.Module`): The model, whatever its weights.
        dtype (`torch.dtype`, *optional*): Floating-point dtype to store.
    """
    total = frozen = 0
    on_disk = names_on_disk(model)
    renamed = {id(tensor) for name, tensor in model.state_dict(keep_vars=True).items() if name in on_disk}
    for tensor in recorded_tensors(model):
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        size = whole_shape(tensor).numel() * kind.itemsize
        total += size
        # what saving splits or merges, as experts, is stored each time
        is_frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        frozen += size if is_frozen and id(tensor) in renamed else 0
    frozen_bytes = 0 if is_adapter(model) else frozen
    return total, total - frozen_bytes if frozen_bytes > WORTH_SHARING * total else total


def roles_on_disk(snapshot: Snapshot, reader: CheckpointReader) -> tuple[dict[str, TensorRole], dict[str, str]]:
    """Roles of the tensors on disk, and the names that are tied to them: from names to names, both as on disk."""
    on_disk = snapshot.on_disk
    owned = {on_disk[name]: role for name, role in snapshot.roles.items() if name in on_disk}
    roles = {
        name: owned.get(name) or role_by_shape(name, reader.shape(name), reader.dtype(name).is_floating_point)
        for name in reader.names
    }
    tied = {
        name: on_disk[role.tied_to]
        for name, role in owned.items()
        if role.tied_to is not None and name not in roles
    }
    return roles, tied


def write_model_files(folder: Path, state_folder: Path, processing_class: Any) -> tuple[FileRecord, ...]:
    """Writes what belongs to the model whatever its state: a state's config, and its tokenizer or processor."""
    work = folder / ".model-files.partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for path in state_folder.iterdir():
        if path.is_file() and not path.name.endswith((".safetensors", ".index.json")):
            shutil.copy2(path, work)
    if processing_class is not None:
        processing_class.save_pretrained(work)
    names = recordable(work)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        fsync(work / name)
        (work / name).replace(folder / name)
    shutil.rmtree(work)
    return tuple(FileRecord.of(folder / name, name) for name in names)


def _write_index(folder: Path, elsewhere: Mapping[str, Path]) -> None:
    """Leads `from_pretrained` to the files of a state and to those of earlier states beside it."""
    index = folder / INDEX_NAME
    if index.exists():
        files = json.loads(index.read_text())["weight_map"]
    else:
        # from_pretrained reads an index only where there is no model.safetensors
        shard = "model-00001-of-00001.safetensors"
        (folder / WEIGHTS_NAME).rename(folder / shard)
        files = dict.fromkeys(CheckpointReader([folder / shard]).names, shard)
    files |= {name: f"../{path.parent.name}/{path.name}" for name, path in elsewhere.items()}
    write_json(index, {"metadata": {}, "weight_map": dict(sorted(files.items()))})


def check_adapter(model: nn.Module) -> None:
    """Raises a `ValueError` when a module has adapters that can't be recorded."""
    if not is_adapter(model):
        return
    from peft import PeftModel

    adapters: Mapping[str, Any] = model.peft_config  # type: ignore[assignment]
    if len(adapters) > 1:
        raise ValueError(
            f"the model has the adapters {', '.join(adapters)}; a trajectory records one: delete the others"
        )
    if not isinstance(model, PeftModel):
        raise ValueError(f"peft can't save a {type(model).__name__}; make it with get_peft_model(…, mixed=False)")
    kind = next(iter(adapters.values()))
    if kind.is_prompt_learning:
        raise ValueError(
            f"{kind.peft_type.value} learns a prompt, of which only what is computed from its weights is saved; a"
            " trajectory records weights: use an adapter such as LoRA"
        )


def _save_adapter(model: Any, state_dict: dict[str, torch.Tensor], folder: Path) -> None:
    model.save_pretrained(folder, state_dict=state_dict)
    (folder / "README.md").unlink(missing_ok=True)  # peft's card, the same for every state
    # where peft puts an adapter that isn't called default
    if (named := folder / next(iter(model.peft_config))).is_dir():
        for path in named.iterdir():
            path.rename(folder / path.name)
        named.rmdir()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def cached_revision(repo_id: str | None) -> str | None:
    """Commit of a Hub id in the Hub cache; `None` where several are there, as a config doesn't say which it is of."""
    if not repo_id or Path(repo_id).exists():
        return None
    try:
        validate_repo_id(repo_id)
    except HFValidationError:  # a folder that is gone
        return None
    snapshots = Path(HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"), "snapshots")
    commits = [path.name for path in snapshots.iterdir()] if snapshots.is_dir() else []
    return commits[0] if len(commits) == 1 else None


def with_place(name: str) -> str:
    """A Hub id or path as it is kept: `./models/bert` for the folder `models/bert`, or it would read as a Hub id."""
    is_relative = not Path(name).is_absolute() and not name.startswith(".")
    return f"./{name}" if name and is_relative and Path(name).is_dir() else name


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a recording depends on, of those that are installed."""
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions
