"""The variant "combination" of KNOWN: its exact properties, and the controls as special cases."""

import math

import pytest
import torch

from know_hf import KNOWNConfig, KNOWNModel
from know_hf.known import TensorContext, combine, tensor_basis
from know_hf.known.combination_network import ELEMENTS, STATE_FEATURES, TENSOR_FEATURES
from know_hf.known.singular_part import singular_part
from know_hf.predictors import TensorSnapshots, get_predictor, shrunken_jackknife

SHAPE = (24, 30)
CONTEXT = TensorContext("conv", 0.4, True, (1.0, 0.5, 0.25), (100, 50, 25), (0.1, 0.05, 0.02), (0.4, 0.5, 0.7))


def snapshots(shape: tuple[int, ...] = SHAPE, **counts: int) -> dict[str, object]:
    """Random snapshots of one tensor, so many of each kind."""
    generator = torch.Generator().manual_seed(0)
    theta0 = torch.randn(shape, generator=generator)

    def moved() -> torch.Tensor:
        return theta0 + 0.3 * torch.randn(shape, generator=generator)

    start = moved() if counts.get("start", 1) else None
    several = {kind: [moved() for _ in range(counts.get(kind, 3))] for kind in ("states", "tail", "branches")}
    return {"theta0": theta0, "start": start, "origin": start, **several}


def changed(function, given: dict[str, object]) -> dict[str, object]:
    """Apply a function to every snapshot."""

    def of(value: object) -> object:
        if isinstance(value, list):
            return [function(one) for one in value]
        return None if value is None else function(value)

    return {kind: of(value) for kind, value in given.items()}


@pytest.fixture
def model() -> KNOWNModel:
    torch.manual_seed(0)
    model = KNOWNModel(KNOWNConfig(variant="combination"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def residual(model: KNOWNModel, given: dict[str, object]) -> torch.Tensor:
    basis = tensor_basis(**given, context=CONTEXT)
    assert basis.tensor_features.isfinite().all() and basis.state_features.isfinite().all()
    return combine(basis.elements, model.coefficients(basis.tensor_features, basis.state_features))


def test_size_and_zero_at_first():
    fresh = KNOWNModel(KNOWNConfig(variant="combination"))
    assert fresh.num_parameters() < 2000
    assert not residual(fresh, snapshots()).any()


@pytest.mark.parametrize("shape", [(7,), SHAPE, (6, 5, 3, 3)])
def test_a_constant_history_gives_zero(model, shape):
    given = snapshots(shape)
    assert residual(model, given).any()
    assert not residual(model, changed(lambda _: given["theta0"], given)).any()
    assert not residual(model, changed(torch.zeros_like, given)).any()


@pytest.mark.parametrize("shape", [(7,), SHAPE, (6, 5, 3, 3)])
@pytest.mark.parametrize("factor", [0.5, 2.0**20, 2.0**-30, -4.0])
def test_scaling_a_history_scales_the_residual_exactly(model, shape, factor):
    given = snapshots(shape)
    assert torch.equal(residual(model, changed(lambda one: factor * one, given)), factor * residual(model, given))


def test_scaling_by_other_factors_and_permuting_neurons_agree_within_rounding(model):
    given = snapshots()
    expected = residual(model, given)
    torch.testing.assert_close(residual(model, changed(lambda one: one * 0.3, given)), 0.3 * expected)
    rows, columns = torch.randperm(SHAPE[0]), torch.randperm(SHAPE[1])
    permuted = residual(model, changed(lambda one: one[rows][:, columns].clone(), given))
    torch.testing.assert_close(permuted, expected[rows][:, columns], rtol=1e-4, atol=1e-5)


def test_permuting_channels_of_a_convolution(model):
    given = snapshots((8, 6, 3, 3))
    out, into = torch.randperm(8), torch.randperm(6)
    permuted = residual(model, changed(lambda one: one[out][:, into].clone(), given))
    torch.testing.assert_close(permuted, residual(model, given)[out][:, into], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "counts",
    [
        *({"states": count, "start": 0, "tail": 0, "branches": 0} for count in (1, 2, 7)),
        {"states": 0, "tail": 0, "branches": 0},
        {"states": 0, "start": 0, "branches": 0},
        {"states": 0, "start": 0, "tail": 0, "branches": 1},
        {"states": 2, "tail": 1, "branches": 2},
    ],
)
def test_any_number_of_snapshots(model, counts):
    given = snapshots(**counts)
    basis = tensor_basis(**given)
    expected = {"theta0", "filtered", *(f"state-{k + 1}" for k in range(len(given["states"])))}
    expected |= {name for name, value in (("start", given["start"]), ("tail", given["tail"])) if value is not None}
    expected |= {"branches"}
    expected -= {name for name in ("tail", "branches") if not given[name]}
    assert basis.elements.keys() == expected
    assert basis.state_features.shape == (len(given["states"]), len(STATE_FEATURES))
    for name in ("start", "tail", "branches"):
        present = given[name] is not None and len(given[name]) > 0
        assert basis.tensor_features[TENSOR_FEATURES.index(f"has_{name}")] == present
    assert residual(model, given).any()


def test_bfloat16_agrees_with_float32_within_rounding(model):
    given = snapshots()
    rounded = changed(lambda one: one.bfloat16(), given)
    expected = residual(model, changed(torch.Tensor.float, rounded))
    assert torch.equal(residual(model, rounded), expected)
    torch.testing.assert_close(residual(model, given), expected, rtol=0.03, atol=0.03)


def test_coefficients_are_bounded():
    model = KNOWNModel(KNOWNConfig(variant="combination", largest_coefficient=0.5))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 9.0)
    coefficients = model.coefficients(torch.ones(len(TENSOR_FEATURES)), torch.ones(4, len(STATE_FEATURES)))
    assert list(coefficients) == [*ELEMENTS, "state-1", "state-2", "state-3", "state-4"]
    assert all(0.49 < value <= 0.5 for value in coefficients.values())


def test_statistics_have_the_expected_values():
    theta0 = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    direction = torch.tensor([[0.0, 0.0], [0.3, 0.4]])
    basis = tensor_basis(
        theta0,
        [theta0 + direction, theta0 + 2 * direction],
        theta0 - 2 * direction,
        branches=[theta0 + direction, theta0 - 3 * direction],
        context=CONTEXT,
    )
    values = dict(zip(TENSOR_FEATURES, basis.tensor_features.tolist(), strict=True))
    expected = {
        **{"role_conv": 1, "role_fc": 0, "depth": 0.4, "is_normalised": 1, "has_start": 1, "has_tail": 0},
        **{"moved": math.log10(1 / 5) / 2, "start_cosine": 0, "norm_growth": math.log10(5 / 26**0.5) / 2},
        **{"states_cosine": 1, "states_moved": math.log10(0.75) / 2, "ratio": 0.5, "steps": 1},
        **{"branches_cosine": -1, "branches_moved": math.log10(0.5) / 2, "branches_agreement": -1},
        # the branches lie 1 to either side of their mean, which is 1 from Θ0 along a line of length 0.5
        **{"branches_noise": math.log10(1 / 0.5) / 2, "branches_shrinkage": 0},
        **{"eval_loss": math.log10(0.4) / 2, "train_loss": -0.5, "loss_gap": math.log10(4) / 2},
        **{"is_matrix": 1, "stable_rank": 0},
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    first, second = ({n: float(v) for n, v in zip(STATE_FEATURES, row, strict=True)} for row in basis.state_features)
    assert first["cosine"] == pytest.approx(1) and first["moved"] == pytest.approx(math.log10(0.5) / 2)
    assert second["turn"] == pytest.approx(1) and second["loss_rise"] == pytest.approx(math.log10(0.7 / 0.4) / 2)


def test_the_shrinkage_of_branches_is_that_of_the_jackknife():
    theta0 = torch.randn(SHAPE)
    branches = [theta0 + 0.2 + 0.1 * torch.randn(SHAPE) for _ in range(2)]
    basis = tensor_basis(theta0, branches=branches)
    factor = float(basis.tensor_features[TENSOR_FEATURES.index("branches_shrinkage")])
    residual = shrunken_jackknife(theta0, branches) - theta0
    assert 0.5 < factor < 1
    torch.testing.assert_close(combine(basis.elements, {"branches": -factor}), residual)


def test_the_singular_part_of_a_planted_signal():
    generator = torch.Generator().manual_seed(0)
    signal = 5 * torch.randn(120, 2, generator=generator) @ torch.randn(2, 90, generator=generator) / 90**0.5
    noisy = signal + 0.1 * torch.randn(120, 90, generator=generator)
    kept, stable_rank = singular_part(noisy, float(noisy.norm()))
    assert stable_rank == pytest.approx(float(noisy.norm() / torch.linalg.matrix_norm(noisy, 2)) ** 2, rel=1e-4)
    error, before = (float((value - signal).square().sum()) for value in (kept, noisy))
    assert error < 0.06 * before  # 2 · (120 + 90) of 120 · 90 numbers
    noise = torch.randn(120, 90, generator=generator)
    assert float(singular_part(noise, float(noise.norm()))[0].norm()) < 0.2 * float(noise.norm())
    assert not singular_part(torch.zeros(4, 4), 0.0)[0].any()


@pytest.mark.parametrize(
    ("name", "options", "coefficients"),
    [
        ("start_interpolation", {"scale": 0.5}, {"start": -0.5}),
        ("start_interpolation", {"scale": 1.5}, {"start": 0.5}),
        ("branch_average", {}, {"branches": 1.0}),
    ],
)
def test_controls_of_snapshots_are_special_cases(name, options, coefficients):
    given = snapshots()
    value = get_predictor(name, **options).tensor(TensorSnapshots(**given))
    torch.testing.assert_close(given["theta0"] + combine(tensor_basis(**given).elements, coefficients), value)


@pytest.mark.parametrize(
    ("name", "options", "coefficients"),
    [
        ("tail_average", {}, {"tail": 3 / 4}),
        ("shrink", {"factor": 0.9}, {"theta0": 0.1}),
        ("average", {}, dict.fromkeys(("state-1", "state-2", "state-3"), 1 / 4)),
        ("task_vector", {"scale": 0.7}, {"state-3": -0.7}),
        ("task_vector", {"scale": -0.25, "since": 1}, {"state-1": 0.25}),
    ],
)
def test_controls_of_histories_are_special_cases(name, options, coefficients):
    given = snapshots()
    several = [*given["tail"]] if name == "tail_average" else [*reversed(given["states"])]
    history = torch.stack([*several, given["theta0"]]).flatten(1).T
    expected = get_predictor(name, **options).residual(history, "fc").reshape(SHAPE)
    torch.testing.assert_close(combine(tensor_basis(**given).elements, coefficients), expected)


def test_histories_of_single_weights_are_refused(model):
    with pytest.raises(ValueError, match="combination"):
        model(torch.zeros(3, 5), "fc")
    with pytest.raises(ValueError, match="reference"):
        KNOWNModel(KNOWNConfig()).coefficients(torch.zeros(len(TENSOR_FEATURES)), torch.zeros(0, len(STATE_FEATURES)))
