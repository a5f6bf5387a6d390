"""Suites: what their files may hold, how their data is divided, and one whose truth is known."""

import json
import pickle
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from know_hf import WeightTrajectory
from know_hf.cli import main
from know_hf.evaluation import batches, load_suite, run_suite
from know_hf.evaluation.suites.small_cnn import SmallCNN, SmallCNNConfig
from know_hf.evaluation.suites.suite import SUITES_DIR
from know_hf.evaluation.suites.suite_data import Inputs, Side, class_turns, prepare
from know_hf.evaluation.suites.suite_task import ModelSpec, SuiteTask

RECIPE = Path(__file__).parents[1] / "recipes" / "compare"

KNOWN_TRUTH = """
name: known-truth
description: The oracle is better than naive, and shuffled weights are worth nothing.
seeds: 4
inputs: {image_size: 8, mean: 0.3, std: 0.35}
source: {dataset: sklearn/digits, classes: [0, 2, 4, 6, 8], train: 40, validation: 50, test: 500}
target: {dataset: sklearn/digits, classes: [1, 3, 5, 7, 9], train: 25, validation: 100, test: 400}
model: {class_name: SmallCNN, config: {width: 8, num_layers: 2}}
schedule: {ratio: 0.25, num_states: 3}
training: {num_train_epochs: 8, per_device_train_batch_size: 2, learning_rate: 0.003, use_cpu: true}
trials_per_rate: 1
protocols:
  - {kind: as_they_are}
  - {kind: linear_probe, learning_rates: [0.03, 0.1, 0.3], steps: 60}
arms: [naive, random, oracle, shuffled]
"""


def written(folder, content=KNOWN_TRUTH, **changes):
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(content), **changes}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    return folder, run_suite(written(folder), folder / "out", pages=False)


def test_where_the_truth_is_known_it_is_found(finished):
    _, report = finished
    source = report.comparisons["source", "accuracy"]
    assert source.valid is True and source.headroom is True
    means = {name: result.estimate.mean for name, result in source.results.items()}
    assert means["oracle"] > means["naive"] + 0.05 and means["naive"] > means["shuffled"] + 0.3
    gap = source.results["shuffled"].difference
    assert gap.high < -0.3  # as good as guessing
    assert abs(source.results["shuffled"].estimate.mean - 0.2) < 0.1
    assert source.validity().endswith("a gain could have shown.")


def test_where_nothing_is_transferred_that_is_said(finished):
    _, report = finished
    probe = report.comparisons["linear-probe", "accuracy"]
    assert probe.valid is False
    assert probe.verdict().endswith("nothing is shown: naive does not clearly beat what it started from.")
    assert probe.validity() in report.warnings


def test_the_report_names_what_it_came_from(finished):
    _, report = finished
    data = report.to_dict()
    assert data["task"]["source"]["train"] == 40 and len(data["task"]["data"]) == 4
    assert data["seeds"] == [0, 1, 2, 3] and data["name"] == "known-truth"
    assert data["trajectories"][0]["num_examples"] == [40, 10, 2]
    assert (
        data["states"]["measures"]["accuracy"]["mean"][0]
        == report.comparisons["source", "accuracy"].results["naive"].estimate.mean
    )


def test_compute_matched_takes_the_steps_of_the_later_states_on_all_data(finished, monkeypatch):
    folder, _ = finished
    lengths, train = [], SuiteTask._trainer

    def spy(self, seed, num_examples, *args, **options):
        trainer = train(self, seed, num_examples, *args, **options)
        if "max_steps" in options:
            lengths.append((options["max_steps"], len(trainer.train_dataset), trainer.args.seed))
        return trainer

    def again(self, seed, folder):
        raise AssertionError(f"{folder} was recorded before: processes that measure would shut each other out")

    monkeypatch.setattr(SuiteTask, "_trainer", spy)
    monkeypatch.setattr(SuiteTask, "record", again)
    report = run_suite(
        folder / "suite.yaml", folder / "out", arms=["naive", "compute-matched"], seeds=[0, 1], pages=False
    )
    assert report.trajectories[0]["steps"] == [160, 5, 1]
    assert lengths == [(5, 40, 1), (1, 40, 2), (5, 40, 101), (1, 40, 102)]
    assert [cell["arm"] for cell in report.cells] == ["naive", "compute-matched"] * 2  # naive was there already


def test_the_command_runs_a_suite_and_the_script_is_the_command(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out"
    arguments = [str(written(tmp_path)), "--output-dir", str(folder), "--arms", "naive", "random", "--seeds", "0", "1"]
    assert main(["compare", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("known-truth: 2 trajectories, 1 downstream draws each\n\n2 trajectory seeds are few")
    data = json.loads((folder / "report.json").read_text())
    assert list(data["arms"]) == ["naive", "random"] and data["seeds"] == [0, 1]
    assert (folder / "report.html").exists()
    monkeypatch.setattr("sys.argv", ["compare.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPE / "compare.py"), run_name="__main__")
    assert ended.value.code == 0 and capsys.readouterr().out == printed


def make_task(**changes):
    given = {
        "inputs": Inputs(image_size=8),
        "source": Side("sklearn/digits", 40, 30, 100, classes=(0, 2, 4)),
        "target": Side("sklearn/digits", 20, 30, classes=(5, 3)),
        "model": ModelSpec(class_name="SmallCNN", config={"width": 4, "num_layers": 1}),
        "schedule": {"ratio": 0.5, "num_states": 2},
        "training": {"use_cpu": True},
    }
    return SuiteTask(**{**given, **changes})


def fingerprints(examples):
    return {tuple(pixels.flatten().tolist()) for pixels in examples["pixel_values"]}


def test_no_example_is_in_two_parts_and_the_oracle_sees_no_test_example(tmp_path):
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


@pytest.fixture
def labelled(tmp_path):
    """A writer of splits with given labels, of one text for each row; gives the folder."""

    def write(**splits):
        (tmp_path / "data").mkdir()
        for split, labels in splits.items():
            lines = [f"{split} {index},{label}" for index, label in enumerate(labels)]
            (tmp_path / "data" / f"{split}.csv").write_text("\n".join(["text,label", *lines]))
        return str(tmp_path / "data")

    return write


def text_task(texts, data, unseen, **options):
    side = Side("someone/texts", 4, 2, unseen=unseen, **options)
    places = {"sources": {"someone/texts": data}, "models": {"someone/bert": str(texts / "bert")}}
    model = ModelSpec("someone/bert")
    return make_task(inputs=Inputs(max_length=4), source=side, target=side, model=model, **places)


def test_the_pools_own_name_as_unseen_leaks_nothing(texts, labelled):
    task = text_task(texts, labelled(train=[0, 1] * 10), unseen="train")
    stored = prepare(task.target, "train", task.inputs, task.sources, str(texts / "bert"))
    order = stored.rows([0, 1, 0]).tolist()
    split = task.target_split(0, 0)
    for part, rows in ((split.train, order[:4]), (split.validation, order[4:6]), (split.test, order[6:])):
        assert torch.equal(part["labels"], stored.take(np.array(rows))["labels"])
    assert len(split.test["labels"]) == 14, "each example is used once"


@pytest.mark.parametrize(
    ("unseen", "message"),
    [
        ([-1] * 8, r"split 'test' of someone/texts has examples without a label \(class -1\)"),
        ([0, 2] * 4, r"'train' and 'test' of someone/texts have different classes, \[0, 1, 2\] and \[0, 2\]"),
    ],
)
def test_splits_with_other_classes_are_errors(texts, labelled, unseen, message):
    data = labelled(train=[0, 1, 2] * 6, test=unseen)
    with pytest.raises(ValueError, match=message):
        text_task(texts, data, "test").task({})


def test_digits_have_one_split():
    with pytest.raises(ValueError, match="sklearn/digits has no unseen 'test': it is one set of images"):
        Side("sklearn/digits", 40, 30, unseen="test")


def test_processes_get_the_task_of_a_suite_whole():
    task = make_task().task({})
    copy = pickle.loads(pickle.dumps(task))
    assert torch.equal(copy.target(1, 2).train["pixel_values"], task.target(1, 2).train["pixel_values"])
    assert torch.equal(copy.fresh_model(1).classifier.weight, task.fresh_model(1).classifier.weight)


def test_seeds_and_draws_give_other_examples_and_the_same_ones_again():
    task = make_task()
    assert torch.equal(task.target_split(0, 0).train["pixel_values"], task.target_split(0, 0).train["pixel_values"])
    for seed, draw in ((0, 1), (1, 0)):
        other = task.target_split(seed, draw).train["pixel_values"]
        assert not torch.equal(task.target_split(0, 0).train["pixel_values"], other)
    assert not torch.equal(task.source_split(0).train["pixel_values"], task.source_split(1).train["pixel_values"])


def test_initialisations_differ_where_they_should():
    task = make_task()
    start, fresh = task.start(0), task.fresh_model(0)
    assert torch.equal(start.classifier.weight, task.start(0).classifier.weight)
    assert not torch.equal(start.classifier.weight, fresh.classifier.weight)
    assert not torch.equal(start.classifier.weight, task.start(1).classifier.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": Side("sklearn/digits", 500, 30, classes=(0, 2, 4))}, "the oracle trains on 1000 examples, but"),
        (
            {"target": Side("sklearn/digits", 20, 30, 5000, classes=(5, 3))},
            "30 and 5000 unseen examples are asked for",
        ),
        ({"target": Side("sklearn/digits", 900, 30, classes=(5, 3))}, "900 examples are asked for, but split 'train'"),
        ({"source": Side("sklearn/digits", 20, 30, classes=(5, 11))}, "sklearn/digits has no example of class 11"),
    ],
)
def test_too_little_data_is_told_before_anything_is_trained(changes, message):
    task = make_task(**changes)
    with pytest.raises(ValueError, match=message):
        task.task({})


def test_classes_take_turns():
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


def test_the_small_network_has_the_layers_it_says():
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
        ({"inputs": {"image_size": 8, "max_length": 5}}, "either image_size or max_length"),
        ({"source": {"dataset": "x", "train": 5}}, "missing 1 required positional argument: 'validation'"),
        ({"model": {}}, "a model needs pretrained, class_name, or both"),
        ({"model": {"class_name": "LargeCNN"}}, "transformers has no class 'LargeCNN', and it is not SmallCNN"),
        ({"protocols": [{"kind": "magic"}]}, "is of kind 'magic'; there are fine_tuning"),
        ({"protocols": [{"kind": "linear_probe", "rates": [1]}]}, "unknown key 'rates'"),
        ({"arms": ["naive", "magic"]}, "unknown arm 'magic'"),
        ({"schedule": {"ration": 0.5}}, "schedule of .* unknown key 'ration'; did you mean 'ratio'"),
        ({"schedule": {"ratio": 2}}, "ratio"),
        ({"training": {"learning_rat": 1}}, "training of .* unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ({"training": [3]}, "training of .* must hold keys, got"),
    ],
)
def test_a_file_that_is_off_is_an_error(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_suite(written(tmp_path, **changes), tmp_path / "out")


def test_numbers_may_be_written_as_people_do(tmp_path):
    content = {**yaml.safe_load(KNOWN_TRUTH), "training": {"learning_rate": "3e-5", "use_cpu": True}}
    content["protocols"] = [{"kind": "linear_probe", "learning_rates": ["1e-3", "1e-2"]}]
    suite = load_suite(written(tmp_path, yaml.safe_dump(content)))
    assert suite.training["learning_rate"] == 3e-5 and suite.protocols[0].learning_rates == (1e-3, 1e-2)


def test_folders_for_what_the_suite_does_not_read_are_errors(tmp_path):
    with pytest.raises(ValueError, match="data names 'digits', which known-truth does not read; it reads sklearn/dig"):
        run_suite(written(tmp_path), tmp_path / "out", data={"digits": "folder"})
    with pytest.raises(ValueError, match="models names 'bert', which known-truth does not read; it reads none"):
        run_suite(written(tmp_path), tmp_path / "out", models={"bert": "folder"})


def test_a_file_without_a_needed_key_or_any_is_an_error(tmp_path):
    (tmp_path / "a.yaml").write_text("name: x")
    with pytest.raises(ValueError, match=r"a\.yaml has no 'description'; a suite needs name, description"):
        load_suite(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(ValueError, match=r"b\.yaml holds no keys"):
        load_suite(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"c\.yaml is not valid YAML"):
        load_suite(tmp_path / "c.yaml")
    with pytest.raises(FileNotFoundError, match=r"there is no suite .*; give a YAML file, or one of"):
        load_suite("no-such-suite")


def test_variants_change_keys_and_the_first_is_taken_without_a_name(tmp_path):
    path = written(tmp_path, variants={"small": {"seeds": 2}, "large": {"seeds": 9, "draws": 3}})
    assert load_suite(path).seeds == 2 and load_suite(path).name == "known-truth:small"
    large = load_suite(f"{path}:large")
    assert (large.seeds, large.draws, large.name) == (9, 3, "known-truth:large")
    with pytest.raises(ValueError, match="has no variant 'huge'; it has small, large"):
        load_suite(f"{path}:huge")


SUITES = [
    (path.stem, variant)
    for path in sorted(SUITES_DIR.glob("*.yaml"))
    for variant in (yaml.safe_load(path.read_text()).get("variants") or {"": None})
]


@pytest.mark.parametrize(("name", "variant"), SUITES)
def test_the_suites_of_the_project_are_whole(name, variant):
    suite = load_suite(f"{name}:{variant}" if variant else name)
    assert suite.seeds >= 10 and suite.first_seed == 0  # sizes were chosen on seeds from 1000 on
    assert {"naive", "random", "known-step-1", "shrink", "oracle"} <= {arm.name for arm in suite.arms}
    assert all(suite.trials_per_rate % len(arm.settings) == 0 for arm in suite.arms)
    assert any(protocol.on_source for protocol in suite.protocols) and not suite.protocols[0].on_source
    suite.model.model_class  # noqa: B018  it is there


def test_there_are_suites():
    names = {name for name, _ in SUITES}
    assert {"digits", "mnist-halves", "fashion-halves", "reviews", "reviews-lora", "imagenet-style"} <= names
    assert names == {path.stem for path in RECIPE.glob("*.yaml")}, "pyproject.toml names those that are installed"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A dataset of positive and negative texts, and a tiny pretrained BERT that reads them."""
    folder = tmp_path_factory.mktemp("texts")
    words = {0: ["bad", "poor", "dull", "weak"], 1: ["good", "fine", "great", "strong"]}
    random = np.random.RandomState(0)
    for split, count in (("train", 120), ("test", 120)):
        (folder / "data").mkdir(exist_ok=True)
        lines = ["text,label"]
        for label in np.arange(count) % 2:
            chosen = random.choice(words[label] + ["film", "plot"], random.randint(2, 7))
            lines.append(f"{' '.join(chosen)},{label}")
        (folder / "data" / f"{split}.csv").write_text("\n".join(lines))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "film", "plot", *words[0], *words[1]]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder / "bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(folder / "bert")
    return folder


TEXTS = """
name: texts
description: Tiny.
seeds: 2
inputs: {max_length: 8}
source: {dataset: someone/texts, unseen: test, train: 32, validation: 20, test: 40}
target: {dataset: someone/texts, unseen: test, train: 8, validation: 20, test: 40}
model: {pretrained: someone/bert}
schedule: {ratio: 0.6, num_states: 5}
training: {num_train_epochs: 4, per_device_train_batch_size: 4, learning_rate: 0.01, use_cpu: true}
trials_per_rate: 1
protocols:
  - {kind: fine_tuning, labels_per_class: 4, learning_rates: [0.001], steps: 2, head_steps: 2}
  - {kind: linear_probe, learning_rates: [0.1], steps: 10}
  - {kind: as_they_are}
arms: [naive, pretrained, known-step-1, compute-matched, oracle]
"""


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
@pytest.mark.parametrize("lora", [None, {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["query", "value"]}])
def test_texts_and_adapters_go_the_same_way(texts, tmp_path, lora):
    model = {"pretrained": "someone/bert", **({} if lora is None else {"lora": lora})}
    sources = {"data": {"someone/texts": str(texts / "data")}, "models": {"someone/bert": str(texts / "bert")}}
    arms = None if lora else ["naive", "pretrained"]
    report = run_suite(written(tmp_path, TEXTS, model=model), tmp_path / "out", arms=arms, pages=False, **sources)
    trajectory = WeightTrajectory(tmp_path / "out" / "trajectories" / "seed-0")
    assert trajectory.is_adapter is (lora is not None)
    assert trajectory.base_model == ("someone/bert" if lora is None else str(texts / "bert"))
    scores = report.comparisons["source", "loss"].results
    assert scores["naive"].estimate.mean < scores["pretrained"].estimate.mean  # it has learned
    states = report.to_dict()["states"]["measures"]["loss"]["per_seed"]
    assert [of_seed[0] for of_seed in states] == list(scores["naive"].per_seed)
    assert lora is None or scores["compute-matched"].per_seed != scores["naive"].per_seed
    tried = report.cells[0]["measured"]["few-shot"][0]["trials"]
    assert len(tried) == 1 and report.to_dict()["seeds"] == [0, 1]
    other = tmp_path / "other"
    shutil.copytree(texts / "bert", other)
    BertModel(BertConfig.from_pretrained(other)).save_pretrained(other)  # another initialisation
    with pytest.raises(ValueError, match="holds results with other task"):
        again = {**sources, "models": {"someone/bert": str(other)}}
        run_suite(written(tmp_path, TEXTS, model=model), tmp_path / "out", arms=arms, pages=False, **again)


def test_padding_that_no_text_of_a_batch_needs_is_left_out(texts):
    side = Side("someone/texts", 8, 4)
    prepared = prepare(side, "train", Inputs(max_length=16), {side.dataset: str(texts / "data")}, str(texts / "bert"))
    examples = prepared.take(prepared.rows([0])[:20])
    assert examples["input_ids"].shape == (20, 16)
    for batch in batches(examples, 4):
        longest = int(batch["attention_mask"].sum(dim=1).max())
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, longest)
        assert batch["labels"].shape == (4,)


@pytest.mark.parametrize(
    ("own", "further"),
    [
        (["naive", "known-step-1", "matched-shrink-step-2"], ["x-step-1", "matched-shrink-x-step-2"]),
        (["naive"], [f"{kind}x-step-{count}" for count in (1, 2, 3) for kind in ("", "matched-shrink-")]),
    ],
)
def test_further_known_weights_get_the_arms_of_the_shipped_ones(own, further, monkeypatch, tmp_path):
    monkeypatch.setattr("know_hf.evaluation.suites.suite.compare_arms", lambda *_, arms, **__: arms)
    arms = run_suite("digits", tmp_path, arms=own, known={"x": "folder"})
    assert [arm.name for arm in arms] == own + further
    assert {arm.known for arm in arms[len(own) :]} == {"folder"}
