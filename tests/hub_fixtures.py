"""What the tests of pushing and pulling share."""

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import FOREIGN_TOKEN, READ_TOKEN, TOKEN, LoopbackHub
from loopback_repos import Repo

from know_hf import predict_overflowed_weights

COMMIT = "POST .*/commit/"


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been slept before trying again."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture(autouse=True)
def no_token_shown(capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> Iterator[None]:
    """No test prints, logs or writes a token, whatever goes wrong in it."""
    for logger in ("huggingface_hub", "know_hf", "transformers"):
        caplog.set_level(logging.DEBUG, logger)
    yield
    logged = "\n".join(record.getMessage() for record in caplog.get_records("call"))
    assert not logged or "authenticated: True" in logged  # the client says so of each request that has a token
    printed = "".join(capfd.readouterr()) + logged
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for token in (TOKEN, READ_TOKEN, FOREIGN_TOKEN):
        assert token not in printed and token.encode() not in files


@pytest.fixture(scope="session")
def enhanced(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An enhanced checkpoint with a card; never changed."""
    folder = tmp_path_factory.mktemp("enhanced") / "enhanced"
    predict_overflowed_weights(recorded, output_dir=folder)
    assert (folder / "README.md").exists()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_card(folder: Path) -> dict[str, bytes]:
    """All but the card, which says where things came from."""
    return {path: content for path, content in contents(folder).items() if path != "README.md"}


def stored(hub: LoopbackHub, folder: Path, repo_id: str) -> Repo:
    """A repo with the files of a folder, made without the client."""
    return hub.create(repo_id, {path: content for path, content in contents(folder).items() if path != ".lock"})


def failing(error: type[Exception], match: str, action: Callable[[], Any]) -> None:
    """Expects an error whose whole traceback is without a token."""
    with pytest.raises(error, match=match) as caught:
        action()
    text = "".join(traceback.format_exception(caught.value))
    assert not any(token in text for token in (TOKEN, READ_TOKEN, FOREIGN_TOKEN))
