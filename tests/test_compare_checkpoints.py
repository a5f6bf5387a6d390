"""Two checkpoints on one dataset: as they are, after fine-tuning, and from the command line."""

import json

import datasets
import pytest
import torch
from conftest import make_images, make_resnet
from doubles.small_models import small_model
from doubles.task_fixtures import SIZES, write_bert
from peft import LoraConfig, get_peft_model
from transformers import (
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

from know_hf import WeightTrajectory
from know_hf.cli import main
from know_hf.evaluation import FineTuning
from know_hf.evaluation.checkpoints import compare_checkpoints, compare_on_dataset
from know_hf.local_paths import hide_paths

QUICK = FineTuning((1e-3, 1e-2), steps=2, head_steps=2, labels_per_class=4)
WORDS = ["good", "bad", "film", "a", "the"]


@pytest.fixture(scope="module")
def test():
    return make_images(96, seed=5)[:]


def test_a_trajectory_and_a_model(trajectory, test):
    result = compare_checkpoints(trajectory, make_resnet(7), test=test)
    accuracy, loss, calibrated = result.scores
    right = []
    for model in (trajectory.load_model(0), make_resnet(7)):
        with torch.no_grad():
            right.append(model.eval()(test["pixel_values"]).logits.argmax(-1) == test["labels"])
    means = [float(values.double().mean()) for values in right]
    assert [accuracy.a, accuracy.b] == pytest.approx(means)
    assert accuracy.difference == pytest.approx(means[1] - means[0])
    only = [int((x & ~y).sum()) for x, y in (right, right[::-1])]
    assert f"only B gets {only[1]} right and only A {only[0]}" in accuracy.test
    assert accuracy.low < accuracy.difference < accuracy.high < 0 and accuracy.p_value < 0.01
    assert "A is significantly better" in str(result)
    assert loss.difference > 0 and loss.low > 0 and "A is significantly better" in loss.sentence
    assert calibrated.measure.name == "calibrated loss" and calibrated.a < loss.a and calibrated.b < loss.b
    assert str(trajectory.path) in str(result) and "another seed" in str(result).lower()
    assert json.loads(json.dumps(result.to_dict()))["scores"][0]["p_value"] == accuracy.p_value


def test_equal_checkpoints(test):
    result = compare_checkpoints(make_resnet(), make_resnet(), test=test, train=make_images(64), protocol=QUICK)
    assert result.scores == () and "same weights" in str(result)


def test_confidence_alone_changes_the_loss_but_not_the_calibrated_loss(test):
    model, calm = make_resnet(), make_resnet()
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.mul_(30)
    accuracy, loss, calibrated = compare_checkpoints(model, calm, test=test).scores
    assert accuracy.difference == 0 and loss.difference < -0.1 and loss.p_value < 0.01
    assert calibrated.difference == pytest.approx(0, abs=1e-5)


def test_few_shot_draws_are_the_same_for_both_and_new_heads_are_trained(trajectory, test, monkeypatch):
    runs = []
    original = FineTuning.trials_of
    monkeypatch.setattr(
        FineTuning, "trials_of", lambda self, r, *args: runs.append(r[0][1:]) or original(self, r, *args)
    )
    options = {"train": make_images(64, seed=3), "num_labels": 4, "draws": 2, "protocol": QUICK}
    result = compare_checkpoints(trajectory.path, make_resnet(), test=test, **options)
    (score,) = result.scores
    assert score.what.startswith("Few-shot fine-tuning") and "2 draws" in score.test
    assert [seed for _, seed in runs] == [0, 0, 1, 1]
    splits = [split for split, _ in runs]
    assert splits[0].content() == splits[1].content() != splits[2].content()
    assert "edge of the grid" in result.notes[0]  # of two rates
    assert splits[0].train["labels"].unique(return_counts=True)[1].tolist() == [4] * 4
    assert len(splits[0].validation["labels"]) == 64 - 16 and splits[0].num_labels == 4
    both = torch.cat([splits[0].train["pixel_values"], splits[0].validation["pixel_values"]])
    assert len(both.unique(dim=0)) == 64


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"test": make_images(8)[:]}, "8 examples.*10"),
        ({"num_labels": 4}, "num_labels=4.*train"),
        ({"train": make_images(16)[:], "draws": 1}, "draws must be at least 2, got 1"),
        ({"train": make_images(4)[:]}, "class 0 of train has 1 examples"),
        ({"train": make_images(16)[:], "protocol": QUICK}, "class 0 of train has 4 examples.*4 per draw"),
        ({"test": {"pixel_values": torch.zeros(12, 1, 8, 8), "labels": torch.arange(12)}}, "label 4.*4 classes"),
        ({"test": {"pixel_values": torch.zeros(12, 1, 8, 8)}}, "'labels'"),
    ],
)
def test_what_cannot_be_compared_is_named(test, options, words):
    with pytest.raises(ValueError, match=words):
        compare_checkpoints(make_resnet(), make_resnet(), **{"test": test, **options})


@pytest.mark.parametrize("name", ["Model", "ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice"])
def test_models_that_do_not_classify_are_refused(name):
    model = small_model(f"Bert{name}", vocab_size=9, num_labels=1, **SIZES)
    size = (12, 2, 3) if name == "ForMultipleChoice" else (12, 3)
    test = {"input_ids": torch.ones(size, dtype=torch.int64), "labels": torch.arange(12) % 2}
    with pytest.raises(ValueError, match=f"Bert{name}.*classifier"):
        compare_checkpoints(model, model, test=test)
    other = {**test, "input_ids": test["input_ids"].float()}
    with pytest.raises(ValueError, match=f"Bert{name}, which cannot evaluate test.*classifier"):
        compare_checkpoints(model, model, test=other)


def test_a_head_for_several_labels_per_example_is_refused(test):
    model = make_resnet()
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="ResNetForImageClassification is for multi_label_classification"):
        compare_checkpoints(make_resnet(), model, test=test)


def test_a_checkpoint_that_does_not_exist(tmp_path, test):
    with pytest.raises(FileNotFoundError, match="nosuch"):
        compare_checkpoints(tmp_path / "nosuch", make_resnet(), test=test)
    with pytest.raises(FileNotFoundError, match=r"no config\.json.* adapter"):
        compare_checkpoints(tmp_path, make_resnet(), test=test)


def test_adapters_are_merged(tmp_path):
    """A trajectory of adapters and an adapter, whose base has a head for other classes."""
    base = make_bert(tmp_path / "base", 0)
    head = BertForSequenceClassification.from_pretrained(base, num_labels=3, ignore_mismatched_sizes=True)
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(head, config)
    model.save_pretrained(tmp_path / "adapter")
    test = {"input_ids": torch.arange(24).view(12, 2) % 9, "labels": torch.arange(12) % 3}
    predicted = model.eval()(test["input_ids"]).logits.argmax(-1)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save.default.bias[0] += 9
    trajectory = WeightTrajectory.create(tmp_path / "trajectory")
    trajectory.record(model, num_examples=24, steps=1)
    accuracy = compare_checkpoints(trajectory.path, tmp_path / "adapter", test=test).scores[0]
    assert accuracy.a == pytest.approx(1 / 3)  # always class 0
    assert accuracy.b == pytest.approx(float((predicted == test["labels"]).double().mean()))
    assert compare_checkpoints(trajectory, model, test=test).scores == ()  # equal weights
    hide_paths(tmp_path / "adapter")  # as those that a prediction writes
    with pytest.raises(ValueError, match=r"\.\.\./base .*base_model="):
        compare_checkpoints(trajectory.path, tmp_path / "adapter", test=test)
    given = compare_checkpoints(trajectory.path, tmp_path / "adapter", test=test, base_model=base)
    assert given.scores[0] == accuracy


def make_bert(folder, seed, words=WORDS, num_labels=2):
    return write_bert(folder, words, seed, BertForSequenceClassification, num_labels=num_labels, pad_token_id=1)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    folder, cache = tmp_path_factory.mktemp("reviews"), tmp_path_factory.mktemp("cache")
    for split, size in (("train", 24), ("test", 16)):
        rows = {"text": ["a good film", "the bad bad film"] * (size // 2), "label": ["good", "bad"] * (size // 2)}
        datasets.Dataset.from_dict(rows).to_csv(folder / f"{split}.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield str(folder)


def test_the_command_compares_two_checkpoints(tmp_path, reviews, capsys):
    b, out, a = make_bert(tmp_path / "b", 1), tmp_path / "out", str(tmp_path / "trajectory")
    model, tokenizer = BertForSequenceClassification.from_pretrained(b), PreTrainedTokenizerFast.from_pretrained(b)
    model.classifier.bias.data += 1  # another model with the same predictions
    WeightTrajectory.create(a).record(model, processing_class=tokenizer, num_examples=24, steps=1)
    assert main(["compare", a, b, "--dataset", reviews, "--draws", "2", "--output-dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"A: {a}" in printed and "Zero-shot" in printed and "12 draws" not in printed
    assert "A has no class 'bad' in its config" in printed
    scores = json.loads((out / "comparison.json").read_text(encoding="utf-8"))["scores"]
    assert [score["what"].split()[0] for score in scores] == [*["Zero-shot"] * 3, "Few-shot"]
    assert [score["difference"] for score in scores[:3]] == pytest.approx([0, 0, 0], abs=1e-6)
    assert main(["compare", a, b, "--dataset", reviews, "--train-split", "none"]) == 0
    assert "fine-tuning" not in capsys.readouterr().out


def test_other_classes_get_new_heads_and_other_tokenizers_are_refused(tmp_path, reviews, capsys):
    a, b = make_bert(tmp_path / "a", 0), make_bert(tmp_path / "b", 1, num_labels=3)
    assert main(["compare", a, b, "--dataset", reviews, "--draws", "2"]) == 0
    assert "of the new head" in capsys.readouterr().out
    assert main(["compare", a, b, "--dataset", reviews, "--train-split", "none"]) == 1
    assert "2 classes" in capsys.readouterr().err
    splits = ["--train-split", "test[:4]", "--test-split", "test"]
    assert main(["compare", a, a, "--dataset", reviews, *splits]) == 1
    assert "splits test[:4] and test of" in capsys.readouterr().err
    other = make_bert(tmp_path / "other", 1, words=WORDS[::-1])
    assert main(["compare", a, other, "--dataset", reviews]) == 1
    assert "tokenizer" in capsys.readouterr().err


@pytest.mark.usefixtures("reviews")  # their cache
def test_classes_are_found_in_the_models_by_name(tmp_path):
    rows = {"text": ["a good film"] * 12 + ["the bad bad film"] * 4, "label": ["good"] * 12 + ["bad"] * 4}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "data/test.parquet")
    base, folders = make_bert(tmp_path / "base", 0), [tmp_path / name for name in ("a", "b", "c")]
    model = BertForSequenceClassification.from_pretrained(base)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    for folder, names in zip(folders, (["good", "bad"], ["good", "bad"], ["bad", "good"]), strict=True):
        model.config.id2label, model.config.label2id = dict(enumerate(names)), {names[0]: 0, names[1]: 1}
        model.classifier.bias.data[0] += 9  # always the first class, not the first of the dataset in order
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    a, b, c = folders
    comparison = compare_on_dataset(a, b, str(tmp_path / "data"), train_split=None)
    assert (comparison.scores[0].a, comparison.scores[0].b) == (0.75, 0.75)
    assert not any("by position" in note for note in comparison.notes)
    with pytest.raises(ValueError, match="label2id"):
        compare_on_dataset(a, c, str(tmp_path / "data"), train_split=None)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("compare", "SUITE"),
        ("compare digits", "--output-dir"),
        ("compare a b c", "SUITE"),
        ("compare a b", "--dataset"),
        ("compare a b --dataset d --arms naive", "--arms needs a suite"),
        ("compare a b --dataset d --model x=y", "--model needs a suite"),
        ("compare a b --dataset d --processes 2", "--processes needs a suite"),
        ("compare digits --output-dir out --dataset d", "--dataset needs two checkpoints"),
        ("compare digits --output-dir out --base-model b", "--base-model needs two checkpoints"),
    ],
)
def test_flags_of_the_other_form_are_refused(command, words, capsys):
    assert main(command.split()) == 1
    assert words in capsys.readouterr().err


def test_texts_in_memory_need_a_collator(tmp_path):
    folder = make_bert(tmp_path / "a", 0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    texts = ["a good film", "bad"] * 8
    rows = [{**tokenizer(text), "labels": index % 2} for index, text in enumerate(texts)]
    with pytest.raises(ValueError, match="data_collator"):
        compare_checkpoints(folder, folder, test=rows)
    other = make_bert(tmp_path / "b", 1)
    result = compare_checkpoints(folder, other, test=rows, data_collator=DataCollatorWithPadding(tokenizer))
    assert "12 examples" not in result.notes[0] and "16 test examples" in result.notes[0]
