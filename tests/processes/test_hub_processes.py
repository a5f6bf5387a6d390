"""Pushed models in new processes with an empty cache."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from doubles.hub_fixtures import contents, without_card
from doubles.loopback_hub import TOKEN, LoopbackHub, environment
from safetensors.torch import load_file

from know_hf import KNOWNModel
from know_hf.hub import push
from know_hf.prediction import SHIPPED_KNOWN

pytestmark = pytest.mark.usefixtures("no_token_shown")


def run(hub: LoopbackHub, home: Path, program: str) -> str:
    """Return what a program prints in a new process with an empty cache."""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=environment(hub, home), capture_output=True, text=True, cwd=home.parent)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


def test_pull_and_predict(hub: LoopbackHub, recorded: Path, enhanced: Path, tmp_path: Path) -> None:
    push(recorded, "me/trajectory", private=True)
    push(SHIPPED_KNOWN, "me/known", private=True)
    push(enhanced, "me/enhanced", private=True)
    program = """
import torch
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


def test_known_loads_without_know_hf(hub: LoopbackHub, tmp_path: Path) -> None:
    push(SHIPPED_KNOWN, "me/known")
    program = """
import sys
sys.modules["know_hf"] = sys.modules["h5py"] = None
import torch
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
