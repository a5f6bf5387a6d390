from itertools import pairwise

import numpy as np
import pytest

from know_hf import ForgettingSchedule


def test_sizes_are_rounded_powers_of_the_ratio():
    assert ForgettingSchedule().sizes(1000) == [1000, 500, 250, 125, 62]
    assert ForgettingSchedule(ratio=0.33, num_states=3).sizes(100) == [100, 33, 11]


def test_relative_cost_is_the_sum_of_the_powers():
    assert ForgettingSchedule(ratio=0.5, num_states=5).relative_cost == pytest.approx(1.9375)


def test_each_subset_lies_inside_the_one_before():
    subsets = ForgettingSchedule(ratio=0.6, num_states=6, seed=3).indices(500)
    assert np.array_equal(subsets[0], np.arange(500))
    for larger, smaller in pairwise(subsets):
        assert set(smaller) < set(larger)
        assert np.array_equal(smaller, np.unique(smaller))


def test_the_members_are_the_same_on_every_machine():
    # written down once: another value means that trajectories of other machines can't be resumed
    assert ForgettingSchedule(num_states=3).indices(16)[2].tolist() == [4, 9, 14, 15]
    labels = [0] * 8 + [1] * 8
    assert ForgettingSchedule(num_states=3, stratify_by="y").indices(16, labels)[2].tolist() == [4, 6, 14, 15]


def test_another_seed_chooses_other_members():
    first, second = (ForgettingSchedule(seed=seed).indices(1000)[1] for seed in (0, 1))
    assert not np.array_equal(first, second)
    assert abs(len(set(first) & set(second)) - 250) < 60  # as two independent halves


def test_stratified_subsets_keep_the_class_balance():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    labels = labels[np.random.RandomState(0).permutation(1000)]
    for subset in ForgettingSchedule(stratify_by="label").indices(1000, labels):
        share = np.bincount(labels[subset], minlength=3)
        assert np.abs(share - len(subset) * np.array([0.6, 0.3, 0.1])).max() <= 1


def test_stratified_by_strings():
    labels = ["cat", "dog"] * 8
    subset = ForgettingSchedule(num_states=3, stratify_by="animal").indices(16, labels)[2]
    assert sorted(labels[index] for index in subset) == ["cat", "cat", "dog", "dog"]


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, float("nan")])
def test_a_ratio_outside_of_zero_to_one_is_refused(ratio):
    with pytest.raises(ValueError, match=f"ratio must lie strictly between 0 and 1, got {ratio}"):
        ForgettingSchedule(ratio=ratio)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_states": 1}, "num_states must be a whole number of at least 2, got 1"),
        ({"num_states": 2.5}, "got 2.5"),
        ({"epochs_per_stage": 0}, "epochs_per_stage must be positive, got 0"),
        ({"seed": -1}, "seed must lie"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ForgettingSchedule(**arguments)


def test_a_last_subset_smaller_than_a_batch_names_the_sizes():
    with pytest.raises(ValueError, match=r"\[100, 50, 25, 12, 6\]; the last is smaller than one batch of 8"):
        ForgettingSchedule().indices(100, batch_size=8)


def test_subsets_that_do_not_shrink_name_the_sizes():
    with pytest.raises(ValueError, match=r"\[3, 3, 2\], which do not shrink"):
        ForgettingSchedule(ratio=0.9, num_states=3).sizes(3)


def test_stratified_without_labels_is_refused():
    with pytest.raises(ValueError, match="stratified by 'label', but no labels"):
        ForgettingSchedule(stratify_by="label").indices(100)
    with pytest.raises(ValueError, match="3 labels for 100 examples"):
        ForgettingSchedule(stratify_by="label").indices(100, [0, 1, 2])
