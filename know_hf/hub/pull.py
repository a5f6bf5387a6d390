"""Pulling: into a folder that appears whole or not at all, every file compared with what the Hub says of it."""

import glob
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from transformers.utils import logging

from ..checkpoint import check_free_disk, file_sha256, fsync
from ..hub_client import DamagedError, HubError, RemoteRepo, Token, retried
from ..trajectory import TrajectoryError, WeightTrajectory
from ..trajectory.manifest import MANIFEST_NAME, Manifest
from ..trajectory.remote import check_remote_files, fetch_manifest
from .repo_contents import checkpoint_files, is_card_file, is_expected, is_weights, kind_of

logger = logging.get_logger(__name__)


def pull(repo_id: str, output_dir: str | Path, *, revision: str | None = None, token: Token = None) -> Path:
    """Pulls the enhanced checkpoint, the trajectory or the KNOWN weights of a repo.

    The folder appears once all is there and has been compared with what the Hub says of it. Interrupted, the next pull
    to the same folder goes on with the files that are missing.

    Args:
        repo_id (`str`): Id of the model repo.
        output_dir (`str` or `Path`): Where to; nothing may be there yet.
        revision (`str`, *optional*): Branch, tag or commit; by default `main`.
        token (`str` or `bool`, *optional*): Of an account that may read it; by default the one logged in.

    Returns:
        `Path`: the folder.

    Raises:
        `FileExistsError`: when `output_dir` is not empty.
        `HubError`: when it can't be pulled; says what to do.
        `TrajectoryError` or `CheckpointError`: when what the repo holds is not whole.
    """
    repo = _open(repo_id, output_dir, revision, token)
    if kind_of(repo.files) == "trajectory":
        return _pull_trajectory(repo, Path(output_dir), token)
    return _pull_checkpoint(repo, Path(output_dir), token)


def pull_checkpoint(repo_id: str, output_dir: str | Path, *, revision: str | None = None, token: Token = None) -> Path:
    """Pulls a checkpoint, one of KNOWN or any other of safetensors. See [`pull`]."""
    return _pull_checkpoint(_open(repo_id, output_dir, revision, token), Path(output_dir), token)


def pull_trajectory(
    repo_id: str, output_dir: str | Path, *, revision: str | None = None, token: Token = None
) -> WeightTrajectory:
    """Pulls a trajectory and opens it; `from_pretrained` can load its states, which are at
    `output_dir/state-k`. See [`pull`]."""
    return WeightTrajectory(_pull_trajectory(_open(repo_id, output_dir, revision, token), Path(output_dir), token))


def _open(repo_id: str, output_dir: str | Path, revision: str | None, token: Token) -> RemoteRepo:
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; name another folder")
    return RemoteRepo.open(repo_id, revision, token)


def _pull_checkpoint(repo: RemoteRepo, output_dir: Path, token: Token) -> Path:
    if kind_of(repo.files) == "trajectory":
        raise HubError(f"{repo.repo_id} holds a trajectory, no checkpoint; pull it with pull or pull_trajectory")
    names = {name for name in repo.files if is_expected(name)}
    if not any(is_weights(name) for name in names):
        raise HubError(f"{repo.repo_id} holds no safetensors weights at {repo.commit[:8]}; no other kind is pulled")
    if left_out := sorted(repo.files.keys() - names - {".gitattributes"}):
        logger.warning(f"left out, as not part of a checkpoint: {', '.join(left_out[:5])}{' …' * (len(left_out) > 5)}")
    download = _Download(repo, names, {}, output_dir, token)
    download.complete()
    return download.publish(checkpoint_files)


def _pull_trajectory(repo: RemoteRepo, output_dir: Path, token: Token) -> Path:
    manifest = Manifest.read(fetch_manifest(repo, token).parent)
    check_remote_files(manifest, repo)
    records = [*manifest.files, *(record for state in manifest.states for record in state.files)]
    names = {MANIFEST_NAME, *(record.path for record in records), *filter(is_card_file, repo.files)}
    download = _Download(repo, names, {record.path: record.sha256 for record in records}, output_dir, token)
    download.complete()

    def check(folder: Path) -> object:
        manifest.check_what_is_loaded(folder)
        return WeightTrajectory(folder).names  # reads the headers of all states

    return download.publish(check)


class _Download:
    """Files on their way into a folder, beside which they are gathered.

    Args:
        repo ([`RemoteRepo`]): Where they are.
        names (`Collection[str]`): Their paths.
        hashes (`Mapping[str, str]`): SHA-256 that were recorded of some.
        output_dir (`Path`): The folder.
        token (`str` or `bool`, *optional*): Of an account that may read the repo.
    """

    def __init__(
        self, repo: RemoteRepo, names: Collection[str], hashes: Mapping[str, str], output_dir: Path, token: Token
    ) -> None:
        self.repo = repo
        self.names = sorted(names)
        self.output_dir = Path(os.path.abspath(output_dir))
        self.work = self.output_dir.with_name(f".{self.output_dir.name}.pull")
        self._hashes = hashes
        self._token = token
        self._whole: set[str] = set()

    def complete(self) -> None:
        """Downloads what is missing and compares every file with what the Hub says of it.

        Raises:
            `HubError`: when a file can't be had whole.
            `TrajectoryError`: when one is not what was recorded.
            `OSError`: when the disk is too small.
        """
        missing = [name for name in self.names if not (self.work / name).is_file()]
        check_free_disk(self.work, sum(self.repo.files[name].size for name in missing))
        retried(self._attempt, f"{self.repo.repo_id} can't be pulled to {self.output_dir}")

    def publish(self, check: Callable[[Path], object]) -> Path:
        """Gives the folder its name, once a last check of it has passed."""
        for path in sorted(self.work.rglob("*"), reverse=True):  # files before their folders
            if path.is_file() or path.is_symlink():
                if path.relative_to(self.work).as_posix() not in self._whole:
                    path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()
        try:
            check(self.work)
        except ValueError:
            shutil.rmtree(self.work)  # the repo itself is at fault: downloading again would not help
            raise
        for path in sorted(self.work.rglob("*")):
            fsync(path)
        fsync(self.work)
        if self.output_dir.exists():
            self.output_dir.rmdir()
        self.work.rename(self.output_dir)
        fsync(self.output_dir.parent)
        return self.output_dir

    def _attempt(self) -> None:
        snapshot_download(
            self.repo.repo_id,
            revision=self.repo.commit,
            local_dir=self.work,
            allow_patterns=[glob.escape(name) for name in self.names],
            token=self._token,
        )
        for name in self.names:
            if name not in self._whole:
                if not self._is_whole(name):  # damaged in the Hub cache, or on its way
                    hf_hub_download(
                        self.repo.repo_id,
                        name,
                        revision=self.repo.commit,
                        local_dir=self.work,
                        force_download=True,
                        token=self._token,
                    )
                if not self._is_whole(name):
                    (self.work / name).unlink(missing_ok=True)
                    raise DamagedError(f"{self.repo.name(name)} did not arrive as it is on the Hub")
                self._whole.add(name)

    def _is_whole(self, name: str) -> bool:
        path, file = self.work / name, self.repo.files[name]
        if not path.is_file() or not file.is_same_as(path):
            return False
        # of small files the Hub keeps no SHA-256 that could have been compared without them
        if file.sha256 is None and name in self._hashes and file_sha256(path) != self._hashes[name]:
            raise TrajectoryError(
                f"{self.repo.name(name)} is not the file that was recorded; push the trajectory again"
            )
        return True
