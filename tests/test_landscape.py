import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_images
from torch import nn

from know_hf.evaluation import loss_landscape as landscape
from know_hf.evaluation.loss_landscape import loss_landscape
from know_hf.predict import predict_overflowed_weights
from know_hf.predictors import Average


class Weights(nn.Module):
    """A module whose weights are given."""

    def __init__(self, values):
        super().__init__()
        values = torch.tensor(values, dtype=torch.float32)
        self.first = nn.Parameter(values[:2])
        self.second = nn.Parameter(values[2:].reshape(1, -1))

    def values(self):
        return torch.cat([self.first, self.second[0]]).double()


def maker(values):
    return lambda: Weights(values)


CENTRE = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)


def squared_distance(model):
    return float((model.values() - CENTRE).square().sum())


THETA = np.array([1.0, 2.0, 3.0, 4.0])
# differences to Θ0 of length 5 along (3/5, 4/5, 0, 0), and of length 2 across it
ALONG, ACROSS = np.array([0.6, 0.8, 0, 0]), np.array([-0.8, 0.6, 0, 0])
STATES = [THETA, THETA + 2 * ALONG + ACROSS, THETA + 5 * ALONG - 0.5 * ACROSS]


def test_the_plane_is_that_of_the_states_and_distances_are_kept():
    away = THETA + ALONG + np.array([0, 0, 3.0, 4.0])
    found = loss_landscape([maker(s) for s in STATES], {"away": maker(away)}, squared_distance, resolution=5)
    points = {point.name: point for point in found.points}
    assert [point.kind for point in found.points] == ["state"] * 3 + ["arm"]
    assert (points["Θ0"].x, points["Θ0"].y, points["Θ0"].loss) == (0, 0, 0)
    for k, state in enumerate(STATES):
        point = points[f"Θ{k}"]
        assert np.hypot(point.x, point.y) == pytest.approx(np.linalg.norm(state - THETA), rel=1e-5)
        assert point.off_plane == pytest.approx(0, abs=1e-3)
        assert point.loss == pytest.approx(((state - THETA) ** 2).sum(), rel=1e-5)
    assert np.hypot(points["away"].x, points["away"].y) == pytest.approx(1, rel=1e-5)
    assert points["away"].off_plane == pytest.approx(5, rel=1e-5)
    assert points["away"].loss == pytest.approx(26, rel=1e-5)
    assert points["Θ2"].x > 0
    assert sum(found.explained) == pytest.approx(1, rel=1e-6)
    assert found.explained[0] > 0.9


def test_the_loss_of_the_grid_is_that_of_its_places():
    found = loss_landscape([maker(s) for s in STATES], {}, squared_distance, resolution=7, margin=0.5)
    expected = np.square(found.y)[:, None] + np.square(found.x)[None]
    np.testing.assert_allclose(found.loss, expected, rtol=1e-4, atol=1e-4)
    places = np.array([point.x for point in found.points])
    assert found.x[0] == pytest.approx(places.min() - 0.5 * np.ptp(places))
    assert found.x[-1] == pytest.approx(places.max() + 0.5 * np.ptp(places))
    others = np.array([point.y for point in found.points])
    assert np.ptp(others) < 0.5 * np.ptp(places), "flatter than half as high as wide"
    assert np.ptp(found.y) == pytest.approx(0.5 * np.ptp(found.x))
    assert np.mean(found.y) == pytest.approx((others.min() + others.max()) / 2)


def test_pieces_change_nothing(monkeypatch):
    whole = loss_landscape([maker(s) for s in STATES], {}, squared_distance, resolution=3).to_dict()
    monkeypatch.setattr(landscape, "_PIECE", 3)
    parts = loss_landscape([maker(s) for s in STATES], {}, squared_distance, resolution=3).to_dict()
    np.testing.assert_allclose(parts["loss"], whole["loss"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(parts["x"], whole["x"], rtol=1e-6)


def test_the_gram_matrix_gives_the_directions_of_a_singular_value_decomposition():
    random = np.random.RandomState(0)
    states = [random.randn(40) for _ in range(5)]
    found = loss_landscape([maker(s) for s in states], {}, lambda model: 0.0, resolution=2)
    differences = np.stack(states) - states[0]
    _, values, rows = np.linalg.svd(differences, full_matrices=False)
    places = np.abs(differences @ rows[:2].T)
    np.testing.assert_allclose(np.abs([(p.x, p.y) for p in found.points]), places, atol=1e-4)
    assert found.explained == pytest.approx((values[:2] ** 2 / (values**2).sum()).tolist(), rel=1e-5)


def test_a_loss_that_is_not_finite_is_none_and_the_rest_json():
    found = loss_landscape(
        [maker(s) for s in STATES], {}, lambda model: float("nan" if model.values()[0] > 1 else 1), resolution=3
    )
    flat = [value for row in found.loss for value in row]
    assert None in flat and 1.0 in flat
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_trajectory_and_its_predictions_with_statistics_of_every_point(trajectory, tmp_path):
    images = make_images(16, seed=3)[:]
    result = predict_overflowed_weights(
        trajectory, predictor=Average(), norm="predict", output_dir=tmp_path / "out", card=False
    )
    seen = []

    def compute_loss(model):
        seen.append(model.resnet.embedder.embedder.normalization.running_mean.clone())
        assert not model.training and not torch.is_grad_enabled()
        return model(**images).loss

    states = [partial(trajectory.load_model, k) for k in range(trajectory.num_states)]
    found = loss_landscape(
        states,
        {"average": result.load_model},
        compute_loss,
        recalibrate_with=[{"pixel_values": images["pixel_values"]}],
        resolution=3,
    )
    assert [point.name for point in found.points] == ["Θ0", "Θ1", "Θ2", "Θ3", "Θ4", "average"]
    points = {point.name: point for point in found.points}
    others = [points[f"Θ{k}"] for k in range(5)]
    assert points["average"].x == pytest.approx(np.mean([point.x for point in others]), rel=1e-3)
    assert points["average"].y == pytest.approx(np.mean([point.y for point in others]), rel=1e-3, abs=1e-4)
    assert len(seen) == 6 + 9
    assert len({tuple(mean.tolist()) for mean in seen}) == 15


@pytest.mark.parametrize(
    ("states", "arms", "options", "message"),
    [
        (STATES[:2], {}, {}, "a plane needs three different states, got 2"),
        ([THETA, THETA + ALONG, THETA + 2 * ALONG], {}, {}, "the states lie on a line"),
        ([THETA] * 3, {}, {}, "the states lie on a line"),
        (STATES, {"other": np.ones(5)}, {}, "other has 5 weights, Θ0 has 4: it is of another model"),
        (STATES, {}, {"resolution": 1}, "resolution=1: a grid needs at least 2"),
    ],
)
def test_what_gives_no_plane_is_an_error(states, arms, options, message):
    with pytest.raises(ValueError, match=message):
        loss_landscape([maker(s) for s in states], {n: maker(a) for n, a in arms.items()}, squared_distance, **options)
