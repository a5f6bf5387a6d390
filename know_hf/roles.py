"""The role of every tensor of a model: which of KNOWN's networks predicts it, or why none does.

KNOWN has one network each for convolution kernels (`conv`), matrices (`fc`) and additive vectors (`bias`). The
published table goes by shape alone: 3×3 kernels are conv, every other tensor of two or more axes is fc, one axis is
bias. Here the module that owns a tensor decides, so that it holds for any model, and what a network was never meant
for is left alone: `norm` (parameters of normalisation layers), `kept` (other parameters) and `copied` (buffers).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

PREDICTED_ROLES = ("conv", "fc", "bias")
ROLES = (*PREDICTED_ROLES, "norm", "kept", "copied")
_MATRIX_OWNERS = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_ELEMENTWISE = ("A_log",)  # logarithms of the decays of state-space models, a row for each channel


@dataclass(frozen=True)
class TensorRole:
    """Role of one tensor, one of `ROLES`, and the reason in words."""

    role: str
    reason: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise TypeError(f"unknown role {self.role!r}; the roles are {', '.join(ROLES)}")


def tensor_roles(model: nn.Module) -> dict[str, TensorRole]:
    """Role of every tensor of the model's state dict.

    Tied tensors are listed under each of their names, all but the first with the reason `tied to …`; a checkpoint on
    disk holds them once.

    Args:
        model (`nn.Module`): Any module.

    Returns:
        `dict[str, TensorRole]`: from the names of `model.state_dict()`, in its order.
    """
    owners = dict(model.named_modules(remove_duplicate=False))
    first_name: dict[int, str] = {}
    roles: dict[str, TensorRole] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, attribute = name.rpartition(".")
        owner = owners.get(path)
        if isinstance(owner, nn.ParameterDict):  # peft's, from names of adapters
            attribute = path.rpartition(".")[2]
        role = _role(owner, name, attribute, tensor)
        source = first_name.setdefault(id(tensor), name)
        roles[name] = role if source == name else TensorRole(roles[source].role, f"tied to {source}")
    return roles


def is_adapter(model: nn.Module) -> bool:
    """Whether a module is a `PeftModel`, of which only the adapter is saved."""
    return type(model).__module__.startswith("peft.") and hasattr(model, "peft_config")


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """Shape of a tensor; of a parameter in parts over the processes, as ZeRO-3 leaves it, the shape of the whole."""
    return getattr(tensor, "ds_shape", tensor.shape)


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds the model's parameters in parts: they are then empty on every process."""
    return any(whole_shape(parameter) != parameter.shape for parameter in model.parameters())


def names_in_memory(model: nn.Module) -> dict[str, str]:
    """Where the tensors are that `save_pretrained` writes, of those it only renames.

    transformers keeps the names of old checkpoints on disk while modules in memory may have others (ViT, Mixtral, …).
    Of a `PeftModel` only the adapter is saved, some tensors under two names. Tensors that saving splits or merges, or
    doesn't save, are left out.

    Args:
        model (`nn.Module`): Any module; one of neither transformers nor peft keeps its names.

    Returns:
        `dict[str, str]`: from the names on disk to those of `model.state_dict()`.
    """
    markers = {
        name: torch.empty(whole_shape(tensor), dtype=tensor.dtype, device="meta")
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    if isinstance(model, PreTrainedModel):
        left_out = model._keys_to_ignore_on_save or ()
        saved = revert_weight_conversion(model, {k: marker for k, marker in markers.items() if k not in left_out})
    elif is_adapter(model):
        from peft import get_peft_model_state_dict

        adapter: Any = model
        name = next(iter(adapter.peft_config))
        saved = get_peft_model_state_dict(adapter, state_dict=dict(markers), adapter_name=name)
    else:
        return {name: name for name in markers}
    in_memory = {id(marker): name for name, marker in markers.items()}
    return {name: in_memory[id(marker)] for name, marker in saved.items() if id(marker) in in_memory}


def converted_names(model: nn.Module) -> set[str]:
    """Names in memory of the tensors of a `PreTrainedModel` that saving splits or merges, such as fused experts."""
    if not isinstance(model, PreTrainedModel):
        return set()
    return (
        set(model.state_dict(keep_vars=True))
        - set(model._keys_to_ignore_on_save or ())
        - {*names_in_memory(model).values()}
    )


def names_on_disk(model: nn.Module) -> dict[str, str]:
    """From the names of `model.state_dict()` to those on disk; [`names_in_memory`] the other way round."""
    return {name: saved for saved, name in names_in_memory(model).items()}


def role_by_shape(name: str, shape: tuple[int, ...], is_floating_point: bool) -> TensorRole:
    """Role of a tensor whose owner isn't known, for those that saving splits or merges.

    Args:
        name (`str`): Its name in the checkpoint.
        shape (`tuple[int, ...]`): Its shape there.
        is_floating_point (`bool`): Whether its dtype is a floating-point one.
    """
    attribute = name.rpartition(".")[2]
    if not is_floating_point:
        return TensorRole("copied", "integer tensor, owner unknown")
    if len(shape) > 3 and any(size > 1 for size in shape[2:]):
        return TensorRole("conv", f"{len(shape)} axes, owner unknown")
    if len(shape) >= 2:
        return TensorRole("fc", f"{len(shape)} axes, owner unknown")
    if "norm" in name.lower():
        return TensorRole("norm", "named norm, owner unknown")
    if len(shape) == 1 and "bias" in attribute:
        return TensorRole("bias", "one axis, named bias, owner unknown")
    return TensorRole("kept", f"{len(shape)} axes, owner unknown")


def _role(owner: nn.Module | None, name: str, attribute: str, tensor: object) -> TensorRole:
    kind = type(owner).__name__.removeprefix("FSDP")  # fully_shard makes a subclass of that name
    if not isinstance(tensor, nn.Parameter):
        return TensorRole("copied", f"buffer of {kind}")
    if not tensor.is_floating_point():
        return TensorRole("copied", f"integer parameter of {kind}")
    if "norm" in kind.lower() or kind.endswith("GRN"):  # global response normalisation
        return TensorRole("norm", f"{attribute} of {kind}")
    if ".parametrizations." in f".{name}":
        return TensorRole("kept", "part of a parametrization: no network was trained on factors of a weight")
    shape = whole_shape(tensor)
    if not shape:
        return TensorRole("kept", f"scalar of {kind}")
    if len(shape) == 1:
        if "bias" in attribute:
            return TensorRole("bias", f"{attribute} of {kind}")
        return TensorRole("kept", f"vector {attribute!r} of {kind} is no bias: it may scale instead of shift")
    if isinstance(owner, _ConvNd):
        taps = "×".join(map(str, owner.kernel_size))
        if all(size == 1 for size in owner.kernel_size):
            return TensorRole("fc", f"{taps} kernel of {kind}: a matrix at every place")
        return TensorRole("conv", f"{taps} kernel of {kind}")
    if isinstance(owner, Conv1D):
        return TensorRole("fc", "weight of transformers' Conv1D: a transposed Linear")
    if isinstance(owner, nn.Embedding):
        return TensorRole("fc", f"table of {kind}")
    if isinstance(owner, _MATRIX_OWNERS) or _is_matrix(attribute):
        return TensorRole("fc", f"{attribute} of {kind}, {len(shape)} axes")
    if attribute in _ELEMENTWISE:
        return TensorRole("kept", f"{attribute} of {kind} acts element by element, not as a matrix")
    if sum(size > 1 for size in shape) < 2:
        size = "×".join(map(str, shape))
        return TensorRole("kept", f"{attribute} of {kind} is a vector, of shape {size}: it may scale instead of shift")
    return TensorRole("fc", f"{attribute} of {kind}, {len(shape)} axes")


def _is_matrix(attribute: str) -> bool:
    """Whether a parameter is a matrix by its name, also one of a single row: an embedding (`cls_token`,
    `position_embeddings`), or a factor of a weight (LoHa, LoKr)."""
    return any(word in attribute.lower() for word in ("token", "embed", "hada_w", "lokr_w"))
