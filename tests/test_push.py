"""Pushes to the loopback Hub: what arrives, what is refused before any work, and faults on the way."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_resnet
from doubles.hub_fixtures import COMMIT, contents, raises
from doubles.loopback_hub import FOREIGN_TOKEN, READ_TOKEN, TOKEN, LoopbackHub
from doubles.old_paths import record_path
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from know_hf import KNOWNConfig, KNOWNModel, WeightTrajectory, predict_overflowed_weights
from know_hf.checkpoint import CheckpointError, atomic_folder
from know_hf.cli import main
from know_hf.hub import HubError, check_push, pull, push, push_checkpoint, push_known, push_trajectory
from know_hf.prediction import REFERENCE, SHIPPED_KNOWN, Gate
from know_hf.trajectory import TrajectoryError

pytestmark = pytest.mark.usefixtures("no_sleep", "no_token_shown")

RESNET = "ResNetForImageClassification"

# Checkpoints


def test_push_again_sends_nothing(hub: LoopbackHub, enhanced: Path) -> None:
    url = push(enhanced, "me/x", private=True, commit_message="Better weights")
    repo = hub.repo("me/x")
    assert repo.private and repo.titles() == ["Better weights", "initial commit"]
    assert url == f"{hub.url}/me/x/commit/{repo.refs['refs/heads/main']}" and repo.files() == contents(enhanced)
    sent = hub.received("PUT|commit")
    assert push(enhanced, "x") == url, "the namespace defaults to the owner of the token"
    assert hub.received("PUT|commit") == sent and len(repo.titles()) == 2


def test_revisions_and_pull_requests(hub: LoopbackHub, enhanced: Path, tmp_path: Path) -> None:
    repo = hub.create("me/x", {"README.md": b"mine"})
    push(enhanced, "me/x", revision="better")
    push(enhanced, "me/new", revision="better")
    assert repo.files("better") == hub.repo("me/new").files("better") == contents(enhanced)
    assert push(enhanced, "me/x", create_pr=True, token=FOREIGN_TOKEN) == f"{hub.url}/me/x/discussions/1"
    assert repo.files("refs/pr/1") == contents(enhanced) and repo.files() == {"README.md": b"mine"}
    hub.fail(COMMIT, times=3, status=500)
    with raises(HfHubHTTPError, "refs/pr/2"):
        push(enhanced, "me/x", create_pr=True)
    assert repo.files("refs/pr/2") == repo.files()
    push(enhanced, "me/x", revision="refs/pr/2")
    assert repo.files("refs/pr/2") == contents(enhanced) and len(repo.discussions) == 2
    assert contents(pull("me/x", tmp_path / "pulled", revision="better")) == contents(enhanced)


def test_old_shards_are_deleted(hub: LoopbackHub, enhanced: Path) -> None:
    other = {"config.json": (enhanced / "config.json").read_bytes(), "notes.txt": b"", "logs.safetensors": b""}
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    repo = hub.create("me/x", other | dict.fromkeys(shards, b"old"))
    push(enhanced, "me/x")
    assert repo.files().keys() == contents(enhanced).keys() | {"notes.txt", "logs.safetensors"}
    assert len(repo.titles()) == 3


def test_incomplete_or_other_folders_are_refused(hub: LoopbackHub, enhanced: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(enhanced, tmp_path / "folder")
    for name in ("pytorch_model.bin", "sub/optimizer.pt", ".cache/x.json", "model.safetensors.partial", "a.pkl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
        with raises(ValueError, name):
            push(folder, "me/x")
        (folder / name).unlink()
    (folder / "model.safetensors").write_bytes((enhanced / "model.safetensors").read_bytes()[:-1])
    with raises(CheckpointError, "model.safetensors"):
        push_checkpoint(folder, "me/x")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with raises(CheckpointError, "model-00001-of-00002.safetensors"):
        push_checkpoint(folder, "me/x")
    (folder / "config.json").write_text("{")
    with raises(ValueError, "config.json"):
        push(folder, "me/x")
    with raises(FileNotFoundError, "model.safetensors"):
        push(tmp_path, "me/x")
    with raises(ValueError, "KNOWN"):
        push_known(enhanced, "me/x")
    with raises(TrajectoryError, "no complete state"):
        push_trajectory(WeightTrajectory.create(tmp_path / "empty"), "me/t")
    assert not hub.requests


def test_predictions_are_pushed(hub: LoopbackHub, recorded: Path, tmp_path: Path) -> None:
    hub.create("me/bert", {"config.json": b'{"architectures": ["BertModel"]}'})
    folder = tmp_path / "enhanced"
    predict = partial(predict_overflowed_weights, recorded, output_dir=folder)
    with raises(HubError, "BertModel"):
        predict(push_to_hub="me/bert")
    assert not folder.exists()
    result = predict(push_to_hub="me/x", private=True)
    assert hub.repo("me/x").files() == contents(folder) and hub.repo("me/x").private
    assert result.url == f"{hub.url}/me/x/commit/{hub.repo('me/x').refs['refs/heads/main']}"
    hub.fail(COMMIT, times=3, status=500)
    with raises(HfHubHTTPError, f"know-hf push {folder} me/y"):
        predict(steps=2, overwrite=True, push_to_hub="me/y")
    assert hub.repo("me/y").files() == {} and push(folder, "me/y")
    gate = Gate(lambda model: [1.0 + number / 100 for number in range(12)])  # all models are equally good
    result = predict_overflowed_weights(recorded, output_dir=tmp_path / "gated", gate=gate, push_to_hub="me/gated")
    assert result.gate is not None and result.gate.is_reference
    files = hub.repo("me/gated").files()
    assert files == contents(tmp_path / "gated") and REFERENCE in files["README.md"].decode()
    assert result.url == f"{hub.url}/me/gated/commit/{hub.repo('me/gated').refs['refs/heads/main']}"


def test_command_line(hub: LoopbackHub, enhanced: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert main(["push", str(enhanced), "me/x", "--private", "--create-pr"]) == 1
    error = capfd.readouterr().err
    assert "know-hf push:" in error and "404" in error and "Could not read me/x" in error, "the notes are printed"
    assert main(["push", str(enhanced), "me/x", "--private", "--message", "Better weights"]) == 0
    assert f"{hub.url}/me/x/commit/" in capfd.readouterr().out
    assert hub.repo("me/x").private and hub.repo("me/x").titles()[0] == "Better weights"
    assert main(["pull", "me/x", "--output-dir", str(tmp_path / "pulled")]) == 0
    assert contents(tmp_path / "pulled") == contents(enhanced)
    assert main(["pull", "me/x", "--output-dir", str(tmp_path / "pulled")]) == 1
    assert "not an empty folder" in capfd.readouterr().err


# Trajectories


@pytest.fixture
def sharing(record_states: Callable[..., WeightTrajectory]) -> WeightTrajectory:
    """Three states of which the later ones refer to tensors of the first."""
    model = make_resnet()
    model.resnet.embedder.requires_grad_(False)
    trajectory = record_states(model, 3, name="sharing")
    assert trajectory.states[2].unchanged
    return trajectory


def test_trajectory(hub: LoopbackHub, sharing: WeightTrajectory, tmp_path: Path) -> None:
    url = push(sharing.path, "me/t", commit_message="Forgetting")
    repo = hub.repo("me/t")
    states = [f"Forgetting: state {index}" for index in range(3)]
    assert repo.titles() == ["Forgetting", *reversed(states), "initial commit"] and repo.refs["refs/heads/main"] in url
    assert b"me/t" in repo.files()["README.md"]
    pulled = WeightTrajectory(pull("me/t", tmp_path / "pulled"))
    assert contents(pulled.path) == contents(sharing.path) | {"README.md": repo.files()["README.md"]}
    remote = WeightTrajectory.from_hub("me/t")
    remote.verify()
    expected = sharing.load_model(2).state_dict()
    for trajectory in (pulled, remote):
        assert [state.unchanged for state in trajectory.states] == [state.unchanged for state in sharing.states]
        for name, weight in trajectory.load_model(2).state_dict().items():
            assert torch.equal(weight, expected[name])
        trajectory.load_into(model := make_resnet(seed=7), 1)
        assert torch.equal(model.classifier[1].weight, sharing.tensor("classifier.1.weight", 1))
    with raises(TrajectoryError, "pull"):
        push_trajectory(remote, "me/copy")


def test_other_trajectory_is_replaced(hub: LoopbackHub, recorded: Path, sharing: WeightTrajectory) -> None:
    push(recorded, "me/t")
    hub.fail(COMMIT, before=lambda: None)
    hub.fail(COMMIT, times=3, status=503)
    with raises(HfHubHTTPError, "Run it again"):
        push(sharing.path, "me/t")
    with raises(TrajectoryError, "push was not finished"):
        WeightTrajectory.from_hub("me/t")
    push(sharing.path, "me/t")
    assert {name for name in hub.repo("me/t").files() if name.startswith("state-")} == {
        record.path for state in sharing.states for record in state.files
    }
    WeightTrajectory.from_hub("me/t").verify()


def test_new_metrics_replace_the_manifest_in_one_commit(hub: LoopbackHub, trajectory_copy: Path) -> None:
    push(trajectory_copy, "me/t")
    WeightTrajectory(trajectory_copy).update_metrics(0, {"accuracy": 0.5})
    push(trajectory_copy, "me/t")
    assert len(hub.repo("me/t").titles()) == 9
    assert WeightTrajectory.from_hub("me/t").states[0].metrics["accuracy"] == 0.5


def test_interrupted_push_of_a_trajectory_resumes(hub: LoopbackHub, recorded: Path, tmp_path: Path) -> None:
    hub.fail("PUT /lfs", times=2, before=lambda: None)
    hub.fail("PUT /lfs", times=1000, cut=1000)
    with raises(ConnectionError, "state 2"):
        push(recorded, "me/t")
    hub.faults.clear()
    assert {name[:7] for name in hub.repo("me/t").files()} == {"state-0", "state-1"}
    with raises(TrajectoryError, "push was not finished"):
        pull("me/t", tmp_path / "pulled")
    before = len(hub.requests)
    push(recorded, "me/t")
    sent = [r.path.removeprefix("/lfs/") for r in hub.requests[before:] if r.method == "PUT"]
    tree = hub.repo("me/t").resolve("main").tree
    assert sent == [tree[f"state-{index}/model.safetensors"].sha256 for index in (2, 3, 4)] + [
        tree["start/model.safetensors"].sha256
    ]
    WeightTrajectory(pull("me/t", tmp_path / "pulled")).verify()


@pytest.fixture
def adapters(record_states: Callable[..., WeightTrajectory]) -> WeightTrajectory:
    config = LoraConfig(target_modules=["convolution"], r=2, modules_to_save=["classifier"])
    return record_states(get_peft_model(make_resnet(), config), 5)


def test_adapters(hub: LoopbackHub, adapters: WeightTrajectory, tmp_path: Path) -> None:
    predict_overflowed_weights(adapters, output_dir=tmp_path / "enhanced")
    push(adapters.path, "me/t")
    push(tmp_path / "enhanced", "me/lora")
    assert contents(pull("me/lora", tmp_path / "pulled")) == contents(tmp_path / "enhanced")
    with raises(HubError, "adapter"):
        push(adapters.path, "me/lora")
    remote = WeightTrajectory.from_hub("me/t")
    assert remote.is_adapter and torch.equal(remote.history(remote.names[0]), adapters.history(remote.names[0]))
    loaded = remote.load_model(1, base_model=make_resnet()).state_dict()
    for name, weight in adapters.load_model(1, base_model=make_resnet()).state_dict().items():
        assert torch.equal(loaded[name], weight)


def test_plain_modules(hub: LoopbackHub, record_states: Callable[..., WeightTrajectory]) -> None:
    plain = record_states(torch.nn.Linear(3, 2), 2, name="plain")
    push(plain.path, "me/plain")
    remote = WeightTrajectory.from_hub("me/plain")
    remote.load_into(module := torch.nn.Linear(3, 2), 1)
    assert torch.equal(module.weight, plain.tensor("weight", 1)) and remote.model_files == []


def test_local_paths_are_not_pushed(hub: LoopbackHub, adapters: WeightTrajectory, tmp_path: Path) -> None:
    record_path(adapters.path, "/home/secretuser/resnet")
    adapters = WeightTrajectory(adapters.path)
    before = contents(adapters.path)
    push(adapters.path, "me/t")
    predict_overflowed_weights(adapters, output_dir=tmp_path / "enhanced")
    written = tmp_path / "enhanced" / "adapter_config.json"
    written.write_text(written.read_text().replace('"base_model_name_or_path": null', '"x_path": "/secretuser/a"'))
    push(tmp_path / "enhanced", "me/lora")
    for repo_id in ("me/t", "me/lora"):
        assert not [name for name, content in hub.repo(repo_id).files().items() if b"secretuser" in content]
    assert contents(adapters.path) == before
    sent = hub.received("PUT|commit")
    push(adapters.path, "me/t")
    assert hub.received("PUT|commit") == sent
    pulled = WeightTrajectory(pull("me/t", tmp_path / "pulled"))
    pulled.verify()
    assert pulled.base_model == ".../resnet" and pulled.states[0].training == {"output": ".../resnet"}
    assert torch.equal(pulled.history(pulled.names[0]), adapters.history(pulled.names[0]))


def test_a_recording_goes_on_during_a_push(hub: LoopbackHub, trajectory_copy: Path) -> None:
    before = (trajectory_copy / "trajectory.json").read_bytes()

    def record() -> None:
        WeightTrajectory(trajectory_copy).update_metrics(0, {"accuracy": 0.5})

    hub.fail(COMMIT, before=record)
    push(trajectory_copy, "me/t")
    assert hub.repo("me/t").files()["trajectory.json"] == before
    WeightTrajectory.from_hub("me/t").verify()


def test_a_folder_is_not_replaced_during_a_push(hub: LoopbackHub, recorded: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    predict = partial(predict_overflowed_weights, recorded, output_dir=target, card=False, overwrite=True)
    predict()
    before, refused = contents(target), []

    def replace() -> None:
        with pytest.raises(BlockingIOError, match="out"):
            predict()
        refused.append(True)

    hub.fail(COMMIT, before=replace)
    push(target, "me/x")
    assert refused and hub.repo("me/x").files().items() >= before.items()
    predict()
    with atomic_folder(target, overwrite=True), raises(BlockingIOError, "out"):
        push(target, "me/x")


# KNOWN weights


def test_known(hub: LoopbackHub, tmp_path: Path) -> None:
    push(SHIPPED_KNOWN, "me/known")
    files = hub.repo("me/known").files()
    described = {"README.md", "comparisons.json", "config.json", "results.json"}
    code = {"combination_network.py", "configuration_known.py", "modeling_known.py"}
    assert files.keys() == described | code | {"model.safetensors"}
    assert b"| known-step-1 |" in files["README.md"], "the card has the comparisons"
    assert files["model.safetensors"] == (SHIPPED_KNOWN / "model.safetensors").read_bytes()
    history, expected = torch.randn(10, 5), KNOWNModel.from_pretrained(SHIPPED_KNOWN)
    for loaded in (KNOWNModel.from_pretrained("me/known"), AutoModel.from_pretrained("me/known")):
        assert type(loaded) is KNOWNModel
        assert torch.equal(loaded(history, "fc").residual, expected(history, "fc").residual)
    folder = pull("me/known", tmp_path / "pulled")
    assert contents(folder) == files
    push_known(KNOWNModel(KNOWNConfig(variant="combination")), "me/combination")
    program = (
        "import sys; from transformers import AutoModel\n"
        "for folder in sys.argv[1:]: AutoModel.from_pretrained(folder, trust_remote_code=True)\n"
        "assert 'know_hf' not in sys.modules"
    )
    folders = [str(folder), str(pull("me/combination", tmp_path / "combination"))]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", program, *folders], env=environment, check=True)
    (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000003" / "random_states_0.pkl").write_bytes(b"pickled")
    (folder / "trainer_state.json").write_text("{}")
    push(folder, "me/again")
    push_known(expected, "third")
    third = hub.repo("me/third").files()
    assert hub.repo("me/again").files() == files, "without the checkpoints of the training"
    assert third["model.safetensors"] == files["model.safetensors"]
    assert b'from_pretrained("me/third")' in third["README.md"]
    (folder / "model.safetensors").write_bytes(b"damaged")
    with raises(CheckpointError, f"{folder}/model.safetensors"):
        push(folder, "me/damaged")


# Checks before any work


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"repo_id": "me/x/y"}, ValueError, "me/x/y"),
        ({"token": TOKEN + "\n"}, ValueError, "token"),
        ({"token": "", "repo_id": "me/new"}, ValueError, "token"),
        ({"token": "hf_unknown"}, HfHubHTTPError, "Invalid user token"),
        ({"token": READ_TOKEN}, HfHubHTTPError, "No write access to me/x.*create_pr"),
        ({"token": FOREIGN_TOKEN}, HfHubHTTPError, "403"),
        ({"repo_id": "me/new", "create_pr": True}, RepositoryNotFoundError, "me/new"),
        ({"architecture": "BertModel"}, HubError, f"{RESNET}, not BertModel"),
        ({"kind": "trajectory"}, HubError, "checkpoint, not trajectory"),
        ({"repo_id": "me/t"}, HubError, "trajectory, not checkpoint"),
        ({"repo_id": "me/lora"}, HubError, "adapter, not checkpoint"),
        ({"private": True}, HubError, "public, not private"),
        ({"revision": "main", "create_pr": True}, ValueError, "create_pr"),
        ({"revision": "0" * 40}, ValueError, "branch"),
        ({"revision": "refs/heads/x"}, ValueError, "branch"),
        ({"revision": "refs/pr/3"}, RevisionNotFoundError, "refs/pr/3"),
    ],
)
def test_refused_pushes(
    hub: LoopbackHub, enhanced: Path, arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    hub.create("me/x", {"config.json": (enhanced / "config.json").read_bytes()})
    hub.create("me/t", {"state-0/config.json": b"{}"})
    hub.create("me/lora", {"adapter_config.json": b"{}"})
    with raises(error, match):
        check_push(**{"repo_id": "me/x", **arguments})
    assert {request.method for request in hub.requests} <= {"GET", "HEAD"}


def test_accepted_pushes(hub: LoopbackHub, enhanced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create("me/x", {"config.json": (enhanced / "config.json").read_bytes()}, private=True)
    hub.create("other/x", {"config.json": b"[]"})
    assert check_push("x", architecture=RESNET, private=True, revision="new") == "me/x"
    assert check_push("new", kind="trajectory") == "me/new"
    assert check_push("other/x", architecture=RESNET, create_pr=True) == "other/x"
    assert {request.method for request in hub.requests} <= {"GET", "HEAD"}
    monkeypatch.delenv("HF_TOKEN")
    with raises(LocalTokenNotFoundError, "hf auth login"):
        check_push("me/x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with raises(OfflineModeIsEnabled):
        check_push("me/x", token=TOKEN)


# Faults


FAULTS = {
    "upload cut": ("PUT /lfs", {"cut": 1000}),
    "commit answered 500": (COMMIT, {"status": 500}),
    "commit answered 409": (COMMIT, {"status": 409}),
    "commit cut": (COMMIT, {"cut": 10}),
    "card cut": ("POST .*/validate-yaml", {"cut": 10}),
    "whoami answered 500": ("GET .*/whoami", {"status": 500}),
    "whoami answered HTML": ("GET .*/whoami", {"tamper": lambda content: b"<html>"}),
    "create answered 500": ("POST .*/repos/create", {"status": 500}),
    "listing answered 504": ("GET .*/tree/", {"status": 504}),
    "answer to commit lost": (COMMIT, {"lose_answer": True}),
    "token revoked": (COMMIT, {"status": 401, "message": "Invalid credentials in Authorization header"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_during_a_push(hub: LoopbackHub, enhanced: Path, fault: str) -> None:
    pattern, options = FAULTS[fault]
    if fault != "token revoked":
        switched_on = hub.fail(pattern, **options)
        push(enhanced, "me/once", commit_message="Mine")
        assert switched_on.times == 0
        assert hub.repo("me/once").files() == contents(enhanced)
        assert hub.repo("me/once").titles() == ["Mine", "initial commit"]
    if fault != "answer to commit lost":
        hub.large_files.clear()
        hub.fail(pattern, times=1000, **options)
        error = json.JSONDecodeError if "HTML" in fault else ConnectionError if "cut" in fault else HfHubHTTPError
        with raises(error, r"Run it again|run it again|Log in"):
            push(enhanced, "me/never")
        assert ("model", "me/never") not in hub.repos or hub.repo("me/never").files() == {}


def test_pushes_that_the_server_refuses(hub: LoopbackHub, enhanced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with raises(HfHubHTTPError, "403.*|Could not create other/new"):
        push(enhanced, "other/new")
    assert not hub.repos and not hub.matching("PUT")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with raises(ConnectionError, "xet-write-token"):
        push(enhanced, "me/x")
    assert hub.repo("me/x").files() == {}


def test_commit_of_someone_else_in_between(hub: LoopbackHub, enhanced: Path) -> None:
    repo = hub.create("me/x")
    hub.fail(COMMIT, before=lambda: hub.add("me/x", {"notes.txt": b"first"}))
    push(enhanced, "me/x", commit_message="Mine")
    assert repo.files() == contents(enhanced) | {"notes.txt": b"first"}
    assert repo.titles() == ["Mine", "by a test", "initial commit"]
    other = hub.create("me/y")
    hub.fail(COMMIT, before=lambda: hub.add("me/y", {"config.json": b'{"architectures": ["BertModel"]}'}))
    with raises(HubError, f"BertModel, not {RESNET}"):
        push(enhanced, "me/y")
    assert other.titles() == ["by a test", "initial commit"]
    hub.fail(COMMIT, times=3, before=lambda: hub.add("me/z", {"notes.txt": str(len(hub.requests)).encode()}))
    with raises(HfHubHTTPError, "Run it again"):
        push(enhanced, "me/z")
    assert hub.repo("me/z").files().keys() == {"notes.txt"}


@pytest.mark.parametrize("change", ["another trajectory", "a file of a state"])
def test_a_trajectory_is_never_mixed_with_another(
    hub: LoopbackHub, recorded: Path, sharing: WeightTrajectory, tmp_path: Path, change: str
) -> None:
    files = contents(sharing.path) if change == "another trajectory" else {"state-1/config.json": b"{}"}
    hub.fail(COMMIT, times=3 if change == "another trajectory" else 6, before=lambda: None)
    hub.fail(COMMIT, before=lambda: hub.add("me/t", files))
    with raises(HubError, "state . of me/t was changed .* push again"):
        push(recorded, "me/t")
    with raises(TrajectoryError, "push was not finished"):
        pull("me/t", tmp_path / "pulled")
    push(recorded, "me/t")
    WeightTrajectory(pull("me/t", tmp_path / "pulled")).verify()


def test_nothing_private_is_sent_to_a_repo_that_became_public(hub: LoopbackHub, enhanced: Path) -> None:
    hub.fail("POST .*/repos/create", before=lambda: hub.create("me/x"))
    with raises(HubError, "me/x is public, not private"):
        push(enhanced, "me/x", private=True)
    assert hub.repo("me/x").files() == {} and not hub.matching("PUT")


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        push(tmp_path / "nowhere", "me/x")


def test_the_repo_id_is_checked_before_the_token(trajectory):
    with pytest.raises(ValueError, match="bad id!"):
        push(trajectory.path, "bad id!")
