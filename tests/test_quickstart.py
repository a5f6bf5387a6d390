import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification

from know_hf import WeightTrajectory, quickstart
from know_hf.evaluation import NAIVE, RANDOM, FineTuning, known_arm
from know_hf.known.modeling_known import KNOWNConfig, KNOWNModel
from know_hf.quickstart import ARMS, QuickstartSettings, run_quickstart

MINIATURE = QuickstartSettings(
    frame=8,
    embedding_size=8,
    hidden_sizes=(8, 8),
    source_images=64,
    batch_size=4,
    epochs=2,
    epochs_per_stage=1,
    labels_per_digit=2,
    validation_images=20,
    few_shot=FineTuning((1e-3, 1e-2), steps=3, head_steps=5),
)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("known")
    KNOWNModel(KNOWNConfig()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(known, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    return run_quickstart(folder, 3, num_seeds=2, settings=MINIATURE, known=known, num_processes=1)


def test_the_report_has_every_arm_in_both_tables(finished):
    data = json.loads((finished.path / "report.json").read_text())
    names = ["naive", "random", "known-x2", "known-x4", "known-x8", "shrink", "average", "oracle"]
    for table in (data["arms"], data["source"]):
        assert list(table) == names
        for result in table.values():
            assert result["mean"] == pytest.approx(np.mean(result["per_seed"]))
            assert result["ci95"][0] <= result["mean"] <= result["ci95"][1]
            assert len(result["per_seed"]) == 2 and all(0 <= value <= 1 for value in result["per_seed"])
    assert data["seeds"] == [3, 4]
    assert data["seconds"] > 0
    assert data["states"]["num_examples"] == [64, 32, 16, 8, 4]
    assert set(data["learning_rates"]["chosen"]["shrink"]) <= {1e-3, 1e-2}
    assert data == json.loads(json.dumps(finished.data))


def test_the_source_accuracy_of_naive_is_that_of_state_0(finished):
    trajectory = WeightTrajectory(finished.data["trajectory"])
    recorded = [state.metrics["unseen_accuracy"] for state in trajectory.states]
    assert recorded == finished.data["states"]["per_seed"][0]
    assert [accuracies[0] for accuracies in finished.data["states"]["per_seed"]] == (
        finished.data["source"]["naive"]["per_seed"]
    )


def test_the_enhanced_checkpoint_loads_and_gives_its_accuracy(finished):
    model = AutoModelForImageClassification.from_pretrained(finished.data["enhanced"]).eval()
    assert finished.data["enhanced_arm"] == "known-x4"
    assert model.config.id2label == {0: "0", 1: "2", 2: "4", 3: "6", 4: "8"}
    source = quickstart._draw(0, 3, MINIATURE)
    with torch.no_grad():
        predicted = model(source["pixel_values"][128:]).logits.argmax(1)
    accuracy = (predicted == source["labels"][128:]).float().mean()
    assert float(accuracy) == pytest.approx(finished.data["source"]["known-x4"]["per_seed"][0])


def test_the_text_has_both_tables_and_the_verdict(finished):
    text = str(finished)
    for name in finished.data["arms"]:
        assert text.count(f"\n   {name} ") == 2
    assert finished.data["verdict"]["transfer"] in text
    assert str(finished.path) in text


def test_only_the_promised_files_stay(finished):
    names = {"cells", "enhanced", "forgetting.png", "identity.json", "report.json", "trajectory"}
    assert {path.name for path in finished.path.iterdir()} == names


def test_a_second_run_resumes_and_gives_the_same(finished, known, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    (copy / "cells" / "seed-3.json").unlink()  # as if killed in the first seed, its trajectory recorded
    again = run_quickstart(copy, 3, num_seeds=2, settings=MINIATURE, known=known, num_processes=1)
    assert again.data["arms"] == finished.data["arms"]
    assert again.data["source"] == finished.data["source"]
    assert again.data["resumed_seeds"] == [4]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 4}, "holds results with other seed: 3 there, 4 now"),
        ({"arms": ARMS[:3]}, "holds results with other arms"),
        ({"settings": replace(MINIATURE, epochs=3)}, "holds results with other settings"),
        ({"known": None}, "holds results with other known"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(finished, known, changed, message):
    arguments = {"seed": 3, "num_seeds": 2, "settings": MINIATURE, "known": known, **changed}
    with pytest.raises(ValueError, match=message):
        run_quickstart(finished.path, **arguments)


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match=r"is not empty and holds no identity\.json"):
        run_quickstart(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed must lie in"),
        ({"num_seeds": 1}, "num_seeds must be at least 2"),
        ({"arms": [RANDOM, known_arm(1, 0.5)]}, "naive arm must be among the arms, got \\['random', 'known-x2'\\]"),
    ],
)
def test_arguments_that_are_off_are_errors(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_quickstart(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_images_are_real_scans_in_turn_of_class():
    source = quickstart._draw(0, 0, QuickstartSettings())
    target = quickstart._draw(1, 0, QuickstartSettings())
    assert len(source["labels"]) + len(target["labels"]) == 1797
    assert source["pixel_values"].shape[1:] == (1, 16, 16)
    for examples in (source, target):
        for size in (50, 160, 320):
            counts = examples["labels"][:size].bincount(minlength=5)
            assert counts.max() - counts.min() == 0
    other = quickstart._draw(0, 1, QuickstartSettings())
    assert not torch.equal(other["labels"], source["labels"]) or not torch.equal(
        other["pixel_values"], source["pixel_values"]
    )


def test_without_the_extra_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs sklearn, of the extra 'demo'"):
        run_quickstart(tmp_path)


def test_naive_is_the_first_arm():
    assert ARMS[0] is NAIVE
