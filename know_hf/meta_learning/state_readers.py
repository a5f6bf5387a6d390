"""Readers of the states of a trajectory: recorded trajectories, and HDF5 files of the published meta-dataset.

Each reads pieces of the history of a tensor, most forgotten state first. Nothing is sampled or computed here.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..known.keras_import import find_dataset, hdf5_errors, open_hdf5, read_values
from ..roles import PREDICTED_ROLES
from ..trajectory import WeightTrajectory

if TYPE_CHECKING:
    import h5py

PUBLISHED_SUFFIXES = (".h5", ".hdf5")
PUBLISHED_DATASETS = {"ConvWeights": ("conv", 4), "FCWeights": ("fc", 2), "Bias": ("bias", 2)}
"""Role and number of axes of each dataset."""


@dataclass(frozen=True)
class TensorInfo:
    """Name, role (`"conv"`, `"fc"` or `"bias"`) and number of scalars of a tensor."""

    name: str
    role: str
    size: int


class StateReader(ABC):
    """Reader of one trajectory. The fingerprint changes with the weights; computing it reads none."""

    path: Path  # folder or file
    num_states: int  # T
    planned_states: int | None = None  # of the finished trajectory, if known
    fingerprint: str

    @property
    @abstractmethod
    def tensors(self) -> list[TensorInfo]:
        """Tensors of the predicted roles, in a fixed order."""

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read the scalars `start` to `stop - 1` of a tensor: `(T, stop - start)`, float32."""

    def close(self) -> None:
        """Close open files."""
        return


def open_states(trajectory: WeightTrajectory | str | Path) -> StateReader:
    """Open the states of a trajectory, of its folder, or of an HDF5 file of the published meta-dataset.

    Raises:
        `FileNotFoundError`: if the folder or file is missing.
        `ValueError`: if it is damaged or has another layout.
        `ImportError`: if it is an HDF5 file and h5py is not installed.
    """
    if isinstance(trajectory, WeightTrajectory):
        return RecordedStates(trajectory)
    path = Path(trajectory)
    return PublishedStates(path) if path.suffix in PUBLISHED_SUFFIXES else RecordedStates(WeightTrajectory(path))


class RecordedStates(StateReader):
    """[`StateReader`] of a recorded trajectory; omits tensors recorded as unchanged in all states."""

    def __init__(self, trajectory: WeightTrajectory) -> None:
        self._trajectory = trajectory
        self.path = trajectory.path
        self.num_states = trajectory.num_states
        self.planned_states = None if trajectory.schedule is None else trajectory.schedule.num_states
        files = [(file.path, file.sha256) for state in trajectory.states for file in state.files]
        self.fingerprint = sha256(repr(files).encode()).hexdigest()

    @property
    def tensors(self) -> list[TensorInfo]:
        trajectory = self._trajectory
        return [
            TensorInfo(name, role, trajectory.shape(name).numel())
            for name in trajectory.names
            if (role := trajectory.roles[name].role) in PREDICTED_ROLES and not trajectory.is_unchanged(name)
        ]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._trajectory.read_history(name, start, stop)


class PublishedStates(StateReader):
    """[`StateReader`] of an HDF5 file in the layout of the published meta-dataset (arXiv 2508.05059).

    The file has some of the datasets `ConvWeights (3, 3, N, T)`, `FCWeights (M, T)` and `Bias (K, T)`. Index 0 of the
    last axis is the state trained on the smallest subset, as in the history of KNOWN. Each dataset holds the weights
    of all layers of its role and counts as one tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_hdf5(path)
        try:
            self._datasets = self._read_datasets()
        except ValueError:
            self._file.close()
            raise
        self.num_states = next(iter(self._datasets.values())).shape[-1]
        status = path.stat()  # hashing the content, 50 GB, would take as long as reading it
        self.fingerprint = sha256(repr((path.name, status.st_size, status.st_mtime_ns)).encode()).hexdigest()

    @property
    def tensors(self) -> list[TensorInfo]:
        return [
            TensorInfo(name, PUBLISHED_DATASETS[name][0], dataset.size // self.num_states)
            for name, dataset in self._datasets.items()
        ]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        dataset = self._datasets[name]
        if dataset.ndim == 2:
            return torch.from_numpy(read_values(dataset, self.path, slice(start, stop)).T)
        # The scalars of a (height, width, N, T) dataset are ordered by kernel position, N of each.
        width, count = dataset.shape[1:3]
        pieces = [
            read_values(dataset, self.path, np.s_[k // width, k % width, first : min(stop - k * count, count)])
            for k in range(start // count, (stop - 1) // count + 1)
            for first in [max(start - k * count, 0)]
        ]
        return torch.from_numpy(np.concatenate(pieces).T)

    def close(self) -> None:
        self._file.close()

    def _read_datasets(self) -> "dict[str, h5py.Dataset]":
        with hdf5_errors(self.path):
            present = [name for name in PUBLISHED_DATASETS if name in {*self._file}]
        datasets = {name: dataset for name in present if (dataset := self._dataset(name)).size}
        if not datasets:
            raise ValueError(
                f"{self.path} has none of the datasets {', '.join(PUBLISHED_DATASETS)}, or all are empty; "
                "use a file of the published meta-dataset"
            )
        lengths = {name: dataset.shape[-1] for name, dataset in datasets.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the datasets of {self.path} differ in their number of states, {lengths}")
        return datasets

    def _dataset(self, name: str) -> "h5py.Dataset":
        dataset = find_dataset(self._file, self.path, name)
        if dataset is None or dataset.dtype.kind != "f" or dataset.ndim != PUBLISHED_DATASETS[name][1]:
            actual = "a group" if dataset is None else f"{dataset.dtype} of shape {dataset.shape}"
            raise ValueError(
                f"dataset {name!r} of {self.path} is {actual}, expected floats with {PUBLISHED_DATASETS[name][1]} "
                "axes, the states last; use a file of the published meta-dataset"
            )
        return dataset
