"""Suites: what their files may contain, how their data is divided, and one with a known outcome."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from doubles.small_suites import KNOWN_TRUTH, digits, make_task, write_suite

from know_hf import KNOWNConfig
from know_hf.cli import main
from know_hf.evaluation import load_suite, plan_suite, run_suite
from know_hf.evaluation.protocols import FineTuning
from know_hf.evaluation.suites import SUITES_DIR
from know_hf.evaluation.suites.small_cnn import SmallCNN, SmallCNNConfig
from know_hf.evaluation.suites.suite_data import Inputs, Side, class_turns, digits_in_frames, prepare
from know_hf.evaluation.suites.suite_task import SuiteTask
from know_hf.prediction import SHIPPED_KNOWN

RECIPE = Path(__file__).parents[1] / "recipes" / "compare"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    return folder, run_suite(write_suite(folder), folder / "out", pages=False)


def test_a_known_outcome_is_reported(finished):
    _, report = finished
    source = report.comparisons["source", "accuracy"]
    assert source.valid is True and source.headroom is True
    means = {name: result.estimate.mean for name, result in source.results.items()}
    assert means["oracle"] > means["naive"] + 0.05 and means["naive"] > means["shuffled"] + 0.3
    assert source.results["shuffled"].difference.high < -0.3
    assert abs(means["shuffled"] - 0.2) < 0.1, "as good as guessing"
    probe = report.comparisons["linear-probe", "accuracy"]
    assert probe.valid is False and probe.validity() in report.warnings
    data = report.to_dict()
    assert data["task"]["source"]["train"] == 40 and len(data["task"]["data"]) == 4
    assert data["seeds"] == [0, 1, 2, 3] and data["name"] == "known-truth"
    assert data["trajectories"][0]["num_examples"] == [40, 10, 2]
    assert data["states"]["measures"]["accuracy"]["mean"][0] == means["naive"]


def test_the_metrics_of_a_gate_are_compared(finished, run_script):
    folder, _ = finished
    printed = run_script(RECIPE / "gate_metrics.py", folder / "suite.yaml", folder / "out")
    rows = [row.split(" | ") for row in printed.strip().splitlines()]
    assert [row[0].lstrip("| ") for row in rows[2:]] == ["calibrated loss", "validation loss", "accuracy"]
    for _, kept, *changes in rows[2:]:
        assert kept != "4 of 4" or all(change.startswith("+0.0") for change in changes)


def test_a_plan_is_a_trial_or_counts_the_finished_cells(finished, tmp_path, capsys):
    folder, report = finished
    tuned = {"kind": "fine_tuning", "learning_rates": [0.01], "steps": 2, "head_steps": 1}
    suite = write_suite(tmp_path, protocols=[tuned, *yaml.safe_load(KNOWN_TRUTH)["protocols"]])
    plan = plan_suite(suite, tmp_path / "out", num_processes=2)
    assert not (tmp_path / "out").exists()
    assert (plan.seeds, plan.trajectories, plan.cells, plan.based_on) == (4, 4, 16, "trial")
    assert plan.minutes > 0 and plan.memory > 2**25 and "trial of a few optimizer steps" in str(plan)
    arguments = ["compare", str(folder / "suite.yaml"), "--output-dir", str(folder / "out"), "--plan"]
    assert main([*arguments, "--seeds", *"01234"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 5 trajectories" in shown and "4 of 20 arms" in shown and "finished cells" in shown
    command = ["compare", str(folder / "suite.yaml"), "--output-dir", str(tmp_path / "limited")]
    assert main([*command, "--max-minutes", "1e-9"]) == 1
    shown = capsys.readouterr().err
    assert "0 of 16 cells" in shown and re.search(r"two seeds need about [\d.e-]+ more.* larger --max-minutes", shown)
    rest = plan_suite(folder / "suite.yaml", folder / "out", arms=["naive", "average"], seeds=[0, 1])
    naive = [cell["seconds"] for cell in report.cells[:8] if cell["arm"] == "naive"]
    assert (rest.trajectories, rest.cells) == (0, 2) and rest.minutes == pytest.approx(sum(naive) / 60)


def test_compute_matched_trains_for_the_steps_of_the_later_states_on_all_data(finished, monkeypatch):
    folder, _ = finished
    lengths, make_trainer = [], SuiteTask._trainer

    def spy(self, *args, **options):
        trainer = make_trainer(self, *args, **options)
        if "max_steps" in options:
            lengths.append((options["max_steps"], len(trainer.train_dataset), trainer.args.seed))
        return trainer

    monkeypatch.setattr(SuiteTask, "_trainer", spy)
    monkeypatch.setattr(SuiteTask, "record", lambda *_: pytest.fail("the trajectory was recorded before"))
    arms = ["naive", "compute-matched"]
    report = run_suite(folder / "suite.yaml", folder / "out", arms=arms, seeds=[0, 1], pages=False)
    assert report.trajectories[0]["steps"] == [160, 5, 1]
    assert lengths == [(5, 40, 1), (1, 40, 2), (5, 40, 101), (1, 40, 102)]
    assert [cell["arm"] for cell in report.cells] == arms * 2  # naive is read from its cell


def test_rescale_runs_with_a_model_class_that_transformers_lacks(finished):
    folder, _ = finished
    arms = ["naive", "rescale-0.5"]
    report = run_suite(folder / "suite.yaml", folder / "out", arms=arms, seeds=[0, 1], pages=False)
    source = report.comparisons["source", "accuracy"].results
    assert source["rescale-0.5"].per_seed == pytest.approx(source["naive"].per_seed, abs=0.005)


def test_the_command_and_the_recipe_run_a_suite(finished, capsys, run_script):
    suite, folder = finished[0] / "suite.yaml", finished[0] / "out"  # all cells exist
    arguments = [str(suite), "--output-dir", str(folder), *"--arms naive random --seeds 0 1".split()]
    assert main(["compare", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("known-truth: 2 trajectories")
    data = json.loads((folder / "report.json").read_text())
    assert list(data["arms"]) == ["naive", "random"] and data["seeds"] == [0, 1]
    assert (folder / "report.html").exists()
    assert run_script(RECIPE / "compare.py", *arguments) == printed


def fingerprints(examples):
    return {tuple(pixels.flatten().tolist()) for pixels in examples["pixel_values"]}


def test_splits_do_not_overlap_and_the_oracle_sees_no_test_example(tmp_path):
    task = make_task()
    source, target = task.source_split(3), task.target_split(3, 1)
    oracle_pixels = fingerprints(task._trainer(3, 80, tmp_path).train_dataset.__getitems__(list(range(80))))
    assert fingerprints(source.train) <= oracle_pixels
    for split in (source, target):
        train, validation, test = (fingerprints(part) for part in (split.train, split.validation, split.test))
        assert not (train & validation or train & test or validation & test)
    assert not oracle_pixels & (fingerprints(source.validation) | fingerprints(source.test))
    assert len(source.test["labels"]) == 100 and len(target.test["labels"]) > 250
    assert source.train["labels"].bincount().tolist() == [14, 13, 13]
    assert target.num_labels == 2 and set(target.train["labels"].tolist()) == {0, 1}


def test_the_task_of_a_suite_is_picklable_and_workers_read_no_dataset(monkeypatch):
    task = make_task().comparison_task()
    copy = pickle.loads(pickle.dumps(task))
    monkeypatch.setattr("know_hf.evaluation.suites.suite_task.prepare", lambda *_, **__: pytest.fail("read again"))
    assert torch.equal(copy.target(1, 2).train["pixel_values"], task.target(1, 2).train["pixel_values"])
    assert torch.equal(copy.fresh_model(1).classifier.weight, task.fresh_model(1).classifier.weight)


def test_seeds_and_draws_decide_examples_and_initialisation():
    task = make_task()
    examples = {draw: task.target_split(*draw).train["pixel_values"] for draw in ((0, 0), (0, 1), (1, 0))}
    assert torch.equal(examples[0, 0], task.target_split(0, 0).train["pixel_values"])
    assert not torch.equal(examples[0, 0], examples[0, 1]) and not torch.equal(examples[0, 0], examples[1, 0])
    assert not torch.equal(task.source_split(0).train["pixel_values"], task.source_split(1).train["pixel_values"])
    start, again, fresh, other = (
        model.classifier.weight for model in (task.start(0), task.start(0), task.fresh_model(0), task.start(1))
    )
    assert torch.equal(start, again) and not torch.equal(start, fresh) and not torch.equal(start, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": digits(500, classes=[0, 2, 4])}, "oracle trains on 1000 examples"),
        ({"target": digits(20, test=5000, classes=[5, 3])}, "validation=30 and test=5000"),
        ({"target": digits(900, classes=[5, 3])}, "900 examples, but split 'train'"),
        ({"source": digits(20, classes=[5, 11])}, "sklearn/digits has no example of class 11"),
        ({"model": {"class_name": "LargeCNN"}}, "LargeCNN"),
    ],
)
def test_errors_are_raised_before_any_training(changes, message):
    task = make_task(**changes)
    with pytest.raises(ValueError, match=message):
        task.comparison_task()


def test_digits_in_frames_and_turns_of_classes():
    (small, labels), (large, same_labels) = (digits_in_frames(size) for size in (8, 16))
    assert large.shape == (1797, 1, 16, 16) and np.array_equal(labels, same_labels)
    np.testing.assert_allclose(small.sum(axis=(1, 2, 3)), large.sum(axis=(1, 2, 3)), rtol=1e-5)
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
    rows = class_turns(labels, (0, 2), (1,))
    assert sorted(rows.tolist()) == [0, 1, 2, 3, 6, 7, 8]
    assert [sorted(labels[rows[i : i + 2]].tolist()) for i in (0, 2, 4)] == [[0, 2]] * 3


def test_images_of_any_mode_and_size_are_read_from_a_folder(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
        for index in range(3):
            pixels = np.full((10, 6, 3), 40 * index + (100 if label == "b" else 0), dtype=np.uint8)
            image_module.fromarray(pixels).save(tmp_path / "train" / label / f"{index}.png")
    side = Side("someone/images", 4, 1)
    inputs = Inputs(image_size=4, channels=3, mean=0.5, std=0.25)
    prepared = prepare(side, "train", inputs, {side.dataset: str(tmp_path)}, None)
    assert prepared.classes == (0, 1)
    rows = prepared.rows([0])
    examples = prepared.take(rows)
    assert examples["pixel_values"].shape == (6, 3, 4, 4) and sorted(examples["labels"].tolist()) == [0, 0, 0, 1, 1, 1]
    stored = prepared.stored(rows)["pixel_values"]
    torch.testing.assert_close(examples["pixel_values"], (stored / 255 - 0.5) / 0.25)
    assert set(stored.flatten().tolist()) == {0, 40, 80, 100, 140, 180}


def test_layers_of_the_small_network():
    plain, normed = (
        SmallCNN(SmallCNNConfig(width=4, num_layers=2, batch_norm=norm, num_labels=3)) for norm in (False, True)
    )
    assert plain.features[0].bias is not None and normed.features[0].bias is None
    assert len(normed.features) == len(plain.features) + 2
    output = plain(torch.randn(5, 1, 16, 16), labels=torch.zeros(5, dtype=torch.long))
    assert output.logits.shape == (5, 3) and output.loss.ndim == 0
    assert plain.base_model is plain.features


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": 3}, "unknown key 'sizes'"),
        ({"seed": 3}, "unknown key 'seed'; did you mean 'seeds'"),
        ({"content": {}}, "unknown key 'content'"),
        ({"seeds": "many"}, "seeds: .*integer, got 'many'"),
        ({"seeds": 0}, "seeds: .*greater than 0, got 0"),
        ({"draws": 1.5}, "draws: .*integer.*1.5"),
        ({"inputs": {"image_size": 8, "max_length": 5}}, "inputs: .*either image_size or max_length"),
        ({"inputs": {"image_size": 8, "channels": 2}}, "channels must be 1 or 3, got 2"),
        ({"inputs": {"image_size": 8, "next_byte": True}}, "inputs: .*next_byte needs texts"),
        ({"source": {"dataset": "x", "train": 5}}, "'source.validation' is missing.*dataset, train"),
        ({"source": {"dataset": "x", "train": 5, "validation": 5, "clases": [1]}}, "'source.clases'.*'classes'"),
        ({"source": digits(40, classes=["one"])}, "source.classes.0: .*'one'"),
        ({"source": digits(40, unseen="test")}, "unseen='test'"),
        ({"model": {}}, "model: .*pretrained, class_name, or both"),
        ({"model": {"class_name": "SmallCNN", "lora": {"r": 2}}}, "model: lora needs pretrained"),
        ({"protocols": [{"kind": "magic"}]}, "protocols.0: kind .*fine_tuning.*magic"),
        ({"protocols": ["magic"]}, "protocols.0: kind .*magic"),
        ({"protocols": [{"kind": "linear_probe", "learning_rate": [1]}]}, "'protocols.0.learning_rate'.*'learning_ra"),
        ({"protocols": [{"kind": "linear_probe", "learning_rates": [1, "x"]}]}, "protocols.0.learning_rates.1: .*'x'"),
        ({"arms": ["naive", "magic"]}, "arms.1: unknown arm 'magic'"),
        ({"schedule": {"ration": 0.5}}, "schedule: unknown key 'ration'; did you mean 'ratio'"),
        ({"schedule": {"ratio": 2}}, "schedule: .*ratio"),
        ({"training": {"learning_rat": 1}}, "training: unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ({"training": {"weight_decay": {"a": 1}}}, "training: weight_decay={'a': 1}: .*number"),
        ({"schedule": {"ratio": "x"}}, "schedule: ratio='x': .*number"),
        ({"training": [3]}, r"training: .*\[3\]"),
        ({"landscape": {"resolution": "fine"}}, "landscape.resolution: .*'fine'"),
    ],
)
def test_a_file_with_an_invalid_key_or_value_is_an_error(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"suite\.yaml: .*{message}"):
        load_suite(write_suite(tmp_path, **changes))


def test_paths_of_data_that_the_suite_does_not_read_are_errors(tmp_path):
    for argument, message in (("data", "known-truth reads sklearn/digits"), ("models", "known-truth reads none")):
        with pytest.raises(ValueError, match=f"{argument} names 'other', .*{message}"):
            run_suite(write_suite(tmp_path), tmp_path / "out", **{argument: {"other": "folder"}})


@pytest.mark.parametrize(("arm", "needed"), [("known-step-1", 5), ("gate", 5), ("state-3", 4)])
def test_arms_need_the_states_of_the_schedule(tmp_path, arm, needed):
    with pytest.raises(ValueError, match=f"'{arm}' needs {needed} states, .*known-truth has num_states=3"):
        plan_suite(write_suite(tmp_path), tmp_path / "out", arms=["naive", "state-2", arm])


@pytest.mark.parametrize(
    ("text", "message"),
    [("name: x", "'description' is missing"), ("- 1", "must contain a mapping"), ("a: [", "not valid YAML")],
)
def test_a_file_that_is_no_suite_is_an_error(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.yaml.*{message}"):
        load_suite(tmp_path / "a.yaml")
    for name, hint in (("no-such-suite", "digits, fashion-halves"), ("recipes/digits.yaml", "did you mean 'digits'")):
        with pytest.raises(FileNotFoundError, match=f"{name}.*{hint}"):
            load_suite(name)


def test_variants_and_scientific_notation(tmp_path):
    protocols = [{"kind": "linear_probe", "learning_rates": ["1e-3", "1e-2"]}]
    suite = load_suite(write_suite(tmp_path, training={"learning_rate": "3e-5"}, protocols=protocols))
    assert suite.training["learning_rate"] == 3e-5 and suite.protocols[0].learning_rates == (1e-3, 1e-2)
    path = write_suite(tmp_path, variants={"small": {"seeds": 2}, "large": {"seeds": 9, "draws": 3}})
    assert load_suite(path).seeds == 2 and load_suite(path).name == "known-truth:small"
    large = load_suite(f"{path}:large")
    assert (large.seeds, large.draws, large.name) == (9, 3, "known-truth:large")
    with pytest.raises(ValueError, match=r"'huge'.*small, large"):
        load_suite(f"{path}:huge")


SUITES = [
    (path.stem, variant)
    for path in sorted(SUITES_DIR.glob("*.yaml"))
    for variant in (yaml.safe_load(path.read_text()).get("variants") or {"": None})
]


@pytest.mark.parametrize(("name", "variant"), SUITES)
def test_suites_of_the_package(name, variant):
    suite = load_suite(f"{name}:{variant}" if variant else name)
    assert suite.seeds >= 10 and suite.first_seed == 0  # sizes were chosen on seeds from 1000 on
    assert {"naive", "random", "known-step-1", "shrink", "oracle"} <= {arm.name for arm in suite.arms}
    assert all(suite.trials_per_rate % len(arm.settings) == 0 for arm in suite.arms)
    assert any(protocol.on_source for protocol in suite.protocols)
    assert suite.protocols[0].on_source == (name == "digits")  # the quickstart, which has little time
    tuned = [p for p in suite.protocols if isinstance(p, FineTuning) and not p.one_trial]
    assert tuned[0].head_rates or not suite.inputs.image_size
    assert suite.model.class_name is None or suite.model.model_class


@pytest.mark.parametrize(
    ("own", "further"),
    [
        (["naive", "known-step-1", "matched-shrink-step-2"], ["x-step-1", "matched-shrink-x-step-2"]),
        (["naive"], [f"{kind}x-step-{count}" for count in (1, 2, 3) for kind in ("", "matched-shrink-")]),
    ],
)
def test_further_known_weights_get_the_arms_of_the_shipped_weights(own, further, monkeypatch, tmp_path):
    monkeypatch.setattr("know_hf.evaluation.suites.suite_run.compare_arms", lambda *_, arms, **__: arms)
    arms = run_suite("digits", tmp_path, arms=own, known={"x": str(SHIPPED_KNOWN)})
    assert [arm.name for arm in arms] == own + further
    assert {arm.known for arm in arms[len(own) :]} == {str(SHIPPED_KNOWN)}
    KNOWNConfig(variant="combination").save_pretrained(tmp_path / "combination")
    arms = run_suite("digits", tmp_path, arms=own, known={"x": str(tmp_path / "combination")})
    assert {arm.name for arm in arms[len(own) :]} <= {"x-step-1", "matched-shrink-x-step-1"}
    assert {arm.known for arm in arms[len(own) :]} == {str(tmp_path / "combination")}


def test_further_known_weights_are_read_before_the_work(tmp_path):
    with pytest.raises(OSError, match="nosuch"):
        run_suite("digits", tmp_path / "out", known={"x": str(tmp_path / "nosuch")})
    assert not (tmp_path / "out").exists()


def test_arms_of_a_suite_keep_its_settings(monkeypatch, tmp_path):
    monkeypatch.setattr("know_hf.evaluation.suites.suite_run.compare_arms", lambda *_, arms, **__: arms)
    naive, shrink, ema = run_suite("digits", tmp_path, arms=["naive", "shrink", {"name": "ema", "tuned": []}])
    assert shrink in load_suite("digits").arms and shrink.settings == ({"factor": 0.8}, {"factor": 0.5})
    assert (naive.name, ema.settings) == ("naive", ({},))
