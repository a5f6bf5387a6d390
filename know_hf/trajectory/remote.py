"""A trajectory on the Hub, read where it is: a piece of a tensor is asked for as a range of bytes.

Everything is read at one commit, whatever is pushed meanwhile. Sizes and SHA-256 that the Hub tells are compared with
`trajectory.json` before anything else is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import ByteSource, file_sha256
from ..hub_client import RemoteRepo, RemoteSource, Token
from .manifest import MANIFEST_NAME, MAX_BYTES, FileRecord, Manifest, TrajectoryError
from .weight_trajectory import WeightTrajectory

_READ_EARLY = ("config.json", "adapter_config.json")  # by those that look into the trajectory's folder


class RemoteTrajectory(WeightTrajectory):
    """A trajectory on the Hub; see [`WeightTrajectory.from_hub`]. Nothing can be recorded to it.

    Attributes:
        path (`Path`): Its folder in the Hub cache, with the files that were needed so far.
        repo ([`RemoteRepo`]): The repo at the commit that is read.
    """

    def __init__(self, repo_id: str, revision: str | None = None, token: Token = None) -> None:
        self._token = token
        self._fetched: set[str] = set()
        self.repo = RemoteRepo.open(repo_id, revision, token)
        self.path = fetch_manifest(self.repo, token).parent
        self._manifest = Manifest.read(self.path)
        self._prepare()
        self._check_files(hashes=False)
        self._fetch(record for record in self._manifest.files if record.path in _READ_EARLY)

    def __repr__(self) -> str:
        sizes = [state.num_examples for state in self.states]
        return f"WeightTrajectory.from_hub({self.repo.repo_id!r}, revision={self.repo.commit!r}, num_examples={sizes})"

    @property
    def model_files(self) -> list[Path]:
        """Config, tokenizer and processor files that belong to the model whatever its state; they are downloaded."""
        self._fetch(self._manifest.files)
        return super().model_files

    @property
    def is_adapter(self) -> bool:
        return any(record.path == "adapter_config.json" for record in self._manifest.files)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compares what the Hub says of sizes and hashes with what was recorded; of the weights, reads headers only.

        Raises:
            `TrajectoryError`: when they differ, or when the states do not have the same tensors.
        """
        self._check_files(hashes=True)
        _ = self._readers

    def load_model(
        self,
        state: int = 0,
        model_class: type[PreTrainedModel] | None = None,
        base_model: PreTrainedModel | None = None,
    ) -> nn.Module:
        self._fetch_state(state)
        return super().load_model(state, model_class, base_model)

    def load_into(self, model: nn.Module, state: int = 0) -> None:
        if isinstance(model, PreTrainedModel):
            self._fetch_state(state)
        super().load_into(model, state)

    @contextmanager
    def recording(self) -> Iterator[None]:
        raise TrajectoryError(
            f"{self.repo.repo_id} is read on the Hub and can't be recorded to; pull it with know_hf.hub.pull, and"
            " record to the folder"
        )
        yield

    def _check_files(self, hashes: bool, part: int = 0, parts: int = 1) -> None:
        check_remote_files(self._manifest, self.repo)

    def _source(self, record: FileRecord) -> Path | ByteSource:
        if self.repo.files[record.path].sha256 is None:  # the Hub can't say that it is the one recorded
            self._fetch([record])
            return super()._source(record)
        return RemoteSource(self.repo, record.path, self._token)

    def _fetch_state(self, index: int) -> None:
        """Downloads all that loading a state reads; an index may lead to the folders of earlier states."""
        needed = {index, *self.states[index].unchanged.values()}
        self._fetch(record for number in sorted(needed) for record in self.states[number].files)
        self._manifest.check_what_is_loaded(self.path)

    def _fetch(self, records: Iterable[FileRecord]) -> None:
        for record in records:
            if record.path not in self._fetched:
                path = self.repo.fetch(record.path, self._token)
                # an LFS file's SHA-256 is the Hub's, which is the manifest's: both have been compared
                if self.repo.files[record.path].sha256 is None and file_sha256(path) != record.sha256:
                    raise TrajectoryError(_differs(self.repo.name(record.path), "another SHA-256"))
                self._fetched.add(record.path)


def fetch_manifest(repo: RemoteRepo, token: Token) -> Path:
    """Downloads `trajectory.json` to the Hub cache.

    Raises:
        `TrajectoryError`: when there is none, or one larger than [`Manifest.read`] takes.
    """
    if MANIFEST_NAME not in repo.files:
        if any(path.startswith("state-") for path in repo.files):
            raise TrajectoryError(
                f"{repo.repo_id} holds states but no {MANIFEST_NAME}: its push was not finished; push the trajectory"
                " again"
            )
        raise TrajectoryError(f"{repo.repo_id} holds no {MANIFEST_NAME}: it is no trajectory")
    if (size := repo.files[MANIFEST_NAME].size) > MAX_BYTES:
        raise TrajectoryError(f"{repo.name(MANIFEST_NAME)} has {size} bytes, more than the {MAX_BYTES} that are read")
    return repo.fetch(MANIFEST_NAME, token)


def check_remote_files(manifest: Manifest, repo: RemoteRepo) -> None:
    """Compares sizes and hashes that the Hub tells with those recorded; nothing is downloaded.

    Raises:
        `TrajectoryError`: when a file is missing or another one; names it.
    """
    for record in (*manifest.files, *(record for state in manifest.states for record in state.files)):
        found, name = repo.files.get(record.path), repo.name(record.path)
        if found is None:
            raise TrajectoryError(f"{name} is missing; push the trajectory again")
        if found.size != record.size:
            raise TrajectoryError(_differs(name, f"{found.size} bytes instead of {record.size}"))
        if found.sha256 not in (None, record.sha256):
            raise TrajectoryError(_differs(name, "another SHA-256"))


def _differs(name: str, what: str) -> str:
    return (
        f"{name} is not the file that was recorded ({what}): its push was not finished, or it was changed; push again"
    )
