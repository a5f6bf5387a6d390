"""The quickstart on a suite of small sizes."""

import json
import shutil

import pytest
from transformers import AutoModelForImageClassification

from know_hf import WeightTrajectory
from know_hf.evaluation import accuracy, load_suite, run_suite
from know_hf.evaluation.suites import quickstart, run_quickstart
from know_hf.evaluation.suites.suite_task import SuiteTask

SMALL = """
name: small
description: The quickstart at small sizes.
seeds: 2
inputs: {image_size: 8, mean: 0.08, std: 0.22}
source: {dataset: sklearn/digits, classes: [0, 2, 4, 6, 8], train: 64, validation: 80}
target: {dataset: sklearn/digits, classes: [1, 3, 5, 7, 9], train: 10, validation: 20}
model:
  class_name: ResNetForImageClassification
  config: {num_channels: 1, embedding_size: 8, hidden_sizes: [8, 8], depths: [1, 1], layer_type: basic}
schedule: {ratio: 0.5, num_states: 5}
training: {num_train_epochs: 2, per_device_train_batch_size: 4, learning_rate: 0.003, use_cpu: true}
protocols:
  - {kind: linear_probe, labels_per_class: 2, learning_rates: [0.001, 0.01], steps: 3}
  - {kind: fine_tuning, labels_per_class: 2, learning_rates: [0.001, 0.01], steps: 3, head_steps: 5}
  - {kind: zero_shot}
arms: [naive]
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "small.yaml"
    path.write_text(SMALL)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(quickstart, "SUITE", path)
        monkeypatch.setattr(quickstart, "NUM_SEEDS", 2)
        yield path


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    return run_quickstart(tmp_path_factory.mktemp("quickstart") / "out", 3, num_processes=1)


def test_text_and_report(finished):
    text, transfer = str(finished), finished.comparison.comparisons["linear-probe", "accuracy"]
    assert text.startswith(finished.sentence) and transfer.verdict() in text and transfer.validity() in text
    assert len(text.splitlines()) <= 20 and ("few-shot", "accuracy") not in finished.comparison.comparisons
    for path in (finished.enhanced, finished.path / "report.html"):
        assert str(path) in text and path.exists()
    report = json.loads((finished.path / "report.json").read_text())
    assert list(report["arms"]) == list(quickstart.ARMS) and report["seeds"] == [3, 4]
    assert report["command"] == "know-hf quickstart --output-dir .../out --seed 3"


def test_the_checkpoint_is_what_the_gate_chose(finished, small):
    model = AutoModelForImageClassification.from_pretrained(finished.enhanced)
    test = SuiteTask(load_suite(small)).source_split(3).test
    card = (finished.enhanced / "README.md").read_text()
    assert "No comparison was run" not in card and "known-step-2" in card
    assert (finished.enhanced / "forgetting.png").exists()
    recorded = WeightTrajectory(finished.trajectory)
    accuracies = [state.metrics["unseen_accuracy"] for state in recorded.states]
    results = finished.comparison.comparisons["source", "accuracy"].results
    assert len(accuracies) == 5 and accuracies[0] == results["naive"].per_seed[0]
    if finished.sentence.startswith("Kept Θ0"):  # with its recorded statistics, not those of the comparison
        assert accuracy(model, test) == accuracy(recorded.load_model(0), test)


def test_a_second_run_resumes(finished, tmp_path, caplog):
    copy = shutil.copytree(finished.path, tmp_path / "copy")
    (copy / "cells" / "seed-3.oracle.json").unlink()
    shutil.rmtree(copy / "enhanced")
    again = run_quickstart(copy, 3, num_processes=1)
    stages = [record.message.split()[0] for record in caplog.records if record.name.endswith("quickstart")]
    assert stages == ["Recording", "Choosing"]  # standard error is no terminal
    times = [{cell["arm"]: cell["seconds"] for cell in run.comparison.cells} for run in (finished, again)]
    assert all(times[0][arm] == times[1][arm] for arm in quickstart.ARMS if arm != "oracle")
    result = [run.comparison.comparisons["linear-probe", "accuracy"].results["oracle"] for run in (finished, again)]
    assert result[0].per_seed == result[1].per_seed and again.enhanced.exists()


def test_errors(finished, small, tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text(small.read_text().replace("train: 10", "train: 20"))
    with pytest.raises(ValueError, match="different protocols"):
        run_suite(path, finished.path)
    with pytest.raises(FileExistsError, match=str(tmp_path)):
        run_quickstart(tmp_path)
    with pytest.raises(ValueError, match=r"seed .*-1"):
        run_quickstart(tmp_path / "out", -1)
    assert not (tmp_path / "out").exists()
