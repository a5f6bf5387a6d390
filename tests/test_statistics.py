import sys

import numpy as np
import pytest

from know_hf.evaluation import holm, mean_and_interval, paired_difference


def test_interval_by_hand():
    estimate = mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # s = sqrt(2.5), t(0.975, 4) = 2.7764: 2.7764 * sqrt(2.5 / 5)
    assert estimate.mean == 3.0
    assert estimate.high - 3.0 == pytest.approx(1.96324, abs=1e-5)
    assert 3.0 - estimate.low == pytest.approx(1.96324, abs=1e-5)
    assert estimate.half_width == pytest.approx(1.96324, abs=1e-5)


def test_a_higher_level_gives_a_wider_interval():
    values = [0.1, 0.4, 0.2]
    assert mean_and_interval(values, 0.99).half_width > 3 * mean_and_interval(values, 0.8).half_width


def test_paired_difference_by_hand():
    difference = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    # differences 1, 2, 3: t = 2 / (1 / sqrt(3)) = 3.4641 with 2 degrees of freedom, p = 1 - t / sqrt(t² + 2)
    assert difference.mean == 2.0
    assert difference.p_value == pytest.approx(1 - 3.4641016 / np.sqrt(14), abs=1e-7)
    assert difference.low == pytest.approx(2 - 4.302653 / np.sqrt(3), abs=1e-6)


def test_pairing_finds_what_the_spread_over_seeds_would_hide():
    seeds = np.linspace(0, 100, 20)
    noise = np.random.RandomState(0).randn(20) * 0.1
    assert paired_difference(list(seeds + 1 + noise), list(seeds)).p_value < 1e-12


def test_equal_arms_have_no_difference_and_constant_ones_are_certain():
    assert paired_difference([0.5, 0.7], [0.5, 0.7]).p_value == 1.0
    assert paired_difference([0.5, 0.75], [0.25, 0.5]).p_value == 0.0


def test_holm_by_hand_in_the_order_given():
    adjusted = holm({"a": 0.03, "b": 0.005, "c": 0.04, "d": 0.9})
    assert adjusted == pytest.approx({"a": 0.09, "b": 0.02, "c": 0.09, "d": 0.9})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_planted_nulls_are_rarely_found():
    random = np.random.RandomState(0)
    found = 0
    for _ in range(400):
        naive = random.randn(12)
        p_values = {
            str(arm): paired_difference(list(naive + random.randn(12)), list(naive)).p_value for arm in range(5)
        }
        found += min(holm(p_values).values()) < 0.05
    assert found / 400 < 0.08


@pytest.mark.parametrize(
    ("values", "message"),
    [([1.0], "at least two seeds, got \\[1.0\\]"), ([1.0, float("nan")], "seed number 1 is not finite")],
)
def test_too_few_or_broken_values_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        mean_and_interval(values)


def test_unpaired_values_are_an_error():
    with pytest.raises(ValueError, match="for every seed, got 2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


def test_a_level_outside_of_0_and_1_is_an_error():
    with pytest.raises(ValueError, match="level must lie strictly between 0 and 1, got 95"):
        mean_and_interval([1.0, 2.0], level=95)


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match="know_hf\\[demo\\]"):
        mean_and_interval([1.0, 2.0])
