"""Reports on residuals, and the warnings of a prediction."""

import re
from dataclasses import dataclass, field

import pytest
import torch
from conftest import make_resnet
from doubles.constant_predictor import Constant
from test_predict import BIAS
from torch import nn

from know_hf import KNOWNConfig, KNOWNModel, predict_overflowed_weights
from know_hf.prediction import ResidualReport
from know_hf.prediction.warnings import code_warnings, forgetting_warnings

torch.manual_seed(0)
HISTORY = torch.randn(5, 1000)


def test_shares_of_shrinking_and_extrapolation():
    shrinks = ResidualReport.of(HISTORY, -0.25 * HISTORY[-1])
    assert (shrinks.shrink_factor, shrinks.shrink_share, shrinks.mean_ratio) == pytest.approx((0.75, 1, 0.25))
    extrapolates = ResidualReport.of(HISTORY, 2 * (HISTORY[-1] - HISTORY[-2]))
    assert (extrapolates.extrapolation_factor, extrapolates.extrapolation_share) == pytest.approx((2, 1))
    # independent normal states: half of the difference lies along the last one
    assert extrapolates.shrink_share == pytest.approx(0.5, abs=0.05)
    neither = ResidualReport.of(HISTORY, torch.randn(1000))
    assert neither.shrink_share < 0.02 and neither.extrapolation_share < 0.02


def test_reports_of_pieces_add_up():
    residual = 0.1 * torch.randn(1000)
    whole = ResidualReport.of(HISTORY, residual)
    parts = ResidualReport.of(HISTORY[:, :300], residual[:300]) + ResidualReport.of(HISTORY[:, 300:], residual[300:])
    assert parts.to_dict() == pytest.approx(whole.to_dict(), rel=1e-4)
    assert whole.predicted == 1000
    assert whole.mean_residual == pytest.approx(float(residual.abs().mean()))
    assert whole.largest_residual == pytest.approx(float(residual.abs().max()))
    assert whole.largest_weight == pytest.approx(float(HISTORY.abs().max()))
    assert whole.largest_move == pytest.approx(float(HISTORY.diff(dim=0).abs().max()))
    assert whole.mean_move == pytest.approx(float((HISTORY[-1] - HISTORY[-2]).abs().mean()))


@pytest.mark.parametrize("history", [torch.zeros(5, 4), torch.zeros(5, 0)])
def test_zeros_have_no_residual(history):
    report = ResidualReport.of(history, torch.zeros(history.shape[1]))
    assert report.mean_ratio == report.shrink_share == report.extrapolation_share == report.mean_residual == 0
    assert report.shrink_factor == 1


def test_inputs_outside_of_the_trained_range_are_counted():
    history = torch.zeros(5, 10)
    history[2, 3] = -3.0  # a weight too large, and so are its two moves
    history[:, 4] = 0.9
    history[-1, 5] = 0.7  # a move too large
    trained_on = {"largest_weight": 1.0, "largest_displacement": 0.5, "mean_displacement": 0.1}
    report = ResidualReport.of(history, torch.zeros(10), trained_on)
    assert report.outside == 2


@dataclass
class Trained:
    """Predicts zero residuals and states the range that it was trained on."""

    roles: dict = field(default_factory=dict)
    num_states = None

    @property
    def trained_on(self):
        return {"roles": self.roles}

    def residual(self, history, role):
        return torch.zeros(len(history))


def test_warnings_name_role_share_tensor_and_range(trajectory, tmp_path, caplog):
    wide = {"largest_weight": 100.0, "largest_displacement": 100.0, "mean_displacement": 1e-3}
    roles = {"conv": wide, "fc": {**wide, "largest_weight": 1e-3}, "bias": {**wide, "mean_displacement": 10.0}}
    result = predict_overflowed_weights(trajectory, predictor=Trained(roles), output_dir=tmp_path / "out")
    bias, fc, same = result.warnings
    assert fc.startswith("fc: ") and "values up to 0.001, moves up to 100" in fc
    worst = max((n for n in result.tensors if result.roles[n] == "fc"), key=lambda n: result.tensors[n].outside)
    assert f"most of them in {worst!r}" in fc
    moved = float((trajectory.tensor(BIAS) - trajectory.tensor(BIAS, 1)).abs().mean())
    assert f"bias: the weights moved by only {moved:.2g}" in bias and "moves of 10" in bias
    assert same.startswith("The enhanced weights equal Θ0")
    assert [record.message for record in caplog.records].count(fc) == 1 and fc not in str(result)
    assert result.to_dict()["warnings"] == result.warnings


@pytest.mark.parametrize("trained_on", [None, {"trajectories": 3}, {"roles": {"fc": {"largest_weight": 1e-6}}}])
def test_an_unknown_range_gives_no_warning(trajectory, tmp_path, trained_on):
    torch.manual_seed(0)
    known = KNOWNModel(KNOWNConfig(trained_on=trained_on))
    result = predict_overflowed_weights(trajectory, known, output_dir=tmp_path / "out")
    assert [text for text in result.warnings if "did not forget" not in text] == []


class Scale(nn.Module):
    """Has no tensor that is predicted."""

    def __init__(self):
        super().__init__()
        self.gain, self.norm = nn.Parameter(torch.ones(4)), nn.LayerNorm(4)


@pytest.mark.parametrize(
    ("model", "predictor", "options", "words"),
    [
        (nn.Linear(4, 4), Constant(0.0), {}, "every predicted change is zero"),
        (nn.Linear(4, 4), Constant(1e-12), {}, "lost to rounding"),
        (nn.Linear(4, 4).requires_grad_(False), Constant(0.5), {}, "no tensor with the role conv, fc or bias moved"),
        (Scale(), Constant(0.5), {}, r"kept: 1, norm: 2\).*norm=.predict."),
        (Scale(), Constant(0.5), {"norm": "predict"}, None),
        (nn.Linear(4, 4), Constant(0.5), {}, None),
    ],
)
def test_a_prediction_that_equals_theta_0_gives_a_warning(record_states, tmp_path, model, predictor, options, words):
    trajectory = record_states(model, num_states=2)
    result = predict_overflowed_weights(trajectory, predictor=predictor, output_dir=tmp_path / "out", **options)
    texts = [text for text in result.warnings if "equal Θ0" in text]
    assert [bool(re.search(words, text)) for text in texts] == [True] if words else texts == []
    assert all(text in (result.path / "README.md").read_text() for text in texts)


def test_states_that_are_no_worse_than_theta_0_give_a_warning(record_states, tmp_path):
    trajectory = record_states(nn.Linear(2, 2), num_states=3)
    for losses, expected in (
        ([0.4, 0.5, 0.6], []),
        ([None, 0.1, 0.2], []),
        ([0.4, None, 0.6], []),
        ([0.4, 0.4, 0.6], ["Θ1 (0.4) is not above that of Θ0 (0.4)"]),
        ([0.4, 0.3, 0.2], ["Θ1 (0.3), Θ2 (0.2) is below that of Θ0 (0.4)"]),
    ):
        assert all(part in text for text, part in zip(forgetting_warnings(losses), expected, strict=True))
    for state, loss in enumerate((0.5, 0.4, 0.7)):
        trajectory.update_metrics(state, {"eval_loss": loss})
    known = KNOWNModel(KNOWNConfig(num_states=3))
    result = predict_overflowed_weights(trajectory, known, output_dir=tmp_path / "out")
    assert result.warnings == forgetting_warnings([0.5, 0.4, 0.7])
    trivial = predict_overflowed_weights(trajectory, predictor="shrink", output_dir=tmp_path / "other")
    assert trivial.warnings == []
    assert "Θ1 (0.4) is below that of Θ0 (0.5)" in (tmp_path / "out" / "README.md").read_text()
    for state, loss in enumerate((0.5, 0.6, 0.3)):
        metrics = {"eval_loss": 0.4 + state, "eval_other_set_loss": loss, "eval_lossy_accuracy": 0.5}
        trajectory.update_metrics(state, metrics)
    result = predict_overflowed_weights(trajectory, known, output_dir=tmp_path / "out", overwrite=True)
    assert result.warnings == forgetting_warnings([0.5, 0.6, 0.3], "eval_other_set_loss")
    card = (result.path / "README.md").read_text()
    assert card.count("did not forget") == 1 and "eval_other_set_loss of Θ2 (0.3)" in card


def test_custom_code_gives_a_warning(record_states, tmp_path):
    model = make_resnet()
    model.config.auto_map = {"AutoConfig": "configuration_my.MyConfig", "AutoModel": "modeling_my.MyModel"}
    (tmp_path / "secret/base").mkdir(parents=True)
    model.config._name_or_path = str(tmp_path / "secret/base")
    trajectory = record_states(model, num_states=2)
    result = predict_overflowed_weights(trajectory, predictor="shrink", output_dir=tmp_path / "out")
    assert sorted(path.name for path in result.path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    (text,) = result.warnings
    assert "(configuration_my.py, modeling_my.py)" in text and "from base and" in text
    card = (result.path / "README.md").read_text()
    assert "configuration_my.py, modeling_my.py" in card and "secret" not in card


@pytest.mark.parametrize(
    ("configs", "files"),
    [
        ([{}, [], {"auto_map": None}, {"auto_map": {"AutoModel": 1}}], []),
        ([{"auto_map": {"AutoModel": "someone/base--modeling_my.MyModel"}}], []),  # fetched from there
        ([{"auto_map": {"AutoTokenizer": ["code.tokens.Mine", None]}}], ["code.tokens.py"]),
        ([{"auto_map": {"AutoModel": "b.B"}}, {"auto_map": {"AutoProcessor": "a.A"}}], ["a.py, b.py"]),
    ],
)
def test_code_is_missing_unless_a_repository_is_named(configs, files):
    warnings = code_warnings(configs, None)
    assert len(warnings) == len(files)
    assert all(f"({names})" in text for names, text in zip(files, warnings, strict=True))
