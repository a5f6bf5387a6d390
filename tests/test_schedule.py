from itertools import pairwise

import numpy as np
import pytest

from know_hf import ForgettingSchedule
from know_hf.schedule import _nearest


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


def test_many_small_classes_move_the_balance_by_what_the_docstring_says():
    labels = np.array([0] * 1000 + [1 + index // 3 for index in range(300)])
    for subset in ForgettingSchedule(ratio=0.6, stratify_by="label").indices(1300, labels):
        off = abs((labels[subset] == 0).sum() - len(subset) * 1000 / 1300)
        assert off <= (1 + 101 * 1000 / 1300) / 2
    subset = ForgettingSchedule(ratio=0.12, num_states=2, stratify_by="label").indices(1300, labels)[1]
    assert set(labels[subset]) == {0}  # 36 rows of the small classes would be their share


def test_stratified_by_strings():
    labels = ["cat", "dog"] * 8
    subset = ForgettingSchedule(num_states=3, stratify_by="animal").indices(16, labels)[2]
    assert sorted(labels[index] for index in subset) == ["cat", "cat", "dog", "dog"]


def test_numbers_of_numpy_become_those_of_python():
    schedule = ForgettingSchedule(
        ratio=np.float32(0.5), num_states=np.int64(3), seed=np.uint8(7), steps_per_stage=np.int32(2)
    )
    assert schedule == ForgettingSchedule(ratio=0.5, num_states=3, seed=7, steps_per_stage=2)
    assert [type(value) for value in (schedule.ratio, schedule.num_states, schedule.seed)] == [float, int, int]
    assert type(schedule.steps_per_stage) is type(ForgettingSchedule(epochs_per_stage=1).epochs_per_stage) is int
    assert type(ForgettingSchedule(epochs_per_stage=np.float64(0.5)).epochs_per_stage) is float


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, float("nan")])
def test_a_ratio_outside_of_zero_to_one_is_refused(ratio):
    with pytest.raises(ValueError, match=f"ratio must lie strictly between 0 and 1, got {ratio}"):
        ForgettingSchedule(ratio=ratio)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_states": 1}, "num_states must be a whole number of at least 2, got 1"),
        ({"num_states": 2.5}, "got 2.5"),
        ({"num_states": 5.0}, r"num_states must be a whole number of at least 2, got 5\.0"),
        ({"epochs_per_stage": 0}, "epochs_per_stage must be positive, got 0"),
        ({"seed": -1}, "seed must lie"),
        ({"seed": 1.5}, r"seed must lie in \[0, 2\*\*32\) and be a whole number, got 1\.5"),
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


def test_a_schedule_written_before_groups_and_steps_still_loads():
    old = {"ratio": 0.5, "num_states": 5, "epochs_per_stage": 1, "stratify_by": None, "seed": 0}
    assert ForgettingSchedule(**old) == ForgettingSchedule()
    assert ForgettingSchedule(0.33, 3, 2, "label", 7) == ForgettingSchedule(
        ratio=0.33, num_states=3, epochs_per_stage=2, stratify_by="label", seed=7
    )
    schedule = ForgettingSchedule(group_by="doc", steps_per_stage=10)
    assert ForgettingSchedule(**schedule.to_dict()) == schedule


def make_groups(num_groups: int = 200, largest: int = 20) -> np.ndarray:
    random = np.random.RandomState(5)
    groups = np.repeat(np.arange(num_groups), random.randint(1, largest + 1, num_groups))
    return groups[random.permutation(len(groups))]


@pytest.mark.parametrize("seed", range(5))
def test_grouped_subsets_are_nested_whole_groups_of_the_sizes_asked_for(seed):
    groups = make_groups()
    schedule = ForgettingSchedule(group_by="doc", seed=seed)
    subsets = schedule.indices(len(groups), groups=groups)
    sizes = [len(subset) for subset in subsets]
    assert np.abs(np.subtract(sizes, schedule.sizes(len(groups)))).max() <= 1  # many small groups nearly always fit
    for larger, smaller in pairwise(subsets):
        assert set(smaller) < set(larger)
        assert np.array_equal(smaller, np.unique(smaller))
        outside = np.setdiff1d(np.arange(len(groups)), smaller)
        assert not set(groups[smaller]) & set(groups[outside])


def test_large_groups_come_as_near_as_they_can():
    groups = np.repeat(np.arange(10), 10)
    assert [len(s) for s in ForgettingSchedule(0.33, 3, group_by="d").indices(100, groups=groups)] == [100, 30, 10]
    assert [len(s) for s in ForgettingSchedule(0.37, 3, group_by="d").indices(100, groups=groups)] == [100, 40, 10]


def test_groups_that_fit_are_taken_and_else_the_smallest_that_brings_nearer():
    assert _nearest([3, 9, 4], 11) == [0, 2]  # 7, as 16 is further
    assert _nearest([2, 20, 9, 1], 8) == [0, 2, 3]  # 12, not 3 or 23, and in the order as given
    assert _nearest([5, 5, 5], 10) == [0, 1]


def test_groups_are_chosen_evenly():
    groups = np.repeat(np.arange(40), 5)
    times = np.zeros(40)
    for seed in range(200):
        times[np.unique(groups[ForgettingSchedule(num_states=2, seed=seed).indices(200, groups=groups)[1]])] += 1
    assert times.min() > 100 - 30  # binomial, σ = 7
    assert times.max() < 100 + 30


def test_the_grouped_members_are_the_same_on_every_machine_and_for_every_name_of_a_group():
    groups = [3, 3, 1, 1, 1, 7, 9, 9, 9, 9, 4, 4, 4, 2, 2, 2]
    schedule = ForgettingSchedule(num_states=3, group_by="doc")
    expected = [[5, 6, 7, 8, 9, 10, 11, 12], [5, 10, 11, 12]]
    assert [subset.tolist() for subset in schedule.indices(16, groups=groups)[1:]] == expected
    for names in (np.array(groups), [str(group) for group in groups], [f"{10 - group}" for group in groups]):
        assert [subset.tolist() for subset in schedule.indices(16, groups=names)[1:]] == expected


def test_groups_too_large_for_a_subset_are_named():
    with pytest.raises(ValueError, match=r"100 examples in 2 whole groups of 'doc', the largest of 50, have sizes "):
        ForgettingSchedule(group_by="doc").indices(100, groups=[0, 1] * 50)
    with pytest.raises(ValueError, match=r"grouped by 'doc', but no groups"):
        ForgettingSchedule(group_by="doc").indices(100)
    with pytest.raises(ValueError, match="3 groups for 100 examples"):
        ForgettingSchedule(group_by="doc").indices(100, groups=[0, 1, 2])
    with pytest.raises(ValueError, match="both labels and groups"):
        ForgettingSchedule(group_by="doc").indices(100, [0] * 100, groups=[0] * 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps_per_stage": 0}, "steps_per_stage must be a whole number of at least 1, got 0"),
        ({"steps_per_stage": 2.0}, r"steps_per_stage must be a whole number of at least 1, got 2\.0"),
        ({"steps_per_stage": True}, "got True"),
        ({"steps_per_stage": 5, "epochs_per_stage": 2}, "steps_per_stage=5 and epochs_per_stage=2; leave one"),
        ({"group_by": "doc", "stratify_by": "label"}, "group_by='doc' and stratify_by='label'"),
        ({"group_by": "doc", "key_column": "id"}, "group_by='doc' and key_column='id'"),
    ],
)
def test_lengths_and_columns_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ForgettingSchedule(**arguments)
