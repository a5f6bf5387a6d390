"""The files of a trajectory in a local folder. `remote` has those in a repo on the Hub."""

from collections.abc import Iterable
from pathlib import Path

from ..checkpoint import ByteSource, file_sha256
from ..hub_client import RemoteRepo
from .manifest import FileRecord, Manifest, TrajectoryError, leads_outside


class Store:
    """The files of a trajectory in a local folder.

    Attributes:
        path (`Path`):
            The folder.
        repo ([`RemoteRepo`], *optional*):
            The repo that files are downloaded from to `path`.
    """

    repo: RemoteRepo | None = None

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, manifest: Manifest, hashes: bool = False, part: int = 0, parts: int = 1) -> None:
        """Compare the files with the manifest.

        Args:
            manifest ([`Manifest`]):
                What was recorded.
            hashes (`bool`, *optional*, defaults to `False`):
                Whether to compare hashes too, not sizes only.
            part, parts (`int`, *optional*):
                Only every `parts`-th file from number `part` on, when several processes share the reading.

        Raises:
            `TrajectoryError`:
                When a file is missing or is not the recorded one; names it.
        """
        records = [(record, "the model") for record in manifest.files]
        records += [(record, f"state {state.index}") for state in manifest.states for record in state.files]
        for record, owner in records[part::parts]:
            path = self.path / record.path
            if leads_outside(self.path, path):
                raise TrajectoryError(f"{path} of {owner} is a link that leads outside its folder; put a copy there")
            if not path.is_file():
                raise TrajectoryError(f"{path} of {owner} is missing; restore it from a copy or record it again")
            if path.stat().st_size != record.size:
                raise TrajectoryError(
                    f"{path} of {owner} has {path.stat().st_size} bytes, {record.size} were recorded: it is truncated"
                    " or was replaced; restore it from a copy or record it again"
                )
            if hashes and file_sha256(path) != record.sha256:
                raise TrajectoryError(
                    f"{path} of {owner} is not the recorded file (its SHA-256 differs): it is damaged or was replaced;"
                    " restore it from a copy or record it again"
                )
        if hashes:
            manifest.check_what_is_loaded(self.path)

    def source(self, record: FileRecord) -> Path | ByteSource:
        """Return the file to read pieces of tensors from."""
        return self.path / record.path

    def fetch(self, records: Iterable[FileRecord]) -> None:
        """Download files that are not in `path` yet."""

    def fetch_state(self, manifest: Manifest, index: int) -> None:
        """Download the files that loading a state reads."""
