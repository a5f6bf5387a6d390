"""Whether something can be pushed, found out before any work is done for it."""

import inspect
import re
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from ..hub_client import HubError, RemoteRepo, Token, check_names, retried
from .repo_contents import Kind, architecture_of, kind_of

_WORDS = {"checkpoint": "a checkpoint", "adapter": "an adapter", "trajectory": "a trajectory"}


def check_push(
    repo_id: str,
    *,
    kind: Kind = "checkpoint",
    architecture: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: Token = None,
) -> str:
    """Raises an error now for a push that would end in one; nothing is made or sent.

    Args:
        repo_id (`str`): Where to push to, `"namespace/name"`; without a namespace, that of the token's owner.
        kind (`"checkpoint"`, `"adapter"` or `"trajectory"`, *optional*, defaults to `"checkpoint"`): What is pushed.
        architecture (`str`, *optional*): Class of the model, as the config has it.
        private (`bool`, *optional*): Whether the repo is to be private.
        revision (`str`, *optional*): Branch to push to, which is made if there is none, or `refs/pr/N`, a pull request
            that is open; by default `main`.
        create_pr (`bool`, *optional*, defaults to `False`): Whether a pull request is to be opened.
        token (`str` or `bool`, *optional*): Of the account that pushes; by default the one logged in.

    Returns:
        `str`: the repo's id with its namespace.

    Raises:
        `ValueError`: when the id or the revision is none that can be pushed to, or the token none that can be sent.
        `HubError`: when there is no token, it is not valid or may not write there; when the repo holds something of
            another kind or architecture, or is not private or public as asked. Says what to do.
    """
    return check_target(PushTarget(repo_id, kind, architecture, private, revision, create_pr), token)[0]


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


@dataclass(frozen=True)
class PushTarget:
    """Where something is pushed to and what it is; see [`check_push`]."""

    repo_id: str
    kind: Kind
    architecture: str | None = None
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False

    def check_contents(self, repo: RemoteRepo, token: Token) -> None:
        """Raises a `HubError` when what a repo holds would be mixed with something else."""
        found = kind_of(repo.files)
        if found not in (None, self.kind):
            raise HubError(
                f"{repo.repo_id} holds {_WORDS[str(found)]}; {_WORDS[self.kind]} pushed there would be mixed with it:"
                " push to another repo, or delete its files first"
            )
        if self.architecture is None or "config.json" not in repo.files:
            return
        there = architecture_of(repo.fetch("config.json", token))
        if there not in (None, self.architecture):
            raise HubError(
                f"{repo.repo_id} holds a {there}, a {self.architecture} is to be pushed: push to another repo, or"
                " delete its files first"
            )


def check_target(target: PushTarget, token: Token) -> tuple[str, RemoteRepo | None]:
    """[`check_push`]; also gives the repo as it is now, if there is one."""
    check_names(target.repo_id, token)
    _check_revision(target)
    account = retried(lambda: HfApi(token=token).whoami(), f"nothing can be pushed to {target.repo_id}")
    access = _access(account)
    if access.get("role") == "read":
        raise HubError(
            f"the token {access.get('displayName')!r} of {account['name']} can only read; make one that can write at"
            " https://huggingface.co/settings/tokens"
        )
    repo_id = target.repo_id if "/" in target.repo_id else f"{account['name']}/{target.repo_id}"
    repo = _open(repo_id, token)
    if repo is None:
        if target.create_pr or _is_pull_request(target.revision):
            raise HubError(f"{repo_id} is not there, or not to be seen: a pull request needs a repo; push without one")
        _check_namespace(account, repo_id)
        return repo_id, None
    if not (target.create_pr or _is_pull_request(target.revision)):
        _check_write(account, repo_id, token)
    if None not in (target.private, repo.private) and target.private != repo.private:
        is_now, asked = ("private", "public") if repo.private else ("public", "private")
        raise HubError(
            f"{repo_id} is there already and is {is_now}, not {asked} as asked: change that on its page on the Hub, or"
            " push to another repo"
        )
    if target.revision is not None:
        repo = _open_revision(repo, target.revision, token)
    target.check_contents(repo, token)
    return repo_id, repo


def _check_revision(target: PushTarget) -> None:
    revision = target.revision
    if revision is None:
        return
    if target.create_pr:
        raise ValueError(
            f"a pull request is opened against main, not {revision!r}: leave revision out, or leave create_pr out and"
            " give the revision 'refs/pr/N' to add to a pull request that is open"
        )
    if re.fullmatch("[0-9a-f]{40}", revision):
        raise ValueError(f"{revision} is a commit, which can't be pushed to; give the name of a branch")
    if revision.startswith("refs/") and not _is_pull_request(revision):
        raise ValueError(
            f"{revision!r} can't be pushed to; give the name of a branch, or 'refs/pr/N' of a pull request"
        )


def _is_pull_request(revision: str | None) -> bool:
    return revision is not None and re.fullmatch(r"refs/pr/\d+", revision) is not None


def _open(repo_id: str, token: Token) -> RemoteRepo | None:
    """The repo, or nothing where there is none that may be seen."""
    try:
        return RemoteRepo.open(repo_id, token=token)
    except HubError as error:
        cause = error.__cause__
        if isinstance(cause, RepositoryNotFoundError) and not isinstance(cause, GatedRepoError):
            return None
        raise


def _open_revision(repo: RemoteRepo, revision: str, token: Token) -> RemoteRepo:
    """The branch or pull request; `main` where the branch is yet to be made from it."""
    refs = retried(
        lambda: HfApi(token=token).list_repo_refs(repo.repo_id), f"the branches of {repo.repo_id} can't be read"
    )
    if any(revision == tag.name for tag in refs.tags):
        raise HubError(f"{revision!r} is a tag of {repo.repo_id}, which can't be pushed to; give the name of a branch")
    try:
        return RemoteRepo.open(repo.repo_id, revision, token)
    except HubError as error:
        if isinstance(error.__cause__, RevisionNotFoundError) and not _is_pull_request(revision):
            return repo
        raise


def _check_write(account: dict[str, Any], repo_id: str, token: Token) -> None:
    """Raises a `HubError` when an account may not write to a repo that is there."""
    if "write" in inspect.signature(HfApi.auth_check).parameters:  # not in huggingface_hub 1
        api = HfApi(token=token)
        try:
            retried(lambda: api.auth_check(repo_id, write=True), f"the rights to {repo_id} can't be read")
            return
        except HubError as error:
            status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
            if status in (401, 403) or isinstance(error.__cause__, RepositoryNotFoundError):
                raise HubError(_may_not_write(account, repo_id)) from error
            if status != 404:  # which is said by a Hub that does not have the question
                raise
    _check_namespace(account, repo_id)


def _access(account: dict[str, Any]) -> dict[str, Any]:
    """What the token itself may do, where the Hub tells."""
    return account.get("auth", {}).get("accessToken") or {}


def _check_namespace(account: dict[str, Any], repo_id: str) -> None:
    """Raises a `HubError` when an account may not make a repo in its namespace."""
    namespace = repo_id.split("/")[0]
    roles = {org["name"]: org.get("roleInOrg") for org in account.get("orgs", [])} | {account["name"]: "admin"}
    access = _access(account)
    scopes = access.get("fineGrained", {}).get("scoped") if access.get("role") == "fineGrained" else None
    allowed = scopes is None or any(
        scope.get("entity", {}).get("name") in (namespace, repo_id) and "repo.write" in scope.get("permissions", [])
        for scope in scopes
    )
    if namespace not in roles or roles[namespace] == "read" or not allowed:
        raise HubError(_may_not_write(account, repo_id))


def _may_not_write(account: dict[str, Any], repo_id: str) -> str:
    name = repo_id.split("/")[1]
    return (
        f"{account['name']} may not write to {repo_id} with this token: push to {account['name']}/{name}, use a token"
        f" that may, ask {repo_id.split('/')[0]} for the right to, or open a pull request with create_pr=True"
    )
