"""Suites of texts: classifiers, adapters and language models."""

import shutil

import numpy as np
import pytest
import torch
import yaml
from doubles.small_suites import make_task, write_suite
from doubles.task_fixtures import write_bert
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from know_hf import WeightTrajectory
from know_hf.evaluation import run_suite
from know_hf.evaluation.fine_tuning import evaluate_next_token
from know_hf.evaluation.linear_probe import features
from know_hf.evaluation.suites import Suite
from know_hf.evaluation.suites.suite_data import Inputs, Side, prepare
from know_hf.evaluation.suites.suite_model import ModelSpec
from know_hf.evaluation.suites.suite_task import SuiteTask
from know_hf.evaluation.trials import with_features
from know_hf.known import KNOWNConfig, KNOWNModel


@pytest.fixture
def labelled(tmp_path):
    """Writes splits with the given labels, one text per row; returns the folder."""

    def write(**splits):
        (tmp_path / "data").mkdir()
        for split, labels in splits.items():
            lines = [f"{split} {index},{label}" for index, label in enumerate(labels)]
            (tmp_path / "data" / f"{split}.csv").write_text("\n".join(["text,label", *lines]))
        return str(tmp_path / "data")

    return write


def text_task(texts, data, unseen=None, model=None, **options):
    side = {"dataset": "someone/texts", "train": 4, "validation": 2, "unseen": unseen, **options}
    paths = {"dataset_paths": {"someone/texts": data}, "model_paths": {"someone/bert": str(texts / "bert")}}
    model = model or {"pretrained": "someone/bert"}
    return make_task(inputs={"max_length": 4}, source=side, target=side, model=model, **paths)


def test_naming_the_pool_as_unseen_leaks_no_example(texts, labelled):
    task = text_task(texts, labelled(train=[0, 1] * 10), unseen="train")
    stored = prepare(task.suite.target, "train", task.suite.inputs, task.dataset_paths, str(texts / "bert"))
    order = stored.rows([0, 1, 0]).tolist()
    split = task.target_split(0, 0)
    for part, rows in ((split.train, order[:4]), (split.validation, order[4:6]), (split.test, order[6:])):
        assert torch.equal(part["labels"], stored.take(np.array(rows))["labels"])
    assert len(split.test["labels"]) == 14, "each example is used once"


@pytest.mark.parametrize(
    ("unseen", "model", "message"),
    [
        ([-1] * 8, None, "'test' of someone/texts .*class -1"),
        ([0, 2] * 4, None, r"'train' and 'test' of someone/texts .*\[0, 1, 2\] and \[0, 2\]"),
        ([0, 1] * 4, {"class_name": "BertForSequenceClassification"}, r"model\.pretrained"),  # no tokenizer
    ],
)
def test_unusable_texts_are_errors(texts, labelled, unseen, model, message):
    data = labelled(train=[0, 1, 2] * 6, test=unseen)
    with pytest.raises(ValueError, match=message):
        text_task(texts, data, "test", model).comparison_task()


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1], {"column": "sentence"}, "no column 'sentence', only text, label; .*key column"),
        ([0, 1], {"label": "stars"}, "no column 'stars', only text, label; .*key label"),
        (["bad", "good"], {}, "labels in column 'label' of split 'train' of someone/texts are .*string, not integers"),
        ([0.5, 1.5], {}, "are float64, not integers"),
    ],
)
def test_unusable_columns_are_errors(labelled, labels, options, message):
    side, data = Side("someone/texts", 1, 1, **options), {"someone/texts": labelled(train=labels)}
    with pytest.raises(ValueError, match=message):
        prepare(side, "train", Inputs(max_length=4), data, None)


def test_new_keeps_the_architecture_but_not_the_weights(texts, labelled):
    data = labelled(train=[0, 1] * 10)
    pretrained = text_task(texts, data)
    new = text_task(texts, data, model={"pretrained": "someone/bert", "new": True})
    models = [task.start(1) for task in (pretrained, new)]
    assert models[0].config.hidden_size == models[1].config.hidden_size == 16
    weights = [model.bert.embeddings.word_embeddings.weight for model in models]
    assert not torch.equal(*weights)
    task = new.comparison_task()
    assert task.pretrained_model is None and task.facts["pretrained"] is None


def test_all_shards_identify_pretrained_weights(texts, tmp_path):
    BertModel.from_pretrained(texts / "bert").save_pretrained(tmp_path, max_shard_size="2KB")
    hashes = ModelSpec(pretrained="someone/bert").weights_hash(str(tmp_path)).split(",")
    assert len(hashes) == len(list(tmp_path.glob("*.safetensors"))) > 1
    assert ModelSpec(class_name="SmallCNN").weights_hash(None) is None


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A dataset of positive and negative texts, and a tiny pretrained BERT that reads them."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "data").mkdir()
    words = {0: ["bad", "poor", "dull", "weak"], 1: ["good", "fine", "great", "strong"]}
    random = np.random.RandomState(0)
    for split in ("train", "test"):
        texts = [random.choice([*words[row % 2], "film", "plot"], random.randint(2, 7)) for row in range(120)]
        lines = [f"{' '.join(text)},{row % 2}" for row, text in enumerate(texts)]
        (folder / "data" / f"{split}.csv").write_text("\n".join(["text,label", *lines]))
    write_bert(folder / "bert", ["film", "plot", *words[0], *words[1]], pad_token_id=1)
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
arms: [naive, pretrained, known-step-1, cross-fit, compute-matched, oracle]
"""


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
@pytest.mark.parametrize("lora", [None, {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["query", "value"]}])
def test_texts_and_adapters(texts, tmp_path, lora):
    model = {"pretrained": "someone/bert", **({} if lora is None else {"lora": lora})}
    paths = {"data": {"someone/texts": str(texts / "data")}, "models": {"someone/bert": str(texts / "bert")}}
    arms = None if lora else ["naive", "pretrained"]
    suite = write_suite(tmp_path, TEXTS, model=model)
    if lora:
        KNOWNModel(KNOWNConfig(variant="combination")).save_pretrained(tmp_path / "combination")
        paths["known"] = {"x": str(tmp_path / "combination")}
    report = run_suite(suite, tmp_path / "out", arms=arms, pages=False, **paths)
    trajectory = WeightTrajectory(tmp_path / "out" / "trajectories" / "seed-0")
    assert trajectory.is_adapter is (lora is not None)
    assert trajectory.base_model == ("someone/bert" if lora is None else ".../bert")
    scores = report.comparisons["source", "loss"].results
    assert scores["naive"].estimate.mean < scores["pretrained"].estimate.mean
    states = report.to_dict()["states"]["measures"]["loss"]["per_seed"]
    assert [of_seed[0] for of_seed in states] == list(scores["naive"].per_seed)
    if lora:
        assert scores["compute-matched"].per_seed != scores["naive"].per_seed
        assert [cell["training_cost"] for cell in report.cells if cell["arm"] == "cross-fit"] == [2, 2]
        assert [cell["training_cost"] for cell in report.cells if cell["arm"] == "x-step-1"] == [1 + 11 / 32] * 2
        assert scores["x-step-1"].per_seed == scores["naive"].per_seed  # a new model predicts no change
    assert len(report.cells[0]["measured"]["few-shot"][0]["trials"]) == 1
    other = tmp_path / "other"
    shutil.copytree(texts / "bert", other)
    BertModel(BertConfig.from_pretrained(other)).save_pretrained(other)  # another initialisation
    with pytest.raises(ValueError, match="task"):
        run_suite(suite, tmp_path / "out", arms=arms, **{**paths, "models": {"someone/bert": str(other)}})


LANGUAGE = """
name: language
description: Tiny.
seeds: 2
inputs: {max_length: 16, next_byte: true}
source: {dataset: someone/texts, train: 32, validation: 20, test: 40}
target: {dataset: someone/texts, pool: test, train: 8, validation: 20, test: 40}
model:
  class_name: GPT2LMHeadModel
  config: {vocab_size: 256, n_positions: 16, n_embd: 16, n_layer: 1, n_head: 2, bos_token_id: null, eos_token_id: null}
schedule: {ratio: 0.5, num_states: 2}
training: {num_train_epochs: 4, per_device_train_batch_size: 4, learning_rate: 0.01, use_cpu: true}
trials_per_rate: 1
protocols:
  - {kind: fine_tuning, learning_rates: [0.001, 0.01], steps: 2, head_steps: 0}
  - {kind: zero_shot}
arms: [naive, random, cross-fit, oracle]
"""


def test_a_language_model_is_compared_by_its_loss_per_byte(texts, tmp_path):
    data = {"someone/texts": str(texts / "data")}
    report = run_suite(write_suite(tmp_path, LANGUAGE), tmp_path / "out", data=data, pages=False)
    assert next(iter(report.comparisons)) == ("few-shot", "loss"), "trials are chosen by the loss"
    scores = report.comparisons["source", "loss"].results
    assert scores["naive"].estimate.mean < scores["random"].estimate.mean
    assert [cell["choice"]["forward_passes"] for cell in report.cells if cell["arm"] == "cross-fit"] == [17 * 32] * 2
    task = SuiteTask(Suite.from_dict(yaml.safe_load(LANGUAGE), "a test"), data)
    split, model = task.target_split(0, 0), task.start(0)
    assert split.num_labels is None and split.test["labels"].shape == (40, 16)
    logits = model.eval()(split.test["input_ids"]).logits[:, :-1]
    labels = split.test["labels"][:, 1:]
    expected = {
        "accuracy": (logits.argmax(-1) == labels).float().mean().item(),
        "loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(),
    }
    assert evaluate_next_token(model, split.test, batch_size=30) == pytest.approx(expected, rel=1e-5)


def test_texts_of_a_language_model_are_joined_and_cut(texts):
    inputs, side = Inputs(max_length=8, next_byte=True), Side("someone/texts", 4, 2)
    prepared = prepare(side, "train", inputs, {side.dataset: str(texts / "data")}, None)
    lines = (texts / "data" / "train.csv").read_text().split("\n")[1:]
    text = "\n".join(line.split(",")[0] for line in lines).encode()
    rows = prepared.rows([0])
    assert sorted(rows.tolist()) == list(range(len(text) // 8)) and rows.tolist() != sorted(rows.tolist())
    examples = prepared.take(np.sort(rows))
    assert bytes(examples["input_ids"].flatten().tolist()) == text[: len(text) // 8 * 8]
    assert torch.equal(examples["labels"], examples["input_ids"])


def test_features_are_computed_in_order_of_length(texts):
    side = Side("someone/texts", 8, 4)
    prepared = prepare(side, "train", Inputs(max_length=16), {side.dataset: str(texts / "data")}, str(texts / "bert"))
    examples = prepared.take(prepared.rows([0])[:20])
    assert examples["input_ids"].shape == (20, 16)
    model = AutoModelForSequenceClassification.from_pretrained(texts / "bert").eval()
    lengths = []
    model.base_model.register_forward_pre_hook(
        lambda module, arguments, options: lengths.append(arguments[0].shape[1]), with_kwargs=True
    )
    ordered = features(model, examples, batch_size=4)
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1] < 16
    for index in range(20):
        one = {name: tensor[index : index + 1] for name, tensor in examples.items()}
        torch.testing.assert_close(ordered[index : index + 1], features(model, one), rtol=1e-4, atol=1e-5)
    _, cached = with_features(model, examples)
    assert cached["body.last_hidden_state"].shape[1] == cached["input_ids"].shape[1] == lengths[4]
