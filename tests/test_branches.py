"""Predictions from branches and from the start: planted noise and bias of which the best error can be computed."""

import pytest
import torch

from know_hf.predictors.branches import (
    branch_average,
    factorise,
    jackknife,
    james_stein,
    james_stein_average,
    model_stock,
    shrunken_jackknife,
    spectral_filter,
)
from know_hf.predictors.start_interpolation import move_from_start

SIZE = 100_000


def planted(count: int, signal: float, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list]:
    """A start, the true weights `signal` away per weight, and branches with independent noise around them."""
    generator = torch.Generator().manual_seed(seed)

    def random() -> torch.Tensor:
        return torch.randn(SIZE, generator=generator)

    start = random()
    truth = start + signal * random()
    return start, truth, [truth + noise * random() for _ in range(count)]


def error(values: torch.Tensor, truth: torch.Tensor) -> float:
    """Squared error per weight."""
    return float((values - truth).square().mean())


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(("signal", "noise"), [(1.0, 0.5), (1.0, 1.0), (0.3, 1.0)])
def test_stock_and_james_stein_beat_the_average_by_the_computed_amount(count, signal, noise):
    start, truth, branches = planted(count, signal, noise)
    plain, variance = noise**2 / count, signal**2
    best = variance / (variance + plain)
    assert error(branch_average(branches), truth) == pytest.approx(plain, rel=0.02)
    for method in (model_stock, james_stein_average):
        values = method(start, branches)
        assert error(values, truth) == pytest.approx(plain * best, rel=0.03)
        update = branch_average(branches) - start
        ratio = float((values - start) @ update / update.square().sum())
        assert ratio == pytest.approx(best, abs=0.01)


def test_branches_without_a_common_update_stay_at_the_start():
    start, _, branches = planted(2, 0.0, 1.0)
    for method in (model_stock, james_stein_average):
        assert error(method(start, branches), start) < 1e-3
    opposite = [start + 1, start - 1]
    assert torch.equal(model_stock(start, opposite), start)
    assert torch.equal(model_stock(start, [start, start + 1]), start)  # a branch that did not move


def test_model_stock_by_hand():
    start = torch.zeros(2)
    # cosine 0.6, so t = 2 · 0.6 / 1.6 = 0.75 of the mean (0.8, 0.4)
    moved = model_stock(start, [torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])])
    torch.testing.assert_close(moved, torch.tensor([0.6, 0.3]))
    # cosines 1, 0 and 0: mean 1/3, so t = 3 · 1/3 / (5/3) = 0.6
    moved = model_stock(start, [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])])
    torch.testing.assert_close(moved, torch.tensor([0.4, 0.6]))
    same = torch.tensor([0.3, -2.0])
    torch.testing.assert_close(model_stock(start, [same, same]), same)


def test_james_stein_factor():
    assert james_stein(torch.tensor([3.0, 0.0, 4.0, 0.0]), noise=10.0) == pytest.approx(1 - 0.5 * 10 / 25)
    assert james_stein(torch.tensor([1.0, 0.0, 0.0]), noise=30.0) == 0.0
    assert james_stein(torch.tensor([1.0, 2.0]), noise=1.0) == 1.0  # no gain in two dimensions
    assert james_stein(torch.zeros(5), noise=0.0) == 1.0


def test_the_jackknife_removes_a_bias_of_one_over_n_exactly():
    truth, bias, n = torch.tensor([1.0, -2.0]), torch.tensor([8.0, 4.0]), 64

    def trained(examples: float) -> torch.Tensor:
        return truth + bias / examples

    for fraction in (0.5, 0.25, 0.75):
        assert torch.allclose(jackknife(trained(n), [trained(fraction * n)] * 2, fraction), truth, rtol=1e-6)


def test_the_jackknife_of_a_quadratic_plug_in_estimator_is_unbiased():
    """The squared mean has the bias σ²/n. From two halves, what is left is the product of two independent means."""
    data = torch.randn(40_000, 8, generator=torch.Generator().manual_seed(0)) + 1.0
    halves = [data[:, :4].mean(dim=1), data[:, 4:].mean(dim=1)]
    plug_in, of_halves = data.mean(dim=1).square(), [half.square() for half in halves]
    corrected = jackknife(plug_in, of_halves)
    torch.testing.assert_close(corrected, halves[0] * halves[1])
    assert float(plug_in.mean()) == pytest.approx(1 + 1 / 8, abs=0.012)
    assert float(corrected.mean()) == pytest.approx(1.0, abs=0.012)


def test_the_shrunken_jackknife_keeps_a_bias_and_drops_noise():
    bias = 0.1 * torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    for scale, noise in [(1.0, 0.01), (0.0, 0.1), (1.0, 0.1)]:
        generator = torch.Generator().manual_seed(2)
        noises = [noise * torch.randn(SIZE, generator=generator) for _ in range(3)]
        theta0 = scale * bias + noises[0] / 2**0.5  # as noisy as the mean of the halves
        halves = [2 * scale * bias + of_half for of_half in noises[1:]]
        shrunken = error(shrunken_jackknife(theta0, halves), torch.zeros(SIZE))
        plain, naive = error(jackknife(theta0, halves), torch.zeros(SIZE)), error(theta0, torch.zeros(SIZE))
        assert shrunken <= min(plain, naive) * 1.01
        if scale == 1.0 and noise == 0.01:  # the correction is real: nearly all of the bias goes
            assert shrunken < 0.05 * naive


def test_the_spectral_filter_leaves_the_computed_error():
    rows, columns, rank, noise = 120, 80, 2, 0.05
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(rows, columns, generator=generator)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    truth = start + left @ right
    branches = [truth + noise * torch.randn(rows, columns, generator=generator) for _ in range(2)]
    plain = noise**2 * rows * columns / 2
    assert error(branch_average(branches), truth) * truth.numel() == pytest.approx(plain, rel=0.03)
    filtered = error(spectral_filter(start, branches), truth) * truth.numel()
    # common directions: σ² r (m + n) / 2; the others: half of them by chance positive, σ² / 2 each, in two halves
    expected = noise**2 * (rank * (rows + columns) / 2 + min(rows, columns) / 4)
    assert filtered == pytest.approx(expected, rel=0.15)
    assert filtered < 0.1 * plain


def test_the_spectral_filter_has_no_directions_beyond_the_rank_of_an_update():
    generator = torch.Generator().manual_seed(0)
    start, left, right = (torch.randn(*shape, generator=generator) for shape in ((20, 30), (20, 1), (1, 30)))
    others = torch.randn(20, 30, generator=generator)
    assert torch.equal(spectral_filter(start, [start, start + others]), start)  # the first did not move
    u, v = left / left.norm(), right / right.norm()
    shared = spectral_filter(start, [start + left @ right, start + 3 * u @ v])
    torch.testing.assert_close(shared, start + (left.norm() * right.norm() + 3) / 2 * u @ v)
    one_sided = spectral_filter(start, [start + 2 * u @ v, start + others])
    along = (u.T @ others @ v.T).clamp(min=0)
    kept, _, directions = torch.linalg.svd(others, full_matrices=False)
    values = ((kept.T @ (2 * u @ v)) * directions).sum(dim=1).clamp(min=0)
    torch.testing.assert_close(one_sided, start + (along * u @ v + kept * values @ directions) / 2)


def test_the_spectral_filter_of_equal_branches_and_of_vectors():
    start, update = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(spectral_filter(start, [start + update] * 3), start + update)
    vector = torch.tensor([1.0, 2.0])
    assert spectral_filter(torch.zeros(2), [vector, 3 * vector]).tolist() == [2.0, 4.0]
    opposite = spectral_filter(start, [start + update, start - update])
    torch.testing.assert_close(opposite, start)


def test_products_are_factorised_at_a_rank():
    a, b = torch.randn(3, 20), torch.randn(30, 3)
    first, second = factorise(b @ a, 3)
    assert first.shape == (3, 20) and second.shape == (30, 3)
    torch.testing.assert_close(second @ first, b @ a, rtol=1e-4, atol=1e-4)
    one, other = factorise(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 1)
    torch.testing.assert_close(other @ one, torch.diag(torch.tensor([3.0, 0.0, 0.0])))
    with pytest.raises(ValueError, match="rank"):
        factorise(torch.eye(3), 4)


def test_movement_from_the_start():
    start, theta0 = torch.tensor([1.0, 0.1]), torch.tensor([3.0, 0.1])
    assert move_from_start(start, theta0, 0.5).tolist() == [2.0, pytest.approx(0.1)]
    assert torch.equal(move_from_start(start, theta0, 1.0), theta0)
    assert move_from_start(start, theta0, 1.5)[0] == 4.0
    assert [float(move_from_start(start, theta0, 0.5, 0.5, depth)[0]) for depth in (0.0, 0.5, 1.0)] == [2.0, 2.5, 3.0]
    with pytest.raises(ValueError, match="scale"):
        move_from_start(start, theta0, float("nan"))


def test_too_few_branches_are_refused():
    vector = torch.zeros(3)
    for method in (model_stock, james_stein_average, spectral_filter, shrunken_jackknife):
        with pytest.raises(ValueError, match="at least 2 branches"):
            method(vector, [vector])
    with pytest.raises(ValueError, match="at least 1 branch"):
        branch_average([])
    with pytest.raises(ValueError, match="fraction"):
        jackknife(vector, [vector], 1.0)
