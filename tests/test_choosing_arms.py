"""Arms that choose: a gate on source data, or settings that are different predictions; and what arms cost."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_resnet
from quadrants import source, target

from know_hf import ForgettingSchedule, WeightTrajectory
from know_hf.evaluation import (
    NAIVE,
    RANDOM,
    ArmSources,
    ComparisonTask,
    FineTuning,
    compare_arms,
    load_suite,
    make_arm,
    measure,
)
from know_hf.evaluation.report.tables import choices_table, costs_table

RECIPE = Path(__file__).parents[1] / "recipes" / "compare"
HEAD = "classifier.1.weight"
SMALL_GATE = {"name": "gate", "predictor": "average", "steps": 1}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Five unrelated states with confident heads, and no labels yet."""
    folder = tmp_path_factory.mktemp("sources")
    trajectory = WeightTrajectory.create(folder / "trajectory", ForgettingSchedule(ratio=0.25))
    for state in range(5):
        model = make_resnet(seed=20 + state)
        with torch.no_grad():
            model.get_parameter(HEAD).mul_(50)
        trajectory.record(model, num_examples=64 >> state, steps=16 >> state)
    pixels = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return ArmSources(
        trajectory=WeightTrajectory(trajectory.path),
        output_dir=folder / "arms",
        batches=[{"pixel_values": pixels}],
        source={"pixel_values": pixels},
        target={"labels": torch.zeros(20)},
        fresh_model=lambda: make_resnet(seed=11),
    )


def labelled_by(sources, state):
    """The sources, whose labels are what a state predicts."""
    model = make_arm(f"state-{state}" if state else "naive").initial_model(sources)
    with torch.no_grad():
        labels = model.eval()(**sources.source).logits.argmax(dim=-1)
    return replace(sources, source={**sources.source, "labels": labels})


@pytest.mark.parametrize(("name", "count"), [("gate", 40), ("gate-few", 20)])
def test_a_gate_chooses_the_weights_with_the_lowest_loss_on_source_data(sources, name, count):
    model, choice = make_arm(name).initial_weights(labelled_by(sources, 2))
    assert choice["chosen"] == "Θ2" and not choice["kept"]
    assert choice["num_candidates"] == 1 + 4 + 2 + 17  # Θ0, other states, KNOWN in 1 and 2 steps, the family of states
    assert choice["forward_passes"] == count * choice["num_candidates"]
    assert torch.equal(model.state_dict()[HEAD], sources.trajectory.tensor(HEAD, state=2))


def test_a_gate_keeps_theta_0_where_nothing_is_better(sources):
    model, choice = make_arm(SMALL_GATE).initial_weights(labelled_by(sources, 0))
    assert choice["chosen"] == "Θ0" and choice["kept"]
    for name, tensor in NAIVE.initial_model(sources).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_what_a_gate_needs(sources):
    assert make_arm("gate").needs == ("source",) and make_arm("gate-few").needs == ("source", "target")
    with pytest.raises(ValueError, match="arm 'gate' needs source of the sources"):
        make_arm("gate").initial_model(replace(sources, source=None))
    with pytest.raises(ValueError, match="arm 'gate-few' needs target of the sources"):
        make_arm("gate-few").initial_model(replace(sources, target=None))


def test_settings_may_be_different_predictions(sources):
    arm = make_arm("family")
    weights = [arm.initial_model(sources, setting).state_dict()[HEAD] for setting in arm.settings]
    history = sources.trajectory.history(HEAD)
    expected = [history[-1], history.mean(0), history[-1] + 0.5 * (history[-1] - history[0]), 0.65 * history[-1]]
    for tensor, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(tensor, other)
    own = make_arm({"name": "mine", "predictor": "average", "tuned": [{"state": 1}, {"predictor": "log"}]})
    assert own.role == arm.role == "method"
    assert torch.equal(own.initial_model(sources, own.settings[0]).state_dict()[HEAD], history[-2])


def test_rescaled_by_a_fixed_factor(sources):
    arm = make_arm("rescale-0.5")
    assert (arm.predictor, arm.options, arm.role) == ("rescale", {"factor": 0.5}, "control")
    models = [each.initial_model(sources) for each in (NAIVE, arm)]
    with torch.no_grad():
        logits, rescaled = (model.eval()(**sources.source).logits for model in models)
    torch.testing.assert_close(rescaled, logits, rtol=0, atol=0.02 * float(logits.abs().max()))  # BatchNorm has an eps
    convolution = "resnet.embedder.embedder.convolution.weight"
    torch.testing.assert_close(models[1].state_dict()[convolution], 0.5 * models[0].state_dict()[convolution])
    with pytest.raises(ValueError, match="unknown arm 'rescale-half'"):
        make_arm("rescale-half")


def test_training_costs_are_steps_relative_to_those_of_theta_0(sources):
    names = "naive random state-1 shrink rescale-2 oracle average known-step-1 compute-matched gate shuffled".split()
    costs = {name: make_arm(name).training_cost(sources.trajectory) for name in names}
    recording = 31 / 16
    assert costs == {
        **{"naive": 1, "random": 0, "state-1": 1.5, "shrink": 1, "rescale-2": 1, "oracle": 4, "shuffled": 1},
        **dict.fromkeys(("average", "known-step-1", "compute-matched", "gate"), recording),
    }
    assert RANDOM.training_cost(sources.trajectory) == 0


def test_protocols_of_one_target_stand_side_by_side(recorded, tmp_path, run_script):
    """The tuned protocol with two rates, with one shared rate, and a fixed recipe with one trial."""
    shared = FineTuning((1e-3, 1e-2), steps=2, head_steps=2, name="few-shot-one-rate")
    protocols = (
        replace(shared, name="few-shot", head_rates=(1e-2, 1e-1)),
        shared,
        replace(shared, name="few-shot-default", learning_rates=(5e-3,), one_trial=True),
    )
    arms = ["naive", "random", {"name": "shrink", "tuned": [{"factor": 0.5}, {"factor": 0.9}]}, SMALL_GATE]
    task = ComparisonTask(recorded, target, source, fresh_model=lambda seed: make_resnet(seed=70 + seed))
    report = compare_arms(task, tmp_path / "out", protocols=protocols, arms=arms, draws=2, trials_per_rate=2)
    trials = {
        (arm, name): [(t["options"], t["learning_rate"], t.get("head_learning_rate")) for t in draws[0]["trials"]]
        for cell in report.cells
        for arm in (cell["arm"],)
        for name, draws in cell["measured"].items()
    }
    assert {len(of_arm) for (_, name), of_arm in trials.items() if name == "few-shot"} == {8}
    assert {len(of_arm) for (_, name), of_arm in trials.items() if name == "few-shot-one-rate"} == {4}
    assert trials["naive", "few-shot-default"] == trials["gate", "few-shot-default"] == [({}, 5e-3, None)]
    assert trials["shrink", "few-shot-default"] == [({"factor": 0.5}, 5e-3, None)], "the first setting"
    content = report.to_dict()
    assert content["results"][0]["protocol"] == "few-shot", "the first is the most important"
    assert [entry["protocol"] for entry in content["budgets"]] == ["few-shot", "few-shot-one-rate"]
    assert "in one trial" in str(report) and "one_trial" not in content["protocols"]["few-shot"]
    fixed = [curve for curve in content["curves"] if curve["protocol"] == "few-shot-default"]
    assert [(curve["arm"], curve["options"]) for curve in fixed].count(("shrink", {"factor": 0.5})) == 1
    costs = {row[0]: row[1:] for row in costs_table(content).rows}
    (choice,) = (cell["choice"] for cell in report.cells if cell["arm"] == "gate")
    assert costs["gate"][1] == f"{20 * choice['num_candidates']}" and costs["random"] == ["0", "–"]
    assert choices_table(content).rows == [["gate", f"{choice['chosen']} (1)"]]
    assert "What the gates chose" in (tmp_path / "out" / "report.md").read_text()
    figure = ["--protocol", "few-shot-one-rate", "--arms", "shrink", "--figure", tmp_path / "rates.svg"]
    run_script(RECIPE / "summary.py", tmp_path / "out", *figure)
    drawn = (tmp_path / "rates.svg").read_text()
    assert "shrink" in drawn and "random" not in drawn
    old = {**content, "cells": [{"arm": "naive", "seed": 0}]}
    assert costs_table(old) is None and choices_table(old) is None


def test_equal_weights_are_measured_once(recorded, tmp_path, monkeypatch):
    """An arm with naive's weights, as a gate that keeps Θ0, has naive's results; settings mean other trials."""
    trained, measured = [], measure._measured
    monkeypatch.setattr(measure, "_measured", lambda *args: trained.append(args[1:3]) or measured(*args))
    same = {"name": "same", "kind": "state", "description": "Θ0 again"}
    arms = [make_arm(spec) for spec in ("naive", same, {**same, "name": "tuned", "tuned": [{}]}, "state-1")]
    protocol = FineTuning((1e-3, 1e-2), steps=2, head_steps=2)
    task = ComparisonTask(recorded, target, source)
    report = compare_arms(task, tmp_path / "out", protocols=[protocol], arms=arms, draws=2, trials_per_rate=1)
    assert trained == [(seed, arm) for seed in report.seeds for arm in arms if arm.name != "same"]
    cells = {(cell["seed"], cell["arm"]): cell for cell in report.cells}
    for seed in report.seeds:
        naive, equal, tuned, other = (cells[seed, arm.name] for arm in arms)
        assert naive["measured"] == equal["measured"] == tuned["measured"] != other["measured"]
        assert naive["weights"] == equal["weights"] != other["weights"] and tuned["weights"] is None


def test_a_fixed_recipe_has_one_rate():
    with pytest.raises(ValueError, match=r"one_trial has one rate, got learning_rates=\(0.001, 0.01\)"):
        FineTuning((1e-3, 1e-2), one_trial=True)
    with pytest.raises(ValueError, match="head_learning_rate"):
        FineTuning((1e-3,), head_learning_rate=(1e-3, 1e-2), one_trial=True)
    assert FineTuning((1e-3,), one_trial=True).to_dict()["one_trial"] is True


@pytest.mark.parametrize("variant", ["mnist", "digits"])
def test_the_published_protocol_stands_beside_the_same_training_at_other_rates(variant):
    tuned, fixed, _ = load_suite(f"{RECIPE / 'published.yaml'}:{variant}").protocols
    assert fixed.one_trial and fixed.learning_rates == (4e-4,) and len(tuned.learning_rates) > 1
    assert replace(fixed, name="tuned", one_trial=False, learning_rates=tuned.learning_rates) == tuned
