"""Pulls from the loopback Hub into a folder: complete and equal to the repo, or not at all."""

from contextlib import suppress
from pathlib import Path

import pytest
from doubles.hub_fixtures import FAULTS, contents, raises, store
from doubles.loopback_hub import LoopbackHub
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from know_hf import WeightTrajectory
from know_hf.checkpoint import CheckpointError, atomic_folder
from know_hf.hub import HubError, pull, pull_checkpoint, pull_trajectory
from know_hf.trajectory import TrajectoryError

pytestmark = pytest.mark.usefixtures("no_sleep", "no_token_shown")


def test_checkpoint(hub: LoopbackHub, enhanced: Path, tmp_path: Path) -> None:
    odd = {"pytorch_model.bin": b"pickle", ".hidden.json": b"{}", "a/../../outside.json": b"{}", "run.sh": b"rm"}
    hub.create("me/x", contents(enhanced) | odd)
    assert contents(pull_checkpoint("me/x", tmp_path / "deep" / "pulled")) == contents(enhanced)
    (tmp_path / "empty").mkdir()
    assert contents(pull("me/x", tmp_path / "empty")) == contents(enhanced)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["pulled"]
    assert not list(tmp_path.rglob("*outside*"))


def test_refused_pulls(hub: LoopbackHub, enhanced: Path, recorded: Path, tmp_path: Path) -> None:
    store(hub, enhanced, "me/x")
    store(hub, recorded, "me/t")
    hub.create("me/pickle", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    hub.create("me/damaged", contents(enhanced) | {"model.safetensors": b"garbage"})
    target = tmp_path / "pulled"
    for function, repo_id, options, error, match in (
        (pull, "me/pickle", {}, HubError, "no safetensors weights"),
        (pull, "me/damaged", {}, CheckpointError, "model.safetensors"),
        (pull_checkpoint, "me/t", {}, HubError, "holds a trajectory"),
        (pull_trajectory, "me/x", {}, TrajectoryError, "trajectory.json"),
        (pull, "me/none", {}, RepositoryNotFoundError, "me/none"),
        (pull, "me/x", {"revision": "none"}, RevisionNotFoundError, "none"),
        (pull, "me/x", {"token": "hf two"}, ValueError, "token"),
    ):
        with raises(error, match):
            function(repo_id, target, **options)
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}
    target.write_bytes(b"")
    with raises(FileExistsError, "another folder"):
        pull("me/x", target)


@pytest.mark.parametrize(
    ("fault", "pattern"),
    [*((fault, "GET /lfs") for fault in FAULTS), ("500", "GET .*json"), ("wrong bytes", "GET .*json")],
)
def test_pull_after_a_fault(hub: LoopbackHub, recorded: Path, tmp_path: Path, fault: str, pattern: str) -> None:
    store(hub, recorded, "me/t")
    switched_on = hub.fail(pattern, **FAULTS[fault])
    pulled = pull_trajectory("me/t", tmp_path / "once")
    assert switched_on.times == 0
    pulled.verify()
    hub.fail(pattern, times=1000, **FAULTS[fault])
    with raises(OSError, "Run it again"):
        pull("me/t", tmp_path / "never")
    assert not (tmp_path / "never").exists()
    hub.faults.clear()
    assert contents(pull("me/t", tmp_path / "never")) == contents(pulled.path)
    assert not (tmp_path / ".never.pull").exists()


def test_pull_into_a_link_and_two_pulls(hub: LoopbackHub, enhanced: Path, tmp_path: Path) -> None:
    store(hub, enhanced, "me/x")
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "empty")
    with suppress(RuntimeError), atomic_folder(tmp_path / "link", resume=True):
        before = hub.sent("GET /lfs")
        with raises(BlockingIOError, "empty"):
            pull("me/x", tmp_path / "link")
        assert hub.sent("GET /lfs") == before
        raise RuntimeError
    pull("me/x", tmp_path / "link")
    assert contents(tmp_path / "disk" / "empty") == contents(enhanced) and (tmp_path / "link").is_symlink()
    assert not list((tmp_path / "disk").glob(".*"))
    with raises(FileExistsError, "another folder"):
        pull("me/x", tmp_path / "link")


def test_pull_into_a_trajectory_is_refused(hub: LoopbackHub, enhanced: Path, trajectory_copy: Path) -> None:
    store(hub, enhanced, "me/x")
    with raises(ValueError, "inside the trajectory"):
        pull("me/x", trajectory_copy / "pulled")


def test_a_folder_that_appears_during_a_pull_is_kept(hub: LoopbackHub, enhanced: Path, tmp_path: Path) -> None:
    store(hub, enhanced, "me/x")
    target = tmp_path / "pulled"

    def write(content: bytes) -> bytes:
        target.mkdir(exist_ok=True)
        (target / "thesis").touch()
        return content

    hub.fail("GET /lfs", tamper=write)
    with raises(FileExistsError, "in the meantime"):
        pull("me/x", target)
    assert [path.name for path in target.iterdir()] == ["thesis"]


def test_interrupted_pull_fetches_missing_files_only(hub: LoopbackHub, recorded: Path, tmp_path: Path) -> None:
    store(hub, recorded, "me/t")
    sha256 = hub.repo("me/t").resolve("main").tree["state-3/model.safetensors"].sha256
    hub.fail(f"GET /lfs/{sha256}", times=100, cut=500)
    with raises(ConnectionError, "Could not pull me/t"):
        pull("me/t", tmp_path / "pulled")
    hub.faults.clear()
    before = hub.sent("GET /lfs")
    pull("me/t", tmp_path / "pulled")
    assert hub.sent("GET /lfs") - before == (recorded / "state-3" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("state-1/model.safetensors", lambda content: content[:-1] + b"\1"),
        ("state-2/model.safetensors", lambda content: content + b"\1"),
        ("state-1/config.json", lambda content: content.replace(b"relu", b"gelu")),
        ("config.json", lambda content: content.replace(b"relu", b"gelu")),
        ("state-4/model.safetensors", None),
    ],
)
def test_repo_differs_from_the_recorded_trajectory(
    hub: LoopbackHub, recorded: Path, tmp_path: Path, name: str, change: object
) -> None:
    files = contents(recorded)
    content = files.pop(name)
    hub.create("me/t", files | ({name: change(content)} if callable(change) else {}))
    with raises(TrajectoryError, name):
        WeightTrajectory.from_hub("me/t").load_model(1)
    with raises(TrajectoryError, name):
        pull("me/t", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_bytes_that_differ_from_the_hash_on_the_hub(hub: LoopbackHub, enhanced: Path, tmp_path: Path) -> None:
    repo = store(hub, enhanced, "me/x")
    sha256 = repo.resolve("main").tree["model.safetensors"].sha256
    content = hub.large_files[sha256]
    hub.large_files[sha256] = content[:-1] + bytes([content[-1] ^ 1])
    with raises(HubError, r"model.safetensors: the downloaded file is damaged"):
        pull("me/x", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    hub.large_files[sha256] = content
    assert contents(pull("me/x", tmp_path / "pulled")) == contents(enhanced)


@pytest.mark.parametrize("pattern", ["GET .*/resolve/.*config.json", "GET .*/tree/"])
def test_the_token_is_not_sent_to_another_host(hub: LoopbackHub, enhanced: Path, tmp_path: Path, pattern: str) -> None:
    hub.create("me/x", contents(enhanced), private=True)
    pull("me/x", tmp_path / "first")
    hub.fail(pattern, times=1000, status=302, headers={"Location": f"{hub.cdn_url}/elsewhere"})
    with raises(OSError):
        pull("me/x", tmp_path / "second")
    assert {request.has_token for request in hub.requests if request.on_cdn} == {False}
    assert hub.matching("GET /elsewhere") and not (tmp_path / "second").exists()
