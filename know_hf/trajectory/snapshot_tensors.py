"""[`SnapshotTensors`]: the records and tensors of all snapshots of a trajectory, read whole or in pieces."""

import torch

from ..checkpoint import CheckpointReader
from ..roles import TensorRole
from ..schedule import ForgettingSchedule
from .manifest import TrajectoryError
from .recorder import Recorder
from .records import StateRecord
from .store import StateName, Store


class SnapshotTensors:
    """The reading half of [`WeightTrajectory`]. Background errors of the recorder are raised before a reading."""

    def __init__(self, store: Store, recorder: Recorder) -> None:
        self._store = store
        self._recorder = recorder

    @property
    def states(self) -> tuple[StateRecord, ...]:
        self._recorder.check()
        return self._store.manifest.states

    @property
    def start(self) -> StateRecord | None:
        self._recorder.check()
        return self._store.manifest.start

    @property
    def tail(self) -> tuple[StateRecord, ...]:
        return self._store.manifest.tail

    @property
    def branches(self) -> tuple[StateRecord, ...]:
        return self._store.manifest.branches

    @property
    def trained(self) -> tuple[StateRecord, ...]:
        """States and branches: one for each finished training, in their order."""
        return (*self.states, *self.branches)

    @property
    def num_states(self) -> int:
        return len(self.states)

    @property
    def schedule(self) -> ForgettingSchedule | None:
        return self._store.manifest.schedule

    @property
    def roles(self) -> dict[str, TensorRole]:
        return self._store.manifest.roles

    @property
    def tied_weights(self) -> dict[str, str]:
        return self._store.manifest.tied_weights

    @property
    def base_model(self) -> str | None:
        return self._store.manifest.base_model

    @property
    def base_revision(self) -> str | None:
        return self._store.manifest.base_revision

    def snapshot(self, state: StateName) -> StateRecord:
        """Return the record of a state by its index, or of another snapshot by its name, such as `"tail-0"`."""
        return self._store.record(state)

    @property
    def names(self) -> list[str]:
        """Names of all tensors on disk, sorted."""
        return self._readers[0].names

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor, the same in all states."""
        return self._reader(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor is stored in, the same in all states."""
        return self._reader(name).dtype(name)

    def tensor(self, name: str, state: StateName = 0) -> torch.Tensor:
        """Read one tensor of one state, `(*shape)`, in the dtype it is stored in."""
        return self._reader(name, state).tensor(name)

    def state_dict(self, state: StateName = 0) -> dict[str, torch.Tensor]:
        """Read all tensors of one state by their names on disk. To load them into a model, see [`load_into`]."""
        return {name: self.tensor(name, state) for name in self.names}

    def read(self, name: str, start: int, stop: int, state: StateName = 0) -> torch.Tensor:
        """Read elements `start` to `stop - 1` of one tensor of one state, in the dtype it is stored in."""
        return self._reader(name, state).read(name, start, stop)

    def is_unchanged(self, name: str) -> bool:
        """Whether the manifest lists a tensor as equal in all states. The tensor is not read."""
        return all(name in state.unchanged for state in self._store.manifest.states[1:])

    def history(self, name: str) -> torch.Tensor:
        """Read all states of one tensor, `(S, *shape)` float32, as KNOWN expects them: full data LAST."""
        return self.read_history(name).reshape(self.num_states, *self.shape(name))

    def read_history(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read elements `start` to `stop - 1` of a [`history`], `(S, stop - start)` float32, and nothing else."""
        stop = self.shape(name).numel() if stop is None else stop
        history = torch.empty(self.num_states, stop - start, dtype=torch.float32)
        for row, reader in zip(history, reversed(self._readers), strict=True):
            row.copy_(reader.read(name, start, stop))
        return history

    @property
    def _readers(self) -> list[CheckpointReader]:
        self._recorder.check()
        return self._store.readers

    def _reader(self, name: str, state: StateName = 0) -> CheckpointReader:
        self._recorder.check()
        reader = self._store.reader(state)
        if name not in reader:
            raise TrajectoryError(f"{self._store.path} has no tensor {name!r}; names lists its tensors")
        return reader
