"""Pushing: a checkpoint in one commit; a trajectory state by state, and what makes it one last."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from ..cards import trajectory_card
from ..hub_client import HubError, RemoteRepo, Token, retried
from ..trajectory import TrajectoryError, WeightTrajectory
from ..trajectory.manifest import MANIFEST_NAME, Manifest
from .push_checks import PushTarget, check_target
from .repo_contents import CARD, architecture_of, checkpoint_files, is_card_file, is_state_file, is_weights, kind_of


def push(
    path: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: Token = None,
) -> str:
    """Pushes the enhanced checkpoint, the trajectory or the KNOWN weights of a folder; see [`push_checkpoint`],
    [`push_trajectory`] and [`push_known`], which have the same arguments.

    Raises:
        `FileNotFoundError`: when the folder holds none of them.
    """
    from .push_known import is_known, push_known

    path = Path(path)
    pushing: Callable[..., str]
    if WeightTrajectory.exists(path):
        pushing = push_trajectory
    else:
        pushing = push_known if is_known(path) else push_checkpoint
    return pushing(
        path,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        token=token,
    )


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: Token = None,
) -> str:
    """Pushes a checkpoint with its card in one commit: there is no moment at which half of it is on the Hub.

    Weights that are there under other names, as of another number of shards, are removed by the same commit. Nothing
    is sent that is there already.

    Args:
        folder (`str` or `Path`): The checkpoint, with `README.md`, its card.
        repo_id (`str`): Where to push to; it is made if it is not there.
        private (`bool`, *optional*): Whether the repo is made private; by default as the account's settings say.
        revision (`str`, *optional*): Branch to push to, made from `main` if it is not there, or `refs/pr/N`, a pull
            request that is open; by default `main`.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead.
        commit_message (`str`, *optional*): First line of the commit.
        token (`str` or `bool`, *optional*): Of the account that pushes; by default the one logged in.

    Returns:
        `str`: address of the commit, or of the pull request.

    Raises:
        `FileNotFoundError`, `CheckpointError` or `ValueError`: when the folder holds no whole checkpoint, or files
            that are not part of one; or see [`check_push`].
        `HubError`: when it can't be pushed; says what to do. Nothing was committed then.
    """
    folder = Path(folder)
    files = checkpoint_files(folder)
    kind = kind_of(files) or "checkpoint"
    architecture = architecture_of(folder / "config.json") if kind == "checkpoint" else None
    target = PushTarget(repo_id, kind, architecture, private, revision, create_pr)
    message = commit_message or f"Add {kind} made with know_hf"
    pushed = Push(target, *check_target(target, token), message, token)
    pushed.commit(files, message, is_weights)
    return pushed.url


def push_trajectory(
    trajectory: WeightTrajectory | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: Token = None,
) -> str:
    """Pushes a trajectory, one commit a state, and `trajectory.json` with the last: without it a repo is none.

    Pushed again after an interruption it goes on where it was; files that are there are not sent again. Another
    trajectory that is there is taken apart by the first commit and replaced by the last.

    On the Hub, states that share tensors with earlier ones can't be loaded with `from_pretrained(repo_id,
    subfolder="state-k")`, which does not leave the subfolder; `WeightTrajectory.from_hub(repo_id).load_model(k)` can,
    and so can whoever has pulled it.

    Args:
        trajectory ([`WeightTrajectory`], `str` or `Path`): The trajectory; every file is compared with its hash first.
            Its folder's `README.md` is the card; one is made where there is none.
        repo_id, private, revision, create_pr, commit_message, token: See [`push_checkpoint`].

    Returns:
        `str`: address of the last commit, or of the pull request.

    Raises:
        `TrajectoryError`: when a file is not the one recorded.
        `ValueError` or `HubError`: when it can't be pushed; says what to do. See [`check_push`].
    """
    if not isinstance(trajectory, WeightTrajectory):
        trajectory = WeightTrajectory(trajectory)
    folder, num_states = trajectory.path, trajectory.num_states
    if trajectory.repo is not None:
        raise TrajectoryError(f"{trajectory!r} is on the Hub; pull it first, with know_hf.hub.pull")
    if not num_states:
        raise TrajectoryError(f"{folder} has no finished state yet; record one first")
    architecture = architecture_of(folder / "config.json")
    target = PushTarget(repo_id, "trajectory", architecture, private, revision, create_pr)
    checked = check_target(target, token)  # before every file is read
    trajectory.verify()
    message = commit_message or f"Add a trajectory of {num_states} states recorded with know_hf"
    pushed = Push(target, *checked, message, token)

    manifest = Manifest.read(folder)
    is_same = pushed.holds(MANIFEST_NAME, folder / MANIFEST_NAME)
    for state in manifest.states:
        files = {record.path: folder / record.path for record in state.files}
        hashes = {record.path: record.sha256 for record in state.files}
        if not all(pushed.holds(name, path, hashes[name]) for name, path in files.items()):
            title = f"{message}: state {state.index}"
            pushed.commit(files, title, lambda name: name == MANIFEST_NAME and not is_same, hashes)
    named = {record.path for state in manifest.states for record in state.files}
    last = {record.path: folder / record.path for record in manifest.files}
    last |= {path.name: path for path in sorted(folder.iterdir()) if is_card_file(path.name)}
    last[MANIFEST_NAME] = folder / MANIFEST_NAME
    with tempfile.TemporaryDirectory(prefix="know_hf-") as made:
        if CARD not in last:
            last[CARD] = Path(made) / CARD
            last[CARD].write_text(str(trajectory_card(trajectory, repo_id=checked[0])), encoding="utf-8")
        pushed.commit(last, message, lambda name: is_state_file(name) and name not in named)
    return pushed.url


class Push:
    """One push that has been checked: makes what is missing to push to, and commits.

    Args:
        target ([`PushTarget`]): Where to and what.
        repo_id (`str`), found ([`RemoteRepo`], *optional*): What [`check_target`] gave.
        message (`str`): First line of the commits, title of the pull request.
        token (`str` or `bool`, *optional*): Of the account that pushes.

    Attributes:
        repo ([`RemoteRepo`]): The repo at the commit that was looked at last.
        url (`str`): Address of the last commit, or of the pull request.
    """

    def __init__(self, target: PushTarget, repo_id: str, found: RemoteRepo | None, message: str, token: Token) -> None:
        self._token = token
        self._api = HfApi(token=token)
        self._target = replace(target, repo_id=repo_id)
        self._pull_request: str | None = None
        if found is None:
            retried(
                lambda: self._api.create_repo(repo_id, private=target.private, exist_ok=True),
                f"{repo_id} can't be made",
            )
        self._revision = self._make_revision(message)
        self.repo = RemoteRepo.open(repo_id, self._revision, token)
        self._checked = {found.commit if found else self.repo.commit}
        self.url = self._pull_request or ""

    def holds(self, name: str, path: Path, sha256: str | None = None) -> bool:
        """Whether the repo has a file of this name with the bytes of `path`, which are only read where need be."""
        found = self.repo.files.get(name)
        if found is None or sha256 is None or found.sha256 is None:
            return found is not None and found.is_same_as(path)
        return found.sha256 == sha256

    def commit(
        self,
        files: Mapping[str, Path],
        message: str,
        is_obsolete: Callable[[str], bool],
        hashes: Mapping[str, str] | None = None,
    ) -> None:
        """Commits files in one step, after a look at what is there now.

        Args:
            files (`Mapping[str, Path]`): From their path in the repo to that on the disk.
            message (`str`): First line.
            is_obsolete (`Callable[[str], bool]`): Of a path in the repo, whether it is removed by this commit.
            hashes (`Mapping[str, str]`, *optional*): SHA-256 of files where they are known.

        Raises:
            `HubError`: when it can't be committed; nothing was then.
        """

        def attempt() -> CommitInfo:
            self.repo = RemoteRepo.open(self._target.repo_id, self._revision, self._token)
            if self.repo.commit not in self._checked:  # somebody else committed
                self._target.check_contents(self.repo, self._token)
            given = hashes or {}
            missing = {name: path for name, path in files.items() if not self.holds(name, path, given.get(name))}
            gone = [name for name in self.repo.files if name not in files and is_obsolete(name)]
            return self._api.create_commit(
                self._target.repo_id,
                [
                    *(CommitOperationAdd(name, path) for name, path in missing.items()),
                    *(CommitOperationDelete(name, is_folder=False) for name in gone),
                ],
                commit_message=message,
                revision=self._revision,
                parent_commit=self.repo.commit,
            )

        try:
            info = retried(attempt, f"{message!r} was not committed to {self._target.repo_id}")
        except HubError as error:
            if self._pull_request is None:
                raise
            raise HubError(
                f"{error}. The pull request {self._pull_request} is open: give revision={self._revision!r} and not"
                " create_pr to go on with it"
            ) from error
        self._checked.add(info.oid)
        self.url = self._pull_request or info.commit_url

    def _make_revision(self, message: str) -> str | None:
        repo_id, revision = self._target.repo_id, self._target.revision
        if self._target.create_pr:
            # opened by itself: with the commit, one that is tried again would open a second one
            opened = retried(
                lambda: self._api.create_pull_request(repo_id, title=message),
                f"no pull request can be opened at {repo_id}",
                again=False,
            )
            self._pull_request = opened.url
            return opened.git_reference
        if revision is not None and revision != "main" and not revision.startswith("refs/"):
            retried(
                lambda: self._api.create_branch(repo_id, branch=revision, exist_ok=True),
                f"the branch {revision!r} of {repo_id} can't be made",
            )
        return revision
