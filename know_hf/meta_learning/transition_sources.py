"""Where transitions are read from: recorded trajectories, and files of the published meta-dataset.

Both give pieces of the history of a tensor, most forgotten state first; nothing is sampled or computed here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ..roles import PREDICTED_ROLES
from ..trajectory import WeightTrajectory

if TYPE_CHECKING:
    import h5py

PUBLISHED_SUFFIXES = (".h5", ".hdf5")
PUBLISHED_DATASETS = {"ConvWeights": ("conv", 4), "FCWeights": ("fc", 2), "Bias": ("bias", 2)}


@dataclass(frozen=True)
class SourceTensor:
    """A tensor that moves or may move: its name, its role (`"conv"`, `"fc"` or `"bias"`) and its number of scalars."""

    name: str
    role: str
    size: int


class Source(Protocol):
    """One trajectory, wherever it is.

    Attributes:
        path (`Path`): Its folder or file.
        num_states (`int`): Number of states T.
        planned_states (`int`, *optional*): Number that it has when it is finished, where that is known.
        fingerprint (`str`): Changes when its weights do; needs no weights to be read.
        tensors (sequence of [`SourceTensor`]): The tensors that KNOWN has a network for, always in the
            same order.
    """

    @property
    def path(self) -> Path: ...

    @property
    def num_states(self) -> int: ...

    @property
    def planned_states(self) -> int | None: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def tensors(self) -> Sequence[SourceTensor]: ...

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Scalars `start` to `stop - 1` of a tensor: `(T, stop - start)`, float32, most forgotten state first."""

    def close(self) -> None:
        """Lets go of open files."""


def open_source(source: WeightTrajectory | str | Path) -> Source:
    """
    Args:
        source ([`WeightTrajectory`], `str` or `Path`):
            A trajectory, its folder, or an HDF5 file of the published meta-dataset (`.h5` or `.hdf5`).

    Raises:
        `FileNotFoundError`: when it is not there.
        `ValueError`: when it is damaged or has another layout.
        `ImportError`: for an HDF5 file, when h5py is not installed.
    """
    if isinstance(source, WeightTrajectory):
        return TrajectorySource(source)
    path = Path(source)
    return PublishedSource(path) if path.suffix in PUBLISHED_SUFFIXES else TrajectorySource(WeightTrajectory(path))


class TrajectorySource:
    """A recorded trajectory; see [`Source`]. Tensors recorded as never changed are left out."""

    def __init__(self, trajectory: WeightTrajectory) -> None:
        self._trajectory = trajectory
        self.path = trajectory.path
        self.num_states = trajectory.num_states
        self.planned_states = None if trajectory.schedule is None else trajectory.schedule.num_states

    @property
    def fingerprint(self) -> str:
        files = [(file.path, file.sha256) for state in self._trajectory.states for file in state.files]
        return sha256(repr(files).encode()).hexdigest()

    @property
    def tensors(self) -> list[SourceTensor]:
        trajectory = self._trajectory
        return [
            SourceTensor(name, role, trajectory.shape(name).numel())
            for name in trajectory.names
            if (role := trajectory.roles[name].role) in PREDICTED_ROLES and not trajectory.is_unchanged(name)
        ]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._trajectory.read_history(name, start, stop)

    def close(self) -> None:
        pass


class PublishedSource:
    """
    An HDF5 file in the layout of the published meta-dataset (arXiv 2508.05059), see [`Source`].

    `ConvWeights (3, 3, N, T)`, `FCWeights (M, T)` and `Bias (K, T)`, of which a file may leave out some. Index 0 of
    the last axis is the state trained on the smallest subset: the order of KNOWN's history already, nothing is turned
    round. Each dataset holds the weights of all layers of its role and counts as one tensor.

    Args:
        path (`Path`): The file.

    Raises:
        `ImportError`: when h5py is not installed.
        `FileNotFoundError`: when there is no such file.
        `ValueError`: when it is not HDF5, has none of the datasets, or one that is not of floats or of another shape.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.planned_states: int | None = None
        if not path.is_file():
            raise FileNotFoundError(f"{path} not found; expected an HDF5 file of the published meta-dataset")
        try:
            self._file = _import_h5py().File(path, "r")
        except OSError as error:
            raise ValueError(f"{path} is not a readable HDF5 file ({error}); download it again") from error
        try:
            self._datasets, self.num_states = self._look()
        except ValueError:
            self._file.close()
            raise

    def _look(self) -> "tuple[dict[str, h5py.Dataset], int]":
        datasets = {
            name: dataset
            for name, (_, axes) in PUBLISHED_DATASETS.items()
            if name in self._file and (dataset := self._check(name, axes)).size
        }
        if not datasets:
            raise ValueError(
                f"{self.path} has none of the datasets {', '.join(PUBLISHED_DATASETS)}, or all are empty; is it of the"
                " published meta-dataset?"
            )
        lengths = {name: dataset.shape[-1] for name, dataset in datasets.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{self.path} has datasets of different numbers of states, {lengths}; download it again")
        return datasets, next(iter(lengths.values()))

    @property
    def fingerprint(self) -> str:
        """Of the name, size and time of the file: hashing 50 GB would take as long as reading them."""
        status = self.path.stat()
        return sha256(repr((self.path.name, status.st_size, status.st_mtime_ns)).encode()).hexdigest()

    @property
    def tensors(self) -> list[SourceTensor]:
        return [
            SourceTensor(name, PUBLISHED_DATASETS[name][0], dataset.size // self.num_states)
            for name, dataset in self._datasets.items()
        ]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        dataset = self._datasets[name]
        if dataset.ndim == 2:
            return torch.from_numpy(dataset[start:stop].astype(np.float32).T)
        # The scalars of a (height, width, N, T) dataset stand place by place of the kernel, N of each.
        count, width = dataset.shape[2], dataset.shape[1]
        pieces = [
            dataset[place // width, place % width, max(start - place * count, 0) : min(stop - place * count, count)]
            for place in range(start // count, (stop - 1) // count + 1)
        ]
        return torch.from_numpy(np.concatenate(pieces).astype(np.float32).T)

    def close(self) -> None:
        self._file.close()

    def _check(self, name: str, axes: int) -> "h5py.Dataset":
        dataset = self._file[name]
        # A group under this name has no dtype.
        if not hasattr(dataset, "dtype") or dataset.dtype.kind != "f" or dataset.ndim != axes:
            found = f"{dataset.dtype} of shape {dataset.shape}" if hasattr(dataset, "dtype") else "a group"
            raise ValueError(
                f"dataset {name!r} of {self.path} is {found}, expected floats with {axes} axes, the states last; is it"
                " a file of the published meta-dataset?"
            )
        return dataset


def _import_h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError('the published meta-dataset needs h5py: pip install "know_hf[keras]"') from error
    return h5py
