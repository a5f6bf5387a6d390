"""Arithmetic of the predictors, independence of chunks, and the registry."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import know_hf
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
    protocol,
    register_predictor,
)


@pytest.fixture
def known() -> KNOWNModel:
    torch.manual_seed(0)
    return KNOWNModel(KNOWNConfig()).eval()


def make(name: str) -> Predictor:
    predictor = get_predictor(name)
    return predictor.at_depth(0.75) if isinstance(predictor, DepthPredictor) else predictor


def test_known_predictor_equals_the_model_with_every_kernel(known):
    history = torch.randn(23, 5)
    expected = known(history=history, role="conv").residual.detach()
    for kernel in ("auto", "eager", "folded"):
        residual = KNOWNPredictor(known, kernel=kernel).residual(history, "conv")
        torch.testing.assert_close(residual, expected, atol=1e-6, rtol=0)
        assert residual.dtype == torch.float32 and not residual.requires_grad and not residual.is_inference()
    assert KNOWNPredictor(known).num_states == 5
    assert KNOWNPredictor(known).residual(history[:0], "conv").shape == (0,)
    double = KNOWNPredictor(known.double()).residual(history, "conv")
    assert double.dtype == torch.float32
    torch.testing.assert_close(double, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("predictor", "history", "expected"),
    [
        (Shrink(factor=0.75), [[3.0, 1.0], [5.0, -2.0]], [-0.25, 0.5]),
        (Shrink(factor=1.0), [[3.0, 1.0], [5.0, -2.0]], [0.0, 0.0]),
        (Average(), [[0.0, 1.0, 5.0], [0.1, 0.1, 0.1]], [-3.0, 0.0]),
        # 1 → 0.75·1 + 0.25·5 = 2 → 0.75·2 + 0.25·10 = 4, which is 6 below Θ0
        (MovingAverage(decay=0.75), [[1.0, 5.0, 10.0]], [-6.0]),
        (MovingAverage(decay=0.0), [[1.0, 5.0, 10.0]], [0.0]),
        (TaskVector(), [[1.0, 2.0, 5.0], [4.0, -1.0, -1.5]], [4.0, -5.5]),
        (TaskVector(scale=-0.5, since=1), [[1.0, 2.0, 5.0], [4.0, -1.0, -1.5]], [-1.5, 0.25]),
        (TaskVector(scale=-1, since=2), [[1.0, 2.0, 5.0], [4.0, -1.0, -1.5]], [-4.0, 5.5]),
    ],
)
def test_residuals_by_hand(predictor, history, expected):
    assert torch.equal(predictor.residual(torch.tensor(history), "fc"), torch.tensor(expected))


@pytest.mark.parametrize("num_states", [2, 3, 5])
@pytest.mark.parametrize(("predictor", "transform"), [(LinearFit(), np.asarray), (LogarithmicFit(), np.log)])
def test_fits_are_least_squares(predictor, transform, num_states):
    history, times = torch.randn(20, num_states), transform(np.arange(1.0, num_states + 2))
    slope, start = np.polyfit(times[:-1], history.double().numpy().T, 1)
    expected = slope * times[-1] + start - history[:, -1].numpy()
    residual = predictor.residual(history, "conv")
    torch.testing.assert_close(residual, torch.tensor(expected).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["average", "ema", "linear", "lines", "log", "shrink", "task_vector"])
def test_rows_are_independent(name):
    predictor, history = make(name), torch.randn(1003, 5) * 1e-3 + 1
    if name != "shrink":
        history[::2] = history[::2, :1]
        unchanged = (predictor.residual(history, "conv") == 0).tolist()
        assert unchanged == [row % 2 == 0 for row in range(1003)]
    residual = predictor.residual(history, "conv")
    assert residual.dtype == torch.float32 and residual.shape == (1003,)
    for size in (1, 7, 256):
        assert torch.equal(torch.cat([predictor.residual(chunk, "conv") for chunk in history.split(size)]), residual)
    assert torch.equal(predictor.residual(history.T.contiguous().T, "conv"), residual)
    assert predictor.residual(history[:0], "conv").shape == (0,)
    half = history.bfloat16()
    assert torch.equal(predictor.residual(half, "conv"), predictor.residual(half.float(), "conv"))


def test_layer_scaling(known):
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
    nested = get_predictor("lines", base=LayerScaling(base="average")).at_depth(0.5)
    assert torch.equal(nested.residual(history, "fc"), 0.25 * Average().residual(history, "fc"))
    assert not isinstance(Average(), DepthPredictor)

    history = torch.randn(6, 5)
    scaled = LayerScaling(base=KNOWNPredictor(known)).at_depth(0.5)
    assert scaled.num_states == 5
    assert torch.equal(scaled.residual(history, "fc"), 0.5 * KNOWNPredictor(known).residual(history, "fc"))
    with pytest.raises(ValueError, match=r"at_depth\(depth\)"):
        lines.residual(history, "fc")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("shrink", {"factor": float("nan")}, "factor.*nan"),
        ("task_vector", {"scale": "0.5"}, "scale.*'0.5'"),
        ("task_vector", {"scale": True}, "scale.*True"),
        ("task_vector", {"since": 0}, "since.*0"),
        ("task_vector", {"since": -1}, "since.*-1"),
        ("task_vector", {"since": 1.0}, r"since.*1\.0"),
        ("task_vector", {"since": True}, "since.*True"),
        ("ema", {"decay": 1.0}, r"decay.*1\.0"),
        ("ema", {"decay": -0.1}, r"decay.*-0\.1"),
        ("lines", {"alpha": float("inf")}, "alpha.*inf"),
        ("lines", {"beta": None}, "beta.*None"),
        ("lines", {"depth": 1.5}, r"depth.*1\.5"),
        ("lines", {"base": "tsak_vector"}, "unknown predictor 'tsak_vector'"),
        ("lines", {"base": 3}, "base.*3"),
        ("shrnk", {}, "'shrnk'.* average, bema, branch_average, ema"),
    ],
)
def test_invalid_values(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_predictor(name, **options)


def test_other_invalid_calls():
    with pytest.raises(ValueError, match=r"since=3.* 3 states.* 1 to 2"):
        TaskVector(since=3).residual(torch.zeros(1, 3), "fc")
    with pytest.raises(TypeError, match=r"'fraction'.*'shrink'.*factor"):
        get_predictor("shrink", fraction=0.5)
    with pytest.raises(TypeError, match=r"'known'.*missing.*'model'"):
        get_predictor("known")


def test_every_registered_predictor_is_documented(known):
    assert get_predictor("shrink", factor=0.5) == Shrink(factor=0.5)
    assert get_predictor("average").num_states is None
    for name in protocol._PREDICTORS:
        options = {"model": known, "kernel": "folded"} if name == "known" else {}
        assert isinstance(get_predictor(name, **options), Predictor)
        assert f'`"{name}"`' in get_predictor.__doc__


def test_register_predictor(monkeypatch):
    monkeypatch.setattr(protocol, "_PREDICTORS", dict(protocol._PREDICTORS))

    @register_predictor("nothing")
    @dataclass
    class Nothing:
        num_states = None

        def residual(self, history, role):
            return torch.zeros(len(history))

    assert get_predictor("nothing") == Nothing()
    with pytest.raises(ValueError, match=r"'shrink'.*Shrink"):
        register_predictor("shrink")(Nothing)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"num_states": None}, "no method residual.*history, role"),
        ({"num_states": None, "residual": 1}, "no method residual"),
        ({"num_states": None, "residual": lambda self, history: history}, r"\(self, history\).*history, role"),
        ({"residual": lambda self, history, role: history}, "no num_states.*None"),
    ],
)
def test_register_predictor_names_what_is_missing(monkeypatch, members, words):
    monkeypatch.setattr(protocol, "_PREDICTORS", dict(protocol._PREDICTORS))
    with pytest.raises(TypeError, match=rf"'mine' \(Mine\).*{words}"):
        register_predictor("mine")(type("Mine", (), members))
    assert "mine" not in protocol._PREDICTORS
    with pytest.raises(TypeError, match=r"'mine'.*class"):
        register_predictor("mine")(lambda: Shrink(0.5))


def test_register_predictor_accepts_fields_and_properties(monkeypatch):
    monkeypatch.setattr(protocol, "_PREDICTORS", dict(protocol._PREDICTORS))

    class Base:
        num_states: int | None

        def residual(self, history, role, *, strength=1.0):
            return torch.zeros(len(history))

    register_predictor("of-base")(type("Derived", (Base,), {}))
    register_predictor("of-property")(type("Property", (), {**vars(Base), "num_states": property(lambda self: 5)}))
    assert know_hf.register_predictor is register_predictor and know_hf.Predictor is Predictor
