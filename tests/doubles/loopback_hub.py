"""A Hub on the loopback interface: answers huggingface_hub's real client from memory.

Repos have commits, branches, tags and pull requests. A second server stores and serves large files, like the CDN of
the Hub, and must not receive a token. All requests are recorded. [`LoopbackHub.fail`] switches faults on.
"""

import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

from .loopback_endpoints import Endpoints, StatusError
from .loopback_repos import GITATTRIBUTES, LFS_SUFFIXES, Account, Entry, Repo

TOKEN, READ_TOKEN, FOREIGN_TOKEN = "hf_writeWRITEwrite", "hf_readREADread", "hf_foreignFOREIGN"


@dataclass
class Request:
    """A request, with the bytes of both bodies."""

    method: str
    path: str
    range: str | None
    has_token: bool
    on_cdn: bool
    received: int = 0
    sent: int = 0


@dataclass
class Fault:
    """A fault of the first `times` requests whose `METHOD path` matches; see [`LoopbackHub.fail`]."""

    pattern: str
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "fault of a test"
    cut: int | None = None
    reset: bool = True
    lose_answer: bool = False
    tamper: Callable[[bytes], bytes] | None = None
    before: Callable[[], object] | None = None


class LoopbackHub:
    """Two servers, for the API and for large files, and their content."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.accounts = {
            TOKEN: Account("me"),
            READ_TOKEN: Account("me", role="read"),
            FOREIGN_TOKEN: Account("somebody"),
        }
        self.lock = threading.RLock()
        self._servers = [_Server(("127.0.0.1", 0), _Handler) for _ in range(2)]
        for server in self._servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fail(self, pattern: str, times: int = 1, **fault: Any) -> Fault:
        """Switch a fault on.

        Args:
            pattern (`str`):
                Regular expression searched in `METHOD path`, the path unquoted and without query.
            times (`int`, *optional*, defaults to `1`):
                Number of requests with the fault.
            **fault:
                Fields of [`Fault`]: answer `status` with `message`; add `headers`; close the connection after `cut`
                bytes of the body (of the request for PUT and POST, of the answer for GET), with a reset unless `reset`
                is off; `lose_answer` after doing what was requested; `tamper` with the answer; call `before` first.
        """
        self.faults.append(Fault(pattern, times, **fault))
        return self.faults[-1]

    def create(self, repo_id: str, files: dict[str, bytes] | None = None, **options: Any) -> Repo:
        """Create a repo without a client."""
        repo = Repo(repo_id, options.pop("type", "model"), options.pop("private", False), **options)
        repo.commit("refs/heads/main", {".gitattributes": Entry(GITATTRIBUTES, False)}, "initial commit")
        self.repos[repo.type, repo_id] = repo
        if files:
            self.add(repo_id, files, repo.type)
        return repo

    def add(self, repo_id: str, files: dict[str, bytes], repo_type: str = "model") -> str:
        """Commit files without a client."""
        repo = self.repos[repo_type, repo_id]
        entries = {path: Entry(content, path.endswith(LFS_SUFFIXES)) for path, content in files.items()}
        self.large_files |= {entry.sha256: entry.content for entry in entries.values() if entry.is_lfs}
        return repo.commit("refs/heads/main", repo.resolve("main").tree | entries, "by a test")

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        return self.repos[repo_type, repo_id]

    def matching(self, pattern: str) -> list[Request]:
        """Requests whose `METHOD path` matches."""
        return [request for request in self.requests if re.search(pattern, f"{request.method} {request.path}")]

    def sent(self, pattern: str) -> int:
        """Bytes sent in answers to matching requests."""
        return sum(request.sent for request in self.matching(pattern))

    def received(self, pattern: str) -> int:
        """Bytes received in matching requests."""
        return sum(request.received for request in self.matching(pattern))


class _Cut(Exception):
    pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    hub: LoopbackHub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that the client closed."""


class _Handler(Endpoints, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_any(self) -> None:
        self.hub = self.server.hub
        path = urlsplit(self.path).path
        self.record = Request(
            self.command,
            unquote(path),
            self.headers.get("Range"),
            "Authorization" in self.headers,
            self.server.server_address[1] == urlsplit(self.hub.cdn_url).port,
        )
        self.hub.requests.append(self.record)
        self.fault = self._take_fault()
        try:
            if self.fault and self.fault.before:
                self.fault.before()
            body = self._read_body()
            if self.fault and self.fault.status:
                raise StatusError(self.fault.status, self.fault.message)
            with self.hub.lock:
                status, headers, content = self.route(path, body)
            if self.fault and self.fault.lose_answer:
                raise _Cut
        except _Cut:
            self._cut_connection()
            return
        except StatusError as error:
            status, content = error.status, json.dumps({"error": error.message}).encode()
            headers = {"X-Error-Message": error.message}
            headers |= {"X-Error-Code": error.code} if error.code else {}
        self._answer(status, headers, content)

    do_GET = do_HEAD = do_POST = do_PUT = do_any

    def _take_fault(self) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and re.search(fault.pattern, f"{self.command} {self.record.path}"):
                    fault.times -= 1
                    return fault
        return None

    def _read_body(self) -> bytes:
        stop = self.fault.cut if self.fault and self.command in ("PUT", "POST") else None
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length if stop is None else min(stop, length))
        self.record.received = len(body)
        if stop is not None:
            raise _Cut
        return body

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        if self.fault and self.fault.tamper and status < 300:
            content = self.fault.tamper(content)
        headers = {**headers, **(self.fault.headers if self.fault else {})}
        self.send_response(status)
        defaults = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        for name, value in (defaults | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            cut = self.fault.cut if self.fault and self.command == "GET" else None
            self.record.sent = len(content[:cut])
            self.wfile.write(content[:cut])
            if cut is not None:
                self.wfile.flush()
                self._cut_connection()

    def _cut_connection(self) -> None:
        self.close_connection = True
        if self.fault and self.fault.reset:  # closing without lingering sends a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """Loopback Hub of this process, with an empty cache; [`TOKEN`] is logged in."""
    server = LoopbackHub()
    huggingface_hub.close_session()
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    huggingface_hub.close_session()
    server.close()


def environment(hub: LoopbackHub, home: Path) -> dict[str, str]:
    """Environment of a new process that uses the Hub; `home` is the folder of its cache."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    return inherited | settings | {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
