"""Predictors: their arithmetic, chunking and the registry."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from know_hf import predictors
from know_hf.known.configuration_known import KNOWNConfig
from know_hf.known.modeling_known import KNOWNModel
from know_hf.predictors import (
    Average,
    DepthPredictor,
    KNOWNPredictor,
    LayerScaling,
    LinearFit,
    LogarithmicFit,
    MovingAverage,
    Predictor,
    Shrink,
    TaskVector,
    get_predictor,
    register_predictor,
)


@pytest.fixture
def known() -> KNOWNModel:
    torch.manual_seed(0)
    return KNOWNModel(KNOWNConfig()).eval()


def test_known_predictor_is_the_model_with_any_kernel(known):
    history = torch.randn(23, 5)
    expected = known(history=history, role="conv").residual.detach()
    for kernel in ("auto", "eager", "folded"):
        residual = KNOWNPredictor(known, kernel=kernel).residual(history, "conv")
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


def test_moving_average():
    # 1 → 0.75·1 + 0.25·5 = 2 → 0.75·2 + 0.25·10 = 4, six below the last state
    residual = MovingAverage(decay=0.75).residual(torch.tensor([[1.0, 5.0, 10.0]]), "fc")
    torch.testing.assert_close(residual, torch.tensor([-6.0]))
    assert torch.equal(MovingAverage(decay=0.0).residual(torch.randn(7, 4), "fc"), torch.zeros(7))


def test_task_vector():
    history = torch.tensor([[1.0, 2.0, 5.0], [4.0, -1.0, -1.5]])
    assert torch.equal(TaskVector().residual(history, "fc"), torch.tensor([4.0, -5.5]))
    assert torch.equal(TaskVector(scale=-0.5, since=1).residual(history, "fc"), torch.tensor([-1.5, 0.25]))
    assert torch.equal(TaskVector(scale=-1, since=2).residual(history, "fc"), history[:, 0] - history[:, 2])
    for since in (0, -1, 1.0, True):
        with pytest.raises(ValueError, match=rf"since={since}: choose the index of a state, 1 or more; 0 is Θ0"):
            TaskVector(since=since)
    with pytest.raises(ValueError, match=r"since=3, but the history has 3 states; choose an index from 1 to 2"):
        TaskVector(since=3).residual(history, "fc")


@pytest.mark.parametrize("num_states", [2, 3, 5])
def test_fits_continue_their_curve(num_states):
    start, slope = torch.randn(10, 1), torch.randn(10, 1)
    places = torch.arange(1, num_states + 2).float()
    line = start + slope * places
    torch.testing.assert_close(LinearFit().residual(line[:, :-1], "bias"), slope[:, 0], atol=1e-5, rtol=1e-5)
    curve = start + slope * places.log()
    expected = curve[:, -1] - curve[:, -2]
    torch.testing.assert_close(LogarithmicFit().residual(curve[:, :-1], "bias"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("predictor", "transform"), [(LinearFit(), np.asarray), (LogarithmicFit(), np.log)])
def test_fits_are_least_squares(predictor, transform):
    history = torch.randn(20, 5)
    coefficients = np.polyfit(transform(np.arange(1.0, 6.0)), history.double().numpy().T, 1)
    expected = coefficients[0] * transform(6.0) + coefficients[1] - history[:, -1].numpy()
    torch.testing.assert_close(predictor.residual(history, "conv"), torch.tensor(expected).float())


COMBINATIONS = ["average", "ema", "linear", "lines", "log", "task_vector"]


def make(name: str) -> Predictor:
    predictor = get_predictor(name)
    return predictor.at_depth(0.75) if isinstance(predictor, DepthPredictor) else predictor


@pytest.mark.parametrize("name", COMBINATIONS)
def test_nothing_is_added_where_nothing_moved(name):
    history = torch.randn(50, 5)
    history[::2] = history[::2, :1]
    residual = make(name).residual(history, "conv")
    assert torch.equal(residual[::2], torch.zeros(25)) and residual[1::2].all()


@pytest.mark.parametrize("name", [*COMBINATIONS, "shrink"])
def test_rows_do_not_depend_on_each_other(name):
    predictor, history = make(name), torch.randn(1003, 5) * 1e-3 + 1
    residual = predictor.residual(history, "conv")
    assert residual.dtype == torch.float32 and residual.shape == (1003,)
    for size in (1, 7, 256):
        assert torch.equal(torch.cat([predictor.residual(chunk, "conv") for chunk in history.split(size)]), residual)
    assert torch.equal(predictor.residual(history.T.contiguous().T, "conv"), residual)
    assert predictor.residual(history[:0], "conv").shape == (0,)
    half = history.bfloat16()
    assert torch.equal(predictor.residual(half, "conv"), predictor.residual(half.float(), "conv"))


def test_layer_scaling():
    history = torch.tensor([[1.0, 2.0, 5.0], [4.0, -1.0, -1.5]])
    lines = LayerScaling(alpha=0.25, beta=0.5)
    assert lines.depth is None and isinstance(lines, DepthPredictor)
    for depth, factor in ((0, 0.25), (0.5, 0.5), (1, 0.75)):
        at_depth = lines.at_depth(depth)
        assert at_depth.depth == depth and at_depth.alpha == 0.25 and at_depth.num_states is None
        assert torch.equal(at_depth.residual(history, "fc"), factor * TaskVector().residual(history, "fc"))
    average = LayerScaling(base=Average()).at_depth(1)
    assert average == LayerScaling(base=Average(), depth=1)
    assert torch.equal(average.residual(history, "fc"), Average().residual(history, "fc"))
    twice = get_predictor("lines", base=LayerScaling(base="average")).at_depth(0.5)
    assert torch.equal(twice.residual(history, "fc"), 0.25 * Average().residual(history, "fc"))
    assert not isinstance(Average(), DepthPredictor)
    with pytest.raises(ValueError, match=r"'lines' scales by the depth.* call at_depth\(depth\) first"):
        lines.residual(history, "fc")
    with pytest.raises(ValueError, match=r"depth=1.5: the relative depth of a layer is from 0"):
        lines.at_depth(1.5)
    with pytest.raises(ValueError, match="unknown predictor 'tsak_vector'"):
        LayerScaling(base="tsak_vector")


def test_layer_scaling_takes_as_many_states_as_its_base(known):
    history = torch.randn(6, 5)
    scaled = LayerScaling(base=KNOWNPredictor(known)).at_depth(0.5)
    assert scaled.num_states == 5
    assert torch.equal(scaled.residual(history, "fc"), 0.5 * KNOWNPredictor(known).residual(history, "fc"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("shrink", {"factor": float("nan")}, "factor=nan: choose a finite number"),
        ("task_vector", {"scale": "0.5"}, "scale='0.5': choose a finite number"),
        ("task_vector", {"scale": True}, "scale=True: choose a finite number"),
        ("ema", {"decay": 1.0}, r"decay=1.0: choose a number from 0 \(Θ0 alone\) to below 1"),
        ("ema", {"decay": -0.1}, "decay=-0.1: choose a number from 0"),
        ("lines", {"alpha": float("inf")}, "alpha=inf: choose a finite number"),
        ("lines", {"beta": None}, "beta=None: choose a finite number"),
    ],
)
def test_values_that_make_no_sense(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_predictor(name, **options)


def test_registry(known):
    assert get_predictor("shrink", factor=0.5) == Shrink(factor=0.5)
    assert get_predictor("average") == Average() and get_predictor("average").num_states is None
    assert get_predictor("linear") == LinearFit()
    predictor = get_predictor("known", model=known, kernel="folded")
    assert isinstance(predictor, KNOWNPredictor) and predictor.kernel == "folded"
    for name in predictors._PREDICTORS:
        assert f'`"{name}"`' in get_predictor.__doc__
        assert isinstance(predictor if name == "known" else get_predictor(name), Predictor)
    with pytest.raises(
        ValueError, match=r"unknown predictor 'shrnk'; choose one of average, ema, known, linear, lines"
    ):
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
