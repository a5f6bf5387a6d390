"""Checkpoints, trajectories and KNOWN weights pushed to a Hub on loopback and pulled from it."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_resnet
from hub_fixtures import COMMIT, contents, enhanced, failing, no_token_shown, stored, waits, without_card
from loopback_hub import FOREIGN_TOKEN, TOKEN, LoopbackHub, environment, hub
from safetensors.torch import load_file
from transformers import AutoModel

from know_hf import KNOWNModel, WeightTrajectory, predict_overflowed_weights
from know_hf.checkpoint import CheckpointError
from know_hf.cli import main
from know_hf.hub import HubError, pull, pull_trajectory, push, push_known
from know_hf.prediction import REFERENCE, SHIPPED_KNOWN, Gate
from know_hf.trajectory import TrajectoryError

__all__ = ["enhanced", "hub", "no_token_shown", "waits"]

# huggingface_hub sends large files in a way that httpx wants otherwise
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

# Whole and back


def test_checkpoint_comes_back_as_it_went(hub: LoopbackHub, enhanced: Path, tmp_path: Path) -> None:
    url = push(enhanced, "me/x", private=True, commit_message="What I made")
    repo = hub.repo("me/x")
    assert repo.private and repo.titles() == ["What I made", "initial commit"]
    assert url == f"{hub.url}/me/x/commit/{repo.refs['refs/heads/main']}"
    assert pull("me/x", tmp_path / "pulled") == tmp_path / "pulled"
    assert contents(tmp_path / "pulled") == contents(enhanced)
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["pulled"]


def test_pushing_again_sends_and_commits_nothing(hub: LoopbackHub, enhanced: Path) -> None:
    first = push(enhanced, "me/x")
    sent = hub.received("PUT|commit")
    assert push(enhanced, "x") == first  # the namespace is the token's
    assert hub.received("PUT|commit") == sent and len(hub.repo("me/x").titles()) == 2


def test_revisions_and_pull_requests(hub: LoopbackHub, enhanced: Path, tmp_path: Path) -> None:
    repo = hub.create("me/x", {"README.md": b"mine"})
    push(enhanced, "me/x", revision="better")
    assert repo.files("better") == contents(enhanced) and repo.files() == {"README.md": b"mine"}
    assert push(enhanced, "me/x", create_pr=True, token=FOREIGN_TOKEN) == f"{hub.url}/me/x/discussions/1"
    assert repo.files("refs/pr/1") == contents(enhanced) and repo.files() == {"README.md": b"mine"}
    hub.fail(COMMIT, times=3, status=500)
    failing(HubError, "give revision='refs/pr/2' and not create_pr", lambda: push(enhanced, "me/x", create_pr=True))
    assert repo.files("refs/pr/2") == repo.files()
    push(enhanced, "me/x", revision="refs/pr/2")
    assert repo.files("refs/pr/2") == contents(enhanced) and len(repo.discussions) == 2
    assert contents(pull("me/x", tmp_path / "pulled", revision="better")) == contents(enhanced)


def test_old_shards_are_not_left_to_be_loaded(hub: LoopbackHub, enhanced: Path) -> None:
    old = {"config.json": (enhanced / "config.json").read_bytes(), "notes.txt": b"kept", "logs.safetensors": b"kept"}
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    repo = hub.create("me/x", old | dict.fromkeys(shards, b"old"))
    push(enhanced, "me/x")
    assert repo.files().keys() == contents(enhanced).keys() | {"notes.txt", "logs.safetensors"}
    assert len(repo.titles()) == 3


@pytest.fixture
def sharing(record_states: Callable[..., WeightTrajectory]) -> WeightTrajectory:
    """Three states of which the later ones refer to tensors of the first."""
    model = make_resnet()
    model.resnet.embedder.requires_grad_(False)
    trajectory = record_states(model, 3, name="sharing")
    assert trajectory.states[2].unchanged
    return trajectory


def test_trajectory_comes_back_as_it_went(hub: LoopbackHub, sharing: WeightTrajectory, tmp_path: Path) -> None:
    url = push(sharing.path, "me/t", commit_message="Forgetting")
    repo = hub.repo("me/t")
    states = [f"Forgetting: state {index}" for index in range(3)]
    assert repo.titles() == ["Forgetting", *reversed(states), "initial commit"] and repo.refs["refs/heads/main"] in url
    assert b"me/t" in repo.files()["README.md"]
    pulled = pull_trajectory("me/t", tmp_path / "pulled")
    ours = contents(sharing.path)
    del ours[".lock"]
    assert contents(pulled.path) == ours | {"README.md": repo.files()["README.md"]}
    remote = WeightTrajectory.from_hub("me/t")
    remote.verify()
    for trajectory in (pulled, remote):
        assert [state.unchanged for state in trajectory.states] == [state.unchanged for state in sharing.states]
        for name, weight in trajectory.load_model(2).state_dict().items():
            assert torch.equal(weight, sharing.load_model(2).state_dict()[name])
        model = make_resnet(seed=7)
        trajectory.load_into(model, 1)
        assert torch.equal(model.classifier[1].weight, sharing.tensor("classifier.1.weight", 1))


def test_reading_a_tensor_of_a_remote_trajectory_transfers_it_alone(hub: LoopbackHub, recorded: Path) -> None:
    stored(hub, recorded, "me/t")
    local, before = WeightTrajectory(recorded), hub.sent("GET /lfs")
    remote = WeightTrajectory.from_hub("me/t")
    assert remote.names == local.names and remote.shape("classifier.1.bias") == (4,)
    headers = hub.sent("GET /lfs") - before
    name = "resnet.encoder.stages.1.layers.0.layer.1.convolution.weight"
    assert torch.equal(remote.history(name), local.history(name))
    assert hub.sent("GET /lfs") - before - headers == 5 * 4 * local.shape(name).numel()
    assert torch.equal(remote.read_history(name, 3, 5), local.read_history(name, 3, 5))
    assert hub.sent("GET /lfs") - before - headers == 5 * 4 * (local.shape(name).numel() + 2)
    size = (recorded / "state-0" / "model.safetensors").stat().st_size
    assert headers < 5 * (size - 4 * 5400) and all(r.range for r in hub.requests if r.on_cdn)
    assert not any(r.has_token for r in hub.requests if r.on_cdn)


def test_remote_trajectory_is_of_one_commit(hub: LoopbackHub, recorded: Path, tmp_path: Path) -> None:
    stored(hub, recorded, "me/t")
    remote = WeightTrajectory.from_hub("me/t")
    hub.add("me/t", {"state-1/model.safetensors": b"other", "config.json": b"{}"})
    assert torch.equal(
        remote.tensor("classifier.1.bias", 1), WeightTrajectory(recorded).tensor("classifier.1.bias", 1)
    )
    again = WeightTrajectory.from_hub("me/t", revision=remote.repo.commit)
    assert repr(again) == repr(remote) and remote.repo.commit in repr(remote)
    result = predict_overflowed_weights(again, output_dir=tmp_path / "remote")
    predict_overflowed_weights(recorded, output_dir=tmp_path / "local")
    assert without_card(result.path) == without_card(tmp_path / "local")
    failing(TrajectoryError, "can't be recorded to; pull it", lambda: again.update_metrics(0, {"accuracy": 1}))


def test_another_trajectory_is_replaced_whole(hub: LoopbackHub, recorded: Path, sharing: WeightTrajectory) -> None:
    push(recorded, "me/t")
    repo = hub.repo("me/t")
    hub.fail(COMMIT, before=lambda: None)
    hub.fail(COMMIT, times=3, status=503)
    failing(HubError, "503.*run it again later", lambda: push(sharing.path, "me/t"))
    failing(TrajectoryError, "push was not finished", lambda: WeightTrajectory.from_hub("me/t"))
    push(sharing.path, "me/t")
    assert {name for name in repo.files() if name.startswith("state-")} == {
        record.path for state in sharing.states for record in state.files
    }
    WeightTrajectory.from_hub("me/t").verify()


def test_new_metrics_replace_the_manifest_in_one_step(hub: LoopbackHub, trajectory_copy: Path) -> None:
    push(trajectory_copy, "me/t")
    WeightTrajectory(trajectory_copy).update_metrics(0, {"accuracy": 0.5})
    push(trajectory_copy, "me/t")
    assert len(hub.repo("me/t").titles()) == 8
    assert WeightTrajectory.from_hub("me/t").states[0].metrics["accuracy"] == 0.5


def test_known_comes_back_and_loads(hub: LoopbackHub, tmp_path: Path) -> None:
    push(SHIPPED_KNOWN, "me/known")
    files = hub.repo("me/known").files()
    assert files.keys() == {
        "README.md",
        "comparisons.json",
        "config.json",
        "configuration_known.py",
        "model.safetensors",
        "modeling_known.py",
        "results.json",
    }
    assert b"| known-step-1 |" in files["README.md"], "what was compared stands in the card"
    assert files["model.safetensors"] == (SHIPPED_KNOWN / "model.safetensors").read_bytes()
    history, expected = torch.randn(10, 5), KNOWNModel.from_pretrained(SHIPPED_KNOWN)
    for loaded in (KNOWNModel.from_pretrained("me/known"), AutoModel.from_pretrained("me/known")):
        assert type(loaded) is KNOWNModel
        assert torch.equal(loaded(history, "fc").residual, expected(history, "fc").residual)
    assert contents(pull("me/known", tmp_path / "pulled")) == files
    push(tmp_path / "pulled", "me/again")
    push_known(expected, "third")  # the namespace is the token's
    assert hub.repo("me/again").files() == files
    assert hub.repo("me/third").files()["model.safetensors"] == files["model.safetensors"]
    assert b'from_pretrained("me/third")' in hub.repo("me/third").files()["README.md"]


def test_known_is_pushed_without_what_a_training_left_beside_it(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = tmp_path / "known-base"
    shutil.copytree(SHIPPED_KNOWN, folder)
    step = folder / "checkpoints" / "step-00000003"
    step.mkdir(parents=True)
    (step / "random_states_0.pkl").write_bytes(b"pickled")
    shutil.copy2(folder / "model.safetensors", step)
    push(folder, "me/trained")
    push(SHIPPED_KNOWN, "me/known")
    pushed, expected = hub.repo("me/trained").files(), hub.repo("me/known").files()
    assert pushed.pop("README.md") == expected.pop("README.md").replace(b"me/known", b"me/trained").replace(
        b"# known", b"# trained"
    )
    assert pushed == expected
    (folder / "model.safetensors").write_bytes(b"damaged")
    failing(CheckpointError, f"{folder}/model.safetensors", lambda: push(folder, "me/damaged"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_adapters_and_plain_modules(
    hub: LoopbackHub, record_states: Callable[..., WeightTrajectory], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["convolution"], r=2, modules_to_save=["classifier"])
    adapters = record_states(peft.get_peft_model(make_resnet(), config), 5)
    predict_overflowed_weights(adapters, output_dir=tmp_path / "enhanced")
    push(adapters.path, "me/t")
    push(tmp_path / "enhanced", "me/lora")
    assert contents(pull("me/lora", tmp_path / "pulled")) == contents(tmp_path / "enhanced")
    failing(HubError, "holds an adapter", lambda: push(adapters.path, "me/lora"))
    remote = WeightTrajectory.from_hub("me/t")
    assert remote.is_adapter and torch.equal(remote.history(remote.names[0]), adapters.history(remote.names[0]))
    loaded = remote.load_model(1, base_model=make_resnet()).state_dict()
    for name, weight in adapters.load_model(1, base_model=make_resnet()).state_dict().items():
        assert torch.equal(loaded[name], weight)

    plain = record_states(torch.nn.Linear(3, 2), 2, name="plain")
    push(plain.path, "me/plain")
    remote = WeightTrajectory.from_hub("me/plain")
    remote.load_into(module := torch.nn.Linear(3, 2), 1)
    assert torch.equal(module.weight, plain.tensor("weight", 1)) and remote.model_files == []


def test_prediction_is_pushed_as_it_was_written(hub: LoopbackHub, recorded: Path, tmp_path: Path) -> None:
    hub.create("me/bert", {"config.json": b'{"architectures": ["BertModel"]}'})
    folder = tmp_path / "enhanced"
    with_push = partial(predict_overflowed_weights, recorded, output_dir=folder)
    failing(HubError, "holds a BertModel", lambda: with_push(push_to_hub="me/bert"))
    assert not folder.exists()
    result = with_push(push_to_hub="me/x", private=True)
    assert hub.repo("me/x").files() == contents(folder) and hub.repo("me/x").private
    assert result.url == f"{hub.url}/me/x/commit/{hub.repo('me/x').refs['refs/heads/main']}"
    hub.fail(COMMIT, times=3, status=500)
    again = partial(with_push, steps=2, overwrite=True)
    failing(HubError, f"whole, in {folder}: push it with know-hf push", lambda: again(push_to_hub="me/y"))
    assert hub.repo("me/y").files() == {} and push(folder, "me/y")


def test_what_a_gate_chose_is_pushed_as_it_was_written(hub: LoopbackHub, recorded: Path, tmp_path: Path) -> None:
    gate = Gate(lambda model: [1.0 + number / 100 for number in range(12)])  # no model is better than another
    result = predict_overflowed_weights(recorded, output_dir=tmp_path / "gated", gate=gate, push_to_hub="me/gated")
    assert result.gate is not None and result.gate.is_reference
    pushed = hub.repo("me/gated").files()
    assert pushed == contents(tmp_path / "gated")
    assert f"The gate kept {REFERENCE}" in pushed["README.md"].decode()
    assert result.url == f"{hub.url}/me/gated/commit/{hub.repo('me/gated').refs['refs/heads/main']}"


def test_command_line(hub: LoopbackHub, enhanced: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert main(["push", str(enhanced), "me/x", "--private", "--create-pr"]) == 1
    assert "know-hf push: me/x is not there" in capfd.readouterr().err
    assert main(["push", str(enhanced), "me/x", "--private", "--message", "What I made"]) == 0
    assert f"{hub.url}/me/x/commit/" in capfd.readouterr().out
    assert hub.repo("me/x").private and hub.repo("me/x").titles()[0] == "What I made"
    assert main(["pull", "me/x", "--output-dir", str(tmp_path / "pulled")]) == 0
    assert contents(tmp_path / "pulled") == contents(enhanced)
    assert main(["pull", "me/x", "--output-dir", str(tmp_path / "pulled")]) == 1
    assert "is not empty" in capfd.readouterr().err


# In new processes


def run(hub: LoopbackHub, home: Path, program: str) -> str:
    """What a program prints in a new process with an empty cache."""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=environment(hub, home), capture_output=True, text=True, cwd=home.parent)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


def test_all_three_in_a_new_process(hub: LoopbackHub, recorded: Path, enhanced: Path, tmp_path: Path) -> None:
    """A fine-tuned model's trajectory, KNOWN and what it predicted: pulled where nothing is, predicted again."""
    push(recorded, "me/trajectory", private=True)
    push(SHIPPED_KNOWN, "me/known", private=True)
    push(enhanced, "me/enhanced", private=True)
    program = """
import torch
from pathlib import Path
from transformers import AutoModelForImageClassification
from know_hf import KNOWNModel, WeightTrajectory, predict_overflowed_weights
from know_hf.hub import pull

for name in ("trajectory", "enhanced", "known"):
    pull(f"me/{name}", name)
predict_overflowed_weights("trajectory", "known", output_dir="from-folders")
remote = WeightTrajectory.from_hub("me/trajectory")
predict_overflowed_weights(remote, KNOWNModel.from_pretrained("me/known"), output_dir="from-hub")
model = AutoModelForImageClassification.from_pretrained("me/enhanced")
print(type(model).__name__, float(model.classifier[1].weight.sum(dtype=torch.float64)))
"""
    printed = run(hub, tmp_path / "home", program)
    for name in ("from-folders", "from-hub"):
        assert without_card(tmp_path / name) == without_card(enhanced)
    assert contents(tmp_path / "enhanced") == contents(enhanced)
    weight = load_file(enhanced / "model.safetensors")["classifier.1.weight"]
    assert printed.split() == ["ResNetForImageClassification", str(float(weight.sum(dtype=torch.float64)))]


def test_known_loads_where_know_hf_is_not(hub: LoopbackHub, tmp_path: Path) -> None:
    push(SHIPPED_KNOWN, "me/known")
    program = """
import sys
sys.modules["know_hf"] = sys.modules["h5py"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModel

model = AutoModel.from_pretrained("me/known", trust_remote_code=True)
history = torch.linspace(-1, 1, 10).reshape(2, 5)
print(model.__module__.split(".")[0], model(history, "conv").prediction.tolist())
try:
    model.from_keras("folder")
except ImportError as error:
    print(error)
"""
    history = torch.linspace(-1, 1, 10).reshape(2, 5)
    expected = KNOWNModel.from_pretrained(SHIPPED_KNOWN)(history, "conv").prediction.tolist()
    first, second = run(hub, tmp_path / "home", program).splitlines()
    assert first == f"transformers_modules {expected}" and "know_hf" in second
