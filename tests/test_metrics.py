"""The metrics: values, offline, without a cache on the disk."""

import socket

import evaluate
import numpy as np
import pytest
import torch

from know_hf import TransitionDataset, WeightTrajectory
from know_hf.evaluation.metrics import ForgettingRate, KnowledgeGain, RetrodictionSkill
from know_hf.meta_learning import retrodiction_skill
from know_hf.predictors import Shrink


def test_retrodiction_skill_is_that_of_whole_trajectories(recorded):
    dataset = TransitionDataset([recorded], num_states=4, max_per_tensor=None, progress=False)
    metric = RetrodictionSkill()
    for block in dataset.blocks:
        history, labels = dataset.block(block)
        metric.add_batch(
            predictions=history[:, -1] + Shrink(0.99).residual(history, block.role),
            references=labels,
            histories=history,
            roles=[block.role] * len(labels),
        )
    found = metric.compute()
    assert set(found) == {
        f"{role}_{skill}"
        for role in dataset.roles
        for skill in ("skill", "skill_against_linear", "skill_against_average")
    }
    expected = retrodiction_skill(Shrink(0.99), dataset)
    for name in ("linear", "average"):
        for role, rival in retrodiction_skill(name, dataset).items():
            ratio = expected[role].error / rival.error
            assert found[f"{role}_skill_against_{name}"] == pytest.approx(1 - ratio, rel=1e-4, abs=1e-6)
            assert found[f"{role}_skill"] == pytest.approx(expected[role].skill, rel=1e-4, abs=1e-6)


def test_retrodiction_skill_by_hand():
    found = RetrodictionSkill().compute(
        predictions=[3.0, 1.0],
        references=[4.0, 1.0],
        histories=torch.tensor([[1.0, 2.0], [1.0, 1.0]]),
        roles=["fc", "bias"],
    )
    assert found == pytest.approx({"fc_skill": 0.5, "fc_skill_against_linear": 0.0, "fc_skill_against_average": 0.6})


def test_forgetting_rate_of_a_line():
    found = ForgettingRate().compute(predictions=[0.9, 0.8, 0.7, 0.6], references=[800, 400, 200, 100])
    assert found == {"forgetting_rate": pytest.approx(0.1), "r_squared": pytest.approx(1.0)}
    assert ForgettingRate().compute(predictions=[0.5, 0.5], references=[2, 1]) == {"forgetting_rate": 0.0}
    noisy = ForgettingRate().compute(predictions=[0.9, 0.7, 0.8, 0.6], references=[800, 400, 200, 100])
    assert noisy["forgetting_rate"] == pytest.approx(np.polyfit([3, 2, 1, 0], [0.9, 0.7, 0.8, 0.6], 1)[0])
    assert 0 < noisy["r_squared"] < 1
    with pytest.raises(ValueError, match="at least two different numbers of examples"):
        ForgettingRate().compute(predictions=[0.5, 0.4], references=[2, 2])


def test_forgetting_rate_of_a_trajectory(tmp_path):
    trajectory = WeightTrajectory.create(tmp_path / "a")
    for accuracy, count in ((0.9, 64), (0.7, 32)):
        trajectory.record(torch.nn.Linear(2, 2), num_examples=count, steps=1, metrics={"eval_accuracy": accuracy})
    assert ForgettingRate().of_trajectory(trajectory)["forgetting_rate"] == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"state 0 of .* has no metric 'eval_loss' \(it has eval_accuracy\)"):
        ForgettingRate().of_trajectory(trajectory, "eval_loss")


def test_knowledge_gain():
    enhanced, naive = [0.82, 0.84], [0.80, 0.81]
    metric = KnowledgeGain()
    assert metric.compute(predictions=enhanced, references=naive) == {"knowledge_gain": pytest.approx(0.025)}
    found = metric.compute(predictions=enhanced, references=naive, oracle=[0.85, 0.86])
    assert found == {"knowledge_gain": pytest.approx(0.025), "relative_knowledge_gain": pytest.approx(0.5)}
    without_headroom = metric.compute(predictions=enhanced, references=naive, oracle=[0.79, 0.81])
    assert without_headroom == {"knowledge_gain": pytest.approx(0.025)}
    with pytest.raises(ValueError, match="oracle has 1 entries, the other arms have 2"):
        metric.compute(predictions=enhanced, references=naive, oracle=[0.8])


def test_offline_and_without_a_cache(tmp_path, monkeypatch):
    def refuse(*_):
        pytest.fail("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    for metric in (RetrodictionSkill(), ForgettingRate(), KnowledgeGain()):
        assert metric.keep_in_memory
    assert KnowledgeGain().compute(predictions=[1.0], references=[0.5]) == {"knowledge_gain": 0.5}
    assert not (tmp_path / "cache").exists()
    on_disk = KnowledgeGain(keep_in_memory=False)
    on_disk.add_batch(predictions=[1.0], references=[0.5])
    assert list((tmp_path / "cache").rglob("*.arrow"))
    assert on_disk.compute() == {"knowledge_gain": 0.5}
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    assert not KnowledgeGain(num_process=2, process_id=0).keep_in_memory
