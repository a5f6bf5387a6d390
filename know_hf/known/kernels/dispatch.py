"""One entry to every form of KNOWN: chosen by device, checked, and never with stale weights.

| kernel | runs on | needs | what it is |
| --- | --- | --- | --- |
| `eager` | any device | – | the model itself, chunk by chunk |
| `folded` | any device | – | fewer and smaller layers, see [`folded`] |
| `cpu` | CPU | llvmlite | one machine-code loop for this CPU, see [`cpu`] |
| `triton` | GPU | triton, a C compiler | one GPU kernel, see [`triton_kernel`] |

All of them take a history of any floating point dtype, bring it to float32 first, and return float32. Differences of
states are taken in float32.
"""

import shutil
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from os import environ
from weakref import WeakKeyDictionary

import torch
from packaging.version import Version

from ..modeling_known import KNOWNModel
from .chunks import in_chunks

KERNELS = ("eager", "folded", "cpu", "triton")

OLDEST_LLVMLITE = Version("0.45")
"""The first with an LLVM whose pointers have no type."""

PreparedKernel = Callable[[torch.Tensor], torch.Tensor]

# The last prepared kernel of every model, role and name, with the weights it was made from.
_PREPARED: WeakKeyDictionary[KNOWNModel, dict[tuple[str, str], tuple[torch.Tensor, PreparedKernel]]] = (
    WeakKeyDictionary()
)


def residual(model: KNOWNModel, history: torch.Tensor, role: str, kernel: str = "auto") -> torch.Tensor:
    """
    What KNOWN adds to the full-data state, without gradients. It computes where the model is.

    A call compares the weights with those of the last one (9,425 numbers) and prepares anew when they changed in any
    way, so that it can be called chunk by chunk and between steps of training alike.

    Args:
        model ([`KNOWNModel`]):
            The networks of the three roles.
        history (`torch.Tensor` of shape `(N, S)`, floating point, any strides):
            One row a scalar weight: its value in every state, most forgotten first, full data last. Finite.
        role (`str`):
            `"conv"`, `"fc"` or `"bias"`.
        kernel (`str`, *optional*, defaults to `"auto"`):
            `"eager"`, `"folded"`, `"cpu"`, `"triton"`, or `"auto"`: the fastest that runs on the device of the model.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32, on the device of `history`. A row's value does not depend on the rows
        beside it: `"cpu"` and `"triton"` see to that, the others rely on torch's matrix products. It is NaN where the
        network overflows float32.

    Raises:
        `ValueError`: for an unknown role or kernel, a history that is not `(N, S)` of floats, or a model on a device
        that the kernel does not run on.
        `ImportError`: when the kernel needs a package that is not installed.
    """
    model._check_inputs(history, role, None)
    kernel = _choose(model, kernel)
    if kernel == "eager":
        return prepare(model, role, kernel)(history)
    weights = torch.nn.utils.parameters_to_vector(model.networks[role].parameters()).detach()
    known, prepared = _PREPARED.setdefault(model, {}).get((role, kernel), (None, None))
    if prepared is None or known is None or not _same(known, weights):
        prepared = prepare(model, role, kernel)
        _PREPARED[model][role, kernel] = weights, prepared
    return prepared(history)


def prepare(model: KNOWNModel, role: str, kernel: str = "auto") -> PreparedKernel:
    """
    Everything of [`residual`] that depends on the weights only. The result keeps the weights of this moment (but for
    `"eager"`, which is the model) and does not check its histories.

    Args:
        model ([`KNOWNModel`]), role (`str`), kernel (`str`, *optional*, defaults to `"auto"`):
            As of [`residual`].

    Returns:
        `Callable`: from a history `(N, S)` to the residual `(N,)`.

    Raises:
        As [`residual`].
    """
    model._check_role(role)
    kernel = _choose(model, kernel)
    if kernel == "eager":

        def forward(chunk: torch.Tensor) -> torch.Tensor:
            return model(history=chunk, role=role, return_dict=False)[0]

        return in_chunks(forward, model.device)
    if kernel == "folded":
        from .folded_kernel import prepare_folded

        return prepare_folded(model, role)
    if kernel == "cpu":
        from .llvm_kernel import prepare_cpu

        return prepare_cpu(model, role)
    from .triton_kernel import prepare_triton

    return prepare_triton(model, role)


def _choose(model: KNOWNModel, kernel: str) -> str:
    """The name of a kernel that can run, from a name or `"auto"`."""
    if kernel == "auto":
        fastest = "triton" if model.device.type == "cuda" else "cpu"  # not Triton's interpreter, which is slow
        return fastest if _obstacle(fastest, model.device) is None else "folded"
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; choose one of auto, {', '.join(KERNELS)}")
    if (obstacle := _obstacle(kernel, model.device)) is not None:
        raise obstacle
    return kernel


def _obstacle(kernel: str, device: torch.device) -> ImportError | ValueError | None:
    """Why a kernel can't run on a device, and the mend."""
    if kernel == "cpu":
        if device.type != "cpu":
            return ValueError(f"kernel 'cpu' can't run: the model is on {device}; move it with model.cpu()")
        if not find_spec("llvmlite"):
            return ImportError("kernel 'cpu' can't run: llvmlite is not installed; pip install 'know_hf[fast]'")
        if (installed := _installed_version("llvmlite")) < OLDEST_LLVMLITE:
            return ImportError(
                f"kernel 'cpu' can't run: llvmlite {installed} is older than {OLDEST_LLVMLITE}; pip install"
                " 'know_hf[fast]'"
            )
    if kernel == "triton":
        interpreted = environ.get("TRITON_INTERPRET") == "1"
        if device.type != "cuda" and not interpreted:
            return ValueError(f"kernel 'triton' can't run: the model is on {device}; move it with model.cuda()")
        if not find_spec("triton"):
            return ImportError("kernel 'triton' can't run: triton is not installed; pip install triton")
        if not interpreted and torch.version.cuda is None:
            return ValueError("kernel 'triton' can't run: it is written for NVIDIA GPUs; choose 'folded'")
        if not interpreted and torch.cuda.get_device_capability(device) < (8, 0):
            return ValueError(f"kernel 'triton' can't run: {device} has no tf32 matrix units; choose 'folded'")
        if not interpreted and not (environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return ValueError("kernel 'triton' can't run: triton finds no C compiler; install gcc or set CC")
    return None


@cache
def _installed_version(package: str) -> Version:
    return Version(version(package))


def _same(known: torch.Tensor, weights: torch.Tensor) -> bool:
    return known.dtype == weights.dtype and known.device == weights.device and torch.equal(known, weights)
