"""Splits, columns, classes and preprocessing of the tasks."""

from dataclasses import replace

import datasets
import pytest
from doubles.task_fixtures import make_texts
from transformers import AutoTokenizer

from know_hf.tasks.task_data import CausalCollator, load_splits, tokenize
from know_hf.tasks.trainer_parts import prepare_task

pytestmark = pytest.mark.usefixtures("own_cache")


def test_end_of_text_tokens_are_learned_and_padding_is_not(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.pad_token = tokenizer.eos_token
    dataset = datasets.Dataset.from_dict({"text": ["good film", "a bad bad film", "the", ""]})

    def tokens_of(**options):
        tokens = tokenize(dataset, tokenizer, causal=True, **options)
        return tokens, [tokenizer.convert_ids_to_tokens(ids) for ids in tokens["input_ids"]]

    tokens, decoded = tokens_of(max_length=4, pack=False)
    assert decoded == [["good", "film", "</s>"], ["a", "bad", "bad", "film"], ["the", "</s>"]]
    labels = CausalCollator(tokenizer)([tokens[0], tokens[1]])["labels"]
    assert labels[0].tolist() == [-100, *tokens[0]["input_ids"][1:], -100]
    _, decoded = tokens_of(max_length=5, pack=True)
    assert decoded == [["good", "film", "</s>", "a", "bad"], ["bad", "film", "</s>", "the", "</s>"]]
    with pytest.raises(ValueError, match="max_length=50"):
        tokens_of(max_length=50, pack=True)
    texts = tokenize(dataset.select([1]), tokenizer, max_length=3, causal=False, pack=False)
    assert tokenizer.convert_ids_to_tokens(texts[0]["input_ids"]) == ["a", "bad", "bad"]


@pytest.fixture
def odd(text_arguments, tmp_path):
    """Arguments for a dataset of one split whose columns cannot be detected."""
    rows = {"Sentence": ["good", "bad"], "review": ["a", "b"], "stars": [1.5, 2.5], "label": [0, -1]}
    (tmp_path / "odd").mkdir()
    datasets.Dataset.from_dict(rows).to_csv(tmp_path / "odd/train.csv")
    return replace(text_arguments, dataset=str(tmp_path / "odd"), eval_split="auto")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({}, "Sentence and review.*text_column"),
        ({"task": "image-classification"}, "image, img.*image_column"),
        ({"text_column": "txt"}, "text_column='txt'.*Sentence, review"),
        ({"text_column": "stars"}, "text_column='stars'.*float64"),
        ({"text_column": "review", "label_column": "stars"}, r"1\.5.*label_column"),
        ({"task": "image-classification", "image_column": "review"}, "image_column='review'.*string"),
    ],
)
def test_columns_that_cannot_be_used_are_named(odd, change, match):
    with pytest.raises(ValueError, match=match):
        load_splits(replace(odd, **change))


def test_pairs_of_texts_and_integer_classes_are_loaded(odd, caplog):
    train, evaluation, names = load_splits(replace(odd, text_column="review", text_pair_column="Sentence"))
    assert evaluation is None and "eval_split" in caplog.text  # there is only one split
    assert (train["text"][:], train["text_pair"][:]) == (["a", "b"], ["good", "bad"])
    assert (train["labels"][:], names) == ([1, 0], ["-1", "0"])


def test_splits_of_training_or_without_classes_are_not_evaluated_on(text_arguments, tmp_path):
    for split in ("train", "validation", "test"):
        make_texts(8).to_parquet(tmp_path / f"splits/{split}.parquet")
    make_texts(8).map(lambda row: {"label": -1}).to_parquet(tmp_path / "splits/test.parquet")
    args = replace(text_arguments, dataset=str(tmp_path / "splits"), eval_split="auto")
    assert str(load_splits(args)[1].split) == "validation"
    with pytest.raises(ValueError, match=r"split test.*8 rows.*-1.*bad, good"):
        load_splits(replace(args, eval_split="test"))
    assert load_splits(replace(args, train_split="train+validation[:50%]"))[1] is None  # 12 rows are too few


def test_a_tenth_is_held_out_when_there_is_no_validation_split(text_arguments, lm_arguments, tmp_path, caplog):
    rows = make_texts(120).add_column("id", list(range(120))).map(lambda row: {"text": f"{row['text']} {row['id']}"})
    rows.select(range(110)).to_parquet(tmp_path / "rows/train.parquet")
    rows.select(range(110, 120)).to_parquet(tmp_path / "rows/test.parquet")
    args = replace(text_arguments, dataset=str(tmp_path / "rows"), eval_split="auto")
    train, held_out, names = load_splits(args)
    assert (len(train), len(held_out), names) == (99, 11, ["bad", "good"])
    assert sorted(train["text"][:] + held_out["text"][:]) == sorted(rows["text"][:110])
    assert abs(2 * sum(held_out["labels"][:]) - 11) == 1  # as balanced as the classes
    assert load_splits(args)[1]["text"][:] == held_out["text"][:]
    assert load_splits(replace(args, seed=1))[1]["text"][:] != held_out["text"][:]
    drawn = load_splits(replace(args, eval_split="held-out", max_examples=50, max_eval_examples=5))
    assert (len(drawn[0]), len(drawn[1])) == (50, 5)
    assert {*drawn[0]["text"]} < {*train["text"]} and {*drawn[1]["text"]} < {*held_out["text"]}
    assert not caplog.records
    train, held_out, names = load_splits(replace(lm_arguments, dataset=args.dataset, eval_split="auto"))
    assert (len(train), len(held_out), names) == (99, 11, None)


def test_classes_of_another_dataset_are_matched_by_name(text_arguments, tmp_path):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["good", "bad"]))
    other = datasets.Dataset.from_dict({"text": ["bad film", "good film"], "label": [1, 0]}, features=features)
    other.to_parquet(tmp_path / "named/train.parquet")
    (tmp_path / "words").mkdir()
    (tmp_path / "words/train.csv").write_text("text,label\nbad film,bad\ngood film,good\n")
    for folder in ("named", "words"):
        validation = replace(text_arguments, dataset=str(tmp_path / folder), eval_split="train")
        _, rows, names = load_splits(text_arguments, validation)
        assert (rows["labels"][:], names) == ([0, 1], ["bad", "good"])
    (tmp_path / "words/train.csv").write_text("text,label\nso so,neutral\n")
    with pytest.raises(ValueError, match=r"split train of .*words: .*'neutral'.*bad, good"):
        load_splits(text_arguments, validation)


def test_booleans_are_classes_and_empty_rows_are_refused(text_arguments, tmp_path):
    path = tmp_path / "csv/train.csv"
    path.parent.mkdir()
    path.write_text("text,label\ngood,True\nbad,False\n")
    args = replace(text_arguments, dataset=str(path.parent), eval_split=None)
    train, _, names = load_splits(args)
    assert (train["labels"][:], train.features["labels"].dtype, names) == ([1, 0], "int64", ["False", "True"])
    path.write_text("text,label\ngood,True\n,False\n")
    with pytest.raises(ValueError, match=r"column 'text': 1 .*row 1"):
        load_splits(args)


def test_max_examples_draws_the_same_rows_every_time(text_arguments):
    args = replace(text_arguments, max_examples=10, max_eval_examples=4)
    (train, evaluation, _), (again, _, _) = load_splits(args), load_splits(args)
    assert (len(train), len(evaluation)) == (10, 4)
    assert train["text"][:] == again["text"][:]
    assert load_splits(replace(args, seed=1))[0]["text"][:] != train["text"][:]


def test_a_damaged_dataset_is_named(text_arguments, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": [1], "label')
    with pytest.raises(ValueError, match=str(tmp_path)):
        prepare_task(replace(text_arguments, dataset=str(tmp_path), eval_split=None))
