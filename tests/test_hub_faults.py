"""What goes wrong with a Hub: found before any work, tried again, or told; never half of something."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_fixtures import COMMIT, contents, enhanced, failing, no_token_shown, stored, waits
from loopback_hub import FOREIGN_TOKEN, READ_TOKEN, TOKEN, LoopbackHub, hub
from loopback_repos import Account

from know_hf import WeightTrajectory
from know_hf.hub import HubError, check_push, pull, pull_checkpoint, pull_trajectory, push, push_checkpoint, push_known
from know_hf.trajectory import TrajectoryError

__all__ = ["enhanced", "hub", "no_token_shown", "waits"]

# huggingface_hub sends large files in a way that httpx wants otherwise
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

# Before any work


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"repo_id": "me/x/y"}, ValueError, "is no repo id"),
        ({"repo_id": "./folder"}, ValueError, "give one like 'name/model'"),
        ({"token": TOKEN + "\n"}, ValueError, "copy it again"),
        ({"token": ""}, ValueError, "copy it again"),
        ({"token": "hf_unknown"}, HubError, "401.*the token is not valid; log in"),
        ({"token": READ_TOKEN}, HubError, "can only read; make one that can write"),
        ({"token": FOREIGN_TOKEN}, HubError, "somebody may not write to me/x.*create_pr=True"),
        ({"repo_id": "other/new"}, HubError, "me may not write to other/new"),
        ({"repo_id": "other/x"}, HubError, "push to me/x"),
        ({"repo_id": "library/new"}, HubError, "me may not write to library/new"),
        ({"token": "hf_fine", "repo_id": "lab/new"}, HubError, "me may not write to lab/new"),
        ({"repo_id": "me/new", "create_pr": True}, HubError, "a pull request needs a repo"),
        ({"architecture": "BertModel"}, HubError, "holds a ResNetForImageClassification, a BertModel"),
        ({"kind": "trajectory"}, HubError, "holds a checkpoint; a trajectory pushed there"),
        ({"repo_id": "me/t"}, HubError, "holds a trajectory; a checkpoint pushed there"),
        ({"repo_id": "me/lora"}, HubError, "holds an adapter; a checkpoint pushed there"),
        ({"private": True}, HubError, "is public, not private as asked"),
        ({"revision": "main", "create_pr": True}, ValueError, "leave revision out"),
        ({"revision": "0" * 40}, ValueError, "is a commit"),
        ({"revision": "refs/heads/x"}, ValueError, "give the name of a branch"),
        ({"revision": "v1"}, HubError, "'v1' is a tag of me/x"),
        ({"revision": "refs/pr/3"}, HubError, "there is no such branch"),
    ],
)
def test_what_would_end_in_an_error_does_so_at_once(
    hub: LoopbackHub, enhanced: Path, arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    repo = hub.create("me/x", {"config.json": (enhanced / "config.json").read_bytes()})
    repo.refs["refs/tags/v1"] = repo.refs["refs/heads/main"]
    hub.create("other/x")
    hub.create("me/t", {"state-0/config.json": b"{}"})
    hub.create("me/lora", {"adapter_config.json": b"{}"})
    scopes = ({"entity": {"type": "user", "name": "me"}, "permissions": ["repo.write"]},)
    hub.accounts["hf_fine"] = Account("me", "fineGrained", {"lab": "write"}, scopes)
    failing(error, match, lambda: check_push(**{"repo_id": "me/x", **arguments}))
    assert {request.method for request in hub.requests} <= {"GET", "HEAD"}


def test_what_can_be_pushed_passes(hub: LoopbackHub, enhanced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create("me/x", {"config.json": (enhanced / "config.json").read_bytes()}, private=True)
    hub.create("other/x")
    architecture = "ResNetForImageClassification"
    assert check_push("x", architecture=architecture, private=True, revision="new") == "me/x"
    assert check_push("lab/new", kind="trajectory") == "lab/new"
    assert check_push("other/x", create_pr=True) == "other/x"
    assert {request.method for request in hub.requests} <= {"GET", "HEAD"}
    monkeypatch.delenv("HF_TOKEN")
    failing(HubError, "no token was found; log in with `hf auth login`", lambda: check_push("me/x"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    failing(HubError, "HF_HUB_OFFLINE is set; unset it", lambda: check_push("me/x", token=TOKEN))


def test_nothing_but_a_checkpoint_is_pushed(hub: LoopbackHub, enhanced: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name in ("pytorch_model.bin", "sub/optimizer.pt", ".cache/x.json", "model.safetensors.partial", "a.pkl"):
        shutil.copytree(enhanced, folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
        failing(ValueError, f"holds {name}, which is not part of a checkpoint", lambda: push(folder, "me/x"))
        (folder / name).unlink()
        (folder / "model.safetensors").write_bytes((enhanced / "model.safetensors").read_bytes()[:-1])
        failing(ValueError, "is truncated or damaged", lambda: push_checkpoint(folder, "me/x"))
        shutil.rmtree(folder)
    failing(FileNotFoundError, "holds no model.safetensors", lambda: push(tmp_path, "me/x"))
    failing(ValueError, "holds no KNOWN weights", lambda: push_known(enhanced, "me/x"))
    assert not hub.requests


# Faults


FAULTS = {
    "upload cut": ("PUT /lfs", {"cut": 1000}),
    "upload answered 500": ("PUT /lfs", {"status": 500}),
    "commit answered 500": (COMMIT, {"status": 500}),
    "commit answered 429": (COMMIT, {"status": 429, "headers": {"Retry-After": "3"}}),
    "commit answered 409": (COMMIT, {"status": 409}),
    "commit cut": (COMMIT, {"cut": 10}),
    "answer to commit lost": (COMMIT, {"lose_answer": True}),
    "preupload answered 503": ("POST .*/preupload", {"status": 503}),
    "card answered 502": ("POST .*/validate-yaml", {"status": 502}),
    "card cut": ("POST .*/validate-yaml", {"cut": 10}),
    "rights answered 500": ("GET .*/whoami", {"status": 500}),
    "making the repo answered 500": ("POST .*/repos/create", {"status": 500}),
    "files not told": ("GET .*/tree/", {"status": 504}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_pushing_goes_on_after_a_fault(hub: LoopbackHub, enhanced: Path, fault: str) -> None:
    pattern, what = FAULTS[fault]
    switched_on = hub.fail(pattern, **what)
    push(enhanced, "me/x", commit_message="Mine")
    assert switched_on.times == 0
    assert hub.repo("me/x").files() == contents(enhanced)
    assert hub.repo("me/x").titles() == ["Mine", "initial commit"]


@pytest.mark.parametrize("fault", [*FAULTS, "token taken back", "another commit each time"])
def test_pushing_with_a_lasting_fault_commits_nothing(hub: LoopbackHub, enhanced: Path, fault: str) -> None:
    taken_back = (COMMIT, {"status": 401, "message": "Invalid credentials in Authorization header"})
    other = (COMMIT, {"before": lambda: hub.add("me/x", {"notes.txt": str(len(hub.requests)).encode()})})
    pattern, what = {**FAULTS, "token taken back": taken_back, "another commit each time": other}[fault]
    repo = hub.create("me/x", {"config.json": (enhanced / "config.json").read_bytes()})
    hub.create("me/new")
    target = "me/made" if "repo" in fault else "me/x"
    hub.fail(pattern, times=1000, **what)
    if fault == "answer to commit lost":
        push(enhanced, target)  # what was committed is found to be there
        assert repo.titles().count("Add checkpoint made with know_hf") == 1
        return
    failing(HubError, "run it again|log in|another commit|check HF_ENDPOINT", lambda: push(enhanced, target))
    assert "model.safetensors" not in repo.files() and "README.md" not in repo.files()


def test_a_hub_without_xet_is_an_error(hub: LoopbackHub, enhanced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    failing(HubError, "the connection broke .*xet-write-token.*run it again", lambda: push(enhanced, "me/x"))
    assert hub.repo("me/x").files() == {}


def test_a_commit_in_between_is_built_on_or_refused(hub: LoopbackHub, enhanced: Path) -> None:
    repo = hub.create("me/x")
    hub.fail(COMMIT, before=lambda: hub.add("me/x", {"notes.txt": b"first"}))
    push(enhanced, "me/x", commit_message="Mine")
    assert repo.files() == contents(enhanced) | {"notes.txt": b"first"}
    assert repo.titles() == ["Mine", "made by a test", "initial commit"]
    other = hub.create("me/y")
    hub.fail(COMMIT, before=lambda: hub.add("me/y", {"config.json": b'{"architectures": ["BertModel"]}'}))
    failing(HubError, "holds a BertModel, a ResNetForImageClassification is", lambda: push(enhanced, "me/y"))
    assert other.titles() == ["made by a test", "initial commit"]


def test_half_a_trajectory_is_none_and_is_gone_on_with(hub: LoopbackHub, recorded: Path, tmp_path: Path) -> None:
    hub.fail(COMMIT, times=2, before=lambda: None)
    hub.fail("PUT /lfs", times=2, before=lambda: None)
    hub.fail("PUT /lfs", times=1000, cut=1000)
    failing(HubError, "state 2' was not committed.*run it again", lambda: push(recorded, "me/t"))
    hub.faults.clear()
    assert {name[:7] for name in hub.repo("me/t").files()} == {"state-0", "state-1"}
    for read in (
        lambda: WeightTrajectory.from_hub("me/t"),
        lambda: pull("me/t", tmp_path / "pulled"),
        lambda: pull_trajectory("me/t", tmp_path / "pulled"),
    ):
        failing(TrajectoryError, "its push was not finished; push the trajectory again", read)
    before = len(hub.requests)
    push(recorded, "me/t")
    sent = [r.path.removeprefix("/lfs/") for r in hub.requests[before:] if r.method == "PUT"]
    tree = hub.repo("me/t").resolve("main").tree
    assert sent == [tree[f"state-{index}/model.safetensors"].sha256 for index in (2, 3, 4)]
    pull_trajectory("me/t", tmp_path / "pulled").verify()


PULL_FAULTS = {
    "reset": {"cut": 100},
    "cut": {"cut": 100, "reset": False},
    "500": {"status": 500},
    "429": {"status": 429, "headers": {"Retry-After": "3"}},
    "wrong bytes": {"tamper": lambda content: content[:-1] + bytes([content[-1] ^ 1])},
    "truncated": {"tamper": lambda content: content[:-1]},
}


@pytest.mark.parametrize("fault", PULL_FAULTS)
@pytest.mark.parametrize("pattern", ["GET /lfs", "GET .*/resolve/.*json"])
def test_pulling_ends_whole_or_not_at_all(
    hub: LoopbackHub, recorded: Path, tmp_path: Path, fault: str, pattern: str
) -> None:
    stored(hub, recorded, "me/t")
    switched_on = hub.fail(pattern, **PULL_FAULTS[fault])
    pulled = pull_trajectory("me/t", tmp_path / "once")
    assert switched_on.times == 0
    pulled.verify()
    hub.fail(pattern, times=1000, **PULL_FAULTS[fault])
    failing(HubError, "run it again", lambda: pull("me/t", tmp_path / "never"))
    assert not (tmp_path / "never").exists()
    hub.faults.clear()
    assert contents(pull("me/t", tmp_path / "never")) == contents(pulled.path)
    assert not (tmp_path / ".never.pull").exists()


def test_pulling_again_fetches_what_is_missing(hub: LoopbackHub, recorded: Path, tmp_path: Path) -> None:
    stored(hub, recorded, "me/t")
    sha256 = hub.repo("me/t").resolve("main").tree["state-3/model.safetensors"].sha256
    hub.fail(f"GET /lfs/{sha256}", times=100, cut=500)
    failing(HubError, "the connection broke", lambda: pull("me/t", tmp_path / "pulled"))
    hub.faults.clear()
    before = hub.sent("GET /lfs")
    pull("me/t", tmp_path / "pulled")
    assert hub.sent("GET /lfs") - before == (recorded / "state-3" / "model.safetensors").stat().st_size
    failing(FileExistsError, "is not empty; name another folder", lambda: pull("me/t", tmp_path / "pulled"))


@pytest.mark.parametrize("fault", ["reset", "cut", "500", "429", "truncated", "longer", "whole file"])
def test_reading_ranges_goes_on_after_a_fault(hub: LoopbackHub, recorded: Path, fault: str) -> None:
    """All but wrong bytes, as a range has no hash."""
    stored(hub, recorded, "me/t")
    remote = WeightTrajectory.from_hub("me/t")
    name, local = "resnet.encoder.stages.1.layers.0.layer.1.convolution.weight", WeightTrajectory(recorded)
    assert remote.names == local.names
    if fault == "whole file":
        hub.fail("GET /lfs", headers={"Content-Range": "bytes 0-1/2"})
        failing(HubError, "the range bytes 0-1/2 was answered; pull the whole repo", lambda: remote.tensor(name))
        return
    what = PULL_FAULTS.get(fault, {"tamper": lambda content: content + b"more"})
    switched_on = hub.fail("GET /lfs", **what)
    assert torch.equal(remote.tensor(name), local.tensor(name)) and switched_on.times == 0
    hub.fail("GET /lfs", times=1000, **what)
    failing(HubError, "model.safetensors can't be read: .*run it again", lambda: remote.tensor(name))


def test_what_the_hub_holds_is_compared_with_what_was_recorded(
    hub: LoopbackHub, recorded: Path, tmp_path: Path
) -> None:
    stored(hub, recorded, "me/t")
    weights = (recorded / "state-1" / "model.safetensors").read_bytes()
    config = (recorded / "state-1" / "config.json").read_bytes()
    for name, content in {
        "state-1/model.safetensors": weights[:-1] + b"\1",
        "state-2/model.safetensors": weights + b"\1",
        "state-1/config.json": config.replace(b"relu", b"gelu"),
        "config.json": config.replace(b"relu", b"gelu"),
        "state-4/model.safetensors": None,
    }.items():
        repo = hub.repo("me/t")
        good = repo.refs["refs/heads/main"]
        if content is None:
            tree = {path: entry for path, entry in repo.commits[good].tree.items() if path != name}
            repo.commit("refs/heads/main", tree, "taken away")
        else:
            hub.add("me/t", {name: content})

        def open_and_load() -> None:
            WeightTrajectory.from_hub("me/t").load_model(1)

        for read in (open_and_load, lambda: pull("me/t", tmp_path / "pulled")):
            failing(TrajectoryError, f"{name} is (missing|not the file that was recorded)", read)
        assert not (tmp_path / "pulled").exists()
        repo.refs["refs/heads/main"] = good


def test_what_does_not_belong_there_is_not_pulled(hub: LoopbackHub, enhanced: Path, tmp_path: Path) -> None:
    odd = {"pytorch_model.bin": b"pickle", ".hidden.json": b"{}", "a/../../outside.json": b"{}", "run.sh": b"rm"}
    hub.create("me/x", contents(enhanced) | odd)
    assert contents(pull_checkpoint("me/x", tmp_path / "deep" / "pulled")) == contents(enhanced)
    assert not list(tmp_path.rglob("*outside*"))
    hub.create("me/y", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    failing(HubError, "holds no safetensors weights", lambda: pull("me/y", tmp_path / "y"))
    hub.create("me/z", contents(enhanced) | {"model.safetensors": b"garbage"})
    failing(ValueError, "read as safetensors", lambda: pull("me/z", tmp_path / "z"))
    failing(HubError, "there is no such repo.*log in", lambda: pull("me/none", tmp_path / "none"))
    failing(HubError, "no such branch, tag or commit", lambda: pull("me/x", tmp_path / "none", revision="none"))
    assert {path.name for path in tmp_path.iterdir()} - {"home"} == {"deep"}
