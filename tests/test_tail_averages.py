"""Averages along a training: equivalence with a decaying learning rate, and the bias-corrected moving average."""

import math

import pytest
import torch

from know_hf.predictors import BiasCorrectedAverage, MovingAverage, TailAverage, decay_weights


def value(predictor, states):
    history = torch.tensor([states])
    return float(history[0, -1] + predictor.residual(history, "fc")[0])


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt"])
def test_an_average_with_decay_weights_is_a_training_with_that_decay(shape):
    steps = torch.randn(6, generator=torch.Generator().manual_seed(0)).tolist()
    states = [5.0 + math.fsum(steps[:i]) for i in range(7)]
    decay = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
        "sqrt": lambda x: 1 - x**0.5,
    }
    decayed = 5.0 + math.fsum(decay[shape](i / 7) * steps[i - 1] for i in range(1, 7))
    assert value(TailAverage(shape=shape), states) == pytest.approx(decayed, rel=1e-5)
    weights = decay_weights(7, shape)
    assert math.fsum(weights) == pytest.approx(1) and min(weights) >= 0


def test_tail_averages_by_hand():
    assert decay_weights(4) == pytest.approx([0.25] * 4)
    assert decay_weights(1, "cosine") == [1.0]
    assert value(TailAverage(last=2), [9.0, 1.0, 3.0]) == 2.0
    assert value(TailAverage(last=1), [9.0, 1.0, 3.0]) == 3.0
    assert value(TailAverage(last=2, shape="sqrt"), [9.0, 1.0, 3.0]) == pytest.approx(1 + 2 * (1 - 0.5**0.5))


def test_bema_equals_its_recursion():
    states = [4.0, 1.0, 3.0, -2.0, 0.5]
    predictor = BiasCorrectedAverage(ema_power=0.5, bias_power=0.2, lag=2.0, multiplier=3.0)
    average = states[0]
    for t, state in enumerate(states[1:], 1):
        share = (2 + 3 * t) ** -0.5
        average = (1 - share) * average + share * state
    expected = average + (2 + 3 * 4) ** -0.2 * (states[-1] - states[0])
    assert value(predictor, states) == pytest.approx(expected, rel=1e-5)


def test_bema_without_averaging_or_correction():
    states = [4.0, 1.0, 3.0]
    assert value(BiasCorrectedAverage(ema_power=0, bias_power=1e3), states) == pytest.approx(3.0)
    assert value(BiasCorrectedAverage(ema_power=1, bias_power=1e3), states) == pytest.approx(8 / 3)  # the plain mean
    # with shares that stay at 0.5 for long, a moving average
    slow = BiasCorrectedAverage(ema_power=1.0, bias_power=1e3, lag=2.0, multiplier=1e-9)
    assert value(slow, states) == pytest.approx(value(MovingAverage(decay=0.5), states))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (TailAverage, {"shape": "step"}),
        (TailAverage, {"last": 0}),
        (TailAverage, {"last": 1.5}),
        (BiasCorrectedAverage, {"lag": 0.5}),
        (BiasCorrectedAverage, {"ema_power": -1}),
        (BiasCorrectedAverage, {"multiplier": 0}),
        (BiasCorrectedAverage, {"bias_power": math.inf}),
    ],
)
def test_invalid_fields(kind, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        kind(**options)


def test_too_short_a_history():
    with pytest.raises(ValueError, match="last=4"):
        TailAverage(last=4).weights(3)
