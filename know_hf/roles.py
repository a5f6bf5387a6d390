"""The role of every tensor of a model: which network of KNOWN predicts it, or why none does.

KNOWN has one network each for convolution kernels (`conv`), matrices (`fc`) and additive vectors (`bias`). In the
paper the shape alone decides: 3×3 kernels are conv, other tensors of two or more axes are fc, vectors are bias. Here
the module that owns a tensor and the tensor's name take precedence over its shape, so roles work for any model. Other
tensors keep their values: `norm` (parameters of normalisation layers), `kept` (other parameters) and `copied`
(buffers).
"""

import re
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from .model_tensors import is_adapter, tied_names, unsharded_shape, unwrapped

PREDICTED_ROLES = ("conv", "fc", "bias")
ROLES = (*PREDICTED_ROLES, "norm", "kept", "copied")
PREDICTED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MATRIX_OWNERS = (
    *(nn.Linear, nn.Bilinear, Conv1D, nn.Embedding, nn.EmbeddingBag),
    *(nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase),
)
# The last of these words in the name of a parameter tells its kind, whatever its shape.
_WORDS = re.compile(
    r"(?P<norm>norm(?!al))"
    r"|(?P<bias>bias(?!.*(weight|proj|kernel)))"
    # a row per token or position, or a factor of LoRA, LoHa or LoKr, even if it has a single row
    r"|(?P<matrix>token|embed|(?<![a-z])emb|emb$|(?<![a-z])table|probe|latent|newline|lora_[ab](?![a-z])|(hada|lokr)_w)"
    # with the decay rates of state-space models, one row per channel
    r"|(?P<scale>(scale(?!d)|scaling|gain|gamma|lambda|temperature|magnitude|decay$|(?<![a-z])(ls|tau|a_log)(?![a-z]))"
    r"(?!.*(weight|proj|kernel)))",
    re.IGNORECASE,
)
_NORM_KINDS = re.compile(r"[Nn]orm(?!al)|NORM|(GRN|RMS|[BGL]N)(\dd)?$")  # GRN: global response normalisation
_SCALE_KINDS = re.compile(r"(Scale|Gain|Temperature)(\dd)?$")


@dataclass(frozen=True)
class TensorRole:
    """Role of a tensor, one of `ROLES`; a `ValueError` for another one."""

    role: str
    reason: str  # for people; code reads the other fields
    tied_to: str | None = None  # first name of a tied tensor, on all of its other names
    is_batch_norm: bool = False  # whether a BatchNorm layer owns the tensor

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"unknown role {self.role!r}; choose one of {', '.join(ROLES)}")


def tensor_roles(model: nn.Module) -> dict[str, TensorRole]:
    """Return the role of every tensor of a model.

    A tied tensor is listed under each of its names, all but the first with `tied_to`. A checkpoint on disk contains it
    only once.

    Args:
        model (`nn.Module`):
            Any module; wrappers such as those of torch.compile are removed.

    Returns:
        `dict[str, TensorRole]`: Roles by the names of `model.state_dict()`, in its order.
    """
    model = unwrapped(model)
    tied = tied_names(model)
    owners = dict(model.named_modules(remove_duplicate=False))
    roles: dict[str, TensorRole] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, attribute = name.rpartition(".")
        owner = owners.get(path)
        if isinstance(owner, nn.ParameterDict | nn.ParameterList):
            # keys are indices, names of adapters, or else what they say
            is_telling = _WORDS.search(attribute) and not is_adapter(model)
            attribute = attribute if is_telling else path.rpartition(".")[2]
        first = tied.get(name)
        if first is None:
            role = _role(owner, name, attribute, tensor)
            roles[name] = replace(role, is_batch_norm=isinstance(owner, _BatchNorm))
        else:
            roles[name] = replace(roles[first], reason=f"tied to {first}", tied_to=first)
    return roles


def role_by_shape(name: str, shape: tuple[int, ...], is_floating_point: bool) -> TensorRole:
    """Role of a tensor on disk of unknown owner, for tensors that saving splits or merges."""
    if not is_floating_point:
        return TensorRole("copied", "integer tensor, owner unknown")
    parent, _, attribute = name.rpartition(".")
    if _NORM_KINDS.search(parent.rpartition(".")[2]):
        return TensorRole("norm", "norm by name, owner unknown")
    if ".parametrizations." in f".{name}" or re.search("weight_[gv]$", attribute):
        return TensorRole("kept", "factor of a parametrized weight, owner unknown")
    if role := _role_by_name(attribute, "unknown owner"):
        return role
    axes = f"{len(shape)} axes, owner unknown"
    if len(shape) > 3 and any(size > 1 for size in shape[2:]):
        return TensorRole("conv", axes)
    return TensorRole("fc" if len(shape) > 1 else "kept", axes)


def _role(owner: nn.Module | None, name: str, attribute: str, tensor: torch.Tensor) -> TensorRole:
    kind = type(owner).__name__.removeprefix("FSDP")  # fully_shard subclasses the class of the module
    if not isinstance(tensor, nn.Parameter):
        return TensorRole("copied", f"buffer of {kind}")
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return TensorRole("copied", f"integer parameter of {kind}")
    if tensor.dtype not in PREDICTED_DTYPES:
        return TensorRole("kept", f"{str(tensor.dtype).removeprefix('torch.')} parameter of {kind}")
    if ".parametrizations." in f".{name}" or _is_factor(owner, attribute):
        return TensorRole("kept", "factor of a parametrized weight")
    shape = unsharded_shape(tensor)
    is_matrix_layer = isinstance(owner, (_ConvNd, *_MATRIX_OWNERS))
    if _NORM_KINDS.search(kind) and not is_matrix_layer:
        return TensorRole("norm", f"{attribute} of {kind}")
    if _SCALE_KINDS.search(kind) and not is_matrix_layer:
        return TensorRole("kept", f"{attribute} of {kind}, which scales")
    if role := _role_by_name(attribute, kind):
        return role
    if is_matrix_layer and "weight" in attribute and len(shape) > 1:
        return _weight_role(owner, kind, attribute, shape)
    return _role_by_axes(attribute, kind, shape)


def _weight_role(owner: nn.Module | None, kind: str, attribute: str, shape: torch.Size) -> TensorRole:
    """Role of the weight of a convolution or of a layer whose weight is a matrix."""
    if not isinstance(owner, _ConvNd):
        return TensorRole("fc", f"{attribute} of {kind}, {len(shape)} axes")
    taps = "×".join(map(str, owner.kernel_size))
    is_pointwise = all(size == 1 for size in owner.kernel_size)
    return TensorRole("fc" if is_pointwise else "conv", f"{taps} kernel of {kind}")


def _role_by_name(attribute: str, kind: str) -> TensorRole | None:
    """Role of a parameter of any shape whose name tells its kind."""
    words = [match.lastgroup for match in _WORDS.finditer(attribute)]
    match words[-1] if words else None:
        case "norm":
            return TensorRole("norm", f"{attribute} of {kind}")
        case "bias":
            return TensorRole("norm" if "norm" in words else "bias", f"{attribute} of {kind}")
        case "matrix":
            return TensorRole("fc", f"{attribute} of {kind}, an embedding or a factor by name")
        case "scale":
            return TensorRole("kept", f"{attribute} of {kind}, a scale by name")
    return None


def _role_by_axes(attribute: str, kind: str, shape: torch.Size) -> TensorRole:
    """Role of a parameter of which neither name nor owner tell the kind."""
    if sum(size > 1 for size in shape) < 2:
        vector = f"a vector of shape {'×'.join(map(str, shape))}" if shape else "a scalar"
        return TensorRole("kept", f"{attribute} of {kind}, {vector} that may scale instead of shift")
    if "conv" in kind.lower() and any(size > 1 for size in shape[2:]):  # a convolution that is not one of torch's
        return TensorRole("conv", f"{attribute} of {kind}, {len(shape)} axes")
    return TensorRole("fc", f"{attribute} of {kind}, {len(shape)} axes")


def _is_factor(owner: nn.Module | None, attribute: str) -> bool:
    """Whether a parameter is of the older `weight_norm` or `spectral_norm` of torch.nn.utils."""
    base, _, kind = attribute.rpartition("_")
    others = {"g": "v", "v": "g", "orig": "u"}
    return kind in others and hasattr(owner, f"{base}_{others[kind]}")
