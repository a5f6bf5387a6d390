"""Selection of a KNOWN kernel by name or device, and reuse of prepared weights.

| kernel | runs on | needs | implementation |
| --- | --- | --- | --- |
| `eager` | any device | – | the model, chunk by chunk |
| `folded` | any device | – | fewer and smaller layers, see `folded_kernel` |
| `cpu` | CPU | llvmlite | one machine-code loop for this CPU, see `llvm_kernel` |
| `triton` | GPU | triton, a C compiler | one GPU kernel, see `triton_kernel` |

Every kernel converts the history to float32, takes its differences in float32, and returns float32.
"""

import shutil
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from os import environ
from weakref import WeakKeyDictionary

import torch
from packaging.version import Version

from ...extras import missing
from ..modeling_known import KNOWNModel
from .chunks import ResidualFunction, in_chunks

KERNELS = ("eager", "folded", "cpu", "triton")

OLDEST_LLVMLITE = Version("0.45")
"""First version with an LLVM that has opaque pointers."""

# For each model, by role and kernel: the weights and the kernel prepared from them.
_PREPARED: WeakKeyDictionary[KNOWNModel, dict[tuple[str, str], tuple[torch.Tensor, ResidualFunction]]] = (
    WeakKeyDictionary()
)


def residual(model: KNOWNModel, history: torch.Tensor, role: str, kernel: str = "auto") -> torch.Tensor:
    """
    Compute what KNOWN adds to the full-data state, without gradients, on the device of the model.

    Each call compares the weights of the network with those of the previous call and prepares the kernel again only
    if they changed. It can therefore be called for every chunk of a tensor, and between training steps.

    Args:
        model ([`KNOWNModel`]):
            Model of the variant `"reference"`.
        history (`torch.Tensor` of shape `(N, S)`, floating point, any strides):
            One row per scalar weight: its value in every state, most forgotten first, full data last. Finite.
        role (`str`):
            Network to apply: `"conv"`, `"fc"` or `"bias"`.
        kernel (`str`, *optional*, defaults to `"auto"`):
            `"eager"`, `"folded"`, `"cpu"`, `"triton"`, or `"auto"` for the fastest one on the device of the model.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32, on the device of `history`. The value of a row does not depend on
        other rows: `"cpu"` and `"triton"` guarantee this, the other kernels rely on torch's matrix products. It is
        NaN where the network overflows float32.

    Raises:
        `ValueError`: If the role or kernel is unknown, `history` is not a floating-point `(N, S)` tensor, or the
        kernel does not run on the device of the model.
        `ImportError`: If the kernel needs a package that is not installed.
    """
    model.check_inputs(history, role)
    kernel = _select(model, kernel)
    if kernel == "eager":
        return prepare(model, role, kernel)(history)
    weights = torch.nn.utils.parameters_to_vector(model.networks[role].parameters()).detach()
    prepared_kernels = _PREPARED.setdefault(model, {})
    entry = prepared_kernels.get((role, kernel))
    if entry is None or not _is_same(entry[0], weights):
        entry = prepared_kernels[role, kernel] = weights, prepare(model, role, kernel)
    return entry[1](history)


def prepare(model: KNOWNModel, role: str, kernel: str = "auto") -> ResidualFunction:
    """
    Prepare a kernel from the current weights. Arguments and errors as [`residual`].

    The prepared kernel keeps these weights, except for `"eager"`, which calls the model. It does not check its input.

    Returns:
        `Callable[[torch.Tensor], torch.Tensor]`: Function from a history `(N, S)` to its residual `(N,)`, float32, on
        the device of the history.
    """
    model.check_role(role)
    kernel = _select(model, kernel)
    if kernel == "eager":
        return in_chunks(lambda chunk: model(history=chunk, role=role, return_dict=False)[0], model.device)
    if kernel == "folded":
        from .folded_kernel import prepare_folded

        return prepare_folded(model, role)
    if kernel == "cpu":
        from .llvm_kernel import prepare_cpu

        return prepare_cpu(model, role)
    from .triton_kernel import prepare_triton

    return prepare_triton(model, role)


def _select(model: KNOWNModel, kernel: str) -> str:
    """Return the name of a kernel that runs on the device of the model."""
    if kernel == "auto":
        # Not Triton's interpreter on a CPU: it is slow.
        kernel = "triton" if model.device.type == "cuda" else "cpu"
        try:
            _check(kernel, model.device)
        except (ImportError, ValueError):
            return "folded"
    elif kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; choose one of auto, {', '.join(KERNELS)}")
    else:
        _check(kernel, model.device)
    return kernel


def _check(kernel: str, device: torch.device) -> None:
    if kernel == "cpu":
        _check_cpu(device)
    elif kernel == "triton":
        _check_triton(device)


def _check_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        raise ValueError(f"kernel 'cpu' cannot run on {device}; move the model with model.cpu()")
    if not find_spec("llvmlite"):
        raise missing("kernel 'cpu'", "llvmlite", "fast")
    if (installed := _installed_version("llvmlite")) < OLDEST_LLVMLITE:
        raise missing("kernel 'cpu'", f"llvmlite {OLDEST_LLVMLITE} or later instead of {installed}", "fast")


def _check_triton(device: torch.device) -> None:
    interpreted = environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        raise ValueError(f"kernel 'triton' cannot run on {device}; move the model with model.cuda()")
    if not find_spec("triton"):
        raise missing("kernel 'triton'", "triton", "triton")
    if interpreted:
        return
    if torch.version.cuda is None:
        raise ValueError("kernel 'triton' supports NVIDIA GPUs only; choose 'folded'")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(f"kernel 'triton' needs TF32 tensor cores, which {device} lacks; choose 'folded'")
    if not (environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise ValueError("kernel 'triton' needs a C compiler; install gcc or set CC")


@cache
def _installed_version(package: str) -> Version:
    return Version(version(package))


def _is_same(previous: torch.Tensor, weights: torch.Tensor) -> bool:
    return (previous.dtype, previous.device) == (weights.dtype, weights.device) and torch.equal(previous, weights)
