"""Fixtures and helpers of the tests that push to and pull from the loopback Hub."""

import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from know_hf import predict_overflowed_weights

from .loopback_hub import FOREIGN_TOKEN, READ_TOKEN, TOKEN, LoopbackHub
from .loopback_repos import Repo

COMMIT = "POST .*/commit/"
TOKENS = (TOKEN, READ_TOKEN, FOREIGN_TOKEN)
FAULTS: dict[str, dict[str, Any]] = {  # of downloads
    "reset": {"cut": 100},
    "cut": {"cut": 100, "reset": False},
    "500": {"status": 500},
    "429": {"status": 429, "headers": {"Retry-After": "3"}},
    "wrong bytes": {"tamper": lambda content: content[:-1] + bytes([content[-1] ^ 1])},
    "truncated": {"tamper": lambda content: content[:-1]},
}


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def no_token_shown(capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> Iterator[None]:
    """Check that a test neither prints, logs nor writes a token."""
    for logger in ("huggingface_hub", "know_hf", "transformers"):
        caplog.set_level(logging.DEBUG, logger)
    yield
    logged = "\n".join(record.getMessage() for record in caplog.get_records("call"))
    assert not logged or "authenticated: True" in logged  # logged by huggingface_hub for each request with a token
    shown = ("".join(capfd.readouterr()) + logged).encode()
    shown += b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not any(token.encode() in shown for token in TOKENS)


@pytest.fixture(scope="session")
def enhanced(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an enhanced checkpoint with its card; read only."""
    folder = tmp_path_factory.mktemp("enhanced") / "enhanced"
    predict_overflowed_weights(recorded, output_dir=folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of all files by relative path, without the lock of a trajectory."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def without_card(folder: Path) -> dict[str, bytes]:
    """Contents without the card, which names where the weights come from."""
    return {path: content for path, content in contents(folder).items() if path != "README.md"}


def store(hub: LoopbackHub, folder: Path, repo_id: str) -> Repo:
    """Create a repo with the files of a folder, without a client."""
    return hub.create(repo_id, contents(folder))


@contextmanager
def raises(error: type[Exception], match: str | None = None) -> Iterator[None]:
    """Expect an error, by its message or notes, and check that its traceback shows no token."""
    with pytest.raises(error, match=match) as raised:
        yield
    text = "".join(traceback.format_exception(raised.value))
    assert not any(token in text for token in TOKENS)
