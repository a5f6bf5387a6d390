"""The engine on tiny tasks: what is kept, what is resumed, what is refused, and a suite whose truth is known."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images, make_resnet
from transformers import T5Config, T5ForConditionalGeneration

from know_hf import WeightTrajectory
from know_hf.evaluation import (
    AsTheyAre,
    CellStore,
    ComparisonTask,
    FineTuning,
    Landscape,
    LinearProbe,
    Split,
    evaluate_classifier,
    make_arm,
)
from know_hf.evaluation import compare_arms as compare_arms_with_pages
from know_hf.evaluation.compare import _default_arms
from know_hf.evaluation.comparison import ACCURACY, Measure
from know_hf.evaluation.measure import _check_head
from know_hf.evaluation.protocols import choose, first_of_each_class, refined

compare_arms = partial(compare_arms_with_pages, pages=False)  # pictures take longer than all the rest

PROTOCOLS = (
    FineTuning((1e-3, 1e-2), steps=1, head_steps=1, head_learning_rate=(1e-2, 1e-1), labels_per_class=2),
    LinearProbe((1e-2, 1e-1), steps=5),
    AsTheyAre(),
)
ARMS = ["naive", "random", "known-step-1", "shrink", "shuffled"]


def images(count, seed):
    """Four classes, each a bright quadrant; classes take turns."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    pixels = torch.randn(count, 1, 8, 8, generator=generator)
    for image, label in zip(pixels, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    return {"pixel_values": pixels, "labels": labels}


def source(seed):
    return Split(images(32, 100 + seed), images(20, 200 + seed), images(20, 300 + seed))


def target(seed, draw):
    return Split(*(images(count, 1000 * part + 10 * seed + draw) for part, count in enumerate((16, 12, 12))), 4)


def fresh(seed):
    return make_resnet(seed=50 + seed)


@pytest.fixture(scope="module")
def task(recorded, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "trajectory"
    trajectory = WeightTrajectory.create(other)
    for index, state in enumerate(WeightTrajectory(recorded).states):
        trajectory.record(make_resnet(seed=30 + index), num_examples=state.num_examples, steps=state.steps)
    return ComparisonTask([recorded, other], target, source, fresh, facts={"name": "quadrants"})


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "out"
    report = compare_arms(
        task, folder, protocols=PROTOCOLS, arms=ARMS, draws=2, landscape=Landscape(3, 8), description="Tiny."
    )
    return folder, report


def test_everything_is_kept_with_the_same_number_of_trials_for_every_arm(finished):
    folder, report = finished
    data = json.loads((folder / "report.json").read_text())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert [(cell["seed"], cell["arm"]) for cell in data["cells"]] == [(seed, arm) for seed in (0, 1) for arm in ARMS]
    for cell in data["cells"]:
        for name, rates in (("few-shot", 2), ("linear-probe", 2)):
            assert [draw["draw"] for draw in cell["measured"][name]] == [0, 1]
            for draw in cell["measured"][name]:
                assert len(draw["trials"]) == 4 * rates
        tried = cell["measured"]["few-shot"][0]["trials"]
        settings = {json.dumps(trial["options"]) for trial in tried}
        rates = {trial["learning_rate"] for trial in tried}
        assert (len(settings), len(rates)) == ((4, 2) if cell["arm"] == "shrink" else (1, 8))
    assert {arm: data["arms"][arm]["role"] for arm in ARMS} == {
        **dict.fromkeys(("naive", "random", "shuffled"), "reference"),
        "shrink": "control",
        "known-step-1": "method",
    }


def test_what_is_reported_is_the_trial_that_validation_data_chose(finished):
    _, report = finished
    data = report.to_dict()
    result = next(r for r in data["results"] if r["protocol"] == "few-shot" and r["measure"]["name"] == "accuracy")
    for cell in data["cells"]:
        index = data["seeds"].index(cell["seed"])
        for draw in cell["measured"]["few-shot"]:
            best = draw["trials"][draw["chosen"]]
            assert best["validation"]["accuracy"] == max(t["validation"]["accuracy"] for t in draw["trials"])
            assert result["arms"][cell["arm"]]["per_draw"][index][draw["draw"]] == best["test"]["accuracy"]
    naive = result["arms"]["naive"]
    assert naive["per_seed"] == [pytest.approx(sum(draws) / 2) for draws in naive["per_draw"]]
    gap = result["arms"]["shrink"]["minus_naive"]
    assert gap["mean"] == pytest.approx(result["arms"]["shrink"]["mean"] - naive["mean"])
    assert result["num_tests"] == 2 and set(result["against_controls"]) == {"known-step-1"}


def test_accuracy_at_every_rate_is_kept(finished):
    _, report = finished
    data = report.to_dict()
    curves = [c for c in data["curves"] if c["protocol"] == "few-shot"]
    assert {curve["arm"] for curve in curves} == set(ARMS)
    shrink = [curve for curve in curves if curve["arm"] == "shrink"]
    assert [curve["options"] for curve in shrink] == [{"factor": factor} for factor in (0.95, 0.8, 0.65, 0.5)]
    assert sum(curve["chosen"] for curve in shrink) == pytest.approx(1)
    naive = next(curve for curve in curves if curve["arm"] == "naive")
    assert naive["learning_rates"] == refined((1e-3, 1e-2), 4)
    rows = [
        [draw["trials"][3]["test"]["accuracy"] for draw in cell["measured"]["few-shot"]]
        for cell in data["cells"]
        if cell["arm"] == "naive"
    ]
    assert naive["measures"]["accuracy"]["test"][3] == pytest.approx(sum(map(sum, rows)) / 4)
    assert not any(curve["protocol"] == "source" for curve in data["curves"])


def test_states_as_they_are_make_the_forgetting_curve(finished, task):
    _, report = finished
    states = report.to_dict()["states"]
    assert states["num_examples"] == [64, 32, 16, 8, 4]
    source_result = report.comparisons["source", "accuracy"]
    measured = [values[0] for values in states["measures"]["accuracy"]["per_seed"]]
    assert measured == list(source_result.results["naive"].per_seed)


def test_the_landscape_has_theta_0_in_its_origin(finished):
    _, report = finished
    picture = report.landscape
    assert len(picture["loss"]) == len(picture["y"]) == 3 and len(picture["loss"][0]) == 3
    points = {point["name"]: point for point in picture["points"]}
    assert set(points) == {*(f"Θ{k}" for k in range(5)), "known-step-1"}
    assert (points["Θ0"]["x"], points["Θ0"]["y"], points["Θ0"]["off_plane"]) == (0, 0, 0)
    assert 1 + 1e-6 >= sum(picture["explained"]) > picture["explained"][0] >= picture["explained"][1] > 0


def test_few_seeds_are_told(finished):
    _, report = finished
    assert report.warnings[0] == "2 trajectory seeds are few: at least 10 are asked for."
    assert "few-shot fine-tuning with 2 labels a class, accuracy" in str(report)
    assert str(report).count("\nnaive ") == 6


def test_only_results_stay_in_the_folder(finished):
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == {"cells", "identity.json", "report.json"}


def test_pages_are_written_where_there_is_matplotlib(task, tmp_path, monkeypatch):
    options = {"protocols": [AsTheyAre()], "arms": ["naive", "random"]}
    compare_arms_with_pages(task, tmp_path / "out", command="make it", **options)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["command"] == "make it"
    assert "make it" in (tmp_path / "out" / "report.html").read_text()
    assert "| `naive`" in (tmp_path / "out" / "report.md").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    compare_arms_with_pages(task, tmp_path / "plain", **options)
    assert (tmp_path / "plain" / "report.json").exists() and not (tmp_path / "plain" / "report.html").exists()


def test_arms_and_seeds_can_be_added_and_nothing_is_run_twice(task, tmp_path, monkeypatch):
    options = {"protocols": PROTOCOLS[1:], "draws": 2}
    compare_arms(task, tmp_path / "out", arms=["naive", "shrink"], seeds=[0], **options)
    cells = {path.name: path.read_bytes() for path in (tmp_path / "out" / "cells").iterdir()}
    assert set(cells) == {"seed-0.naive.json", "seed-0.shrink.json", "seed-0.trajectory.json"}
    more = compare_arms(task, tmp_path / "out", arms=["naive", "random", "shrink"], **options)
    assert all((tmp_path / "out" / "cells" / name).read_bytes() == content for name, content in cells.items())
    for name in ("measure_trajectory", "measure_arm"):
        monkeypatch.setattr(f"know_hf.evaluation.compare.{name}", lambda *_, **__: pytest.fail("run again"))
    again = compare_arms(task, tmp_path / "out", arms=["naive", "random", "shrink"], **options)
    assert again.to_dict() == more.to_dict() and len(more.cells) == 6
    assert more.seeds == (0, 1)


KILLED = """
import sys
from test_compare import *
task = ComparisonTask(sys.argv[1:3], target, source, fresh, facts={"name": "quadrants"})
compare_arms(task, sys.argv[3], protocols=PROTOCOLS, arms=["naive", "random", "shrink"], draws=2)
"""


def test_a_run_that_was_killed_goes_on_and_ends_the_same(finished, task, tmp_path):
    trajectories = [str(path) for path in task.trajectory]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *trajectories, str(tmp_path / "out")],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    cells = tmp_path / "out" / "cells"
    while process.poll() is None and not list(cells.glob("seed-0.naive.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.read_bytes() for path in cells.glob("seed-*")}
    assert "seed-0.naive.json" in kept and not (tmp_path / "out" / "report.json").exists()
    options = {"protocols": PROTOCOLS, "arms": ["naive", "random", "shrink"], "draws": 2}
    resumed = compare_arms(task, tmp_path / "out", **options)
    assert all((cells / name).read_bytes() == content for name, content in kept.items())
    _, report = finished
    expected = {(cell["seed"], cell["arm"]): cell["measured"] for cell in report.cells}
    assert len(resumed.cells) == 6
    for cell in resumed.cells:
        assert cell["measured"] == expected[cell["seed"], cell["arm"]]


def test_processes_get_the_task_whole(task):
    # what they do with it is in test_cells.py: each cell is run as it is here
    copy = pickle.loads(pickle.dumps(task))
    assert copy.facts == task.facts and torch.equal(copy.target(1, 1).test["labels"], target(1, 1).test["labels"])
    assert copy.open_trajectory(1, Path("unused")).path == Path(task.trajectory[1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"draws": 3}, "holds results with other draws: 2 there, 3 now"),
        ({"protocols": PROTOCOLS[:2]}, "holds results with other protocols"),
        ({"arms": ["naive", {"name": "shrink", "tuned": [{"factor": 0.9}]}]}, "results of another arm 'shrink'"),
    ],
)
def test_results_of_something_else_are_not_mixed_in(finished, task, changed, message):
    options = {"protocols": PROTOCOLS, "arms": ARMS, "draws": 2, **changed}
    with pytest.raises(ValueError, match=message):
        compare_arms(task, finished[0], **options)


def test_trajectories_can_be_added(task, tmp_path):
    options = {"protocols": [PROTOCOLS[1]], "arms": ["naive", "average"], "draws": 2}
    compare_arms(replace(task, trajectory=task.trajectory[0]), tmp_path / "out", **options)
    cells = {path.name: path.read_bytes() for path in (tmp_path / "out" / "cells").iterdir()}
    assert compare_arms(task, tmp_path / "out", **options).seeds == (0, 1)
    assert all((tmp_path / "out" / "cells" / name).read_bytes() == content for name, content in cells.items())


def recorded_by_seed(seed, folder, count=3, shift=0):
    trajectory = WeightTrajectory(folder) if WeightTrajectory.exists(folder) else WeightTrajectory.create(folder)
    for index in range(trajectory.num_states, count):
        trajectory.record(make_resnet(seed=10 * seed + index + shift), num_examples=64 >> index, steps=4)
    return trajectory


def test_a_trajectory_that_was_deleted_is_recorded_whole_and_only_as_it_was(tmp_path):
    task = ComparisonTask(recorded_by_seed, target, source)
    options = {"protocols": [PROTOCOLS[1]], "draws": 2, "seeds": [0]}
    expected = compare_arms(task, tmp_path / "whole", arms=["naive", "average"], **options)
    out, folder = tmp_path / "out", tmp_path / "out" / "trajectories" / "seed-0"
    compare_arms(task, out, arms=["naive"], **options)
    shutil.rmtree(folder)
    recorded_by_seed(0, folder, count=2)  # killed while it was recorded again
    again = compare_arms(task, out, arms=["naive", "average"], **options)
    assert WeightTrajectory(folder).num_states == 3
    assert [cell["measured"] for cell in again.cells] == [cell["measured"] for cell in expected.cells]
    assert "identity" not in again.to_dict()["trajectories"][0]
    shutil.rmtree(folder)
    other = replace(task, trajectory=partial(recorded_by_seed, shift=1))
    with pytest.raises(ValueError, match="is not the trajectory that the cells of seed 0 in"):
        compare_arms(other, out, arms=["naive", "average", "ema"], **options)


def test_of_trajectories_of_several_lengths_the_states_that_all_have_are_drawn(task, tmp_path):
    short = recorded_by_seed(2, tmp_path / "short", count=2)
    both = replace(task, trajectory=[task.trajectory[0], short])
    report = compare_arms(both, tmp_path / "out", protocols=[AsTheyAre()], arms=["naive", "random"]).to_dict()
    assert report["states"]["num_examples"] == [64, 32]
    assert [len(run) for run in report["states"]["measures"]["accuracy"]["per_seed"]] == [2, 2]
    assert [len(run["states"]) for run in report["trajectories"]] == [5, 2]


def test_other_facts_or_trajectories_are_not_mixed_in(finished, task):
    options = {"protocols": PROTOCOLS, "arms": ARMS, "draws": 2}
    with pytest.raises(ValueError, match="holds results with other task"):
        compare_arms(replace(task, facts={"name": "octants"}), finished[0], **options)
    with pytest.raises(ValueError, match="is not the trajectory that the cells of seed 0 in"):
        compare_arms(replace(task, trajectory=list(task.trajectory)[::-1]), finished[0], **options)


def other_images(examples):
    return {**examples, "pixel_values": examples["pixel_values"] + 1e-3}


@pytest.mark.parametrize(
    ("changed", "call"),
    [
        ({"target": lambda s, d: replace(target(s, d), test=other_images(target(s, d).test))}, r"target\(0, 0\)"),
        ({"target": lambda s, d: target(s, d + (s == 1 and d == 1))}, r"target\(1, 1\)"),
        ({"target": lambda s, d: replace(target(s, d), num_labels=5)}, r"target\(0, 0\)"),
        ({"source": lambda s: replace(source(s), train=other_images(source(s).train))}, r"source\(0\)"),
        ({"source": lambda s: source(s if s == 0 else 7)}, r"source\(1\)"),
    ],
)
def test_other_data_is_not_mixed_in(task, finished, changed, call):
    with pytest.raises(ValueError, match=f"holds results on other data of {call}: .* there, .* now; give another out"):
        compare_arms(replace(task, **changed), finished[0], protocols=PROTOCOLS, arms=ARMS, draws=2)


def test_seeds_are_added_with_their_data(task, tmp_path):
    options = {"protocols": PROTOCOLS[1:2], "arms": ["naive"], "draws": 2}
    compare_arms(task, tmp_path, seeds=[0], **options)
    other = replace(task, target=lambda seed, draw: target(5 * seed, draw))
    assert compare_arms(other, tmp_path, **options).seeds == (0, 1)  # there was nothing of seed 1 before
    with pytest.raises(ValueError, match=r"other data of target\(1, 0\)"):
        compare_arms(task, tmp_path, **options)


def test_results_from_before_data_was_hashed_are_not_resumed(task, tmp_path):
    options = {"protocols": PROTOCOLS[1:2], "arms": ["naive"], "draws": 2, "seeds": [0]}
    compare_arms(task, tmp_path, **options)
    path = tmp_path / "cells" / "seed-0.trajectory.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "identity": kept["identity"]["weights"]}))
    with pytest.raises(ValueError, match=r"of seed 0 without the hash of their data, .* give another output folder"):
        compare_arms(task, tmp_path, **options)


def unsendable():
    class Local(LinearProbe):
        pass

    return Local((1e-2, 1e-1))


@pytest.mark.parametrize(
    ("name", "of_task", "protocol"),
    [
        ("target of the task", {"target": lambda seed, draw: target(seed, draw)}, PROTOCOLS[1]),
        ("fresh_model of the task", {"fresh_model": lambda seed: fresh(seed)}, PROTOCOLS[1]),
        ("protocol 'linear-probe'", {}, unsendable()),
    ],
)
def test_what_can_not_be_sent_to_other_processes_is_named(task, tmp_path, name, of_task, protocol):
    options = {"protocols": [protocol], "arms": ["naive"], "draws": 2}
    with pytest.raises(ValueError, match=f"{name} can't be sent to another process .* or num_processes=1"):
        compare_arms(replace(task, **of_task), tmp_path / "out", num_processes=2, **options)
    assert not (tmp_path / "out").exists()


def with_labels(change, part="test", num_labels=4):
    """A `target` with other labels in one part."""

    def changed(seed, draw):
        split = target(seed, draw)
        examples = getattr(split, part)
        return replace(split, num_labels=num_labels, **{part: {**examples, "labels": change(examples["labels"])}})

    return changed


def with_part(part, content):
    return lambda seed, draw: replace(target(seed, draw), **{part: content})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda seed, draw: {"train": 1}, "target(0, 0) gave a dict; give a Split"),
        (
            with_part("train", make_images(16)),
            "train of target(0, 0) is a datasets.arrow_dataset.Dataset, not a mapping",
        ),
        (with_part("test", {}), "test of target(0, 0) holds no examples"),
        (
            with_part("train", {"pixel_values": torch.ones(3, 1), "labels": torch.arange(2)}),
            "the tensors in train of target(0, 0) have different lengths, {'pixel_values': 3, 'labels': 2}",
        ),
        (with_part("test", {"labels": [0, 1]}), "test of target(0, 0) has a list as 'labels'; give one tensor"),
        (with_part("test", {"label": torch.tensor([0])}), "test of target(0, 0) has 'label', which models take as"),
        (
            with_labels(torch.Tensor.float),
            "labels in test of target(0, 0) are torch.float32, accuracy and loss are of",
        ),
        (with_labels(torch.Tensor.int), "labels in test of target(0, 0) are torch.int32"),
        (
            with_labels(lambda labels: labels + 1),
            "test of target(0, 0) has the label 4, but the head has 4 classes, 0",
        ),
        (
            with_labels(lambda labels: labels - 1, "train"),
            "train of target(0, 0) has the label -1, but the head has 4",
        ),
    ],
)
def test_data_that_no_classifier_takes_is_told_before_anything_is_run(task, tmp_path, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compare_arms(replace(task, target=given), tmp_path / "out", protocols=PROTOCOLS, arms=["naive"], draws=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("protocol", [FineTuning((1e-3, 1e-2), steps=1, head_steps=0), PROTOCOLS[1]])
def test_labels_beyond_a_head_that_is_kept_are_told(task, tmp_path, protocol):
    beyond = replace(task, target=with_labels(lambda labels: labels + 1, num_labels=None))
    with pytest.raises(ValueError, match=r"^test of .* has the label 4, but the head has 4 classes, 0 to 3; count"):
        compare_arms(beyond, tmp_path, protocols=[protocol], arms=["naive"])


def test_the_head_of_a_language_model_is_not_asked_for_classes(task):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 1}
    model = T5ForConditionalGeneration(T5Config(vocab_size=8, **sizes, decoder_start_token_id=0))
    part = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "labels": torch.full((2, 3), 7)}
    _check_head(task, model, Split(part, part, part), "source(0)")  # it gives no logits without labels
    with pytest.raises(ValueError, match="input_ids"):
        model(part["input_ids"])


def test_source_labels_beyond_the_recorded_head_are_told(task, tmp_path):
    beyond = replace(task, source=lambda seed: with_labels(lambda labels: labels + 1, num_labels=None)(seed, 0))
    with pytest.raises(ValueError, match=r"^test of source\(0\) has the label 4, but the head has 4 classes"):
        compare_arms(beyond, tmp_path, protocols=[AsTheyAre()], arms=["naive"])


def test_with_measures_of_ones_own_labels_need_be_no_classes(task, tmp_path):
    def distance(model, examples):
        with torch.no_grad():
            return {
                "distance": float((model(examples["pixel_values"]).logits[:, 0] - examples["labels"]).abs().mean())
            }

    whole = vars(target(0, 0))
    regression = {
        part: {**whole[part], "labels": whole[part]["labels"].float()} for part in ("train", "validation", "test")
    }
    task = replace(
        task,
        target=lambda seed, draw: Split(**regression, num_labels=1),
        evaluate=distance,
        measures=(Measure("distance", higher_is_better=False),),
    )
    protocol = FineTuning((1e-3, 1e-2), steps=1, head_steps=1)
    report = compare_arms(task, tmp_path, protocols=[protocol], arms=["naive"], trials_per_rate=1)
    assert report.cells[0]["measured"]["few-shot"][0]["trials"][0]["test"]["distance"] > 0


def test_numbers_may_be_numpys(task, tmp_path):
    def evaluate(model, examples):
        return {"accuracy": np.mean(np.float32([0.5, 1.0])), "loss": torch.tensor(1.0)}

    task = replace(task, evaluate=evaluate)
    protocols = (FineTuning((1e-3,), steps=1, head_steps=0), AsTheyAre())
    report = compare_arms(task, tmp_path, protocols=protocols, arms=["naive"], seeds=np.arange(2), trials_per_rate=1)
    assert report.seeds == (0, 1)
    assert json.loads((tmp_path / "report.json").read_text())["results"][0]["arms"]["naive"]["mean"] == 0.75


def test_an_equal_difference_at_every_seed_is_warned_of(task, tmp_path):
    alike = {"source": lambda seed: source(0), "target": lambda seed, draw: target(0, 0)}
    task = replace(task, trajectory=[task.trajectory[0]] * 2, **alike)
    protocols = (LinearProbe((1e-2, 1e-1), steps=5),)
    report = compare_arms(task, tmp_path, protocols=protocols, arms=["naive", "state-4"])
    differing = [c.what for c in report.comparisons.values() if c.without_spread == ("state-4",)]
    assert differing and not any(c.better or c.worse for c in report.comparisons.values())
    for what in differing:
        assert any(f"In {what}, the difference to naive of state-4 is the same" in text for text in report.warnings)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arms": ["shrink"]}, r"the naive arm must be among the arms, got \['shrink'\]"),
        ({"arms": ["naive", "naive"]}, "arm 'naive' must have a name of its own"),
        ({"arms": ["naive", {"name": "trajectory", "predictor": "average"}]}, "no arm can be named 'trajectory'"),
        ({"arms": ["naive", "oracle"]}, "arm 'oracle' needs oracle_model of the task"),
        ({"trials_per_rate": 3}, "arm 'shrink' tries 4 settings, which do not divide trials_per_rate=3"),
        ({"protocols": []}, "a comparison needs protocols, different seeds, draws and trials, got 0 protocols"),
        ({"seeds": [0, 0]}, "different seeds"),
        ({"trials_per_rate": 0}, "trials_per_rate=0"),
        ({"protocols": [FineTuning((1e-3,))]}, "a grid of one learning rate, 0.001, has no step to refine"),
        ({"protocols": [LinearProbe((1e-3, 1e-2), labels_per_class=9)]}, "class 0 has 4 training examples, 9 were"),
        ({"seeds": [0], "draws": 1}, "one draw of one trajectory has no interval"),
        ({"seeds": [0, 2]}, "seed 2 has no trajectory: 2 are given"),
    ],
)
def test_arguments_that_are_off_are_errors(task, tmp_path, changed, message):
    options = {"protocols": PROTOCOLS, "arms": ["naive", "shrink"], "draws": 2, **changed}
    with pytest.raises(ValueError, match=message):
        compare_arms(task, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("protocol", "missing"), [(AsTheyAre(), "source"), (PROTOCOLS[1], "target")])
def test_a_protocol_needs_its_data(task, tmp_path, protocol, missing):
    with pytest.raises(ValueError, match=f"protocol '{protocol.name}' needs {missing} of the task"):
        compare_arms(replace(task, **{missing: None}), tmp_path / "out", protocols=[protocol], arms=["naive"])


def test_of_one_trajectory_the_draws_are_counted_and_that_is_told(recorded, tmp_path):
    task = ComparisonTask(recorded, target, source)
    report = compare_arms(task, tmp_path / "out", protocols=PROTOCOLS[1:], arms=["naive", "average"], draws=3)
    assert report.counted == "draws of one trajectory"
    assert report.warnings[0].startswith("There is one trajectory")
    comparison = report.comparisons["linear-probe", "accuracy"]
    assert comparison.num_seeds == 3 and ("source", "accuracy") not in report.comparisons
    assert "over 3 draws of one trajectory" in comparison.verdict()
    data = report.to_dict()
    assert len(data["curves"][0]["measures"]["accuracy"]["test_ci95"]) == 8
    assert data["cells"][0]["measured"]["source"][0]["trials"][0]["test"]["accuracy"] <= 1


def test_measures_of_ones_own(recorded, tmp_path):
    task = ComparisonTask(
        recorded, target, source, evaluate=errors, measures=(Measure("errors", digits=0, higher_is_better=False),)
    )
    report = compare_arms(
        task, tmp_path / "out", protocols=[PROTOCOLS[0]], arms=["naive", "average"], draws=2, trials_per_rate=1
    )
    trials = report.cells[0]["measured"]["few-shot"][0]["trials"]
    chosen = report.cells[0]["measured"]["few-shot"][0]["chosen"]
    assert trials[chosen]["validation"]["errors"] == min(trial["validation"]["errors"] for trial in trials)
    assert "errors" in str(report)


def test_a_probe_has_no_measures_of_ones_own(recorded, tmp_path):
    task = ComparisonTask(recorded, target, evaluate=errors, measures=(Measure("errors"),))
    with pytest.raises(ValueError, match="'linear-probe' measures accuracy and loss, not 'errors'; leave it out"):
        compare_arms(task, tmp_path / "out", protocols=[PROTOCOLS[1]], arms=["naive"], draws=2)


def test_what_the_statistics_need_is_asked_for_before_anything_is_run(task, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match="confidence intervals need scipy"):
        compare_arms(task, tmp_path / "out", protocols=PROTOCOLS, arms=ARMS, draws=2)
    assert not (tmp_path / "out").exists()


def errors(model, examples):
    return {"errors": (1 - evaluate_classifier(model, examples)["accuracy"]) * len(examples["labels"])}


def test_a_training_that_diverges_is_the_worst_trial(recorded, tmp_path):
    task = ComparisonTask(recorded, target, source)
    options = {"arms": ["naive", "average"], "draws": 2, "trials_per_rate": 1}
    # BatchNorm bounds the features, so that only numbers beyond float32 make the loss infinite
    protocol = FineTuning((1e-3, 1e30), steps=2, head_steps=0)
    report = compare_arms(task, tmp_path / "out", protocols=[protocol], **options)
    good, bad = report.cells[0]["measured"]["few-shot"][0]["trials"]
    assert bad["test"] == {"accuracy": None, "loss": None} and good["test"]["loss"] > 0
    assert report.cells[0]["measured"]["few-shot"][0]["chosen"] == 0
    curve = report.to_dict()["curves"][0]["measures"]["loss"]
    assert curve["test"][1] is None and curve["test_ci95"][1] is None and curve["test"][0] > 0
    with pytest.raises(ValueError, match="best trial of arm 'naive', seed 0, draw 0 of few-shot is not finite"):
        compare_arms(task, tmp_path / "none", protocols=[replace(protocol, learning_rates=(1e30,))], **options)


def test_rates_are_refined_evenly():
    assert refined((1e-3, 1e-2), 1) == [1e-3, 1e-2]
    assert refined((1e-3, 1e-2), 2) == [0.000562, 0.00178, 0.00562, 0.0178]
    assert refined((1e-3, 1e-2, 1e-1), 3)[1::3] == [1e-3, 1e-2, 1e-1]
    with pytest.raises(ValueError, match=r"one learning rate, 0.001, has no step to refine"):
        refined((1e-3,), 2)


def test_validation_chooses_by_the_first_measure_then_the_next():
    loss = Measure("loss", higher_is_better=False)

    def trial(accuracy, value):
        return {"validation": {"accuracy": accuracy, "loss": value}}

    trials = [trial(0.5, 0.1), trial(0.8, 0.9), trial(0.8, 0.7), trial(None, None), trial(0.8, 0.7)]
    assert choose(trials, (ACCURACY, loss)) == 2
    assert choose(trials, (loss, ACCURACY)) == 0


def test_the_first_labels_of_each_class_are_taken():
    examples = {"labels": torch.tensor([1, 0, 1, 1, 0, 0]), "x": torch.arange(6)}
    assert first_of_each_class(examples, 2)["x"].tolist() == [0, 1, 2, 4]
    assert first_of_each_class(examples, None) is examples
    with pytest.raises(ValueError, match="class 0 has 3 training examples, 4 were asked for"):
        first_of_each_class(examples, 4)


def test_by_default_all_arms_are_compared_that_can_be_made(task, recorded, tmp_path):
    names = _default_arms(task)
    assert [make_arm(name).name for name in names] == names and len(names) == len(set(names)) == 21
    assert {"naive", "random", "known-step-3", "matched-shrink-step-1", "state-4", "shuffled"} <= set(names)
    assert not {"oracle", "pretrained", "compute-matched"} & set(names)
    everything = replace(task, oracle_model=fresh, pretrained_model=fresh, train_further=fresh)
    assert {"oracle", "pretrained", "compute-matched"} <= set(_default_arms(everything))
    short = WeightTrajectory.create(tmp_path / "short")
    for size in (4, 2):
        short.record(make_resnet(seed=size), num_examples=size, steps=1)
    names = _default_arms(replace(task, trajectory=[recorded, short]))
    assert "state-1" in names and not {"state-2", "known-step-1"} & set(names)


def test_a_store_of_something_else_is_refused(tmp_path, task):
    CellStore(tmp_path / "out", {"of": "another program"})
    with pytest.raises(ValueError, match="holds results with other"):
        compare_arms(task, tmp_path / "out", protocols=PROTOCOLS, arms=["naive"], draws=2)
