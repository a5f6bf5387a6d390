"""Cross-fitting on a convex problem whose best coefficient can be computed."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from know_hf import CrossFit, ForgettingSchedule, WeightTrajectory
from know_hf import predict_overflowed_weights as predict
from know_hf.data.subsets import divide

WIDTH = 40
SCHEDULE = ForgettingSchedule(kind="complementary", branch_from="start")


class LineConfig(PretrainedConfig):
    model_type = "test_line"


class Line(PreTrainedModel):
    """Linear regression without intercept."""

    config_class = LineConfig

    def __init__(self, config: LineConfig) -> None:
        super().__init__(config)
        self.line = nn.Linear(WIDTH, 1, bias=False)
        self.post_init()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> ModelOutput:
        return ModelOutput(loss=(self.line(x).squeeze(-1) - labels).square().mean())


def record(folder: Path, noise: float, schedule: ForgettingSchedule = SCHEDULE, size: int = 400) -> tuple:
    """Record least-squares solutions of all data and of both halves, with a start at zero."""
    generator = torch.Generator().manual_seed(1)
    truth = 1.5 * torch.randn(WIDTH, generator=generator) / WIDTH**0.5
    x = torch.randn(size, WIDTH, generator=generator)
    y = x @ truth + noise * torch.randn(size, generator=generator)
    data = Dataset.from_dict({"x": x.tolist(), "labels": y.tolist()}).with_format("torch")
    model, trajectory = Line(LineConfig()), WeightTrajectory.create(folder, schedule)
    nn.init.zeros_(model.line.weight)
    trajectory.record_start(model)
    for index, subset in enumerate(divide(data, schedule)):
        rows = subset.dataset[:]
        with torch.no_grad():
            model.line.weight.copy_(torch.linalg.lstsq(rows["x"], rows["labels"][:, None]).solution.T)
        trajectory.record(
            model,
            num_examples=subset.num_examples,
            fraction=subset.fraction,
            subset_fingerprint=subset.fingerprint,
            steps=1,
            kind="branch" if index else "state",
        )
    return WeightTrajectory(folder), data, truth


def risk(weight: torch.Tensor, truth: torch.Tensor) -> float:
    """Expected loss on fresh data, without the noise."""
    return float((weight - truth).square().sum())


def test_an_overtrained_model_is_moved_towards_the_start(tmp_path):
    trajectory, data, truth = record(tmp_path / "trajectory", noise=3.0)
    gate = CrossFit(data, batch_size=4)
    result = predict(trajectory, output_dir=tmp_path / "out", gate=gate, model_class=Line)
    assert result.gate.chosen in [f"start_interpolation, scale {scale}" for scale in (0.7, 0.75, 0.8)]
    theta0, scale = trajectory.tensor("line.weight"), result.gate.recipe["predictor_options"]["scale"]
    written = result.load_model().line.weight.detach()
    torch.testing.assert_close(written, scale * theta0)
    assert risk(written, truth) < 0.9 * risk(theta0, truth)

    assert result.gate.num_values == 100 and len(result.gate.candidates) == 17
    losses = []
    for name, half in zip(("branch-1", "branch-0"), divide(data, SCHEDULE)[1:], strict=True):
        rows, weight = half.dataset[:], trajectory.tensor("line.weight", name)
        losses.append(
            [float((rows["x"] @ (f * weight[0]) - rows["labels"]).square().mean()) for f in (1.0, 2 * scale - 1)]
        )
    expected = torch.tensor(losses).mean(dim=0).tolist()
    assert [result.gate.scores[name] for name in ("Θ0", result.gate.chosen)] == pytest.approx(expected, rel=1e-4)
    assert "two branches in the place of Θ0" in result.sentence and "half of the data" in result.gate.rule
    card = (result.path / "README.md").read_text()
    assert "two branches in the place of Θ0" in card and 'predictor="start_interpolation"' in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "trajectory"]


def test_theta0_is_kept_where_nothing_is_gained(tmp_path):
    trajectory, data, _ = record(tmp_path / "trajectory", noise=0.05)
    result = predict(trajectory, output_dir=tmp_path / "out", gate=CrossFit(data, max_examples=80), model_class=Line)
    assert result.gate.is_reference and result.gate.num_values == 20
    assert not [text for text in result.warnings if "equal Θ0" in text]  # of one state, kept by choice
    before = trajectory.path / "state-0/model.safetensors"
    assert (result.path / "model.safetensors").read_bytes() == before.read_bytes()


def test_what_cannot_be_cross_fitted_is_refused(tmp_path, trajectory):
    recorded, data, _ = record(tmp_path / "trajectory", noise=1.0)
    options = {"output_dir": tmp_path / "out", "model_class": Line}
    with pytest.raises(ValueError, match=r"no two branches.*branch_from='start'"):
        predict(trajectory, gate=CrossFit(data), output_dir=tmp_path / "out")
    schedule = ForgettingSchedule(kind="complementary")
    from_theta0, _, _ = record(tmp_path / "from_theta0", 1.0, schedule)
    with pytest.raises(ValueError, match=r"begin at Θ0, which has seen both halves"):
        predict(from_theta0, gate=CrossFit(data), **options)
    with pytest.raises(ValueError, match=r"dataset is not the one .*branch-0 .*fingerprint"):
        predict(recorded, gate=CrossFit(data.select(range(398))), **options)
    with pytest.raises(ValueError, match="remove known, predictor, predictor_options and steps"):
        predict(recorded, gate=CrossFit(data), predictor="shrink", **options)
    with pytest.raises(ValueError, match="predictor_options"):
        predict(recorded, gate=CrossFit(data), predictor_options={"scale": 2.0}, **options)
    with pytest.raises(ValueError, match="3 batches of 8 examples"):
        predict(recorded, gate=CrossFit(data, max_examples=24), **options)
    with pytest.raises(ValueError, match="max_examples"):
        CrossFit(data, max_examples=0)
    assert not (tmp_path / "out").exists()
