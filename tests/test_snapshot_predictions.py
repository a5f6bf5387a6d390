"""Registered predictors over the start, the tail and branches, through the written checkpoint."""

from pathlib import Path

import pytest
import torch
from conftest import make_resnet
from doubles.constant_predictor import weights
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from know_hf import ForgettingSchedule, WeightTrajectory, plan_prediction
from know_hf import predict_overflowed_weights as predict
from know_hf.predictors import (
    SnapshotPredictor,
    branch_average,
    get_predictor,
    jackknife,
    james_stein_average,
    model_stock,
    shrunken_jackknife,
    spectral_filter,
)
from know_hf.predictors.branches import factorise

SHAPE = (120, 80)


def record(
    folder: Path,
    start: torch.Tensor | None,
    theta0: torch.Tensor,
    branches: list[torch.Tensor],
    schedule: ForgettingSchedule | None = None,
    **details: object,
) -> WeightTrajectory:
    """Record matrices as the weights of a linear layer; its bias stays zero."""
    model, trajectory = nn.Linear(*reversed(theta0.shape)), WeightTrajectory.create(folder, schedule)
    nn.init.zeros_(model.bias)
    for kind, values in (("start", start), ("state", theta0), *(("branch", branch) for branch in branches)):
        if values is None:
            continue
        with torch.no_grad():
            model.weight.copy_(values)
        if kind == "start":
            trajectory.record_start(model)
        else:
            trajectory.record(model, num_examples=8, steps=1, kind=kind, **(details if kind == "branch" else {}))
    return WeightTrajectory(folder)


def planted(noise: float, low_rank: bool = False) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """A start, the true weights, and two branches with independent noise around them."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    start = random(*SHAPE)
    truth = start + (random(SHAPE[0], 2) @ random(2, SHAPE[1]) if low_rank else random(*SHAPE))
    return start, truth, [truth + noise * random(*SHAPE) for _ in range(2)]


def predicted(trajectory: WeightTrajectory, name: str, folder: Path, **options: object) -> torch.Tensor:
    result = predict(trajectory, predictor=name, output_dir=folder / name, card=False, **options)
    written = weights(result.path)
    assert not written["bias"].any() and result.warnings == []
    return written["weight"]


def test_branches_are_combined_through_the_registered_predictors(tmp_path):
    start, _, branches = planted(noise=1.0)
    trajectory = record(tmp_path / "trajectory", start, branches[0], branches)
    values = {name: predicted(trajectory, name, tmp_path) for name in ("branch_average", "model_stock", "james_stein")}
    for name, function in (("model_stock", model_stock), ("james_stein", james_stein_average)):
        torch.testing.assert_close(values[name], function(start, branches))
    torch.testing.assert_close(values["branch_average"], branch_average(branches))


def test_the_spectral_filter_keeps_what_branches_share(tmp_path, monkeypatch):
    start, truth, branches = planted(noise=0.05, low_rank=True)
    trajectory = record(tmp_path / "trajectory", start, branches[0], branches)
    value = predicted(trajectory, "spectral_filter", tmp_path)
    torch.testing.assert_close(value, spectral_filter(start, branches))
    assert (value - truth).square().sum() < 0.1 * (branch_average(branches) - truth).square().sum()
    monkeypatch.setattr("know_hf.prediction.pieces.PIECE_SIZE", 1000)
    assert torch.equal(predicted(trajectory, "spectral_filter", tmp_path / "pieces"), value)


def test_the_jackknife_removes_the_bias_of_two_halves(tmp_path):
    truth, bias, n = torch.randn(SHAPE), torch.randn(SHAPE), 64
    halves = [truth + 2 * bias / n] * 2
    trajectory = record(tmp_path / "trajectory", None, truth + bias / n, halves, fraction=0.5)
    for name in ("jackknife", "shrunken_jackknife"):
        torch.testing.assert_close(predicted(trajectory, name, tmp_path), truth)
    unknown = record(tmp_path / "unknown", None, truth + bias / n, halves)
    with pytest.raises(ValueError, match=r"Jackknife .* without a recorded share .* fraction="):
        predict(unknown, predictor="jackknife", output_dir=tmp_path / "refused")
    for fraction in (0, 1, "half"):
        with pytest.raises(ValueError, match="fraction must be"):
            get_predictor("jackknife", fraction=fraction)
    given = predicted(unknown, "jackknife", tmp_path / "given", predictor_options={"fraction": 0.5})
    torch.testing.assert_close(given, truth)
    theta0, noisy = truth + bias / n, [truth + 2 * bias / n + 0.01 * torch.randn(SHAPE) for _ in range(2)]
    noise = record(tmp_path / "noise", None, theta0, noisy, fraction=0.5)
    expected = shrunken_jackknife(theta0, noisy)
    torch.testing.assert_close(predicted(noise, "shrunken_jackknife", tmp_path / "noisy"), expected)
    assert 0.2 < (expected - theta0).norm() / (jackknife(theta0, noisy) - theta0).norm() < 0.9


def test_branches_from_theta0_part_at_theta0(tmp_path):
    schedule = ForgettingSchedule(kind="complementary")
    start, truth, branches = planted(noise=1.0)
    trajectory = record(tmp_path / "trajectory", torch.zeros(SHAPE), start, branches, schedule)
    torch.testing.assert_close(predicted(trajectory, "model_stock", tmp_path), model_stock(start, branches))
    plan = plan_prediction(trajectory, predictor="model_stock")
    assert plan.snapshots == ["branch-0", "branch-1", 0]
    assert "states    1 (read: branch-0, branch-1 and Θ0)" in str(plan)
    shrunk = predicted(trajectory, "shrink", tmp_path, predictor_options={"factor": 0.5})
    torch.testing.assert_close(shrunk, 0.5 * start)
    pieces = plan_prediction(trajectory, predictor="average", estimate_time=False).memory
    assert plan.seconds is None and plan.memory > pieces + 3 * 4 * 3 * truth.numel()


def test_movement_between_the_start_and_theta0(trajectory, tmp_path):
    options = {"start_interpolation": {"scale": 0.75}}
    result = predict(
        trajectory, predictor="start_interpolation+rescale", predictor_options=options, output_dir=tmp_path / "both"
    )
    written = weights(result.path)
    for name, role in trajectory.roles.items():
        theta0, start = trajectory.tensor(name), trajectory.tensor(name, "start")
        expected = theta0 if role.role == "copied" else theta0 + 0.25 * (start - theta0)
        factor = result.rescaling.factors.get(name)
        torch.testing.assert_close(written[name], expected if factor is None else factor.scale(expected))
    card = (result.path / "README.md").read_text()
    assert "StartInterpolation" in card or "start_interpolation" in card
    assert "normalisation layers | weights and biases predicted" in card


def test_a_slope_over_the_depth(trajectory, tmp_path):
    options = {"scale": 0.5, "slope": 0.5}
    result = predict(
        trajectory, predictor="start_interpolation", predictor_options=options, output_dir=tmp_path / "lines"
    )
    written = weights(result.path)
    for name, depth in (("resnet.embedder.embedder.convolution.weight", 0.0), ("classifier.1.weight", 1.0)):
        theta0, start = trajectory.tensor(name), trajectory.tensor(name, "start")
        torch.testing.assert_close(written[name], start + (0.5 + 0.5 * depth) * (theta0 - start))


def adapter(config: object) -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    return get_peft_model(BertForSequenceClassification(BertConfig(vocab_size=32, **sizes)), config)


def test_adapters_are_combined_by_their_products(tmp_path):
    model = adapter(LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    trajectory = WeightTrajectory.create(tmp_path / "trajectory")
    trajectory.record_start(model)
    a, b, head = (
        next(p for n, p in model.named_parameters() if part in n)
        for part in ("lora_A", "lora_B", "classifier.modules_to_save.default.weight")
    )
    turn = torch.tensor([[0.0, -2.0], [1.0, 0.0]])
    with torch.no_grad():
        b += torch.randn(b.shape)
    trajectory.record(model, num_examples=8, steps=1)
    theta0, products, heads = (b @ a).detach(), [], []
    for noise in (0.0, 0.5):
        with torch.no_grad():  # another factorisation, and for the second branch other weights
            a.copy_(turn @ a + noise * torch.randn(a.shape))
            b.copy_(b @ turn.inverse())
            head += noise
        products.append((b @ a).detach().clone())
        heads.append(head.detach().clone())
        trajectory.record(model, num_examples=8, steps=1, kind="branch", fraction=0.5)

    def product_of(name: str, **options: object) -> torch.Tensor:
        folder = tmp_path / f"{name}{len(options)}"
        written = weights(predict(trajectory, predictor=name, predictor_options=options, output_dir=folder).path)
        first, second = (next(t for n, t in written.items() if part in n) for part in ("lora_A", "lora_B"))
        assert first.shape == a.shape and second.shape == b.shape
        if name == "branch_average":
            torch.testing.assert_close(written["base_model.model.classifier.weight"], branch_average(heads))
        return second @ first

    origin = torch.zeros_like(theta0)
    for name, expected in (
        ("branch_average", branch_average(products)),
        ("model_stock", model_stock(origin, products)),
        ("spectral_filter", spectral_filter(origin, products)),
        ("jackknife", jackknife(theta0, products)),
    ):
        first, second = factorise(expected, 2)
        torch.testing.assert_close(product_of(name), second @ first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(product_of("start_interpolation"), 0.5 * theta0, rtol=1e-4, atol=1e-6)
    predict(
        trajectory, predictor="start_interpolation", predictor_options={"scale": 1.0}, output_dir=tmp_path / "same"
    )
    same = weights(tmp_path / "same")
    assert all(torch.equal(same[name], trajectory.tensor(name)) for name in trajectory.names)


def test_what_a_trajectory_lacks_is_named(trajectory, tmp_path, record_states):
    output = {"output_dir": tmp_path / "refused"}
    with pytest.raises(ValueError, match=r"ModelStock .* 0 branches of the 2 needed.*kind='complementary'"):
        predict(trajectory, predictor="model_stock", **output)
    with pytest.raises(ValueError, match=r"StartInterpolation .* no start.*induce_forgetting"):
        predict(record_states(make_resnet(), 2), predictor="start_interpolation", **output)
    alone = record(tmp_path / "alone", torch.zeros(SHAPE), torch.ones(SHAPE), [torch.ones(SHAPE)])
    with pytest.raises(ValueError, match=r"TailAverage has nothing .* no tail.*tail_states"):
        predict(alone, predictor="tail_average", **output)
    with pytest.raises(ValueError, match="one step, got steps=2"):
        predict(trajectory, predictor="start_interpolation", steps=2, **output)
    with pytest.raises(ValueError, match="start_interpolation' with a slope"):
        get_predictor("lines", base="model_stock")
    with pytest.raises(ValueError, match="ModelStock computes complete tensors"):
        get_predictor("model_stock").residual(torch.zeros(2, 3), "fc")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[]), "IA3"),
        (LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], use_dora=True), "DoRA"),
    ],
)
def test_adapters_that_are_not_linear_in_the_model_are_refused(config, kind, tmp_path):
    trajectory, model = WeightTrajectory.create(tmp_path / "trajectory"), adapter(config)
    trajectory.record_start(model)
    trajectory.record(model, num_examples=8, steps=1)
    with pytest.raises(ValueError, match=rf"adapters of type {kind}.*know-hf merge"):
        predict(trajectory, predictor="start_interpolation", output_dir=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


class Signs(SnapshotPredictor):
    def reads(self):
        return {"start": 1}

    def tensor(self, snapshots):
        return snapshots.theta0.abs().copysign(snapshots.start)


def test_a_predictor_of_your_own(trajectory, tmp_path):
    name = "classifier.1.weight"
    written = weights(predict(trajectory, predictor=Signs(), output_dir=tmp_path / "signs").path)
    assert torch.equal(written[name], trajectory.tensor(name).abs().copysign(trajectory.tensor(name, "start")))
