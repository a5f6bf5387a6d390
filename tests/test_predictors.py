"""Predictors: their arithmetic, chunking and the registry."""

from dataclasses import dataclass

import pytest
import torch

from know_hf import predictors
from know_hf.configuration_known import KNOWNConfig
from know_hf.modeling_known import KNOWNModel
from know_hf.predictors import (
    Average,
    KNOWNPredictor,
    LinearFit,
    Predictor,
    Shrink,
    get_predictor,
    register_predictor,
)


@pytest.fixture
def known() -> KNOWNModel:
    torch.manual_seed(0)
    return KNOWNModel(KNOWNConfig()).eval()


def test_known_predictor_is_the_model_chunk_by_chunk(known):
    history = torch.randn(23, 5)
    expected = known(history=history, role="conv").residual.detach()
    for chunk_size in (1, 5, 23, 4096):
        residual = KNOWNPredictor(known, chunk_size=chunk_size).residual(history, "conv")
        torch.testing.assert_close(residual, expected, atol=1e-6, rtol=0)
        assert residual.dtype == torch.float32 and not residual.requires_grad and not residual.is_inference()
    assert KNOWNPredictor(known).num_states == 5
    assert KNOWNPredictor(known).residual(history[:0], "conv").shape == (0,)


def test_known_predictor_of_a_double_model_returns_float32(known):
    history = torch.randn(8, 5)
    single = KNOWNPredictor(known).residual(history, "fc")
    double = KNOWNPredictor(known.double()).residual(history, "fc")
    assert double.dtype == torch.float32
    torch.testing.assert_close(double, single, atol=1e-6, rtol=0)


def test_shrink():
    history = torch.tensor([[3.0, 1.0], [5.0, -2.0]])
    torch.testing.assert_close(Shrink(factor=0.75).residual(history, "fc"), torch.tensor([-0.25, 0.5]))
    assert torch.equal(Shrink(factor=1.0).residual(history, "fc"), torch.zeros(2))


def test_average_of_all_states():
    history = torch.tensor([[0.0, 1.0, 5.0], [0.1, 0.1, 0.1]])
    assert torch.equal(Average().residual(history, "conv"), torch.tensor([-3.0, 0.0]))


@pytest.mark.parametrize("num_states", [2, 3, 5])
def test_linear_fit_continues_a_line(num_states):
    start, slope = torch.randn(10, 1), torch.randn(10, 1)
    history = start + slope * torch.arange(num_states)
    torch.testing.assert_close(LinearFit().residual(history, "bias"), slope[:, 0], atol=1e-5, rtol=1e-5)
    assert torch.equal(LinearFit().residual(start.expand(-1, num_states), "bias"), torch.zeros(10))


def test_linear_fit_is_least_squares():
    # numpy.polyfit([0, 1, 2], [0, 0, 3], 1) is [1.5, -0.5]: 4 at t = 3, one above the last state.
    residual = LinearFit().residual(torch.tensor([[0.0, 0.0, 3.0]]), "conv")
    torch.testing.assert_close(residual, torch.tensor([1.0]))


def test_registry(known):
    assert get_predictor("shrink", factor=0.5) == Shrink(factor=0.5)
    assert get_predictor("average") == Average() and get_predictor("average").num_states is None
    assert get_predictor("linear") == LinearFit()
    predictor = get_predictor("known", model=known, chunk_size=7)
    assert isinstance(predictor, KNOWNPredictor) and predictor.chunk_size == 7
    assert all(isinstance(get_predictor(name), Predictor) for name in ("shrink", "average", "linear"))
    with pytest.raises(ValueError, match=r"unknown predictor 'shrnk'; choose one of average, known, linear, shrink"):
        get_predictor("shrnk")
    with pytest.raises(TypeError, match=r"predictor 'shrink' takes .*factor.*unexpected keyword argument 'fraction'"):
        get_predictor("shrink", fraction=0.5)
    with pytest.raises(TypeError, match=r"predictor 'known' takes .*missing a required argument: 'model'"):
        get_predictor("known")


def test_register_predictor(monkeypatch):
    monkeypatch.setattr(predictors, "_PREDICTORS", dict(predictors._PREDICTORS))

    @register_predictor("nothing")
    @dataclass
    class Nothing:
        num_states = None

        def residual(self, history, role):
            return torch.zeros(len(history))

    assert get_predictor("nothing") == Nothing()
    with pytest.raises(ValueError, match=r"'shrink' belongs to .*Shrink.* already"):
        register_predictor("shrink")(Nothing)


def test_chunk_size_below_one(known):
    with pytest.raises(ValueError, match="chunk_size=0: choose at least 1 row"):
        KNOWNPredictor(known, chunk_size=0)
