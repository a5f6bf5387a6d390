import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_images
from torch import nn

from know_hf.evaluation import Landscape, landscape
from know_hf.evaluation.landscape import loss_landscape


class Weights(nn.Module):
    """A module with given weights."""

    def __init__(self, values):
        super().__init__()
        values = torch.tensor(values, dtype=torch.float32)
        self.first = nn.Parameter(values[:2])
        self.second = nn.Parameter(values[2:].reshape(1, -1))

    def values(self):
        return torch.cat([self.first, self.second[0]]).double()


THETA = np.array([1.0, 2.0, 3.0, 4.0])
# differences to Θ0 along (3/5, 4/5, 0, 0), up to a length of 5, and across it
ALONG, ACROSS = np.array([0.6, 0.8, 0, 0]), np.array([-0.8, 0.6, 0, 0])
STATES = [THETA, THETA + 2 * ALONG + ACROSS, THETA + 5 * ALONG - 0.5 * ACROSS]


def squared_distance(model):
    return float((model.values() - torch.tensor(THETA)).square().sum())


def compute(states=STATES, arms=None, loss=squared_distance, **options):
    models = [partial(Weights, state) for state in states]
    return loss_landscape(models, {n: partial(Weights, a) for n, a in (arms or {}).items()}, loss, **options)


def coordinates(result):
    return np.array([(point["x"], point["y"]) for point in result["points"]])


def test_the_plane_contains_the_states_and_keeps_distances():
    result = compute(arms={"away": THETA + ALONG + np.array([0, 0, 3.0, 4.0])}, resolution=5)
    points = {point["name"]: point for point in result["points"]}
    assert [point["kind"] for point in result["points"]] == ["state"] * 3 + ["arm"]
    assert (points["Θ0"]["x"], points["Θ0"]["y"], points["Θ0"]["loss"]) == (0, 0, 0)
    for k, state in enumerate(STATES):
        point = points[f"Θ{k}"]
        assert np.hypot(point["x"], point["y"]) == pytest.approx(np.linalg.norm(state - THETA), rel=1e-5)
        assert point["off_plane"] == pytest.approx(0, abs=1e-3)
        assert point["loss"] == pytest.approx(((state - THETA) ** 2).sum(), rel=1e-5)
    away = points["away"]
    assert (np.hypot(away["x"], away["y"]), away["off_plane"], away["loss"]) == pytest.approx((1, 5, 26), rel=1e-5)
    assert points["Θ2"]["x"] > 0
    assert sum(result["explained"]) == pytest.approx(1, rel=1e-6) and result["explained"][0] > 0.9


def test_the_grid_has_the_loss_of_its_coordinates_for_any_size_of_pieces(monkeypatch):
    result = compute(resolution=7)
    expected = np.square(result["y"])[:, None] + np.square(result["x"])[None]
    np.testing.assert_allclose(result["loss"], expected, rtol=1e-4, atol=1e-4)
    x, y = coordinates(result).T
    assert (result["x"][0], result["x"][-1]) == pytest.approx((x.min() - 0.25 * np.ptp(x), x.max() + 0.25 * np.ptp(x)))
    assert np.ptp(y) < 0.5 * np.ptp(x), "the points are flatter than the grid may be"
    assert np.ptp(result["y"]) == pytest.approx(0.5 * np.ptp(result["x"]))
    assert np.mean(result["y"]) == pytest.approx((y.min() + y.max()) / 2)
    monkeypatch.setattr(landscape, "_PIECE", 3)
    in_pieces = compute(resolution=7)
    np.testing.assert_allclose(in_pieces["loss"], result["loss"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(in_pieces["x"], result["x"], rtol=1e-6)


def test_the_directions_are_those_of_a_singular_value_decomposition():
    states = np.random.RandomState(0).randn(5, 40)
    result, differences = compute(states, loss=lambda model: 0.0, resolution=2), states - states[0]
    _, values, rows = np.linalg.svd(differences, full_matrices=False)
    np.testing.assert_allclose(np.abs(coordinates(result)), np.abs(differences @ rows[:2].T), atol=1e-4)
    assert result["explained"] == pytest.approx((values[:2] ** 2 / (values**2).sum()).tolist(), rel=1e-5)


def test_a_loss_that_is_not_finite_is_none():
    result = compute(loss=lambda model: float("nan" if model.values()[0] > 1 else 1), resolution=3)
    flat = [value for row in result["loss"] for value in row]
    assert None in flat and 1.0 in flat
    json.dumps(result, allow_nan=False)


def test_batch_norm_is_recalibrated_at_every_point(trajectory):
    images, means = make_images(16, seed=3)[:], []

    def compute_loss(model):
        means.append(tuple(model.resnet.embedder.embedder.normalization.running_mean.tolist()))
        assert not model.training and not torch.is_grad_enabled()
        return model(**images).loss

    def average():
        model = trajectory.load_model(0)
        for name, parameter in model.named_parameters():
            parameter.data.copy_(trajectory.history(name).mean(dim=0))
        return model

    states = [partial(trajectory.load_model, k) for k in range(trajectory.num_states)]
    batches = [{"pixel_values": images["pixel_values"]}]
    result = loss_landscape(states, {"average": average}, compute_loss, recalibrate_with=batches, resolution=3)
    assert [point["name"] for point in result["points"]] == ["Θ0", "Θ1", "Θ2", "Θ3", "Θ4", "average"]
    *of_states, of_average = coordinates(result)
    assert of_average == pytest.approx(np.mean(of_states, axis=0), rel=1e-3, abs=1e-4)
    assert len(means) == len(set(means)) == 6 + 9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compute(STATES[:2]), "three states, got 2"),
        (lambda: compute([THETA, THETA + ALONG, THETA + 2 * ALONG]), "on a line"),
        (lambda: compute([THETA] * 3), "on a line"),
        (lambda: compute(arms={"other": np.ones(5)}), "other has 5 weights, .* 4"),
        (lambda: Landscape(resolution=1), "resolution=1"),
        (lambda: Landscape(num_examples=0), "num_examples=0"),
    ],
)
def test_invalid_planes_and_options_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
