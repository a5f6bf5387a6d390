"""Recomputed BatchNorm statistics."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from know_hf import recalibrate_batch_norm


class Net(nn.Module):
    def __init__(self, dropout=0.5):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(3, momentum=0.25)
        self.frozen = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x, scale=1.0):
        return self.frozen(self.norm(self.dropout(x) * scale))


def make_batches(count=3, size=8):
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(size, 3, generator=generator) * 4 + 7, "scale": 2.0} for _ in range(count)]


def test_statistics_are_the_average_over_batches():
    model, batches = Net(), make_batches()
    with torch.no_grad():
        model.norm.running_mean.fill_(100.0)
    recalibrate_batch_norm(model, iter(batches))
    scaled = torch.stack([batch["x"] * 2.0 for batch in batches])  # (batches, B, 3), without dropout
    torch.testing.assert_close(model.norm.running_mean, scaled.mean(dim=1).mean(dim=0))
    torch.testing.assert_close(model.norm.running_var, scaled.var(dim=1).mean(dim=0))
    assert model.norm.num_batches_tracked == 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_momentum_and_training_modes_are_restored(training, fails):
    model = Net().train(training)
    model.norm.eval()
    batches = [*make_batches(), *([{"pixels": torch.zeros(2, 3)}] if fails else [])]
    with pytest.raises(TypeError, match="argument 'pixels'") if fails else nullcontext():
        recalibrate_batch_norm(model, batches)
    assert (model.training, model.dropout.training, model.norm.training) == (training, training, False)
    assert model.norm.momentum == 0.25
    assert not model.norm.running_mean.requires_grad


def test_batches_are_read_for_batch_norm_only():
    batches = iter(make_batches())
    recalibrate_batch_norm(nn.Linear(2, 2), batches)
    assert len(list(batches)) == 3
    model = Net()
    with pytest.raises(ValueError, match="1 BatchNorm layers"):
        recalibrate_batch_norm(model, [])
    assert model.norm.running_mean.tolist() == [0.0] * 3
