"""Metrics of the `evaluate` library: values, offline, without a cache folder."""

import math
import socket

import evaluate
import numpy as np
import pytest
import torch

from know_hf import WeightTrajectory
from know_hf.evaluation import compare_with_naive
from know_hf.evaluation.comparison import ACCURACY, LOSS
from know_hf.evaluation.report.comparison_report import _result as result_entry
from know_hf.metrics import ForgettingRate, KnowledgeGain, RetrodictionSkill
from know_hf.trajectory.summary import inspect_trajectory


def test_retrodiction_skill():
    errors, references = [1.0, 2.0, 0.5, 0.0, 1.0], [2.0, 4.0, 0.5, 0.0, 0.0]
    skill = RetrodictionSkill()
    assert skill.compute(predictions=errors[:2], references=references[:2]) == {"retrodiction_skill": 0.5}
    groups = ["fc", "fc", "bias", "still", "moved"]
    assert skill.compute(predictions=errors, references=references, groups=groups) == {
        "fc": 0.5,
        "bias": 0.0,
        "still": 0.0,
        "moved": -math.inf,
    }


def test_forgetting_rate_of_a_line():
    metric, sizes = ForgettingRate(), [800, 400, 200, 100]
    rate = metric.compute(predictions=[0.9, 0.8, 0.7, 0.6], references=sizes)
    assert rate == {"forgetting_rate": pytest.approx(0.1), "r_squared": pytest.approx(1.0)}
    assert metric.compute(predictions=[0.5, 0.5], references=[2, 1]) == {"forgetting_rate": 0.0}
    noisy = metric.compute(predictions=[0.9, 0.7, 0.8, 0.6], references=sizes)
    assert noisy["forgetting_rate"] == pytest.approx(np.polyfit([3, 2, 1, 0], [0.9, 0.7, 0.8, 0.6], 1)[0])
    assert 0 < noisy["r_squared"] < 1
    with pytest.raises(ValueError, match="two different"):
        metric.compute(predictions=[0.5, 0.4], references=[2, 2])


def test_forgetting_rate_of_a_trajectory(tmp_path):
    trajectory = WeightTrajectory.create(tmp_path / "a")
    for accuracy, count in ((0.9, 64), (0.7, 32)):
        trajectory.record(torch.nn.Linear(2, 2), num_examples=count, steps=1, metrics={"eval_accuracy": accuracy})
    assert ForgettingRate().of_trajectory(trajectory)["forgetting_rate"] == pytest.approx(0.2)
    summary = inspect_trajectory(trajectory)
    assert summary.forgetting == {"eval_accuracy": pytest.approx(0.2)}
    assert "per halving of the examples: eval_accuracy -0.2000" in str(summary)
    with pytest.raises(ValueError, match=r"state 0 .*'eval_loss'.*eval_accuracy"):
        ForgettingRate().of_trajectory(trajectory, "eval_loss")


def test_knowledge_gain():
    enhanced, naive = [0.82, 0.84], [0.80, 0.81]
    metric = KnowledgeGain()
    gain = {"knowledge_gain": pytest.approx(0.025)}
    assert metric.compute(predictions=enhanced, references=naive) == gain
    assert metric.compute(predictions=enhanced, references=naive, oracle=[0.79, 0.81]) == gain, "no headroom"
    relative = metric.compute(predictions=enhanced, references=naive, oracle=[0.85, 0.86])
    assert relative == {**gain, "relative_knowledge_gain": pytest.approx(0.5)}
    with pytest.raises(ValueError, match="oracle has 1 entries"):
        metric.compute(predictions=enhanced, references=naive, oracle=[0.8])


@pytest.mark.parametrize(("measure", "sign"), [(ACCURACY, 1), (LOSS, -1)])
def test_reports_contain_gains_relative_to_the_oracle(measure, sign):
    naive = np.array([0.5, 0.52, 0.54, 0.51])
    arms = {"naive": naive, "known": naive + sign * 0.01, "oracle": naive + sign * np.array([0.04, 0.05, 0.03, 0.04])}
    scores = {name: values.tolist() for name, values in arms.items()}
    result = result_entry("few-shot", compare_with_naive(scores, ["known"], measure=measure))
    assert result["headroom"] and result["relative_gains"] == {"known": pytest.approx(0.25)}
    without = compare_with_naive({**scores, "oracle": scores["naive"]}, ["known"], measure=measure)
    assert result_entry("few-shot", without)["relative_gains"] == {}


def test_metrics_are_offline_and_write_no_cache(tmp_path, monkeypatch):
    def refuse(*_):
        pytest.fail("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    inputs = {"predictions": [1.0], "references": [0.5]}
    assert KnowledgeGain().compute(**inputs) == {"knowledge_gain": 0.5}
    assert RetrodictionSkill().compute(**inputs) == {"retrodiction_skill": -1.0}
    assert not (tmp_path / "cache").exists()
    on_disk = KnowledgeGain(keep_in_memory=False)
    on_disk.add_batch(**inputs)
    assert list((tmp_path / "cache").rglob("*.arrow"))
    assert on_disk.compute() == {"knowledge_gain": 0.5}
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    assert not KnowledgeGain(num_process=2, process_id=0).keep_in_memory
