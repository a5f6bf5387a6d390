"""Import of the published Keras weights of KNOWN. HDF5 files are read with h5py; nothing is unpickled."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..extras import missing

if TYPE_CHECKING:
    import h5py

_LARGEST_COMPRESSION = 20  # of the bytes of weights, which hardly compress

KERAS_FILES = {"conv": "KNOWN_Conv.h5", "fc": "KNOWN_FC.h5", "bias": "KNOWN_Bias.h5"}

# Order in which the published program builds its layers; Keras names them dense, dense_1, dense_2, …
_STREAM_LAYERS = ("expand", *(f"activation.{name}" for name in ("squeeze", "shift", "scale", "exponent")), "contract")
KERAS_LAYERS = (
    *(f"{stream}_stream.{layer}" for stream in ("history", "difference") for layer in _STREAM_LAYERS),
    "head",
)


def read_keras_weights(folder: str | os.PathLike, model: nn.Module) -> dict[str, torch.Tensor]:
    """
    Read the three files of a folder as a float32 state dict for a model, which has the expected names and shapes.

    Keras kernels `(in, out)` are transposed to `(out, in)`.

    Raises:
        `ImportError`: If h5py is not installed.
        `FileNotFoundError`: If a file is missing.
        `ValueError`: If a file is not HDF5, or one of its datasets is missing, has the wrong shape or dtype, is stored
        elsewhere or not completely, or contains non-finite values.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state_dict = {}
    for role, file_name in KERAS_FILES.items():
        path = Path(folder) / file_name
        with open_hdf5(path) as file:
            for number, layer in enumerate(KERAS_LAYERS):
                group = "dense" if number == 0 else f"dense_{number}"
                prefix = f"networks.{role}.{layer}"
                kernel = _read(file, path, f"{group}/{group}/kernel:0", shapes[f"{prefix}.weight"][::-1])
                state_dict[f"{prefix}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel.T))
                bias = _read(file, path, f"{group}/{group}/bias:0", shapes[f"{prefix}.bias"])
                state_dict[f"{prefix}.bias"] = torch.from_numpy(bias)
    return state_dict


def open_hdf5(path: Path) -> "h5py.File":
    """
    Open an HDF5 file for reading.

    Raises:
        `ImportError`: If h5py is not installed.
        `FileNotFoundError`: If the file is missing.
        `ValueError`: If the file is not HDF5.
    """
    try:
        import h5py
    except ImportError as error:
        raise missing(f"the HDF5 file {path.name}", "h5py", "keras") from error
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; download the published file, or check the folder")
    with hdf5_errors(path):
        return h5py.File(path, "r")


def find_dataset(file: "h5py.File", path: Path, name: str) -> "h5py.Dataset | None":
    """
    Return a dataset whose values are in the file itself, or `None` if there is no dataset of that name.

    HDF5 can take values from any other file of the machine, and can declare sizes that it does not store.

    Raises:
        `ValueError`: If a link, a virtual dataset or external storage leads out of the file, or the dataset is larger
        than what the file stores, or the file is damaged.
    """
    with hdf5_errors(path):
        return _find(file, path, name)


def read_values(dataset: "h5py.Dataset", path: Path, selection: Any = ()) -> np.ndarray:
    """Read a part of a dataset as float32. A `ValueError` names a damaged file."""
    with hdf5_errors(path):
        return dataset[selection].astype(np.float32)


@contextmanager
def hdf5_errors(path: Path) -> Iterator[None]:
    """Turn the errors of h5py for a damaged file into a `ValueError` that names it."""
    try:
        yield
    except (KeyError, OSError, RuntimeError, UnicodeError) as error:
        raise ValueError(f"{path} is not a readable HDF5 file ({error}); download it again") from error


def _find(file: "h5py.File", path: Path, name: str) -> "h5py.Dataset | None":
    import h5py

    node, problem = file, None
    for part in name.split("/"):
        # Not `part in node`, nor `node.get`: both follow an external link, that is, open its file.
        if not isinstance(node, h5py.Group) or not node.id.links.exists(part.encode()):
            return None
        if node.id.links.get_info(part.encode()).type != h5py.h5l.TYPE_HARD:
            raise ValueError(f"{part!r} of {path} is a link; use a file that contains its datasets")
        node = node[part]
    if not isinstance(node, h5py.Dataset):
        return None
    if node.is_virtual or node.external:
        problem = "is stored outside the file"
    else:
        needed = max(node.nbytes, math.prod(node.chunks or ()) * node.dtype.itemsize)  # HDF5 reads complete chunks
        compressed = _LARGEST_COMPRESSION if node.id.get_create_plist().get_nfilters() else 1
        stored = min(node.id.get_storage_size(), path.stat().st_size)
        if needed > compressed * stored and node.size:
            problem = f"needs {needed:,} bytes, of which the file stores {stored:,}"
    if problem:
        raise ValueError(f"dataset {name!r} of {path} {problem}; use a complete file")
    return node


def _read(file: "h5py.File", path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    dataset = find_dataset(file, path, name)
    if dataset is None:
        raise ValueError(f"{path} has no dataset {name!r}; use an unmodified KNOWN weight file")
    if dataset.shape != shape or dataset.dtype.kind != "f":
        actual = f"{dataset.dtype} of shape {dataset.shape}"
        hint = "pass the KNOWNConfig that matches the file"
        raise ValueError(f"dataset {name!r} of {path} is {actual}, expected floats of shape {shape}; {hint}")
    values = read_values(dataset, path)
    if not np.isfinite(values).all():
        raise ValueError(f"dataset {name!r} of {path} contains non-finite values; download the file again")
    return values
