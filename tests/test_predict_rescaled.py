"""Rescaling inside `predict_overflowed_weights`: values on disk, pieces, composition, adapters and errors."""

import json

import pytest
import torch
from conftest import make_images, make_resnet, rewrite_state
from doubles.constant_predictor import weights
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from know_hf import Gate, KNOWNModel, WeightTrajectory, plan_prediction, predict_overflowed_weights
from know_hf.prediction import SHIPPED_KNOWN, pieces
from know_hf.predictors import Average, KNOWNPredictor, Rescale
from know_hf.trajectory import TrajectoryError

CONV = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
MEAN = "resnet.encoder.stages.0.layers.0.layer.0.normalization.running_mean"
VARIANCE = "resnet.encoder.stages.0.layers.0.layer.0.normalization.running_var"
IMAGES = make_images(16, seed=7)[:]["pixel_values"]


@pytest.fixture
def predict(tmp_path):
    def predict(trajectory, predictor, **options):
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        result = predict_overflowed_weights(trajectory, predictor=predictor, output_dir=out, **options)
        return result, weights(out)

    return predict


def test_rescale_alone_keeps_the_function(trajectory, predict):
    result, written = predict(trajectory, "rescale", predictor_options={"factor": 0.5})
    before = {name: trajectory.tensor(name) for name in trajectory.names}
    factors = {CONV: 0.5, MEAN: 0.5, VARIANCE: 0.25}
    for name, factor in factors.items():
        assert torch.equal(written[name], factor * before[name])
    unchanged = before.keys() - result.rescaling.factors.keys()
    assert len(unchanged) < len(before) and all(torch.equal(written[name], before[name]) for name in unchanged)
    with torch.no_grad():
        old, new = (model.eval()(IMAGES).logits for model in (trajectory.load_model(0), result.load_model()))
    torch.testing.assert_close(new, old, rtol=0, atol=1e-3 * float(old.abs().max()))
    assert result.rescaling.deviation <= 1e-3
    assert "rescaled" in str(result) and result.to_dict()["rescaling"]["factors"][CONV] == 0.5
    json.dumps(result.to_dict())
    card = (result.path / "README.md").read_text()
    assert "rescaled" in card and "--predictor rescale" in card


def test_a_prediction_is_rescaled_by_factors_of_theta_0(trajectory, predict, monkeypatch):
    _, average = predict(trajectory, "average")
    monkeypatch.setattr(pieces, "PIECE_SIZE", 50)
    options = {"average+rescale": {"rescale": {"factor": 0.5}}}
    for predictor in (
        "average+rescale",
        "tail_average+rescale",
        ["average", Rescale(factor=0.5)],
        [Average(), "rescale"],
    ):
        given = options.get(predictor) if isinstance(predictor, str) else None
        result, written = predict(trajectory, predictor, predictor_options=given)
        for name, tensor in average.items():
            factor = result.rescaling.factors.get(name)
            assert torch.equal(written[name], tensor if factor is None else factor.scale(tensor)), name
        card = (result.path / "README.md").read_text()
        assert "Rescale(" in card or f'predictor="{predictor}"' in card


def test_channels_are_rescaled_in_pieces(tmp_path, predict, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 3))
    trajectory = WeightTrajectory.create(tmp_path / "states")
    for state in range(2):
        trajectory.record(model, num_examples=4 >> state, steps=1, dtype=torch.bfloat16)
    monkeypatch.setattr(pieces, "PIECE_SIZE", 11)
    batch = torch.randn(4, 1, 4, 4)
    result, written = predict(trajectory, Rescale(equalise="channels", model=model, batch=batch))
    trajectory.load_into(model)
    before = model(batch)
    for name, factor in result.rescaling.factors.items():
        exact = factor.scale(trajectory.tensor(name).float())
        assert factor.channels and torch.equal(written[name], exact.to(torch.bfloat16))
    result.load_into(model)
    torch.testing.assert_close(
        model(batch), before, rtol=0, atol=0.02 * float(before.detach().abs().max())
    )  # bfloat16


def test_a_plain_module_and_its_batch_are_needed(record_states, predict):
    trajectory = record_states(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), num_states=2)
    with pytest.raises(ValueError, match="model="):
        predict(trajectory, "rescale")
    with pytest.raises(ValueError, match="str"):
        predict(trajectory, Rescale(model="linear"))


def adapters(record_states, config) -> WeightTrajectory:
    model = get_peft_model(make_resnet(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return record_states(model, num_states=2)


def test_lora_needs_no_base_model(record_states, predict):
    trajectory = adapters(record_states, LoraConfig(r=2, target_modules=["convolution"]))
    base = make_resnet()
    for rescale in (Rescale(factor=0.5), Rescale(factor=0.5, model=base)):
        result, written = predict(trajectory, ["average", rescale])
        _, average = predict(trajectory, "average")
        for name, tensor in average.items():
            assert torch.equal(written[name], (0.5 if "lora_A" in name else 2) * tensor), name
        assert result.rescaling.deviation < 1e-5
    assert not hasattr(base, "peft_config")
    trajectory = adapters(
        lambda *args, **kw: record_states(*args, **kw, name="ia3"),
        IA3Config(target_modules=["convolution"], feedforward_modules=[]),
    )
    with pytest.raises(ValueError, match="model="):
        predict(trajectory, "rescale")


def test_nothing_is_written_where_the_function_would_change(trajectory, tmp_path):
    with pytest.raises(ValueError, match=r"convolution\.weight"):
        predict_overflowed_weights(trajectory, predictor=Rescale(factor=1e-3), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_value_that_is_not_finite_is_named(trajectory_copy, predict):
    rewrite_state(trajectory_copy, 0, lambda tensors: tensors[CONV].view(-1)[0].fill_(float("nan")))
    with pytest.raises(TrajectoryError, match=CONV):
        predict(trajectory_copy, "rescale")


def test_known_and_rescale(trajectory, predict):
    _, known = predict(trajectory, None)
    model = KNOWNModel.from_pretrained(SHIPPED_KNOWN)
    for predictor, given in (
        ("known+rescale", None),
        (["known", Rescale()], model),
        ([KNOWNPredictor(model), "rescale"], None),
    ):
        result, written = predict(trajectory, predictor, known=given)
        torch.testing.assert_close(written[CONV], 0.5 * known[CONV], rtol=1e-6, atol=0)
        assert "KNOWN" in (result.path / "README.md").read_text()
    with pytest.raises(ValueError, match="Average"):
        predict(trajectory, ["rescale", "average"])
    with pytest.raises(ValueError, match="'factor'"):
        predict(trajectory, "average+rescale", predictor_options={"factor": 0.5})
    with pytest.raises(ValueError, match="kernel"):
        predict(trajectory, "average+rescale", kernel="eager")


def test_the_plan_and_the_gate_show_it(trajectory, tmp_path):
    plan = plan_prediction(trajectory, predictor="average+rescale", estimate_time=False)
    assert "rescaled" in str(plan) and plan.rescaling.factors

    def norms(model):
        return [float(model.state_dict()[CONV].norm()) * (1 + k / 10) for k in range(10)]

    gate = Gate(norms, candidates=["average"])
    result = predict_overflowed_weights(
        trajectory, predictor=["shrink", "rescale"], output_dir=tmp_path / "out", gate=gate
    )
    assert result.gate.chosen == "Shrink + Rescale" and result.rescaling is not None
    names = [candidate.name for candidate in result.gate.candidates]
    losses = {candidate.name: candidate.loss for candidate in result.gate.candidates}
    assert "average" in names
    assert losses["average"] > 0.8 * losses["Θ0"]  # not rescaled
