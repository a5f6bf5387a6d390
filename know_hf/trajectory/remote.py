"""The files of a trajectory on the Hub: tensors are read as byte ranges, other files are downloaded to the Hub cache.

All reads are of one commit. Sizes and hashes on the Hub are compared with `trajectory.json` before any other file is
read.
"""

from collections.abc import Iterable
from pathlib import Path

from ..checkpoint import ByteSource, file_sha256
from ..hub_client import RemoteRepo, RemoteSource, Token
from .manifest import MANIFEST_NAME, MAX_BYTES, FileRecord, Manifest, TrajectoryError
from .store import Store


class HubStore(Store):
    """A model repo at one commit; see [`WeightTrajectory.from_hub`]. Downloads go to the Hub cache."""

    repo: RemoteRepo

    def __init__(self, repo_id: str, revision: str | None = None, token: Token = None) -> None:
        self.repo = RemoteRepo.open(repo_id, revision, token)
        self._token = token
        self._fetched: set[str] = set()
        super().__init__(fetch_manifest(self.repo, token).parent)

    def check(self, manifest: Manifest, hashes: bool = False, part: int = 0, parts: int = 1) -> None:
        check_remote_files(manifest, self.repo)

    def source(self, record: FileRecord) -> Path | ByteSource:
        if self.repo.files[record.path].sha256 is None:  # the Hub has no hash to compare
            self.fetch([record])
            return super().source(record)
        return RemoteSource(self.repo, record.path, self._token)

    def fetch(self, records: Iterable[FileRecord]) -> None:
        for record in records:
            if record.path in self._fetched:
                continue
            path = self.repo.fetch(record.path, self._token)
            # `check` has compared the SHA-256 of LFS files
            if self.repo.files[record.path].sha256 is None and file_sha256(path) != record.sha256:
                raise TrajectoryError(_differs(self.repo.name(record.path), "another SHA-256"))
            self._fetched.add(record.path)

    def fetch_state(self, manifest: Manifest, index: int) -> None:
        needed = {index, *manifest.states[index].unchanged.values()}  # its index may lead to files of earlier states
        self.fetch(record for number in sorted(needed) for record in manifest.states[number].files)
        manifest.check_what_is_loaded(self.path)


def fetch_manifest(repo: RemoteRepo, token: Token) -> Path:
    """Download `trajectory.json` to the Hub cache.

    Raises:
        `TrajectoryError`:
            When the repo has none, or one larger than [`Manifest.read`] accepts.
    """
    if MANIFEST_NAME not in repo.files:
        if any(path.startswith("state-") for path in repo.files):
            raise TrajectoryError(
                f"{repo.repo_id} has states but no {MANIFEST_NAME}: its push was not finished; push the trajectory"
                " again"
            )
        raise TrajectoryError(f"{repo.repo_id} has no {MANIFEST_NAME}: it is not a trajectory; check the repo id")
    if (size := repo.files[MANIFEST_NAME].size) > MAX_BYTES:
        raise TrajectoryError(f"{repo.name(MANIFEST_NAME)} has {size} bytes, at most {MAX_BYTES} are read")
    return repo.fetch(MANIFEST_NAME, token)


def check_remote_files(manifest: Manifest, repo: RemoteRepo) -> None:
    """Compare sizes and hashes on the Hub with the recorded ones, without a download.

    Raises:
        `TrajectoryError`:
            When a file is missing or differs; names it.
    """
    for record in (*manifest.files, *(record for state in manifest.states for record in state.files)):
        file, name = repo.files.get(record.path), repo.name(record.path)
        if file is None:
            raise TrajectoryError(f"{name} is missing; push the trajectory again")
        if file.size != record.size:
            raise TrajectoryError(_differs(name, f"{file.size} bytes instead of {record.size}"))
        if file.sha256 not in (None, record.sha256):
            raise TrajectoryError(_differs(name, "another SHA-256"))


def _differs(name: str, difference: str) -> str:
    return (
        f"{name} is not the recorded file ({difference}): its push was not finished, or it was changed; push the"
        " trajectory again"
    )
