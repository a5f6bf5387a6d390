import numpy as np
import pytest

from know_hf.evaluation import holm, mean_and_interval, paired_difference
from know_hf.evaluation.comparison import compare_with_naive
from know_hf.evaluation.statistics import minimum_detectable_effect, variance_components


def test_interval_by_hand():
    estimate = mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # s = sqrt(2.5), t(0.975, 4) = 2.7764: 2.7764 * sqrt(2.5 / 5)
    assert estimate.mean == 3.0
    assert (estimate.high - 3.0, 3.0 - estimate.low) == pytest.approx((1.96324, 1.96324), abs=1e-5)
    assert estimate.half_width == pytest.approx(1.96324, abs=1e-5)
    values = [0.1, 0.4, 0.2]
    assert mean_and_interval(values, 0.99).half_width > 3 * mean_and_interval(values, 0.8).half_width


def test_paired_difference_by_hand():
    difference = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    # differences 1, 2, 3: t = 2 / (1 / sqrt(3)) = 3.4641 with 2 degrees of freedom, p = 1 - t / sqrt(t² + 2)
    assert difference.mean == 2.0
    assert difference.p_value == pytest.approx(1 - 3.4641016 / np.sqrt(14), abs=1e-7)
    assert difference.low == pytest.approx(2 - 4.302653 / np.sqrt(3), abs=1e-6)
    assert difference.effect_size == pytest.approx(2.0)  # mean 2, standard deviation 1
    assert difference.minimum_detectable == pytest.approx(minimum_detectable_effect(3))
    seeds, noise = np.linspace(0, 100, 20), np.random.RandomState(0).randn(20) * 0.1
    assert paired_difference(list(seeds + 1 + noise), list(seeds)).p_value < 1e-12  # no spread over seeds


@pytest.mark.parametrize("reference", [[0.5, 0.7, 0.9], [0.25, 0.45, 0.65], [0.2, 0.4, 0.6]])
def test_equal_differences_are_not_significant(reference):
    difference = paired_difference([0.5, 0.7, 0.9], reference)
    assert difference.p_value == 1.0 and difference.effect_size is difference.minimum_detectable is None
    assert difference.mean == pytest.approx(0.5 - reference[0])


def test_holm_by_hand_in_the_given_order():
    corrected = holm({"a": 0.03, "b": 0.005, "c": 0.04, "d": 0.9})
    assert corrected == pytest.approx({"a": 0.09, "b": 0.02, "c": 0.09, "d": 0.9})
    assert list(corrected) == ["a", "b", "c", "d"]
    assert holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_and_interval([1.0]), "two seeds"),
        (lambda: mean_and_interval([1.0, float("nan")]), "value 1 .* not finite"),
        (lambda: mean_and_interval([1.0, 2.0], level=95), "level .* 95"),
        (lambda: paired_difference([1.0, 2.0], [1.0, 2.0, 3.0]), "2 and 3"),
    ],
)
def test_invalid_values_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# n and d of a two-sided paired t-test at level 0.05 with a power of 80%, by G*Power 3.1
@pytest.mark.parametrize(("n", "expected"), [(10, 0.9960), (12, 0.8887), (30, 0.5292)])
def test_the_minimum_detectable_effect_agrees_with_tables(n, expected):
    assert minimum_detectable_effect(n) == pytest.approx(expected, abs=1e-4)
    assert minimum_detectable_effect(n, 0.05 / 18) > expected


def test_variance_components_by_hand():
    components = variance_components([[1.0, 3.0], [5.0, 7.0], [9.0, 11.0]])
    assert (components.within, components.draws) == (2, 2)
    assert components.between == 16 - 1 and components.share_of_draws == 1 / 16
    assert variance_components([[0.0, 2.0], [2.0, 0.0]]).between == 0
    assert variance_components([[1.0], [2.0]]) is None and variance_components([[1.0, 2.0]]) is None


def test_a_comparison_says_whether_draws_or_trajectories_vary_more():
    far, near = [[0.1, 0.3], [0.5, 0.7], [0.9, 1.1]], [[0.0, 1.0], [0.2, 0.9], [0.1, 1.1]]
    for arm, words in ((far, "6% is that of the draws: more seeds"), (near, "100% is that of the draws: more draws")):
        comparison = compare_with_naive({"naive": [[0.5, 0.5]] * 3, "shrink": arm}, ["shrink"])
        assert words in comparison.sensitivity()
