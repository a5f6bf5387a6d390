"""The role of every tensor of a model: which of KNOWN's networks predicts it, or why none does.

KNOWN has one network each for convolution kernels (`conv`), matrices (`fc`) and additive vectors (`bias`). The
published table goes by shape alone: 3×3 kernels are conv, every other tensor of two or more axes is fc, one axis is
bias. Here the module that owns a tensor decides, so that it holds for any model, and what a network was never meant
for is left alone: `norm` (parameters of normalisation layers), `kept` (other parameters) and `copied` (buffers).
"""

from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from .model_tensors import whole_shape

PREDICTED_ROLES = ("conv", "fc", "bias")
ROLES = (*PREDICTED_ROLES, "norm", "kept", "copied")
_MATRIX_OWNERS = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_ELEMENTWISE = ("A_log",)  # logarithms of the decays of state-space models, a row for each channel


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
        `ValueError`: If the role is unknown.
    """

    role: str
    reason: str
    tied_to: str | None = None
    is_batch_norm: bool = False

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"unknown role {self.role!r}; choose one of {', '.join(ROLES)}")


def tensor_roles(model: nn.Module) -> dict[str, TensorRole]:
    """Role of every tensor of the model's state dict.

    A tied tensor is listed under each of its names; all but the first have `tied_to`. A checkpoint on disk holds it
    once.

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
        first = first_name.setdefault(id(tensor), name)
        if first == name:
            role = _role(owner, name, attribute, tensor)
            roles[name] = replace(role, is_batch_norm=isinstance(owner, _BatchNorm))
        else:
            roles[name] = replace(roles[first], reason=f"tied to {first}", tied_to=first)
    return roles


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
