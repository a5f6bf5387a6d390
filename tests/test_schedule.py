"""Sizes and members of the subsets of a schedule."""

from itertools import pairwise

import numpy as np
import pytest

from know_hf import ForgettingSchedule
from know_hf.schedule import _fill


def test_sizes_and_cost():
    assert ForgettingSchedule().sizes(1000) == [1000, 500, 250, 125, 62]
    assert ForgettingSchedule(ratio=0.33, num_states=3).sizes(100) == [100, 33, 11]
    assert ForgettingSchedule(ratio=0.5, num_states=5).relative_cost == pytest.approx(1.9375)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_subsets_are_nested_and_sorted(grouped, seed):
    random = np.random.RandomState(5)
    groups = random.permutation(np.repeat(np.arange(200), random.randint(1, 21, 200)))
    schedule = ForgettingSchedule(ratio=0.6, num_states=6, group_by="doc" if grouped else None, seed=seed)
    subsets = schedule.indices(len(groups), groups=groups if grouped else None)
    assert np.array_equal(subsets[0], np.arange(len(groups)))
    # many small groups nearly always fit
    off = np.subtract([len(subset) for subset in subsets], schedule.sizes(len(groups)))
    assert np.abs(off).max() <= (1 if grouped else 0)
    for larger, smaller in pairwise(subsets):
        assert set(smaller) < set(larger)
        assert np.array_equal(smaller, np.unique(smaller))
        if grouped:
            outside = np.setdiff1d(np.arange(len(groups)), smaller)
            assert not set(groups[smaller]) & set(groups[outside])


def test_members_are_the_same_on_every_machine():
    # fixed values: recorded trajectories could not resume with others
    assert ForgettingSchedule(num_states=3).indices(16)[2].tolist() == [4, 9, 14, 15]
    labels = [0] * 8 + [1] * 8
    assert ForgettingSchedule(num_states=3, stratify_by="y").indices(16, labels)[2].tolist() == [4, 6, 14, 15]
    groups = [3, 3, 1, 1, 1, 7, 9, 9, 9, 9, 4, 4, 4, 2, 2, 2]
    schedule = ForgettingSchedule(num_states=3, group_by="doc")
    for names in (groups, np.array(groups), [str(group) for group in groups], [f"{10 - group}" for group in groups]):
        members = [subset.tolist() for subset in schedule.indices(16, groups=names)[1:]]
        assert members == [[5, 6, 7, 8, 9, 10, 11, 12], [5, 10, 11, 12]]


def test_seeds_choose_independently():
    first, second = (ForgettingSchedule(seed=seed).indices(1000)[1] for seed in (0, 1))
    assert abs(len(set(first) & set(second)) - 250) < 60  # two independent halves
    groups, times = np.repeat(np.arange(40), 5), np.zeros(40)
    for seed in range(200):
        times[np.unique(groups[ForgettingSchedule(num_states=2, seed=seed).indices(200, groups=groups)[1]])] += 1
    assert 70 < times.min() and times.max() < 130  # binomial with mean 100 and σ = 7


def test_stratified_subsets_keep_the_class_balance():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    labels = labels[np.random.RandomState(0).permutation(1000)]
    for subset in ForgettingSchedule(stratify_by="label").indices(1000, labels):
        share = np.bincount(labels[subset], minlength=3)
        assert np.abs(share - len(subset) * np.array([0.6, 0.3, 0.1])).max() <= 1
    labels = ["cat", "dog"] * 8
    subset = ForgettingSchedule(num_states=3, stratify_by="animal").indices(16, labels)[2]
    assert sorted(labels[index] for index in subset) == ["cat", "cat", "dog", "dog"]

    # many small classes change the balance within the documented bound
    labels = np.array([0] * 1000 + [1 + index // 3 for index in range(300)])
    for subset in ForgettingSchedule(ratio=0.6, stratify_by="label").indices(1300, labels):
        off = abs((labels[subset] == 0).sum() - len(subset) * 1000 / 1300)
        assert off <= (1 + 101 * 1000 / 1300) / 2
    subset = ForgettingSchedule(ratio=0.12, num_states=2, stratify_by="label").indices(1300, labels)[1]
    assert set(labels[subset]) == {0}  # the share of the small classes is 36 rows


def test_groups_fill_a_subset():
    assert _fill([3, 9, 4], 11) == [0, 2]  # 7, because 16 is further away
    assert _fill([2, 20, 9, 1], 8) == [0, 2, 3]  # 12 instead of 3 or 23, in the given order
    assert _fill([5, 5, 5], 10) == [0, 1]
    groups = np.repeat(np.arange(10), 10)
    assert [len(s) for s in ForgettingSchedule(0.33, 3, group_by="d").indices(100, groups=groups)] == [100, 30, 10]
    assert [len(s) for s in ForgettingSchedule(0.37, 3, group_by="d").indices(100, groups=groups)] == [100, 40, 10]


def test_numpy_numbers_become_python_numbers():
    numbers = {"num_states": np.int64(3), "seed": np.uint8(7), "steps_per_stage": np.int32(2)}
    schedule = ForgettingSchedule(ratio=np.float32(0.5), **numbers)
    assert schedule == ForgettingSchedule(ratio=0.5, num_states=3, seed=7, steps_per_stage=2)
    types = [type(value) for value in (schedule.ratio, schedule.num_states, schedule.seed, schedule.steps_per_stage)]
    assert types == [float, int, int, int]
    assert type(ForgettingSchedule(epochs_per_stage=1).epochs_per_stage) is int
    assert type(ForgettingSchedule(epochs_per_stage=np.float64(0.5)).epochs_per_stage) is float


def test_a_schedule_of_version_0_1_loads():
    old = {"ratio": 0.5, "num_states": 5, "epochs_per_stage": 1, "stratify_by": None, "seed": 0}
    assert ForgettingSchedule(**old) == ForgettingSchedule()
    assert ForgettingSchedule(0.33, 3, 2, "label", 7) == ForgettingSchedule(
        ratio=0.33, num_states=3, epochs_per_stage=2, stratify_by="label", seed=7
    )
    schedule = ForgettingSchedule(group_by="doc", steps_per_stage=10)
    assert ForgettingSchedule(**schedule.to_dict()) == schedule


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": "0.5"}, "ratio must be a number .*got '0.5'"),
        ({"epochs_per_stage": "1"}, "epochs_per_stage must be a number .*got '1'"),
        *(({"ratio": ratio}, f"ratio .* got {ratio}") for ratio in (0, 1, -0.5, 1.5, float("nan"))),
        ({"num_states": 1}, "num_states .*2.* got 1"),
        ({"num_states": 1001}, "num_states .*1,000, got 1001"),
        ({"epochs_per_stage": float("inf")}, "epochs_per_stage .* got inf"),
        ({"num_states": 2.5}, r"num_states .* got 2\.5"),
        ({"num_states": 5.0}, r"num_states .* got 5\.0"),
        ({"epochs_per_stage": 0}, "epochs_per_stage .* got 0"),
        ({"seed": -1}, "seed .* got -1"),
        ({"seed": 1.5}, r"seed .* got 1\.5"),
        ({"seed": 2**32}, "seed .* got 4294967296"),
        ({"steps_per_stage": 0}, "steps_per_stage .* got 0"),
        ({"steps_per_stage": 2.0}, r"steps_per_stage .* got 2\.0"),
        ({"steps_per_stage": True}, "steps_per_stage .* got True"),
        ({"steps_per_stage": 5, "epochs_per_stage": 2}, "steps_per_stage=5 and epochs_per_stage=2"),
        ({"group_by": "doc", "stratify_by": "label"}, "group_by='doc' .*stratify_by='label'"),
        ({"group_by": "doc", "key_column": "id"}, "group_by='doc' .*key_column='id'"),
    ],
)
def test_invalid_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        ForgettingSchedule(**arguments)


@pytest.mark.parametrize(
    ("schedule", "arguments", "message"),
    [
        ({}, {"batch_size": 8}, r"\[100, 50, 25, 12, 6\].* batch of 8"),
        ({"ratio": 0.995, "num_states": 3}, {}, r"\[100, 100, 99\].* not shrink"),
        ({"stratify_by": "label"}, {}, "'label'.* labels="),
        ({"stratify_by": "label"}, {"labels": [0, 1, 2]}, "3 labels for 100 examples"),
        ({"group_by": "doc"}, {}, "'doc'.* groups="),
        ({"group_by": "doc"}, {"groups": [0, 1, 2]}, "3 groups for 100 examples"),
        ({"group_by": "doc"}, {"groups": [0, 1] * 50}, r"2 groups of 'doc', the largest of 50"),
        ({"group_by": "doc"}, {"groups": [0] * 100, "labels": [0] * 100}, "both labels and groups"),
    ],
)
def test_examples_that_cannot_be_divided(schedule, arguments, message):
    with pytest.raises(ValueError, match=message):
        ForgettingSchedule(**schedule).indices(100, **arguments)
