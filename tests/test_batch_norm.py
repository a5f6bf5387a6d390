"""Recomputed BatchNorm statistics."""

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
def test_momentum_and_training_modes_are_restored(training):
    model = Net().train(training)
    model.norm.eval()
    recalibrate_batch_norm(model, make_batches())
    assert (model.training, model.dropout.training, model.norm.training) == (training, training, False)
    assert model.norm.momentum == 0.25
    assert not model.norm.running_mean.requires_grad


def test_momentum_and_training_modes_are_restored_after_an_error():
    model = Net().eval()
    with pytest.raises(TypeError, match="unexpected keyword argument 'pixels'"):
        recalibrate_batch_norm(model, [{"pixels": torch.zeros(2, 3)}])
    assert model.norm.momentum == 0.25
    assert not any(module.training for module in model.modules())


def test_batches_are_not_read_for_a_model_without_batch_norm():
    def unread():
        raise AssertionError("the batches were read")
        yield

    recalibrate_batch_norm(nn.Linear(2, 2), unread())


def test_without_a_batch_the_statistics_stay():
    model = Net()
    with torch.no_grad():
        model.norm.running_mean.fill_(3.0)
    with pytest.raises(ValueError, match="1 BatchNorm layers"):
        recalibrate_batch_norm(model, [])
    assert model.norm.running_mean.tolist() == [3.0] * 3
