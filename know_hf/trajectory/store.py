"""Files, manifest and tensors of a trajectory, in a local folder or in a repo on the Hub."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import save_torch_state_dict

from ..checkpoint import ByteSource, CheckpointError, CheckpointReader, file_sha256
from ..hub_client import RemoteRepo, RemoteSource, Token
from .manifest import MANIFEST_NAME, MAX_BYTES, Manifest, TrajectoryError, leads_outside
from .records import FileRecord, StateRecord
from .start import hub_tensors

StateName = int | str


class Store:
    """A trajectory in a local folder.

    Without the manifest of a new trajectory, `trajectory.json` is read and the sizes of the files are compared with
    it. `repo` is the repo that files are downloaded from to `path`.
    """

    repo: RemoteRepo | None = None

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        self.path = path
        self.manifest = Manifest.read(path) if manifest is None else manifest
        self._readers: list[CheckpointReader] | None = None
        self._other_readers: dict[str, CheckpointReader] = {}
        if manifest is None:
            self.check()

    @property
    def readers(self) -> list[CheckpointReader]:
        """Readers of all states, full data first.

        Raises:
            `TrajectoryError`: when there is no state, a file cannot be read, the states do not have the same tensors,
                or a tensor has no role.
        """
        if self._readers is None:
            self._readers = self._open_readers()
        return self._readers

    def record(self, state: StateName) -> StateRecord:
        """Return the record of a snapshot by the index of a state, or by name: `"start"`, `"tail-0"`, `"state-0"`."""
        snapshots = {snapshot.name: snapshot for snapshot in self.manifest.snapshots}
        record = snapshots.get(state if isinstance(state, str) else f"state-{state}")
        if record is None:
            raise TrajectoryError(_missing(self.path, state, self.manifest))
        return record

    def reader(self, state: StateName) -> CheckpointReader:
        """Return the reader of a snapshot; arguments and errors as [`record`] and [`readers`]."""
        record = self.record(state)
        if record.kind == "state":
            return self.readers[record.index]
        if record.name not in self._other_readers:
            self._other_readers[record.name] = self._open(record, self.readers)
        return self._other_readers[record.name]

    @contextmanager
    def folder(self, state: StateName) -> Iterator[Path]:
        """Give a folder from which `from_pretrained` loads a snapshot; a temporary one if tensors are on the Hub."""
        record = self.record(state)
        self.fetch_state(record)
        if record.hub is None:
            yield self.path / record.name
            return
        reader = self.reader(state)
        with TemporaryDirectory(prefix="know_hf-") as temporary:
            for file in record.files:
                if not file.path.endswith((".safetensors", ".index.json")):
                    shutil.copy2(self.path / file.path, temporary)
            tensors = {name: reader.tensor(name) for name in reader.names}
            save_torch_state_dict(tensors, temporary, metadata={"format": "pt"})
            yield Path(temporary)

    def enter(self, manifest: Manifest) -> None:
        """Write a manifest with a new or changed state."""
        manifest.write(self.path)
        self.manifest, self._readers, self._other_readers = manifest, None, {}

    def verify(self, part: int, parts: int) -> None:
        """Compare hashes, and read the headers of all states again."""
        self.check(True, part, parts)
        self._readers, self._other_readers = self._open_readers(), {}
        for snapshot in self.manifest.snapshots:
            if snapshot.hub is None:  # its files are in another repo
                self.reader(snapshot.name)

    def check(self, hashes: bool = False, part: int = 0, parts: int = 1) -> None:
        """Compare the sizes of every `parts`-th file from `part` on with the manifest, and their hashes if asked to.

        Raises:
            `TrajectoryError`: when a file is missing or is not the recorded one; names it.
        """
        for record in self.manifest.all_files[part::parts]:
            path = self.path / record.path
            if leads_outside(self.path, path):
                raise TrajectoryError(f"{path} is a link that leads outside its folder; put a copy there")
            size = path.stat().st_size if path.is_file() else None
            sha256 = file_sha256(path) if hashes and size == record.size else None
            if difference := _difference(record, size, sha256):
                raise TrajectoryError(f"{path} {difference}; restore it from a copy, or record the trajectory again")
        if hashes:
            self.manifest.check_what_is_loaded(self.path)

    def source(self, record: FileRecord) -> Path | ByteSource:
        """Return the file to read pieces of tensors from."""
        return self.path / record.path

    def fetch(self, records: Iterable[FileRecord]) -> None:
        """Download files that are not in `path` yet."""

    def fetch_state(self, record: StateRecord) -> None:
        """Download the files that loading a snapshot reads."""

    def _open_readers(self) -> list[CheckpointReader]:
        path, manifest = self.path, self.manifest
        if not manifest.states:
            raise TrajectoryError(f"{path} has no finished state; record one first")
        readers: list[CheckpointReader] = []
        for state in manifest.states:
            readers.append(self._open(state, readers))
        for name in readers[0].names:
            if name not in manifest.roles:
                raise TrajectoryError(f"{path / MANIFEST_NAME} has no role for {name!r}; restore it from a copy")
        return readers

    def _open(self, state: StateRecord, readers: list[CheckpointReader]) -> CheckpointReader:
        """Open a snapshot whose tensors may be in files of the states before it."""
        files = [self.source(record) for record in state.files if record.path.endswith(".safetensors")]
        try:
            elsewhere = {name: readers[k].locate(name) for name, k in state.unchanged.items()}
            if state.hub is not None:
                elsewhere |= hub_tensors(state.hub, self.path)
            reader = CheckpointReader(files, elsewhere)
        except (CheckpointError, KeyError) as error:
            raise TrajectoryError(f"{state.label} of {self.path}: {error}") from error
        check_same_tensors(self.path, state.label, reader, readers[0] if readers else reader)
        return reader


class HubStore(Store):
    """A trajectory in a model repo at one commit.

    Tensors are read as byte ranges. Other files are downloaded to the Hub cache. Sizes and hashes on the Hub are
    compared with `trajectory.json` before any other file is read.

    Raises:
        `TrajectoryError`: when the repo has no `trajectory.json` or one of over 64 MB, or a file is missing or
            differs.
    """

    repo: RemoteRepo

    def __init__(self, repo: RemoteRepo, token: Token = None) -> None:
        self.repo = repo
        self._token = token
        self._fetched: set[str] = set()
        file = repo.files.get(MANIFEST_NAME)
        if file is None:
            has_states = any(path.startswith("state-") for path in repo.files)
            hint = "its push was not finished; push the trajectory again" if has_states else "check the repo id"
            raise TrajectoryError(f"{repo.repo_id} has no {MANIFEST_NAME}: {hint}")
        if file.size > MAX_BYTES:
            raise TrajectoryError(f"{repo.name(MANIFEST_NAME)} has {file.size} bytes, more than {MAX_BYTES}")
        super().__init__(repo.fetch(MANIFEST_NAME, token).parent)

    def check(self, hashes: bool = False, part: int = 0, parts: int = 1) -> None:
        """Compare the sizes and hashes that the Hub lists with the manifest, without a download."""
        for record in self.manifest.all_files:
            file = self.repo.files.get(record.path)
            self._refuse(record, _difference(record, file.size, file.sha256) if file else "is missing")

    def check_download(self, record: FileRecord, path: Path) -> None:
        """Compare the SHA-256 of a downloaded file if the Hub does not list it, as it does for LFS files."""
        if self.repo.files[record.path].sha256 is None:
            self._refuse(record, _difference(record, record.size, file_sha256(path)))

    def source(self, record: FileRecord) -> Path | ByteSource:
        if self.repo.files[record.path].sha256 is None:
            self.fetch([record])
            return super().source(record)
        return RemoteSource(self.repo, record.path, self._token)

    def fetch(self, records: Iterable[FileRecord]) -> None:
        for record in records:
            if record.path not in self._fetched:
                self.check_download(record, self.repo.fetch(record.path, self._token))
                self._fetched.add(record.path)

    def fetch_state(self, record: StateRecord) -> None:
        states = self.manifest.states
        # its index may lead to files of earlier states
        needed = [*record.files, *(file for k in sorted({*record.unchanged.values()}) for file in states[k].files)]
        self.fetch(needed)
        self.manifest.check_what_is_loaded(self.path)

    def _refuse(self, record: FileRecord, difference: str | None) -> None:
        if difference:
            raise TrajectoryError(
                f"{self.repo.name(record.path)} {difference}: its push was not finished, or it was replaced; push the"
                " trajectory again"
            )


def check_same_tensors(path: Path, state: str, reader: CheckpointReader, first: CheckpointReader) -> None:
    """Raise a `TrajectoryError` that names the first tensor in which a snapshot differs from state 0."""
    for name in sorted({*reader.names, *first.names}):
        kind, expected = reader.describe(name), first.describe(name)
        if kind != expected:
            raise TrajectoryError(
                f"tensor {name!r} of {path} is {kind} in {state} and {expected} in state 0; was the head"
                " replaced between stages?"
            )


def _missing(path: Path, state: StateName, manifest: Manifest) -> str:
    if state == "start":
        return (
            f"{path} has no start, the weights before the training: know_hf 0.2 and older did not record it, nor does"
            " start='current'; record the training again"
        )
    existing = f"the states are 0 to {len(manifest.states) - 1}" if manifest.states else "no state is recorded yet"
    if others := [snapshot.name for snapshot in manifest.snapshots if snapshot.kind != "state"]:
        existing += f", and {', '.join(others[:3])}{', …' if len(others) > 3 else ''}"
    return f"{f'state {state}' if isinstance(state, int) else repr(state)} of {path} does not exist; {existing}"


def _difference(record: FileRecord, size: int | None, sha256: str | None) -> str | None:
    """Describe how a file differs from the recorded one, if it does."""
    if size is None:
        return "is missing"
    if size != record.size:
        return f"has {size} bytes instead of {record.size}"
    return None if sha256 in (None, record.sha256) else "differs from the recorded file (SHA-256)"
