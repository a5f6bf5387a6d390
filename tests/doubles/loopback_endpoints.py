"""Answers of the loopback Hub, one method per endpoint."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from .loopback_repos import DATE, LFS_SUFFIXES, Account, Commit, Entry, Repo

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
    query: dict[str, str]

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
        if repo is None or (repo.private and not (account and account.is_member(repo_id.split("/")[0]))):
            raise StatusError(404 if account else 401, "Repository not found", "RepoNotFound")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> Commit:
        if (commit := repo.resolve(revision)) is None:
            raise StatusError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _check_write(self, namespace: str, as_member: bool = True) -> Account:
        if (account := self._account()) is None:
            raise StatusError(401, "Invalid username or password.")
        if account.role == "read":
            raise StatusError(403, "Forbidden: you must use a write token to upload to a repository.")
        if as_member and not account.is_member(namespace):
            raise StatusError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        return account

    # Accounts and repositories

    def whoami(self, body: bytes) -> Any:
        if (account := self._account()) is None:
            raise StatusError(401, "Invalid credentials in Authorization header")
        return account.whoami()

    def create_repo(self, body: bytes) -> Any:
        payload = json.loads(body)
        account = self._account()
        repo_id = f"{payload['organization'] or (account and account.name)}/{payload['name']}"
        self._check_write(repo_id.split("/")[0])
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
        blobs = "blobs" in self.query
        siblings = [
            {"rfilename": path}
            | ({"size": len(e.content), "blobId": e.blob_id, "lfs": e.info(path).get("lfs")} if blobs else {})
            for path, e in sorted(commit.tree.items())
        ]
        for sibling in siblings if blobs else ():
            if sibling["lfs"]:
                sibling["lfs"] = {"sha256": sibling["lfs"]["oid"], "size": sibling["size"], "pointerSize": 130}
        return {
            "id": repo_id,
            "author": repo_id.split("/")[0],
            "sha": commit.sha,
            "private": repo.private,
            "gated": False,
            "tags": [],
            "siblings": siblings,
            "createdAt": DATE,
            "lastModified": DATE,
        }

    def tree(self, body: bytes, kind: str, repo_id: str, revision: str, folder: str) -> Any:
        commit = self._commit_of(self._repo(kind, repo_id), revision)
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        inside = {path: entry for path, entry in sorted(commit.tree.items()) if path.startswith(prefix)}
        if prefix and not inside:
            raise StatusError(404, f"{prefix} does not exist", "EntryNotFound")
        rest = {path: path.removeprefix(prefix) for path in inside}
        folders = sorted({f"{prefix}{Path(r).parts[0]}" for r in rest.values() if "/" in r})
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        files = [entry.info(path) for path, entry in inside.items() if recursive or "/" not in rest[path]]
        return [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders] + files

    def auth_check(self, body: bytes, kind: str, repo_id: str, write: str) -> Any:
        self._repo(kind, repo_id)
        if write:
            self._check_write(repo_id.split("/")[0])
        return {}

    def create_branch(self, body: bytes, kind: str, repo_id: str, branch: str) -> Any:
        repo = self._repo(kind, repo_id)
        self._check_write(repo_id.split("/")[0])
        if branch.startswith("refs/"):
            raise StatusError(400, f"Invalid reference for a branch: {branch}")
        if f"refs/heads/{branch}" in repo.refs:
            raise StatusError(409, "Reference already exists")
        start = self._commit_of(repo, json.loads(body or b"{}").get("startingPoint") or "main")
        repo.refs[f"refs/heads/{branch}"] = start.sha
        return {}

    def open_discussion(self, body: bytes, kind: str, repo_id: str) -> Any:
        repo = self._repo(kind, repo_id)
        account = self._check_write(repo_id.split("/")[0], as_member=False)
        return {"num": self._discuss(repo, account, json.loads(body), repo.refs["refs/heads/main"])}

    def discussion(self, body: bytes, kind: str, repo_id: str, number: str) -> Any:
        repo = self._repo(kind, repo_id)
        if int(number) > len(repo.discussions):
            raise StatusError(404, "no such discussion")
        return repo.discussions[int(number) - 1]

    def _discuss(self, repo: Repo, account: Account, payload: dict[str, Any], start: str) -> int:
        number = len(repo.discussions) + 1
        discussion = {
            "title": payload["title"],
            "num": number,
            "author": {"name": account.name},
            "createdAt": DATE,
            "status": "draft",
            "repo": {"name": repo.id, "type": repo.type},
            "isPullRequest": bool(payload.get("pullRequest")),
            "events": [],
        }
        if payload.get("pullRequest"):
            repo.refs[f"refs/pr/{number}"] = start
            discussion |= {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "diff": ""}
        repo.discussions.append(discussion)
        return number

    # Upload

    def preupload(self, body: bytes, kind: str, repo_id: str, revision: str) -> Any:
        repo = self._repo(kind, repo_id)
        self._check_write(repo_id.split("/")[0], as_member=not self._is_open_to_all(revision))
        tree = self._commit_of(repo, revision).tree
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10**7 else "regular",
                    "shouldIgnore": False,
                    "oid": tree[file["path"]].etag if file["path"] in tree else None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def _is_open_to_all(self, revision: str) -> bool:
        return revision.startswith("refs/pr/") or "create_pr" in self.query

    def lfs_batch(self, body: bytes, kind: str, repo_id: str) -> Any:
        self._repo(kind, repo_id)
        payload = json.loads(body)
        revision = payload.get("ref", {}).get("name")
        self._check_write(repo_id.split("/")[0], as_member=not (revision is None or self._is_open_to_all(revision)))
        objects = []
        for wanted in payload["objects"]:
            actions = {"upload": {"href": f"{self.hub.cdn_url}/lfs/{wanted['oid']}"}}
            stored = {"oid": wanted["oid"], "size": wanted["size"]}
            objects.append(stored if wanted["oid"] in self.hub.large_files else {**stored, "actions": actions})
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise StatusError(400, "the SHA-256 of the content is not the one announced")
        self.hub.large_files[oid] = body
        return {}

    def commit(self, body: bytes, kind: str, repo_id: str, revision: str) -> Any:
        repo = self._repo(kind, repo_id)
        account = self._check_write(repo_id.split("/")[0], as_member=not self._is_open_to_all(revision))
        head = self._commit_of(repo, revision)
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        pull_request = None
        if "create_pr" in self.query:
            payload = {"title": header["summary"], "pullRequest": True}
            pull_request = self._discuss(repo, account, payload, head.sha)
            ref = f"refs/pr/{pull_request}"
        else:
            ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
            if ref not in repo.refs:
                raise StatusError(400, f"{revision} is no branch")
            if not head.sha.startswith(header.get("parentCommit") or head.sha):
                raise StatusError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(head.tree)
        for line in lines[1:]:
            self._apply(tree, line["key"], line["value"])
        sha = repo.commit(ref, tree, header["summary"])
        url = f"{self.hub.url}/{'' if repo.type == 'model' else repo.type + 's/'}{repo_id}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}"}
        return answer | ({"pullRequestUrl": f"{url}/discussions/{pull_request}"} if pull_request else {})

    def _apply(self, tree: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            tree[path] = Entry(base64.b64decode(value["content"]), is_lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.large_files:
                raise StatusError(400, f"LFS pointer of {path} points to a file that does not exist")
            tree[path] = Entry(self.hub.large_files[value["oid"]], is_lfs=True)
        else:
            deleted = [name for name in tree if name == path or name.startswith(f"{path.rstrip('/')}/")]
            if not deleted:
                raise StatusError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in deleted:
                del tree[name]

    # Download

    def resolve(self, body: bytes, kind: str, repo_id: str, revision: str, path: str) -> Any:
        commit = self._commit_of(self._repo(kind, repo_id), revision)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if (entry := commit.tree.get(path)) is None:
            message = json.dumps({"error": f"Entry {path} not found"}).encode()
            return 404, {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, message
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
    ("GET", rf"{_API}/tree/([^/]+)(/.*)?", Endpoints.tree),
    ("GET", rf"{_API}/auth-check(/write)?", Endpoints.auth_check),
    ("POST", rf"{_API}/branch/([^/]+)", Endpoints.create_branch),
    ("POST", rf"{_API}/discussions", Endpoints.open_discussion),
    ("GET", rf"{_API}/discussions/(\d+)", Endpoints.discussion),
    ("POST", rf"{_API}/preupload/([^/]+)", Endpoints.preupload),
    ("POST", rf"{_API}/commit/([^/]+)", Endpoints.commit),
    ("POST", rf"{_FILES}\.git/info/lfs/objects/batch", Endpoints.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", Endpoints.lfs_put),
    *((method, rf"{_FILES}/resolve/([^/]+)/(.+)", Endpoints.resolve) for method in ("GET", "HEAD")),
    *((method, r"/lfs/([0-9a-f]{64})", Endpoints.lfs_get) for method in ("GET", "HEAD")),
]
