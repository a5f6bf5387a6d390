"""Retrodiction skill of predictors."""

import math

import pytest
import torch
from doubles.toy_trajectories import record_lines

from know_hf.known import KNOWNConfig, KNOWNModel
from know_hf.meta_learning import RoleSkill, TransitionDataset, retrodiction_skill
from know_hf.predictors import Shrink


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    path = record_lines(tmp_path_factory.mktemp("held_out") / "a2", seed=2).path
    return TransitionDataset([path], max_per_tensor=None, progress=False)


def test_skill_is_one_minus_the_ratio_of_sums(held_out):
    class Constant:
        num_states = None

        def residual(self, history, role):
            return torch.full((len(history),), 0.01 if role == "fc" else 0.0)

    skill = retrodiction_skill(Constant(), held_out)
    assert skill["conv"].skill == skill["bias"].skill == 0
    error = change = 0.0
    for block in held_out.blocks:
        if block.role == "fc":
            history, labels = held_out.block(block)
            error += (history[:, -1] + 0.01 - labels).abs().double().sum().item()
            change += (history[:, -1] - labels).abs().double().sum().item()
    assert skill["fc"].skill == pytest.approx(1 - error / change)
    count = sum(block.stop - block.start for block in held_out.blocks if block.role == "fc")
    assert skill["fc"].transitions == count
    assert skill["fc"].error == pytest.approx(error / count)
    assert skill["fc"].no_change == pytest.approx(change / count)
    assert skill["fc"].by_trajectory == {held_out.trajectories[0]: pytest.approx(skill["fc"].skill)}


def test_skill_of_a_sample_estimates_that_of_all_scalars(tmp_path):
    """A tensor weighs as much as it has scalars, however few are drawn."""
    record_lines(tmp_path / "a")
    every = TransitionDataset([tmp_path / "a"], max_per_tensor=None, progress=False)
    some = TransitionDataset([tmp_path / "a"], max_per_tensor=100, progress=False)
    estimated, expected = (retrodiction_skill("linear", dataset) for dataset in (some, every))
    assert [skill.transitions for skill in estimated.values()] == [200, 200, 2 * (32 + 40)]
    for role in ("conv", "fc", "bias"):
        assert estimated[role].skill == pytest.approx(expected[role].skill, abs=0.05)
        assert estimated[role].median == estimated[role].skill
    error = change = 0.0
    for block in some.blocks:
        if block.role == "fc":
            history, labels = some.block(block)
            change += (history[:, -1] - labels).abs().double().sum().item() * 12.8
            error += 2560
    assert estimated["fc"].no_change == pytest.approx(change / error)


def test_skill_of_named_predictors(held_out):
    # The weights move along a line, with noise: a linear fit beats no change, shrinking does not.
    assert all(skill.skill > 0.5 for skill in retrodiction_skill("linear", held_out).values())
    assert retrodiction_skill("shrink", held_out) == retrodiction_skill(Shrink(0.8), held_out)
    assert all(isinstance(skill, RoleSkill) for skill in retrodiction_skill("average", held_out).values())


def test_skill_where_nothing_moved(tmp_path):
    # The biases only move in the first step, which is the last step of no window.
    record_lines(tmp_path / "a", moves_until={"fc.bias": 1, "conv.bias": 1})
    dataset = TransitionDataset([tmp_path / "a"], num_states=5, progress=False)
    assert retrodiction_skill(Shrink(1.0), dataset)["bias"].skill == 0
    assert retrodiction_skill("shrink", dataset)["bias"].skill == -math.inf


def test_another_number_of_states(held_out):
    with pytest.raises(ValueError, match=r"KNOWNPredictor takes 3 states.*num_states=5"):
        retrodiction_skill(KNOWNModel(KNOWNConfig(num_states=3)), held_out)
    with pytest.raises(ValueError, match="ModelStock computes complete tensors"):
        retrodiction_skill("model_stock", held_out)
