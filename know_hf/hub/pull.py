"""Pull repos into a folder that appears once all files are complete and match their hashes."""

import glob
import os
import shutil
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.utils import logging

from ..checkpoint import atomic_folder, check_empty, check_free_disk, check_output
from ..hub_client import HubError, RemoteRepo, Token, call_hub
from ..terminal import first_names
from ..trajectory import WeightTrajectory
from ..trajectory.manifest import MANIFEST_NAME
from ..trajectory.store import HubStore
from .repo_contents import checkpoint_files, is_card_file, is_expected, is_weights, kind_of

logger = logging.get_logger(__name__)


def pull(repo_id: str, output_dir: str | Path, *, revision: str | None = None, token: Token = None) -> Path:
    """Pull a checkpoint, a trajectory or KNOWN weights.

    The folder appears once all files are complete and match their hashes. After an interruption, pull to the same
    folder again: only missing files are downloaded.

    Args:
        repo_id (`str`):
            Id of the model repo.
        output_dir (`str` or `Path`):
            Folder to create; an empty one is replaced, and a link is followed.
        revision (`str`, *optional*, defaults to `"main"`):
            Branch, tag or commit.
        token (`str` or `bool`, *optional*):
            Access token; defaults to the token of `hf auth login`.

    Returns:
        `Path`: The folder.

    Raises:
        `FileExistsError`: If `output_dir` is not empty.
        `BlockingIOError`: If another process pulls to `output_dir`.
        `ValueError`: If `output_dir` is inside a trajectory.
        `HubError`: If the repo holds no safetensors weights, or a file arrives damaged.
        `TrajectoryError` or `CheckpointError`: If the content of the repo is incomplete.
        `HfHubHTTPError`: If the server refuses, for example because the repo does not exist.
    """
    repo = _open(repo_id, output_dir, revision, token)
    if kind_of(repo.files) == "trajectory":
        return pull_trajectory(repo_id, output_dir, revision=repo.commit, token=token).path
    return pull_checkpoint(repo_id, output_dir, revision=repo.commit, token=token)


def pull_checkpoint(repo_id: str, output_dir: str | Path, *, revision: str | None = None, token: Token = None) -> Path:
    """Pull a safetensors checkpoint, of KNOWN or of any other model. See [`pull`]."""
    repo = _open(repo_id, output_dir, revision, token)
    if kind_of(repo.files) == "trajectory":
        raise HubError(f"{repo_id} holds a trajectory, not a checkpoint; use pull or pull_trajectory")
    names = {name for name in repo.files if is_expected(name)}
    if not any(is_weights(name) for name in names):
        raise HubError(f"{repo_id} has no safetensors weights at commit {repo.commit[:8]}")
    if skipped := sorted(repo.files.keys() - names - {".gitattributes"}):
        logger.warning(f"Skipping files that are not part of a checkpoint: {first_names(skipped, 5)}")
    return _download(repo, names, output_dir, token, checkpoint_files)


def pull_trajectory(
    repo_id: str, output_dir: str | Path, *, revision: str | None = None, token: Token = None
) -> WeightTrajectory:
    """Pull a trajectory and open it. `from_pretrained` loads its states from `output_dir/state-k`. See [`pull`]."""
    repo = _open(repo_id, output_dir, revision, token)
    store = HubStore(repo, token)
    records = store.manifest.all_files

    def check(folder: Path) -> None:
        for record in records:
            store.check_download(record, folder / record.path)
        store.manifest.check_what_is_loaded(folder)
        _ = WeightTrajectory(folder).names  # reads the headers of all states

    names = {MANIFEST_NAME, *(record.path for record in records), *filter(is_card_file, repo.files)}
    return WeightTrajectory(_download(repo, names, output_dir, token, check))


def _open(repo_id: str, output_dir: str | Path, revision: str | None, token: Token) -> RemoteRepo:
    check_empty(Path(output_dir))
    check_output(output_dir)
    return RemoteRepo.open(repo_id, revision, token)


def _download(
    repo: RemoteRepo, names: Collection[str], output_dir: str | Path, token: Token, check: Callable[[Path], object]
) -> Path:
    """Download files beside `output_dir`, compare them with their hashes, check the folder and rename it."""
    folder = Path(os.path.abspath(output_dir))
    with atomic_folder(folder, resume=True) as work:
        check_free_disk(work, sum(repo.files[name].size for name in names if not (work / name).is_file()))
        patterns = [glob.escape(name) for name in names]
        download = partial(snapshot_download, repo.repo_id, revision=repo.commit, allow_patterns=patterns, token=token)
        call_hub(lambda: download(local_dir=work), f"Could not pull {repo.repo_id} to {folder}")
        for name in names:
            repo.fetch(name, token, work)
        for path in sorted(work.rglob("*"), reverse=True):  # files before their folders
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(work).as_posix() not in names:  # of huggingface_hub, or of a pull of another commit
                path.unlink()
        try:
            check(work)
        except ValueError:
            shutil.rmtree(work)  # the repo is damaged, and the files would not help the next pull
            raise
    return folder
