"""The role of every tensor of a model: which network of KNOWN predicts it, or why none does.

KNOWN has one network each for convolution kernels (`conv`), matrices (`fc`) and additive vectors (`bias`). In the
paper the shape alone decides: 3×3 kernels are conv, other tensors of two or more axes are fc, vectors are bias. Here
the module that owns a tensor decides, so roles hold for any model. Tensors that no network was meant for keep their
values: `norm` (parameters of normalisation layers), `kept` (other parameters) and `copied` (buffers).
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from .model_tensors import unsharded_shape

PREDICTED_ROLES = ("conv", "fc", "bias")
ROLES = (*PREDICTED_ROLES, "norm", "kept", "copied")
_MATRIX_OWNERS = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_ELEMENTWISE = ("A_log",)  # log decay rates of state-space models, one row per channel


@dataclass(frozen=True)
class TensorRole:
    """Role of a tensor.

    Attributes:
        role (`str`):
            One of `ROLES`.
        reason (`str`):
            Explanation for people. Code reads the other fields.
        tied_to (`str`, *optional*):
            First name of a tied tensor, on all of its other names.
        is_batch_norm (`bool`):
            Whether a BatchNorm layer owns the tensor.

    Raises:
        `ValueError`:
            If the role is unknown.
    """

    role: str
    reason: str
    tied_to: str | None = None
    is_batch_norm: bool = False

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"unknown role {self.role!r}; choose one of {', '.join(ROLES)}")


def tensor_roles(model: nn.Module) -> dict[str, TensorRole]:
    """Return the role of every tensor of a model.

    A tied tensor is listed under each of its names; all but the first have `tied_to`. A checkpoint on disk contains it
    once.

    Args:
        model (`nn.Module`):
            Any module.

    Returns:
        `dict[str, TensorRole]`: Roles by the names of `model.state_dict()`, in its order.
    """
    owners = dict(model.named_modules(remove_duplicate=False))
    first_name: dict[int, str] = {}
    roles: dict[str, TensorRole] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, attribute = name.rpartition(".")
        owner = owners.get(path)
        if isinstance(owner, nn.ParameterDict):  # of peft, by name of the adapter
            attribute = path.rpartition(".")[2]
        first = first_name.setdefault(id(tensor), name)
        if first == name:
            role = _role(owner, name, attribute, tensor)
            roles[name] = replace(role, is_batch_norm=isinstance(owner, _BatchNorm))
        else:
            roles[name] = replace(roles[first], reason=f"tied to {first}", tied_to=first)
    return roles


def role_by_shape(name: str, shape: tuple[int, ...], is_floating_point: bool) -> TensorRole:
    """Role of a tensor on disk of unknown owner, for tensors that saving splits or merges."""
    axes = f"{len(shape)} axes, owner unknown"
    if not is_floating_point:
        return TensorRole("copied", "integer tensor, owner unknown")
    if len(shape) > 3 and any(size > 1 for size in shape[2:]):
        return TensorRole("conv", axes)
    if len(shape) >= 2:
        return TensorRole("fc", axes)
    if "norm" in name.lower():
        return TensorRole("norm", "norm by name, owner unknown")
    if len(shape) == 1 and "bias" in name.rpartition(".")[2]:
        return TensorRole("bias", "bias by name, owner unknown")
    return TensorRole("kept", axes)


def _role(owner: nn.Module | None, name: str, attribute: str, tensor: object) -> TensorRole:
    kind = type(owner).__name__.removeprefix("FSDP")  # fully_shard subclasses the class of the module
    if not isinstance(tensor, nn.Parameter):
        return TensorRole("copied", f"buffer of {kind}")
    if not tensor.is_floating_point():
        return TensorRole("copied", f"integer parameter of {kind}")
    if "norm" in kind.lower() or kind.endswith("GRN"):  # global response normalisation
        return TensorRole("norm", f"{attribute} of {kind}")
    if ".parametrizations." in f".{name}":
        return TensorRole("kept", "factor of a parametrized weight")
    shape = unsharded_shape(tensor)
    if not shape:
        return TensorRole("kept", f"scalar of {kind}")
    if len(shape) > 1:
        return _matrix_role(owner, kind, attribute, shape)
    if "bias" in attribute:
        return TensorRole("bias", f"{attribute} of {kind}")
    return TensorRole("kept", f"{attribute} of {kind}, a vector that may scale instead of shift")


def _matrix_role(owner: nn.Module | None, kind: str, attribute: str, shape: torch.Size) -> TensorRole:
    """Role of a floating-point parameter of two or more axes."""
    if isinstance(owner, _ConvNd):
        taps = "×".join(map(str, owner.kernel_size))
        is_pointwise = all(size == 1 for size in owner.kernel_size)
        return TensorRole("fc" if is_pointwise else "conv", f"{taps} kernel of {kind}")
    if isinstance(owner, (*_MATRIX_OWNERS, Conv1D, nn.Embedding)) or _is_matrix(attribute):
        return TensorRole("fc", f"{attribute} of {kind}, {len(shape)} axes")
    if attribute in _ELEMENTWISE:
        return TensorRole("kept", f"{attribute} of {kind}, which acts element by element")
    if sum(size > 1 for size in shape) < 2:
        size = "×".join(map(str, shape))
        return TensorRole("kept", f"{attribute} of {kind}, a vector of shape {size} that may scale instead of shift")
    return TensorRole("fc", f"{attribute} of {kind}, {len(shape)} axes")


def _is_matrix(attribute: str) -> bool:
    """Whether the name is that of a matrix, even with a single row: an embedding or a factor of LoHa or LoKr."""
    return any(word in attribute.lower() for word in ("token", "embed", "hada_w", "lokr_w"))
