"""Options of a push, checks before any work, and atomic commits."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..hub_client import HubError, RemoteRepo, Token, call_hub, check_token
from .repo_contents import Kind, architecture_of, kind_of


class PushKeywords(TypedDict, total=False):
    """The fields of [`PushOptions`] as keyword arguments."""

    private: bool | None
    revision: str | None
    create_pr: bool
    commit_message: str | None
    token: Token


@dataclass(frozen=True)
class PushOptions:
    """Options of a push to the Hub.

    Args:
        private (`bool`, *optional*):
            Whether a new repo is private; defaults to the setting of the account or organization.
        revision (`str`, *optional*, defaults to `"main"`):
            Branch to push to, created from `main` if it does not exist, or `refs/pr/N`, an open pull request.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to open a pull request instead of pushing to the branch.
        commit_message (`str`, *optional*):
            First line of the commit message.
        token (`str` or `bool`, *optional*):
            Access token; defaults to the token of `hf auth login`.
    """

    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    token: Token = None

    def __post_init__(self) -> None:
        if self.revision is not None and self.create_pr:
            raise ValueError(f"pass either create_pr or revision={self.revision!r}, not both")
        if self.revision is not None and re.fullmatch(r"[0-9a-f]{40}|refs/(?!pr/\d+$).*", self.revision):
            raise ValueError(f"revision {self.revision!r} is not a branch; pass the name of a branch or 'refs/pr/N'")
        check_token(self.token)

    @property
    def is_pull_request(self) -> bool:
        """Whether the push goes to a pull request."""
        return self.create_pr or (self.revision or "").startswith("refs/pr/")


def check_push(
    repo_id: str, *, kind: Kind = "checkpoint", architecture: str | None = None, **options: Unpack[PushKeywords]
) -> str:
    """Check a push before doing the work whose result is pushed. Creates and sends nothing.

    The server checks the token and its write access to an existing repo. Whether the token may create a new repo shows
    only when it is created.

    Args:
        repo_id (`str`):
            Id of the repo; its namespace defaults to the owner of the token.
        kind (`"checkpoint"`, `"adapter"` or `"trajectory"`, *optional*, defaults to `"checkpoint"`):
            What is pushed.
        architecture (`str`, *optional*):
            Class of the model, as in its config.
        options (*optional*):
            Fields of [`PushOptions`].

    Returns:
        `str`: Id of the repo with its namespace.

    Raises:
        `ValueError`: If the repo id, the revision or the token is malformed.
        `HubError`: If the repo holds another kind or architecture, or is public where `private` was requested, or the
            reverse.
        `HfHubHTTPError`: If the server refuses.
    """
    return PushTarget(repo_id, kind, architecture, PushOptions(**options)).repo_id


class PushTarget:
    """A repo to push to, at `repo_id` with its namespace; the constructor runs the checks of [`check_push`].

    `repo` is its content before the push, or None, and `url` the address of the last commit or of the pull request.
    """

    def __init__(self, repo_id: str, kind: Kind, architecture: str | None, options: PushOptions) -> None:
        validate_repo_id(repo_id)  # before the token, whose absence would hide it
        self._kind, self._architecture, self._options = kind, architecture, options
        self._api = HfApi(token=options.token)
        self._revision = options.revision
        self._is_new_branch = False
        self._pull_request: str | None = None
        self.url = ""
        account = call_hub(self._api.whoami, f"Could not push to {repo_id}")
        self.repo_id = repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"
        self.repo = self._find()

    def create(self, title: str) -> RemoteRepo:
        """Create the repo, the branch or the pull request if needed; `title` is that of the pull request."""
        options = self._options
        if self.repo is None:
            self._call("create", self._api.create_repo, private=options.private, exist_ok=True)
        if options.create_pr:
            # not with the commit: a retry would open a second pull request
            opened = self._call("open a pull request at", self._api.create_pull_request, retry=False, title=title)
            self._pull_request, self._revision = opened.url, opened.git_reference
        elif self._is_new_branch:
            what = f"create the branch {options.revision!r} of"
            self._call(what, self._api.create_branch, branch=str(options.revision), exist_ok=True)
        return self._open()

    def commit(
        self,
        files: Mapping[str, Path],
        message: str,
        is_obsolete: Callable[[str], bool],
        check: Callable[[RemoteRepo], None] | None = None,
    ) -> None:
        """Commit the files, given by path in the repo, that differ from those on the Hub, and delete obsolete ones.

        `check` is called before each attempt with the repo that the commit changes.
        """

        def attempt() -> CommitInfo:
            repo = self._open()
            self._check_repo(repo)
            if check is not None:
                check(repo)
            obsolete = [name for name in repo.files if name not in files and is_obsolete(name)]
            return self._api.create_commit(
                self.repo_id,
                [CommitOperationAdd(*item) for item in files.items()]
                + [CommitOperationDelete(name, is_folder=False) for name in obsolete],
                commit_message=message,
                revision=self._revision,
                parent_commit=repo.commit,  # the server refuses the commit after another one
            )

        failure = f"Could not commit {message!r} to {self.repo_id}"
        if self._pull_request is not None:
            failure += f"; to continue {self._pull_request}, pass revision={self._revision!r} instead of create_pr"
        info = call_hub(attempt, failure)
        self.url = self._pull_request or info.commit_url

    def _find(self) -> RemoteRepo | None:
        options = self._options
        try:
            repo = self._open()
        except RepositoryNotFoundError as error:
            if isinstance(error, GatedRepoError) or options.is_pull_request:
                raise
            self._is_new_branch = options.revision not in (None, "main")
            return None
        except RevisionNotFoundError:
            if options.is_pull_request:
                raise
            self._is_new_branch = True  # starts at main
            repo = RemoteRepo.open(self.repo_id, token=options.token)
        if not options.is_pull_request and "write" in inspect.signature(HfApi.auth_check).parameters:  # not in 1.0
            failure = f"No write access to {self.repo_id}: use another repo, or open a pull request (create_pr=True)"
            call_hub(lambda: self._api.auth_check(self.repo_id, write=True), failure)
        self._check_repo(repo)
        return repo

    def _call(self, what: str, method: Callable[..., Any], retry: bool = True, **arguments: Any) -> Any:
        failure = f"Could not {what} {self.repo_id}"
        return call_hub(lambda: method(self.repo_id, **arguments), failure, retry)

    def _open(self) -> RemoteRepo:
        return RemoteRepo.open(self.repo_id, self._revision, self._options.token)

    def _check_repo(self, repo: RemoteRepo) -> None:
        """Refuse to publish what must be private, and to mix kinds or architectures in one repo."""
        private = self._options.private
        if None not in (private, repo.private) and private != repo.private:
            actual, requested = ("private", "public") if repo.private else ("public", "private")
            raise HubError(f"{self.repo_id} is {actual}, not {requested}; change that on the Hub or use another repo")
        pairs: dict[str, str | None] = {self._kind: kind_of(repo.files)}
        if self._architecture is not None and "config.json" in repo.files:
            pairs[self._architecture] = architecture_of(repo.fetch("config.json", self._options.token))
        for pushed, held in pairs.items():
            if held not in (None, pushed):
                raise HubError(f"{self.repo_id} holds another model ({held}, not {pushed}); push to another repo")
