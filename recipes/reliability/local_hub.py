"""A Hub on the loopback interface that stores commits in memory: what pushing and pulling a model repo needs."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

ATTRIBUTES = ".gitattributes"


class LocalHub(ThreadingHTTPServer):
    """The server; `commits` has the files of every commit of every repo, the newest last."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.large_files: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def files(self, repo_id: str) -> dict[str, bytes]:
        """Files of the newest commit; empty if the repo does not exist."""
        newest = self.commits.get(repo_id, [{}])[-1]
        return {path: content for path, content in newest.items() if path != ATTRIBUTES}

    def create(self, repo_id: str, files: dict[str, bytes]) -> None:
        """Create a repo, or replace it."""
        self.commits[repo_id] = [{ATTRIBUTES: b"", **files}]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections of killed clients."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            status, headers, content = self._route(path, body)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = do_any

    def _route(self, path: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        if path == "/api/whoami-v2":
            return 200, {}, {"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/repos/create":
            repo_id = f"me/{json.loads(body)['name']}"
            self.server.commits.setdefault(repo_id, [{ATTRIBUTES: b""}])
            return 200, {}, {"url": f"{self.server.url}/{repo_id}"}
        if path == "/api/validate-yaml":
            return 200, {}, {"warnings": [], "errors": []}
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            if hashlib.sha256(body).hexdigest() == match[1]:
                self.server.large_files[match[1]] = body
            return 200, {}, {}
        if match := re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git)?(?:/(.+))?", path):
            if commits := self.server.commits.get(match[1]):
                return self._answer(match[1], commits, match[2] or "revision/main", body)
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repo"}, {}
        return 404, {}, {"error": path}

    def _answer(
        self, repo_id: str, commits: list[dict[str, bytes]], action: str, body: bytes
    ) -> tuple[int, dict[str, str], Any]:
        name, _, rest = action.partition("/")
        if name == "auth-check":
            return 200, {}, {}
        if name == "preupload":
            return 200, {}, {"files": [_upload(file["path"]) for file in json.loads(body)["files"]]}
        if action == "info/lfs/objects/batch":
            return 200, {}, {"transfer": "basic", "objects": [self._large(o) for o in json.loads(body)["objects"]]}
        if name == "commit":
            return self._commit(repo_id, commits, [json.loads(line) for line in body.splitlines()])
        revision, _, path = rest.partition("/")
        shas = [_sha(commit) for commit in commits]
        commit = commits[shas.index(revision)] if revision in shas else commits[-1]
        if name == "revision":
            siblings = [{"rfilename": path} for path in commit]
            return 200, {}, {"id": repo_id, "sha": _sha(commit), "private": False, "tags": [], "siblings": siblings}
        if name == "tree":
            return 200, {}, [_entry(path, content) for path, content in sorted(commit.items())]
        if path not in commit:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such file"}, {}
        entry = _entry(path, commit[path])
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": _sha(commit)}, commit[path]

    def _large(self, wanted: dict[str, Any]) -> dict[str, Any]:
        href = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}
        return {**wanted, **({} if wanted["oid"] in self.server.large_files else {"actions": href})}

    def _commit(
        self, repo_id: str, commits: list[dict[str, bytes]], operations: list[dict[str, Any]]
    ) -> tuple[int, dict[str, str], Any]:
        header, tree = operations[0]["value"], dict(commits[-1])
        if header.get("parentCommit") not in (None, _sha(tree)):
            return 412, {}, {"error": "A commit has happened since."}
        for operation in operations[1:]:
            value = operation["value"]
            if operation["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                tree[value["path"]] = self.server.large_files[value["oid"]]
            else:
                del tree[value["path"]]
        commits.append(tree)
        return (
            200,
            {},
            {
                "success": True,
                "commitOid": _sha(tree),
                "commitUrl": f"{self.server.url}/{repo_id}/commit/{_sha(tree)}",
            },
        )


def _upload(path: str) -> dict[str, Any]:
    mode = "lfs" if _is_large(path) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
    large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
    return entry | ({"lfs": large} if _is_large(path) else {})


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


def _sha(commit: dict[str, bytes]) -> str:
    hashes = sorted((path, hashlib.sha256(content).hexdigest()) for path, content in commit.items())
    return hashlib.sha1(repr(hashes).encode()).hexdigest()
