"""Comparisons of tiny tasks: results, resuming, and errors."""

import json
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_resnet
from quadrants import PROTOCOLS, compare_arms, source, target

from know_hf import WeightTrajectory
from know_hf.checkpoint import locked_folder
from know_hf.evaluation import ComparisonTask, FineTuning, Landscape, LinearProbe, ZeroShot, make_arm
from know_hf.evaluation import compare_arms as compare_arms_with_pages
from know_hf.evaluation.compare import RESULTS_VERSION, _arm_entry
from know_hf.evaluation.comparison import ACCURACY
from know_hf.evaluation.comparison_checks import default_arms
from know_hf.evaluation.measure import measure_arm, measure_trajectory
from know_hf.evaluation.protocols import refined

ARMS = ["naive", "random", "known-step-1", "shrink", "shuffled"]
OPTIONS = {"protocols": PROTOCOLS, "arms": ARMS, "draws": 2}


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
    report = compare_arms(task, folder, **OPTIONS, landscape=Landscape(3, 8), description="Tiny.")
    return folder, report, report.to_dict()


def test_every_arm_has_the_same_number_of_trials(finished):
    folder, _, data = finished
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(data))
    assert [(cell["seed"], cell["arm"]) for cell in data["cells"]] == [(seed, arm) for seed in (0, 1) for arm in ARMS]
    for cell in data["cells"]:
        for name in ("few-shot", "linear-probe"):
            assert [(draw["draw"], len(draw["trials"])) for draw in cell["measured"][name]] == [(0, 8), (1, 8)]
        trials = cell["measured"]["few-shot"][0]["trials"]
        settings = {json.dumps(trial["options"]) for trial in trials}
        rates = {trial["learning_rate"] for trial in trials}
        assert (len(settings), len(rates)) == ((4, 2) if cell["arm"] == "shrink" else (1, 8))
    roles = {arm: data["arms"][arm]["role"] for arm in ARMS}
    references = dict.fromkeys(("naive", "random", "shuffled"), "reference")
    assert roles == {**references, "shrink": "control", "known-step-1": "method"}


def test_the_trial_that_is_best_on_validation_data_is_reported(finished):
    data = finished[2]
    result = next(r for r in data["results"] if r["protocol"] == "few-shot" and r["measure"]["name"] == "accuracy")
    for cell in data["cells"]:
        index = data["seeds"].index(cell["seed"])
        for draw in cell["measured"]["few-shot"]:
            best = draw["trials"][draw["chosen"]]
            assert best["validation"]["accuracy"] == max(t["validation"]["accuracy"] for t in draw["trials"])
            assert result["arms"][cell["arm"]]["per_draw"][index][draw["draw"]] == best["test"]["accuracy"]
    naive, shrink = result["arms"]["naive"], result["arms"]["shrink"]
    assert naive["per_seed"] == [pytest.approx(sum(draws) / 2) for draws in naive["per_draw"]]
    assert shrink["minus_naive"]["mean"] == pytest.approx(shrink["mean"] - naive["mean"])
    assert result["num_tests"] == 2 and set(result["against_controls"]) == {"known-step-1"}


def test_curves_have_the_accuracy_at_every_rate(finished):
    data = finished[2]
    assert {curve["protocol"] for curve in data["curves"]} == {"few-shot", "linear-probe"}
    curves = [curve for curve in data["curves"] if curve["protocol"] == "few-shot"]
    assert {curve["arm"] for curve in curves} == set(ARMS)
    shrink = [curve for curve in curves if curve["arm"] == "shrink"]
    assert [curve["options"] for curve in shrink] == [{"factor": factor} for factor in (0.95, 0.8, 0.65, 0.5)]
    assert sum(curve["chosen"] for curve in shrink) == pytest.approx(1)
    naive = next(curve for curve in curves if curve["arm"] == "naive")
    assert naive["learning_rates"] == refined((1e-3, 1e-2), 4)
    draws = [draw for cell in data["cells"] if cell["arm"] == "naive" for draw in cell["measured"]["few-shot"]]
    mean = np.mean([draw["trials"][3]["test"]["accuracy"] for draw in draws])
    assert naive["measures"]["accuracy"]["test"][3] == pytest.approx(mean)


def test_rates_of_the_head_and_trial_matched_naive(task, tmp_path):
    protocol = FineTuning((1e-3, 1e-2), steps=1, head_steps=1, labels_per_class=2, head_rates=(1e-3, 1e-1))
    arms = ["naive", "trial-matched-naive", "shrink"]
    data = compare_arms(task, tmp_path, protocols=[protocol], arms=arms).to_dict()
    assert data["arms"]["trial-matched-naive"]["role"] == "control"
    assert data["protocols"]["few-shot"]["head_rates"] == (1e-3, 1e-1)
    trials = {cell["arm"]: cell["measured"]["few-shot"][0]["trials"] for cell in data["cells"][:3]}
    assert {len(of_arm) for of_arm in trials.values()} == {16}  # 2 · 2 pairs of rates, 4 trials each
    matched = trials["trial-matched-naive"]
    assert [trial["options"] for trial in matched] == [{"seed": 0}] * 8 + [{"seed": 1}] * 8
    assert {trial["learning_rate"] for trial in matched} == set(refined((1e-3, 1e-2), 2))
    assert all(a["test"] != b["test"] for a, b in zip(matched[:8], matched[8:], strict=True))
    assert {trial["head_learning_rate"] for trial in matched} == {1e-3, 1e-1}
    assert all("head_learning_rate" in chosen for chosen in data["chosen"]["few-shot"]["naive"])
    curve = next(curve for curve in data["curves"] if curve["arm"] == "naive")
    assert curve["learning_rates"] == refined((1e-3, 1e-2), 4) and curve["chosen"] == 1
    draws = [draw for cell in data["cells"] if cell["arm"] == "naive" for draw in cell["measured"]["few-shot"]]
    pairs = zip(*(draw["trials"] for draw in draws), strict=True)
    means = [np.mean([trial["validation"]["accuracy"] for trial in pair]) for pair in pairs]
    assert curve["measures"]["accuracy"]["validation"] == [max(means[k : k + 2]) for k in range(0, 16, 2)]


def test_trials_in_stacks_give_the_same_results(task, tmp_path):
    options = {"protocols": PROTOCOLS, "arms": ["naive", "shrink"], "draws": 2}
    reports = [compare_arms(task, tmp_path / str(it), stacked=it, **options).to_dict() for it in (True, False)]
    losses = [
        [
            trial["test"]["loss"]
            for cell in report["cells"]
            for draws in cell["measured"].values()
            for draw in draws
            for trial in draw["trials"]
        ]
        for report in reports
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_states_have_a_forgetting_curve_and_a_landscape(finished):
    _, report, data = finished
    assert data["states"]["num_examples"] == [64, 32, 16, 8, 4]
    measured = [values[0] for values in data["states"]["measures"]["accuracy"]["per_seed"]]
    assert measured == list(report.comparisons["source", "accuracy"].results["naive"].per_seed)
    picture = report.landscape
    assert np.shape(picture["loss"]) == (3, 3)
    points = {point["name"]: point for point in picture["points"]}
    assert set(points) == {*(f"Θ{k}" for k in range(5)), "known-step-1"}
    assert (points["Θ0"]["x"], points["Θ0"]["y"], points["Θ0"]["off_plane"]) == (0, 0, 0)
    assert 1 + 1e-6 >= sum(picture["explained"]) > picture["explained"][0] >= picture["explained"][1] > 0


def test_the_report_is_printable_with_warnings_and_temporary_files_are_deleted(finished):
    folder, report, _ = finished
    assert "2 trajectory seeds" in report.warnings[0] and "10" in report.warnings[0]
    assert "few-shot fine-tuning with 2 labels per class, accuracy" in str(report).lower()
    assert str(report).count("\nnaive ") == 6
    assert {path.name for path in folder.iterdir()} == {"cells", "identity.json", "report.json"}
    versions = json.loads((folder / "identity.json").read_text())["versions"]
    assert versions["know_hf"] == RESULTS_VERSION and versions["torch"] == version("torch")


def test_pages_are_written_if_matplotlib_is_installed(task, tmp_path, monkeypatch):
    options = {"protocols": [ZeroShot()], "arms": ["naive", "random"]}
    compare_arms_with_pages(task, tmp_path / "out", command="make it", **options)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["command"] == "make it"
    assert "make it" in (tmp_path / "out" / "report.html").read_text()
    assert "naive" in (tmp_path / "out" / "report.md").read_text()
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    compare_arms_with_pages(task, tmp_path / "plain", **options)
    assert (tmp_path / "plain" / "report.json").exists() and not (tmp_path / "plain" / "report.html").exists()


def test_arms_and_trajectories_can_be_added_without_running_cells_again(task, tmp_path, monkeypatch):
    options, cells = {"protocols": PROTOCOLS[1:], "draws": 2}, tmp_path / "cells"
    compare_arms(replace(task, trajectory=task.trajectory[0]), tmp_path, arms=["naive", "shrink"], **options)
    before = {path: path.read_bytes() for path in cells.iterdir()}
    assert {path.stem for path in before} == {"seed-0.naive", "seed-0.shrink", "seed-0.trajectory"}
    more = compare_arms(task, tmp_path, arms=["naive", "random", "shrink"], **options)
    assert all(path.read_bytes() == content for path, content in before.items())
    for name in ("measure_trajectory", "measure_arm"):
        monkeypatch.setattr(f"know_hf.evaluation.compare.{name}", lambda *_, **__: pytest.fail("run again"))
    again = compare_arms(task, tmp_path, arms=["naive", "random", "shrink"], **options)
    assert again.to_dict() == more.to_dict() and len(more.cells) == 6 and more.seeds == (0, 1)


def recorded_by_seed(seed, folder, count=3, shift=0):
    trajectory = WeightTrajectory(folder) if WeightTrajectory.exists(folder) else WeightTrajectory.create(folder)
    for index in range(trajectory.num_states, count):
        trajectory.record(make_resnet(seed=10 * seed + index + shift), num_examples=64 >> index, steps=4)
    return trajectory


def test_a_deleted_trajectory_is_recorded_again(tmp_path):
    task = ComparisonTask(recorded_by_seed, target, source)
    options = {"protocols": [PROTOCOLS[1]], "draws": 2, "seeds": [0]}
    expected = compare_arms(task, tmp_path / "expected", arms=["naive", "average"], **options)
    out, folder = tmp_path / "out", tmp_path / "out" / "trajectories" / "seed-0"
    compare_arms(task, out, arms=["naive"], **options)
    shutil.rmtree(folder)
    recorded_by_seed(0, folder, count=2)  # killed while recording again
    again = compare_arms(task, out, arms=["naive", "average"], **options)
    assert WeightTrajectory(folder).num_states == 3
    assert [cell["measured"] for cell in again.cells] == [cell["measured"] for cell in expected.cells]
    assert "identity" not in again.to_dict()["trajectories"][0]
    shutil.rmtree(folder)
    other = replace(task, trajectory=partial(recorded_by_seed, shift=1))
    with pytest.raises(ValueError, match="other weights than the trajectory of seed 0"):
        compare_arms(other, out, arms=["naive", "average", "ema"], **options)


def test_a_time_limit_ends_with_the_seeds_that_are_complete(task, tmp_path, monkeypatch):
    task = replace(task, trajectory=[*task.trajectory, task.trajectory[1]])
    options = {"protocols": PROTOCOLS[1:2], "arms": ["naive", "shrink", "random"], "draws": 2}
    clock, order = [0.0], []

    def a_minute(measure):
        def measured(cell, **arguments):
            clock[0] += 60
            order.append((cell[0], cell[1].name) if isinstance(cell, tuple) else (cell, "trajectory"))
            return {**measure(cell, **arguments), "seconds": 60.0}

        return measured

    for module in ("cells", "compare"):
        monkeypatch.setattr(f"know_hf.evaluation.{module}.time", SimpleNamespace(monotonic=lambda: clock[0]))
    for name, function in (("measure_trajectory", measure_trajectory), ("measure_arm", measure_arm)):
        monkeypatch.setattr(f"know_hf.evaluation.compare.{name}", a_minute(function))
    with pytest.raises(TimeoutError, match="1 of 3 seeds complete"):
        compare_arms(task, tmp_path, max_minutes=5.5, **options)
    of_seed = [(0, name) for name in ("trajectory", "naive", "random", "shrink")]
    assert order == [*of_seed, (1, "trajectory")] and not (tmp_path / "report.json").exists()
    report = compare_arms(task, tmp_path, max_minutes=5.5, **options)
    assert order[5:] == [(1, "naive"), (1, "random"), (1, "shrink"), (2, "trajectory"), (2, "naive")]
    assert (report.seeds, report.planned_seeds) == ((0, 1), (0, 1, 2)) and "2 of 3 planned" in report.warnings[0]
    complete = compare_arms(task, tmp_path, max_minutes=0.5, seeds=[0, 1], **options)
    assert complete.cells == report.cells and "limit" not in str(complete)
    with pytest.raises(ValueError, match="max_minutes"):
        compare_arms(task, tmp_path, max_minutes=-1, **options)


def change_images(examples):
    return {**examples, "pixel_values": examples["pixel_values"] + 1e-3}


@pytest.mark.parametrize(
    ("of_task", "options", "message"),
    [
        ({}, {"draws": 3}, "different draws: 2 instead of 3"),
        ({}, {"protocols": PROTOCOLS[:2]}, "different protocols"),
        ({}, {"arms": ["naive", {"name": "shrink", "tuned": [{"factor": 0.9}]}]}, "different arm 'shrink'"),
        ({"facts": {"name": "octants"}}, {}, "different task"),
        ({"target": lambda s, d: replace(target(s, d), test=change_images(target(s, d).test))}, {}, r"target\(0, 0\)"),
        ({"target": lambda s, d: target(s, d + (s == 1 and d == 1))}, {}, r"different target\(1, 1\)"),
        ({"target": lambda s, d: replace(target(s, d), num_labels=5)}, {}, r"different target\(0, 0\)"),
        ({"source": lambda s: replace(source(s), train=change_images(source(s).train))}, {}, r"source\(0\)"),
        ({"source": lambda s: source(s if s == 0 else 7)}, {}, r"different source\(1\)"),
        ({"trajectory": "reversed"}, {}, "other weights than the trajectory of seed 0"),
    ],
)
def test_results_of_another_comparison_are_refused(finished, task, of_task, options, message):
    if "trajectory" in of_task:
        of_task = {"trajectory": task.trajectory[::-1]}
    with pytest.raises(ValueError, match=message):
        compare_arms(replace(task, **of_task), finished[0], **{**OPTIONS, **options})


@pytest.mark.parametrize(
    ("cell", "change"),
    [
        ("seed-0.naive", lambda content: content.pop("arm")),
        ("seed-0.naive", lambda content: content.update(seconds="9")),
        ("seed-0.naive", lambda content: content.update(seed=1)),
        ("seed-0.naive", lambda content: content["measured"].pop("source")),
        ("seed-1.shrink", lambda content: content["measured"]["few-shot"].pop()),
        ("seed-1.shrink", lambda content: content["measured"]["few-shot"][0].update(chosen=99)),
        ("seed-1.shrink", lambda content: content["measured"]["few-shot"][0]["trials"].pop()),
        ("seed-1.shrink", lambda content: content["measured"]["few-shot"][0]["trials"][0].pop("test")),
        ("seed-1.trajectory", lambda content: content["states"].pop()),
        ("seed-1.trajectory", lambda content: content["states"][0].pop("accuracy")),
        ("seed-1.trajectory", lambda content: content.pop("identity")),
    ],
)
def test_damaged_cells_are_named(finished, task, tmp_path, cell, change):
    folder = shutil.copytree(finished[0], tmp_path / "out")
    path = folder / "cells" / f"{cell}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{re.escape(path.name)}.*run the cell again"):
        compare_arms(task, folder, **OPTIONS)


def test_seeds_are_added_with_their_data(task, tmp_path):
    options = {"protocols": PROTOCOLS[1:2], "arms": ["naive"], "draws": 2}
    compare_arms(task, tmp_path, seeds=[0], **options)
    other = replace(task, target=lambda seed, draw: target(5 * seed, draw))
    assert compare_arms(other, tmp_path, **options).seeds == (0, 1)  # seed 1 is new
    with pytest.raises(ValueError, match=r"different target\(1, 0\)"):
        compare_arms(task, tmp_path, **options)


def few_source(seed):
    split = source(seed)
    return replace(split, validation={name: tensor[:4] for name, tensor in split.validation.items()})


def unpicklable():
    return type("Local", (LinearProbe,), {})((1e-2, 1e-1))


def test_an_equal_difference_at_every_seed_is_a_warning(task, tmp_path):
    alike = {"source": lambda seed: source(0), "target": lambda seed, draw: target(0, 0)}
    task = replace(task, trajectory=[task.trajectory[0]] * 2, **alike)
    protocols = (LinearProbe((1e-2, 1e-1), steps=5),)
    report = compare_arms(task, tmp_path, protocols=protocols, arms=["naive", "state-4"])
    equal = [c.what for c in report.comparisons.values() if c.without_spread == ("state-4",)]
    assert equal and not any(c.better or c.worse for c in report.comparisons.values())
    for what in equal:
        assert any(what in text and "state-4" in text for text in report.warnings)


@pytest.mark.parametrize(
    ("of_task", "options", "message"),
    [
        ({}, {"arms": ["shrink"]}, r"naive, got \['shrink'\]"),
        ({}, {"arms": ["naive", "naive"]}, "arm 'naive' needs a unique name"),
        ({}, {"arms": ["naive", {"name": "trajectory", "predictor": "average"}]}, "'trajectory'"),
        ({}, {"arms": ["naive", "oracle"]}, "arm 'oracle' needs oracle_model of the task"),
        ({"source": few_source}, {"arms": ["naive", "gate"]}, "'gate' needs at least 10 .*validation.* got 4"),
        (
            {},
            {"trials_per_rate": 3},
            "trials_per_rate=3 .* 4 settings of arm 'shrink'.*Set trials_per_rate=4.*'tuned'",
        ),
        ({}, {"protocols": []}, "0 protocols"),
        ({}, {"seeds": [0, 0]}, "distinct seeds"),
        ({}, {"trials_per_rate": 0}, "trials_per_rate=0"),
        (
            {},
            {"arms": ["naive", {"name": "shrink", "options": {"facter": 0.5}}]},
            "arm 'shrink': unknown option 'facter'; 'shrink' takes factor",
        ),
        ({}, {"arms": ["naive", {"name": "ema", "tuned": [{"decay": 2}]}]}, "arm 'ema': decay must be .*got 2"),
        ({}, {"arms": ["naive", {"name": "family", "tuned": [{"predictor": "avrage"}]}]}, "'family': .*'avrage'"),
        ({}, {"protocols": [FineTuning((1e-3,))]}, r"0\.001.* cannot be refined"),
        ({}, {"protocols": [LinearProbe((1e-3, 1e-2), labels_per_class=9)]}, "class 0 has 4 .*labels_per_class=9"),
        ({}, {"seeds": [0], "draws": 1}, "no interval.*10 draws.*compare_checkpoints"),
        ({}, {"seeds": [0, 2]}, "seed 2 has no trajectory"),
        ({"source": None}, {}, "protocol 'source' needs source of the task"),
        ({"target": None}, {}, "protocol 'few-shot' needs target of the task"),
        ({"source": None}, {"protocols": PROTOCOLS[:1], "landscape": Landscape()}, "landscape needs source"),
        ({"measures": (ACCURACY,)}, {"landscape": Landscape()}, "landscape needs a loss"),
        ({"target": lambda seed, draw: None}, {"num_processes": 2}, "target of the task cannot be pickled"),
        ({"fresh_model": lambda seed: fresh(seed)}, {"num_processes": 2}, "fresh_model of the task cannot be pickled"),
        ({}, {"protocols": [unpicklable()], "num_processes": 2}, "protocol 'linear-probe' cannot be pickled"),
    ],
)
def test_invalid_arguments_are_errors_before_the_work(task, tmp_path, of_task, options, message):
    with pytest.raises(ValueError, match=message):
        compare_arms(replace(task, **of_task), tmp_path / "out", **{**OPTIONS, **options})
    assert not (tmp_path / "out").exists()


def test_a_missing_scipy_is_an_error_before_the_work(task, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match="scipy"):
        compare_arms(task, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_diverged_training_is_the_worst_trial(recorded, tmp_path):
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


def test_default_arms_and_the_forgetting_curve_are_those_the_task_has_models_and_states_for(task, recorded, tmp_path):
    names, with_models = default_arms(task), {"oracle", "pretrained", "compute-matched"}
    assert [make_arm(name).name for name in names] == names and len(names) == len(set(names)) == 25
    assert {"naive", "random", "known-step-3", "matched-shrink-step-1", "state-4", "gate-few"} <= set(names)
    everything = replace(task, oracle_model=fresh, pretrained_model=fresh, train_further=fresh)
    assert set(default_arms(everything)) - set(names) == with_models
    short = replace(task, trajectory=[recorded, recorded_by_seed(2, tmp_path / "short", count=2)])
    names = default_arms(short)
    assert "state-1" in names and not {"state-2", "known-step-1", "gate"} & set(names)
    report = compare_arms(short, tmp_path / "out", protocols=[ZeroShot()], arms=["naive", "random"]).to_dict()
    assert report["states"]["num_examples"] == [64, 32]  # the states of all trajectories
    assert [len(run) for run in report["states"]["measures"]["accuracy"]["per_seed"]] == [2, 2]
    assert [len(run["states"]) for run in report["trajectories"]] == [5, 2]


def test_a_report_tells_no_local_folder(task, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "out")
    known = {"name": "mine", "kind": "predicted", "description": "", "known": "/home/secretuser/known"}
    command = "know-hf compare digits --output-dir /home/secretuser/out --known mine=/home/secretuser/known"
    report = compare_arms(task, folder, **OPTIONS, command=command)
    assert report.command == "know-hf compare digits --output-dir .../out --known mine=.../known"
    assert _arm_entry(make_arm(known))["spec"]["known"] == ".../known"
    assert not [path for path in folder.rglob("*") if path.is_file() and b"secretuser" in path.read_bytes()]


def test_one_comparison_at_a_time(task, finished):
    with locked_folder(finished[0]), pytest.raises(BlockingIOError, match=r"another process .*out"):
        compare_arms(task, finished[0], **OPTIONS)
