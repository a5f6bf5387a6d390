"""Trajectories read on the loopback Hub by byte ranges."""

from pathlib import Path

import pytest
import torch
from doubles.hub_fixtures import FAULTS, raises, store, without_card
from doubles.loopback_hub import LoopbackHub
from huggingface_hub.errors import HfHubHTTPError

from know_hf import WeightTrajectory, predict_overflowed_weights
from know_hf.hub import HubError
from know_hf.hub_client import call_hub
from know_hf.trajectory import TrajectoryError

pytestmark = pytest.mark.usefixtures("no_sleep", "no_token_shown")

NAME = "resnet.encoder.stages.1.layers.0.layer.1.convolution.weight"


def test_only_the_requested_tensor_is_transferred(hub: LoopbackHub, recorded: Path) -> None:
    store(hub, recorded, "me/t")
    local, before = WeightTrajectory(recorded), hub.sent("GET /lfs")
    remote = WeightTrajectory.from_hub("me/t")
    assert remote.names == local.names and remote.shape("classifier.1.bias") == (4,)
    headers = hub.sent("GET /lfs") - before
    assert torch.equal(remote.history(NAME), local.history(NAME))
    assert hub.sent("GET /lfs") - before - headers == 5 * 4 * local.shape(NAME).numel()
    assert torch.equal(remote.read_history(NAME, 3, 5), local.read_history(NAME, 3, 5))
    assert hub.sent("GET /lfs") - before - headers == 5 * 4 * (local.shape(NAME).numel() + 2)
    size = (recorded / "state-0" / "model.safetensors").stat().st_size
    assert headers < 5 * (size - 4 * 5400)
    assert all(request.range and not request.has_token for request in hub.requests if request.on_cdn)


def test_all_reads_are_of_one_commit(hub: LoopbackHub, recorded: Path, tmp_path: Path) -> None:
    store(hub, recorded, "me/t")
    remote, local = WeightTrajectory.from_hub("me/t"), WeightTrajectory(recorded)
    hub.add("me/t", {"state-1/model.safetensors": b"other", "config.json": b"{}"})
    assert torch.equal(remote.tensor("classifier.1.bias", 1), local.tensor("classifier.1.bias", 1))
    again = WeightTrajectory.from_hub("me/t", revision=remote.repo.commit)
    assert repr(again) == repr(remote) and remote.repo.commit in repr(remote)
    result = predict_overflowed_weights(again, output_dir=tmp_path / "remote")
    predict_overflowed_weights(recorded, output_dir=tmp_path / "local")
    assert without_card(result.path) == without_card(tmp_path / "local")
    with raises(TrajectoryError, "pull"):
        again.update_metrics(0, {"accuracy": 1})


@pytest.mark.parametrize("fault", ["reset", "cut", "500", "429", "truncated", "longer"])
def test_ranges_are_read_after_a_fault(hub: LoopbackHub, recorded: Path, fault: str) -> None:
    store(hub, recorded, "me/t")
    remote, local = WeightTrajectory.from_hub("me/t"), WeightTrajectory(recorded)
    assert remote.names == local.names
    options = FAULTS.get(fault, {"tamper": lambda content: content + b"more"})
    switched_on = hub.fail("GET /lfs", **options)
    assert torch.equal(remote.tensor(NAME), local.tensor(NAME)) and switched_on.times == 0
    hub.fail("GET /lfs", times=1000, **options)
    with raises(HfHubHTTPError if fault in ("429", "500") else OSError, "model.safetensors"):
        remote.tensor(NAME)


def test_other_range_is_refused(hub: LoopbackHub, recorded: Path) -> None:
    store(hub, recorded, "me/t")
    remote = WeightTrajectory.from_hub("me/t")
    assert remote.names
    hub.fail("GET /lfs", headers={"Content-Range": "bytes 0-1/2"})
    with raises(HubError, "bytes 0-1/2.*pull"):
        remote.tensor(NAME)


def test_errors_that_are_not_of_the_hub() -> None:
    attempts = []

    def fail() -> None:
        attempts.append(1)
        raise PermissionError(13, "Permission denied", "folder")

    with raises(PermissionError, "Could not pull"):
        call_hub(fail, "Could not pull me/x")
    assert len(attempts) == 1
