"""The published Keras weights of KNOWN as a PyTorch state dict: read with h5py, nothing is ever unpickled."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    import h5py

KERAS_FILES = {"conv": "KNOWN_Conv.h5", "fc": "KNOWN_FC.h5", "bias": "KNOWN_Bias.h5"}

# The order in which the published program builds its layers; Keras numbers them dense, dense_1, dense_2, …
_STREAM_LAYERS = (
    "expand",
    "activation.squeeze",
    "activation.shift",
    "activation.scale",
    "activation.exponent",
    "contract",
)
KERAS_LAYERS = (
    *(f"history_stream.{layer}" for layer in _STREAM_LAYERS),
    *(f"difference_stream.{layer}" for layer in _STREAM_LAYERS),
    "head",
)


def read_keras_weights(folder: str | os.PathLike, model: nn.Module) -> dict[str, torch.Tensor]:
    """
    Reads `KNOWN_Conv.h5`, `KNOWN_FC.h5` and `KNOWN_Bias.h5`.

    Args:
        folder (`str` or `os.PathLike`):
            Folder with the three files.
        model ([`KNOWNModel`]):
            Gives the names and shapes the weights must have; it is not changed.

    Returns:
        `dict[str, torch.Tensor]`: a state dict for `model`, float32. Keras keeps kernels as `(in, out)`, they come
        back as `(out, in)`.

    Raises:
        `ImportError`: when h5py is not installed.
        `FileNotFoundError`: when a file is missing.
        `ValueError`: when a file is not HDF5, or a dataset in it is missing, not of floats, not finite or of another
        shape.
    """
    h5py = _import_h5py()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state_dict = {}
    for role, file_name in KERAS_FILES.items():
        path = Path(folder) / file_name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} not found: from_keras needs {', '.join(KERAS_FILES.values())} in one folder"
            )
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise ValueError(f"{path} is not a readable HDF5 file ({error}); download it again") from error
        with file:
            for number, layer in enumerate(KERAS_LAYERS):
                group = "dense" if number == 0 else f"dense_{number}"
                prefix = f"networks.{role}.{layer}"
                kernel_shape = shapes[f"{prefix}.weight"][::-1]
                kernel = _read(file, path, f"{group}/{group}/kernel:0", kernel_shape)
                state_dict[f"{prefix}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel.T))
                bias = _read(file, path, f"{group}/{group}/bias:0", shapes[f"{prefix}.bias"])
                state_dict[f"{prefix}.bias"] = torch.from_numpy(bias)
    return state_dict


def _read(file: "h5py.File", path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    dataset = file.get(name)
    # A group under this name has no dtype: it counts as missing too.
    if dataset is None or not hasattr(dataset, "dtype"):
        raise ValueError(f"{path} has no dataset {name!r}; is it a KNOWN weight file as published?")
    if dataset.shape != shape or dataset.dtype.kind != "f":
        raise ValueError(
            f"dataset {name!r} of {path} is {dataset.dtype} of shape {dataset.shape}, expected floats of shape "
            f"{shape}; pass the KNOWNConfig the file was made with"
        )
    values = dataset[()].astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"dataset {name!r} of {path} has values that are not finite; download the file again")
    return values


def _import_h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError('reading Keras weights needs h5py: pip install "know_hf[keras]"') from error
    return h5py
