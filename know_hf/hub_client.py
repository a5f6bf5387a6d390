"""Model repos on the Hub: their files at one commit, ranges of those files, retries and hints on errors.

All requests go through huggingface_hub, and its errors keep their class. This module retries `whoami`, listings and
commits, which huggingface_hub sends only once, and compares downloaded files with their hashes.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from huggingface_hub.utils.sha import git_hash
from transformers.utils import logging

from .checkpoint import file_sha256

logger = logging.get_logger(__name__)

T = TypeVar("T")
Token = str | bool | None

_WAITS = (1.0, 5.0)  # seconds before each further attempt
_CONFLICT = (409, 412)
_TRANSIENT = (408, *_CONFLICT, 429, 500, 502, 503, 504)


class HubError(OSError):
    """Raised when know_hf refuses a push or a pull, or when the Hub returns other data than was requested."""


class DamagedError(HubError):
    """Raised when downloaded bytes differ from those on the Hub."""


@dataclass(frozen=True)
class RemoteFile:
    """Size in bytes, git hash and, for large files only, SHA-256 of a file on the Hub."""

    size: int
    blob_id: str
    sha256: str | None


@dataclass(frozen=True)
class RemoteRepo:
    """A model repo on the Hub at one commit, with its files by path."""

    repo_id: str
    commit: str
    files: dict[str, RemoteFile]
    private: bool | None = None

    @classmethod
    def open(cls, repo_id: str, revision: str | None = None, token: Token = None) -> "RemoteRepo":
        """List the files of a repo at a branch, tag or commit; the default is `main`."""
        check_token(token)
        api = HfApi(token=token)

        def request() -> RemoteRepo:
            info = api.repo_info(repo_id, revision=revision)
            files = {
                entry.path: RemoteFile(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
                for entry in api.list_repo_tree(repo_id, recursive=True, revision=info.sha)
                if isinstance(entry, RepoFile)
            }
            return cls(repo_id, str(info.sha), files, info.private)

        return call_hub(request, f"Could not read {repo_id}{f' at {revision!r}' if revision else ''}")

    def name(self, path: str) -> str:
        """Return the address of a file for messages."""
        return f"hf://{self.repo_id}@{self.commit[:8]}/{path}"

    def has(self, path: str, local: Path, sha256: str | None = None) -> bool:
        """Return whether the repo has the bytes of a local file, whose SHA-256 may be given, at this path."""
        file = self.files.get(path)
        if file is None or local.stat().st_size != file.size:
            return False
        if file.sha256 is None:
            return git_hash(local.read_bytes()) == file.blob_id
        return file.sha256 == (sha256 or file_sha256(local))

    def fetch(self, path: str, token: Token = None, local_dir: Path | None = None) -> Path:
        """Download a file to the Hub cache, or to `local_dir`, and compare it with its hash."""

        def download() -> Path:
            options: dict[str, Any] = {"revision": self.commit, "token": token, "local_dir": local_dir}
            for force in (False, True):  # a file of an earlier download may be damaged
                local = Path(hf_hub_download(self.repo_id, path, force_download=force, **options))
                if self.has(path, local):
                    return local
            os.unlink(os.path.realpath(local))
            raise DamagedError(f"{self.name(path)}: the downloaded file is damaged (wrong hash)")

        return call_hub(download, f"Could not download {self.name(path)}")


class RemoteSource:
    """A [`ByteSource`] that reads ranges of a file on the Hub."""

    def __init__(self, repo: RemoteRepo, path: str, token: Token = None) -> None:
        self.name = repo.name(path)
        self.size = repo.files[path].size
        self._url = hf_hub_url(repo.repo_id, path, revision=repo.commit)
        self._token = token

    def read_into(self, buffer: memoryview, offset: int) -> None:
        filled = 0  # kept between attempts

        def read() -> None:
            nonlocal filled
            first, last = offset + filled, offset + len(buffer) - 1
            # without `identity`, the range may count compressed bytes
            headers = {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
            headers |= build_hf_headers(token=self._token)
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            with get_session().stream("GET", self._url, headers=headers, timeout=timeout) as response:
                hf_raise_for_status(response)
                received = response.headers.get("Content-Range", "none")
                if response.status_code != 206 or received != f"bytes {first}-{last}/{self.size}":
                    raise HubError(
                        f"the server returned the range {received!r} of {self.name} instead of bytes {first}-{last};"
                        " download the repo with know_hf.hub.pull"
                    )
                for chunk in response.iter_bytes():
                    if len(chunk) > len(buffer) - filled:
                        raise DamagedError(f"the server sent more than bytes {first}-{last} of {self.name}")
                    buffer[filled : filled + len(chunk)] = chunk
                    filled += len(chunk)
            if filled < len(buffer):
                raise DamagedError(f"the server sent fewer than bytes {first}-{last} of {self.name}")

        if buffer:
            call_hub(read, f"Could not read {self.name}")


def check_token(token: Token) -> None:
    """Raise a `ValueError` for a malformed token, which the HTTP library would print in its error."""
    if isinstance(token, str) and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ValueError("token is empty or contains spaces or other invalid characters; copy it again")


def call_hub(request: Callable[[], T], failure: str, retry: bool = True) -> T:
    """Call the Hub, and retry after transient errors.

    Errors of huggingface_hub keep their class and get two notes: `failure` and what to do. Errors of the HTTP library
    become a `ConnectionError`.
    """
    waits = list(_WAITS if retry else ())
    while True:
        try:
            return request()
        except (HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:
            cause = _cause(error)
            if not waits or not _is_transient(cause):
                for note in (f"{failure}.", _hint(cause)):
                    if note and note not in getattr(cause, "__notes__", ()):
                        cause.add_note(note)
                raise cause from cause.__cause__
            logger.warning(f"{failure} ({type(cause).__name__}). Retrying in {waits[0]:.0f} s.")
            time.sleep(waits.pop(0))


def _cause(error: Exception) -> Exception:
    """Unwrap an error, and turn errors of the HTTP library into a `ConnectionError`."""
    while isinstance(error, RuntimeError | LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, HTTPError) and not isinstance(error, OSError):
        failed = ConnectionError(f"the connection to the Hub failed: {error or type(error).__name__}")
        failed.__cause__ = error
        return failed
    return error


def _is_transient(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT
    is_size_mismatch = type(error) is OSError and error.errno is None  # raised by huggingface_hub after a download
    return is_size_mismatch or type(error) is ConnectionError or isinstance(error, DamagedError | json.JSONDecodeError)


def _hint(error: Exception) -> str | None:
    """Return what to do, unless the message of the error says it."""
    if isinstance(error, json.JSONDecodeError):
        return "The response is not JSON. Check HF_ENDPOINT, or run it again later."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return "Log in with `hf auth login`, set HF_TOKEN, or pass token=."
    if status in _CONFLICT:
        return "Another commit arrived first and nothing was committed. Run it again."
    return "Run it again: transferred files are not sent again." if _is_transient(error) else None
