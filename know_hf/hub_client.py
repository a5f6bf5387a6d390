"""Reading from and asking the Hub: a repo at one commit, ranges of its files, and errors that say what to do.

All goes through huggingface_hub. What it leaves to its callers is here: requests that it makes only once are made
again, what arrives is compared with what the Hub says of it, and its many errors become one.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id
from transformers.utils import logging

from .checkpoint import file_sha256

logger = logging.get_logger(__name__)

T = TypeVar("T")
Token = str | bool | None

_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]  # of the HTTP library, whichever huggingface_hub uses
_WAITS = (1.0, 5.0)  # seconds before an action is tried again; most of its requests the client has tried five times
_PASSING = (408, 409, 412, 429, 500, 502, 503, 504)
LOG_IN = "log in with `hf auth login`, set HF_TOKEN, or pass token="


class HubError(OSError):
    """The Hub refused something, can't be reached, or holds something else than was expected."""


class DamagedError(HubError):
    """Bytes arrived that are not those that were asked for."""


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub says of a file.

    Attributes:
        size (`int`): In bytes.
        blob_id (`str`): What git calls it, 40 hexadecimal digits.
        sha256 (`str`, *optional*): Of its bytes; the Hub keeps it of large files only.
    """

    size: int
    blob_id: str
    sha256: str | None

    def is_same_as(self, path: Path) -> bool:
        """Whether a file on the disk has the same bytes."""
        if path.stat().st_size != self.size:
            return False
        return file_sha256(path) == self.sha256 if self.sha256 else _git_blob_id(path) == self.blob_id


@dataclass(frozen=True)
class RemoteRepo:
    """The files of a model repo on the Hub at one commit.

    Attributes:
        repo_id, commit (`str`): Where they are.
        files (`dict[str, RemoteFile]`): From path to what the Hub says of it.
        private (`bool`, *optional*): Whether only some accounts may read it.
    """

    repo_id: str
    commit: str
    files: dict[str, RemoteFile]
    private: bool | None = None

    @classmethod
    def open(cls, repo_id: str, revision: str | None = None, token: Token = None) -> "RemoteRepo":
        """Asks what a repo holds.

        Args:
            repo_id (`str`): Its id.
            revision (`str`, *optional*): Branch, tag or commit; by default `main`.
            token (`str` or `bool`, *optional*): Of an account that may read it; by default the one logged in.

        Raises:
            `ValueError`: when the id is none.
            `HubError`: when there is no such repo or revision, or it may not be read.
        """
        check_names(repo_id, token)
        api = HfApi(token=token)

        def ask() -> RemoteRepo:
            info = api.repo_info(repo_id, revision=revision)
            entries = api.list_repo_tree(repo_id, recursive=True, revision=info.sha)
            files = {
                entry.path: RemoteFile(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
                for entry in entries
                if isinstance(entry, RepoFile)
            }
            return cls(repo_id, str(info.sha), files, info.private)

        return retried(ask, f"{repo_id}{f' at {revision!r}' if revision else ''} can't be read")

    def name(self, path: str) -> str:
        """Address of a file, for messages."""
        return f"hf://{self.repo_id}@{self.commit[:8]}/{path}"

    def fetch(self, path: str, token: Token = None) -> Path:
        """Downloads a file to the Hub cache and compares it with what the Hub says of it.

        Returns:
            `Path`: in the folder that the cache has for this commit.

        Raises:
            `HubError`: when it can't be had whole.
        """

        def download() -> Path:
            for force in (False, True):  # what the cache has may be damaged
                local = Path(
                    hf_hub_download(self.repo_id, path, revision=self.commit, token=token, force_download=force)
                )
                if self.files[path].is_same_as(local):
                    return local
            os.unlink(os.path.realpath(local))
            raise DamagedError(f"{self.name(path)} did not arrive as it is on the Hub")

        return retried(download, f"{self.name(path)} can't be downloaded")


class RemoteSource:
    """A file on the Hub of which ranges of bytes are read, as a [`ByteSource`].

    Args:
        repo ([`RemoteRepo`]): The repo it is in.
        path (`str`): Its path there.
        token (`str` or `bool`, *optional*): Of an account that may read it.
    """

    def __init__(self, repo: RemoteRepo, path: str, token: Token = None) -> None:
        self.name = repo.name(path)
        self.size = repo.files[path].size
        self._url = hf_hub_url(repo.repo_id, path, revision=repo.commit)
        self._token = token

    def __repr__(self) -> str:
        return self.name

    def read_into(self, buffer: memoryview, offset: int) -> None:
        filled = 0

        def read() -> None:
            nonlocal filled
            first, last = offset + filled, offset + len(buffer) - 1
            # compressed, a range would be one of the compressed bytes
            headers = {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
            headers |= build_hf_headers(token=self._token)
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            with get_session().stream("GET", self._url, headers=headers, timeout=timeout) as response:
                hf_raise_for_status(response)
                given = response.headers.get("Content-Range", "none")
                if response.status_code != 206 or given != f"bytes {first}-{last}/{self.size}":
                    raise HubError(
                        f"{self.name} can't be read: bytes {first}-{last} of {self.size} were asked for, the range"
                        f" {given} was answered; pull the whole repo instead, with know_hf.hub.pull"
                    )
                for chunk in response.iter_bytes():
                    if len(chunk) > len(buffer) - filled:
                        raise DamagedError(f"more bytes than {first}-{last} of {self.name} arrived")
                    buffer[filled : filled + len(chunk)] = chunk
                    filled += len(chunk)
            if filled < len(buffer):
                raise DamagedError(f"fewer bytes than {first}-{last} of {self.name} arrived")

        if buffer:
            retried(read, f"{self.name} can't be read")


def check_names(repo_id: str, token: Token) -> None:
    """Raises a `ValueError` for what is no repo id, and for a token that can't be sent, which is not shown."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repo id ({error}); give one like 'name/model'") from error
    if isinstance(token, str) and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ValueError("the token is empty or has blanks or characters that no token has; copy it again")


def retried(action: Callable[[], T], failed: str, again: bool = True) -> T:
    """Does something with the Hub, again after errors that pass.

    Args:
        action (`Callable`): What to do.
        failed (`str`): What an error's message begins with.
        again (`bool`, *optional*, defaults to `True`): Whether it may be done several times.

    Raises:
        `HubError`: when it can't be done; says what to do.
    """
    for wait in (*(_WAITS if again else ()), None):
        try:
            return action()
        except (_HTTPError, OSError, RuntimeError, EntryNotFoundError, json.JSONDecodeError) as error:
            cause = _cause(error)
            mend = _mend(cause)
            if mend is None:
                raise
            if wait is None or not _passes(cause):
                raise HubError(f"{failed}: {mend}") from error
            logger.warning(f"{failed}: {mend}. Trying again in {wait:.0f} s.")
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _cause(error: BaseException) -> BaseException:
    """The error that the client wrapped in others."""
    while isinstance(error, RuntimeError | LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _passes(error: BaseException) -> bool:
    status = _status(error)
    if status:
        return status in _PASSING
    return isinstance(error, _HTTPError | DamagedError | json.JSONDecodeError) or _is_told_by_client(error)


def _is_told_by_client(error: BaseException) -> bool:
    """Whether it is an error of huggingface_hub's own, such as of a file that arrived with another size."""
    return type(error) is OSError and error.errno is None


def _status(error: BaseException) -> int | None:
    response: Any = getattr(error, "response", None)
    return response.status_code if isinstance(error, HfHubHTTPError) and response is not None else None


def _mend(error: BaseException) -> str | None:
    """What happened and what to do, in words; nothing for errors that are not the Hub's."""
    if isinstance(error, HubError) and not isinstance(error, DamagedError):
        return None
    for kind, text in (
        (LocalTokenNotFoundError, f"no token was found; {LOG_IN}"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set; unset it"),
        (GatedRepoError, "it is gated; ask for access on its page on the Hub"),
        (RepositoryNotFoundError, f"there is no such repo, or the token may not see it; check its name, or {LOG_IN}"),
        (RevisionNotFoundError, "there is no such branch, tag or commit; check the revision"),
        (EntryNotFoundError, "there is no such file at this revision; check the revision"),
        (DamagedError, f"{error}; run it again"),
        (json.JSONDecodeError, "the answer was not that of a Hub; check HF_ENDPOINT, or run it again later"),
    ):
        if isinstance(error, kind):
            return text
    if _is_told_by_client(error):
        return f"{str(error).splitlines()[0]}; run it again"
    status = _status(error)
    if status is None:
        is_network = isinstance(error, (_HTTPError, ConnectionError, TimeoutError))
        return (
            f"the connection broke ({error}); run it again, what has arrived is not sent again" if is_network else None
        )
    said = f"the Hub answered {status}, {getattr(error, 'server_message', None) or 'without a reason'}"
    if status == 401:
        return f"{said}: the token is not valid; {LOG_IN}"
    if status == 403:
        return f"{said}: the token may not do this; use one with the right to write there"
    if status in (409, 412):
        return f"{said}: somebody else committed at the same time; nothing was committed, run it again"
    if status == 429:
        return f"{said}: there were too many requests; wait some minutes and run it again"
    return f"{said}: run it again later, what has arrived is not sent again" if status >= 500 else said


def _git_blob_id(path: Path) -> str:
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
