"""Answers of the loopback Hub, one method per endpoint."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from email.message import Message
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from .loopback_repos import LFS_SUFFIXES, Account, Commit, Entry, Repo

if TYPE_CHECKING:
    from .loopback_hub import LoopbackHub


class StatusError(Exception):
    """Answer with an error status."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


class Endpoints:
    """Answers to requests; a mixin of the request handler."""

    hub: "LoopbackHub"
    command: str
    headers: Message

    def route(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        for method, pattern, action in _ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                answer = action(self, body, *map(unquote, match.groups("")))
                return answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())
        raise StatusError(404, f"no such endpoint: {self.command} {path}")

    def _account(self) -> Account | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        if (account := self.hub.accounts.get(header.removeprefix("Bearer "))) is None:
            raise StatusError(401, "Invalid credentials in Authorization header")
        return account

    def _repo(self, kind: str, repo_id: str) -> Repo:
        account = self._account()
        repo = self.hub.repos.get((kind.removesuffix("s") or "model", repo_id))
        if repo is None or (repo.private and not (account and account.owns(repo_id))):
            raise StatusError(404 if account else 401, "Repository not found", "RepoNotFound")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> Commit:
        if (commit := repo.resolve(revision)) is None:
            raise StatusError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _check_write(self, repo_id: str, revision: str = "") -> Account:
        """Refuse accounts without write access; all accounts may write to pull requests."""
        if (account := self._account()) is None:
            raise StatusError(401, "Invalid username or password.")
        if account.role == "read":
            raise StatusError(403, "Forbidden: you must use a write token to upload to a repository.")
        if not revision.startswith("refs/pr/") and not account.owns(repo_id):
            raise StatusError(403, f"You don't have the rights to create a model under {repo_id}")
        return account

    # Accounts and repos

    def whoami(self, body: bytes) -> Any:
        if (account := self._account()) is None:
            raise StatusError(401, "Invalid credentials in Authorization header")
        return {"type": "user", "name": account.name, "auth": {"accessToken": {"role": account.role}}}

    def create_repo(self, body: bytes) -> Any:
        payload = json.loads(body)
        account = self._account()
        repo_id = f"{payload['organization'] or (account and account.name)}/{payload['name']}"
        self._check_write(repo_id)
        kind = payload.get("type") or "model"
        answer = {"url": f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}", "name": repo_id}
        if (kind, repo_id) in self.hub.repos:
            return 409, {}, json.dumps({"error": "You already created this model repo", **answer}).encode()
        private = payload.get("visibility") == "private" or bool(payload.get("private"))
        self.hub.create(repo_id, type=kind, private=private)
        return answer

    def validate_yaml(self, body: bytes) -> Any:
        return {"warnings": [], "errors": []}

    def repo_info(self, body: bytes, kind: str, repo_id: str, revision: str) -> Any:
        repo = self._repo(kind, repo_id)
        commit = self._commit_of(repo, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.tree)]
        return {"id": repo_id, "sha": commit.sha, "private": repo.private, "tags": [], "siblings": siblings}

    def tree(self, body: bytes, kind: str, repo_id: str, revision: str) -> Any:
        commit = self._commit_of(self._repo(kind, repo_id), revision)
        return [entry.info(path) for path, entry in sorted(commit.tree.items())]

    def auth_check(self, body: bytes, kind: str, repo_id: str) -> Any:
        self._repo(kind, repo_id)
        self._check_write(repo_id)
        return {}

    def create_branch(self, body: bytes, kind: str, repo_id: str, branch: str) -> Any:
        repo = self._repo(kind, repo_id)
        self._check_write(repo_id)
        repo.refs[f"refs/heads/{branch}"] = repo.refs["refs/heads/main"]
        return {}

    def open_pull_request(self, body: bytes, kind: str, repo_id: str) -> Any:
        repo = self._repo(kind, repo_id)
        account = self._check_write(repo_id, "refs/pr/")
        number = len(repo.discussions) + 1
        repo.refs[f"refs/pr/{number}"] = repo.refs["refs/heads/main"]
        repo.discussions.append(
            {
                "title": json.loads(body)["title"],
                "num": number,
                "author": {"name": account.name},
                "createdAt": "2025-01-01T00:00:00.000Z",
                "status": "draft",
                "repo": {"name": repo.id, "type": repo.type},
                "isPullRequest": True,
                "events": [],
                "changes": {"base": "refs/heads/main"},
                "filesWithConflicts": [],
                "diff": "",
            }
        )
        return {"num": number}

    def discussion(self, body: bytes, kind: str, repo_id: str, number: str) -> Any:
        return self._repo(kind, repo_id).discussions[int(number) - 1]

    # Upload

    def preupload(self, body: bytes, kind: str, repo_id: str, revision: str) -> Any:
        repo = self._repo(kind, repo_id)
        self._check_write(repo_id, revision)
        tree = self._commit_of(repo, revision).tree
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": tree[file["path"]].etag if file["path"] in tree else None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def lfs_batch(self, body: bytes, kind: str, repo_id: str) -> Any:
        payload = json.loads(body)
        self._repo(kind, repo_id)
        self._check_write(repo_id, payload.get("ref", {}).get("name", ""))
        objects = []
        for wanted in payload["objects"]:
            actions = {"upload": {"href": f"{self.hub.cdn_url}/lfs/{wanted['oid']}"}}
            is_stored = wanted["oid"] in self.hub.large_files
            objects.append(
                {"oid": wanted["oid"], "size": wanted["size"]} | ({} if is_stored else {"actions": actions})
            )
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise StatusError(400, "the SHA-256 of the content is not the one announced")
        self.hub.large_files[oid] = body
        return {}

    def commit(self, body: bytes, kind: str, repo_id: str, revision: str) -> Any:
        repo = self._repo(kind, repo_id)
        self._check_write(repo_id, revision)
        head = self._commit_of(repo, revision)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit") not in (None, head.sha):
            raise StatusError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(head.tree)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                tree[value["path"]] = Entry(base64.b64decode(value["content"]), is_lfs=False)
            elif key == "lfsFile":
                tree[value["path"]] = Entry(self.hub.large_files[value["oid"]], is_lfs=True)
            else:
                del tree[value["path"]]
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        sha = repo.commit(ref, tree, header["value"]["summary"])
        url = f"{self.hub.url}/{'' if repo.type == 'model' else repo.type + 's/'}{repo_id}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url}

    # Download

    def resolve(self, body: bytes, kind: str, repo_id: str, revision: str, path: str) -> Any:
        commit = self._commit_of(self._repo(kind, repo_id), revision)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if (entry := commit.tree.get(path)) is None:
            return 404, {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b"{}"
        headers["ETag"] = f'"{entry.etag}"'
        if not entry.is_lfs:
            return self._content(entry.content, headers)
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(len(entry.content))}
        return 302, {**headers, "Location": f"{self.hub.cdn_url}/lfs/{entry.sha256}"}, b""

    def lfs_get(self, body: bytes, oid: str) -> Any:
        return self._content(self.hub.large_files[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _content(self, content: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        headers["Content-Type"] = "application/octet-stream"
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            return 200, headers, content
        start, stop = int(match[1]), min(int(match[2] or len(content)) + 1, len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return 206, headers, content[start:stop]


_API = r"/api/(model|dataset)s/([^/]+/[^/]+)"
_FILES = r"/(?:(dataset)s/)?([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", r"/api/whoami-v2", Endpoints.whoami),
    ("POST", r"/api/repos/create", Endpoints.create_repo),
    ("POST", r"/api/validate-yaml", Endpoints.validate_yaml),
    ("GET", rf"{_API}(?:/revision/([^/]+))?", Endpoints.repo_info),
    ("GET", rf"{_API}/tree/([^/]+)", Endpoints.tree),
    ("GET", rf"{_API}/auth-check/write", Endpoints.auth_check),
    ("POST", rf"{_API}/branch/([^/]+)", Endpoints.create_branch),
    ("POST", rf"{_API}/discussions", Endpoints.open_pull_request),
    ("GET", rf"{_API}/discussions/(\d+)", Endpoints.discussion),
    ("POST", rf"{_API}/preupload/([^/]+)", Endpoints.preupload),
    ("POST", rf"{_API}/commit/([^/]+)", Endpoints.commit),
    ("POST", rf"{_FILES}\.git/info/lfs/objects/batch", Endpoints.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", Endpoints.lfs_put),
    *((method, rf"{_FILES}/resolve/([^/]+)/(.+)", Endpoints.resolve) for method in ("GET", "HEAD")),
    *((method, r"/lfs/([0-9a-f]{64})", Endpoints.lfs_get) for method in ("GET", "HEAD")),
]
