"""Displacement of states, in pieces."""

import pytest
import torch
from torch import nn

from know_hf import WeightTrajectory
from know_hf.trajectory import summary
from know_hf.trajectory.summary import displacement, inspect_trajectory, loss_names


@pytest.fixture
def recorded(tmp_path):
    """Three states of a matrix per dtype; the integer buffer does not count."""
    module = nn.Linear(5, 7)
    module.wide = nn.Parameter(torch.full((3, 5), 1e100, dtype=torch.float64))
    module.pair = nn.Parameter(torch.full((3,), 3 + 4j))
    module.register_buffer("steps", torch.zeros(4, dtype=torch.int64))
    trajectory = WeightTrajectory.create(tmp_path / "trajectory")
    for state in range(3):
        trajectory.record(module, num_examples=8 >> state, steps=1)
        with torch.no_grad():
            module.weight += 0.1 * torch.randn(7, 5)
            module.wide *= 2
            module.pair *= 1j
            module.steps += 1
    return trajectory


@pytest.mark.parametrize("size", [1, 4, 2**20])
def test_displacement_is_that_of_full_tensors(recorded, monkeypatch, size):
    monkeypatch.setattr(summary, "_PIECE_SIZE", size)
    moved = inspect_trajectory(recorded).displacement
    assert moved["kept"] == pytest.approx([0, 2**0.5, 2])  # multiplied by 1, i and -1
    first = recorded.tensor("wide")
    assert moved["fc"] == pytest.approx([0, 1, 3]) and first.abs().max() > 1e38
    ratio = [float((recorded.tensor("bias", k) - recorded.tensor("bias")).norm()) for k in range(3)]
    assert moved["bias"] == pytest.approx(ratio)
    assert "copied" not in moved
    assert displacement(recorded, 0) == 0 and displacement(recorded, 2) == pytest.approx(3)


def test_names_of_losses():
    names = ["eval_accuracy", "eval_loss", "eval_my-set_loss", "eval_lossless", "eval_closs", "loss", "eval_b_Loss"]
    assert loss_names(names) == ["eval_b_Loss", "eval_loss", "eval_my-set_loss", "loss"]
