"""The finished states of a trajectory, which reading and recording share."""

from pathlib import Path

from ..checkpoint import CheckpointError, CheckpointReader
from .manifest import MANIFEST_NAME, Manifest, TrajectoryError
from .store import Store


class RecordedStates:
    """Manifest and tensors of the finished states.

    Args:
        store ([`Store`]):
            The files.
        manifest ([`Manifest`]):
            Their manifest.
    """

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self._readers: list[CheckpointReader] | None = None

    @classmethod
    def open(cls, store: Store) -> "RecordedStates":
        """Read the manifest of a store and compare the sizes of its files."""
        manifest = Manifest.read(store.path)
        store.check(manifest)
        return cls(store, manifest)

    @property
    def readers(self) -> list[CheckpointReader]:
        """Readers of all states, full data first.

        Raises:
            `TrajectoryError`:
                When there is no state, a file cannot be read, the states do not have the same tensors, or a tensor has
                no role.
        """
        if self._readers is None:
            self._readers = self._open_readers()
        return self._readers

    def enter(self, manifest: Manifest) -> None:
        """Write a manifest with a new or changed state."""
        manifest.write(self.store.path)
        self.manifest = manifest
        self._readers = None

    def verify(self, part: int, parts: int) -> None:
        """Compare hashes, and read the headers of all states again."""
        self.store.check(self.manifest, True, part, parts)
        self._readers = self._open_readers()

    def _open_readers(self) -> list[CheckpointReader]:
        path, manifest = self.store.path, self.manifest
        if not manifest.states:
            raise TrajectoryError(f"{path} has no finished state yet; record one first")
        readers: list[CheckpointReader] = []
        for state in manifest.states:
            files = [self.store.source(record) for record in state.files if record.path.endswith(".safetensors")]
            elsewhere = {name: readers[origin] for name, origin in state.unchanged.items()}
            try:
                readers.append(CheckpointReader(files, elsewhere))
            except (CheckpointError, KeyError) as error:
                raise TrajectoryError(f"state {state.index} of {path}: {error}") from error
            check_same_tensors(path, state.index, readers[-1], readers[0])
        if missing := sorted(set(readers[0].names) - set(manifest.roles)):
            raise TrajectoryError(
                f"{MANIFEST_NAME} of {path} has no role for tensor {missing[0]!r}; restore it from a copy"
            )
        return readers


def check_same_tensors(path: Path, state: int, reader: CheckpointReader, first: CheckpointReader) -> None:
    """Raise a `TrajectoryError` that names the first tensor in which a state differs from state 0."""
    names, expected = set(reader.names), set(first.names)
    hint = "was the head replaced between stages?"
    for name in sorted(names ^ expected):
        has, lacks = (state, 0) if name in names else (0, state)
        raise TrajectoryError(f"tensor {name!r} of {path} is in state {has} but not in state {lacks}; {hint}")
    for name in sorted(names):
        if _kind(reader, name) != _kind(first, name):
            raise TrajectoryError(
                f"tensor {name!r} of {path} is {_kind(reader, name)} in state {state} and {_kind(first, name)} in"
                f" state 0; {hint}"
            )


def _kind(reader: CheckpointReader, name: str) -> str:
    return f"{tuple(reader.shape(name))} {reader.dtype(name)}"
