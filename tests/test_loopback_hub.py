"""The loopback Hub answers huggingface_hub's real client as the real Hub does."""

from pathlib import Path

import pytest
from doubles.loopback_hub import READ_TOKEN, TOKEN, LoopbackHub, hub
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

__all__ = ["hub"]

# huggingface_hub sends large files in a way that httpx deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 400, "nested/note.txt": b"a note\n"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_round_trip(hub: LoopbackHub, folder: Path, tmp_path: Path, repo_type: str) -> None:
    api = HfApi()
    api.create_repo("me/x", repo_type=repo_type, private=True)
    commit = api.upload_folder(repo_id="me/x", folder_path=folder, repo_type=repo_type)
    assert hub.repo("me/x", repo_type).files() == FILES
    info = api.repo_info("me/x", repo_type=repo_type)
    assert (info.sha, info.private) == (commit.oid, True)
    assert api.upload_folder(repo_id="me/x", folder_path=folder, repo_type=repo_type).oid == commit.oid
    assert len(hub.matching("PUT")) == 1
    pulled = Path(snapshot_download("me/x", repo_type=repo_type, local_dir=tmp_path / "pulled"))
    assert {name: (pulled / name).read_bytes() for name in FILES} == FILES
    assert all(request.has_token != request.on_cdn for request in hub.requests if "me/x" in request.path)


def test_hashes(hub: LoopbackHub) -> None:
    hub.create("me/x", FILES)
    entries = {entry.path: entry for entry in HfApi().list_repo_tree("me/x", recursive=True)}
    assert entries["model.safetensors"].lfs.sha256 == hub.repo("me/x").resolve("main").tree["model.safetensors"].sha256
    assert entries["config.json"].blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # git hash-object


def test_refused_requests(hub: LoopbackHub, folder: Path) -> None:
    hub.create("me/x", FILES)
    hub.create("other/x")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/x", "none.json")
    for repo_id, token in (("me/x", READ_TOKEN), ("other/x", TOKEN)):
        with pytest.raises(HfHubHTTPError, match="403"):
            HfApi().upload_folder(repo_id=repo_id, folder_path=folder, token=token)
