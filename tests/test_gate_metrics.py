"""What a gate compares: losses, calibrated losses or error rates."""

import pytest
import torch
from conftest import make_images, make_resnet
from datasets import Dataset
from doubles.constant_predictor import Constant
from test_gate import bert, through
from transformers import ResNetForImageClassification

from know_hf.prediction import Gate
from know_hf.predictors import Shrink
from know_hf.trajectory import WeightTrajectory


def test_the_metric_accuracy_compares_error_rates(trajectory, tmp_path):
    dataset = make_images(40, seed=3)
    gate = Gate(dataset=dataset, batch_size=4, candidates=["average"], metric="accuracy")
    model = trajectory.load_model(4).eval()
    with torch.no_grad():
        is_wrong = model(dataset["pixel_values"][:]).logits.argmax(-1) != dataset["labels"][:]
    assert gate.losses(model) == is_wrong.reshape(10, 4).double().mean(1).tolist()
    _, decided = through(gate, trajectory, tmp_path)
    assert decided.metric == "error rate (1 - accuracy)"
    with torch.no_grad():
        predicted = trajectory.load_model().eval()(dataset["pixel_values"][:]).logits.argmax(-1)
    assert decided.scores["Θ0"] == pytest.approx(float((predicted != dataset["labels"][:]).double().mean()))
    pairs = Dataset.from_dict({"input_ids": [[1, 2]] * 10, "labels": [[0.0, 1.0]] * 10})
    with pytest.raises(ValueError, match=r"metric='accuracy'.*one class"):
        Gate(dataset=pairs, batch_size=1, metric="accuracy").losses(bert())
    with pytest.raises(
        ValueError, match=r"one of calibrated loss, validation loss, accuracy with a dataset, got 'f1'"
    ):
        Gate(dataset=dataset, metric="f1")


def test_becoming_less_confident_lowers_the_loss_but_not_the_calibrated_loss(tmp_path):
    dataset, model = make_images(200, seed=3), make_resnet()
    trajectory = WeightTrajectory.create(tmp_path / "overconfident")
    for size, factor in ((2, 300.0), (1, 0.1)):  # Θ1 has the outputs of Θ0, divided by 10
        with torch.no_grad():
            model.classifier[1].weight.mul_(factor)
            model.classifier[1].bias.zero_()
        trajectory.record(model, num_examples=size, steps=1)
    for metric, chosen in (("validation loss", "Θ1"), ("accuracy", "Θ0"), (None, "Θ0")):
        gate = Gate(dataset=dataset, batch_size=4, candidates=[1], metric=metric)
        _, decided = through(gate, trajectory, tmp_path / str(metric), Constant(0.0), steps=1)
        assert decided.chosen == chosen
    assert decided.metric == "calibrated loss" and "temperature scaling" in str(decided)
    assert decided.candidates[2].difference == pytest.approx(0, abs=1e-5)


class Weighted(ResNetForImageClassification):
    """A classifier whose classes count differently."""

    def forward(self, pixel_values, labels=None):
        outputs = super().forward(pixel_values)
        weight = torch.arange(1.0, self.config.num_labels + 1)
        outputs.loss = None if labels is None else torch.nn.functional.cross_entropy(outputs.logits, labels, weight)
        return outputs


def test_theta_0_decides_what_all_candidates_are_compared_by(trajectory, tmp_path):
    rows = [{"pixel_values": row["pixel_values"], "labels": 0} for row in make_images(160, seed=3)]
    rows[1]["labels"] = 1  # in batches of a single class, a weighted cross-entropy looks like any other
    gate = Gate(dataset=rows, batch_size=2, candidates=[1, 2, Shrink(1.0)], num_confirmed=3)
    _, decided = through(gate, trajectory, tmp_path, steps=1, model_class=Weighted)
    assert decided.metric == "validation loss"
    (same,) = (one for one in (*decided.candidates, *decided.screened) if one.name.startswith("Shrink"))
    assert same.difference == 0
