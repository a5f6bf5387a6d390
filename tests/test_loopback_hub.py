"""The Hub of the tests answers huggingface_hub's real client as the real one does."""

import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_hub import FOREIGN_TOKEN, READ_TOKEN, TOKEN, LoopbackHub, hub

__all__ = ["hub"]

# huggingface_hub sends large files in a way that httpx wants otherwise
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 400, "nested/note.txt": b"a note\n"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds the client would have slept before it tried again."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_folder_comes_back_as_it_went(hub: LoopbackHub, folder: Path, tmp_path: Path, repo_type: str) -> None:
    api = HfApi()
    url = api.create_repo("me/x", repo_type=repo_type, private=True)
    commit = api.upload_folder(repo_id="me/x", folder_path=folder, repo_type=repo_type)
    assert url.repo_id == "me/x" and url.repo_type == repo_type
    assert hub.repo("me/x", repo_type).files() == FILES
    info = api.repo_info("me/x", repo_type=repo_type, files_metadata=True)
    assert (info.sha, info.private) == (commit.oid, True)
    assert {s.rfilename: s.size for s in info.siblings} == {".gitattributes": 216} | {
        n: len(c) for n, c in FILES.items()
    }
    pulled = Path(snapshot_download("me/x", repo_type=repo_type, local_dir=tmp_path / "pulled"))
    assert {name: (pulled / name).read_bytes() for name in FILES} == FILES
    assert all(r.has_token for r in hub.requests if "me/x" in r.path)
    assert not any(r.has_token for r in hub.requests if r.on_cdn)
    assert {r.path.split("/")[1] for r in hub.requests if r.on_cdn} == {"lfs"}


def test_same_folder_again_sends_and_commits_nothing(hub: LoopbackHub, folder: Path) -> None:
    api = HfApi()
    api.create_repo("me/x")
    first = api.upload_folder(repo_id="me/x", folder_path=folder)
    puts = hub.count("PUT")
    assert api.upload_folder(repo_id="me/x", folder_path=folder).oid == first.oid
    assert (puts, hub.count("PUT")) == (1, 1)
    assert len(hub.repo("me/x").titles()) == 2


def test_ranges_and_hashes(hub: LoopbackHub) -> None:
    hub.create("me/x", FILES)
    content = FILES["model.safetensors"]
    with HfFileSystem(token=TOKEN, skip_instance_cache=True).open("me/x/model.safetensors", cache_type="none") as file:
        file.seek(1000)
        assert file.read(2000) == content[1000:3000]
    assert [r.range for r in hub.requests if r.on_cdn] == ["bytes=1000-2999"]
    assert hub.sent("GET /lfs") == 2000
    entries = {entry.path: entry for entry in HfApi().list_repo_tree("me/x", recursive=True)}
    assert entries["model.safetensors"].lfs.sha256 == hub.repo("me/x").resolve("main").tree["model.safetensors"].sha256
    assert entries["config.json"].blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # git hash-object
    assert {info.path for info in HfApi().get_paths_info("me/x", ["config.json", "nested"])} == {
        "config.json",
        "nested",
    }


def test_branches_tags_and_pull_requests(hub: LoopbackHub, folder: Path) -> None:
    api, repo = HfApi(), hub.create("me/x", {"config.json": b"old"})
    api.create_branch("me/x", branch="b")
    api.create_tag("me/x", tag="v1")
    api.upload_folder(repo_id="me/x", folder_path=folder, revision="b")
    assert (repo.files("b"), repo.files("main"), repo.files("v1")) == (FILES, {"config.json": b"old"}, repo.files())
    opened = api.upload_folder(repo_id="me/x", folder_path=folder, create_pr=True, token=FOREIGN_TOKEN)
    assert opened.pr_url == f"{hub.url}/me/x/discussions/1" and opened.pr_revision == "refs/pr/1"
    assert repo.files("refs/pr/1") == FILES
    second = api.create_pull_request("me/x", title="later")
    api.upload_folder(repo_id="me/x", folder_path=folder, revision=second.git_reference)
    assert repo.files("refs/pr/2") == FILES and repo.files() == {"config.json": b"old"}
    refs = api.list_repo_refs("me/x", include_pull_requests=True)
    assert [b.name for b in refs.branches] == ["main", "b"] and len(refs.tags) == 1 and len(refs.pull_requests) == 2
    api.delete_repo("me/x")
    assert not api.repo_exists("me/x")


def test_what_is_not_there_or_not_allowed(hub: LoopbackHub, folder: Path) -> None:
    hub.create("me/x", FILES, private=True)
    hub.create("other/x")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("me/x", "config.json", token=FOREIGN_TOKEN)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("me/x", "config.json", revision="none")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/x", "none.json")
    for repo_id, token, words in (("me/x", READ_TOKEN, "write token"), ("other/x", TOKEN, "don't have the rights")):
        with pytest.raises(HfHubHTTPError, match=words):
            HfApi().upload_folder(repo_id=repo_id, folder_path=folder, token=token)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi().whoami(token="hf_unknown")
    assert [HfApi().whoami(token=token)["auth"]["accessToken"]["role"] for token in (TOKEN, READ_TOKEN)] == [
        "write",
        "read",
    ]


def test_faults_strike_as_often_as_told(hub: LoopbackHub, folder: Path, waits: list[float]) -> None:
    api, repo = HfApi(), hub.create("me/x")
    hub.fail("PUT /lfs", cut=1000)
    hub.fail("preupload", status=503)
    hub.fail("objects/batch", status=429, headers={"Retry-After": "7"})
    api.upload_folder(repo_id="me/x", folder_path=folder)
    assert repo.files() == FILES
    assert sorted(waits) == [1, 1, 8]
    assert [r.received for r in hub.requests if r.method == "PUT"] == [1000, 102400]

    hub.fail("GET /lfs", cut=700, reset=False)
    path = Path(hf_hub_download("me/x", "model.safetensors"))
    assert path.read_bytes() == FILES["model.safetensors"]
    assert [r.sent for r in hub.requests if r.method == "GET" and r.on_cdn] == [700, 102400]

    hub.fail("GET /lfs", cut=700)
    with pytest.raises(Exception, match="reset by peer"):
        hf_hub_download("me/x", "model.safetensors", force_download=True)

    hub.fail("GET .*config.json", tamper=lambda content: b"[]")
    assert Path(hf_hub_download("me/x", "config.json")).read_bytes() == b"[]"
    assert [fault.times for fault in hub.faults] == [0] * 6


def test_commits_on_a_stale_parent_and_lost_answers(hub: LoopbackHub, folder: Path) -> None:
    api, repo = HfApi(), hub.create("me/x", {"config.json": b"old"})
    parent = repo.refs["refs/heads/main"]
    hub.fail("POST .*/commit/", before=lambda: hub.add("me/x", {"other.txt": b"first"}))
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_folder(repo_id="me/x", folder_path=folder, parent_commit=parent)
    assert repo.files() == {"config.json": b"old", "other.txt": b"first"}
    hub.fail("POST .*/commit/", lose_answer=True)
    with pytest.raises(Exception, match=r"disconnected|reset"):
        api.upload_folder(repo_id="me/x", folder_path=folder)
    assert repo.files() == {**FILES, "other.txt": b"first"}


def test_xet_is_not_spoken(hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With xet on, downloads still go over HTTP; uploads end in an error and commit no large file."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    repo = hub.create("me/x", FILES)
    assert Path(hf_hub_download("me/x", "model.safetensors")).read_bytes() == FILES["model.safetensors"]
    (folder / "model.safetensors").write_bytes(b"new")
    with pytest.raises(Exception, match="xet-write-token"):
        HfApi().upload_folder(repo_id="me/x", folder_path=folder)
    assert repo.files() == FILES
