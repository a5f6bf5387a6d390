"""Arguments of a recording from YAML, flags and Python."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from know_hf import RecordArguments
from know_hf.config_files import check_keys
from know_hf.tasks import LoraArguments
from know_hf.tasks.trainer_parts import prepare_task

RECIPES = Path(__file__).parents[1] / "recipes"
pytestmark = pytest.mark.usefixtures("own_cache")
REQUIRED = {"task": "causal-lm", "model": "m", "dataset": "d", "output_dir": "o"}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("record/*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_parse(path):
    args = RecordArguments.from_yaml(path)
    check_keys(args.training, TrainingArguments.__dataclass_fields__, str(path))
    assert args.output_dir == f"outputs/record/{path.stem}"
    assert (args.lora is not None) == path.stem.endswith("_lora")
    sizes = args.schedule.sizes(args.max_examples or 10_000, args.training["per_device_train_batch_size"])
    assert all(small < large for large, small in pairwise(sizes))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"max_exampels": 3}, ["'max_exampels'", "did you mean 'max_examples'"]),
        ({"lora": {"rank": 8}}, ["'rank'", "r, alpha"]),
        ({"lora": {"r": 0}}, ["lora", "r=0"]),
        ({"lora": {"r": 10**8}}, ["lora", "r=100000000", "65,536"]),
        ({"lora": {"dropout": 1}}, ["lora", "dropout=1"]),
        ({"lora": 8}, ["lora=8"]),
        ({"task": "causal_lm"}, ["unknown task 'causal_lm'", "choose one of", "causal-lm"]),
        ({"epochs": "many"}, ["epochs='many'", "number"]),
        ({"epochs": 0}, ["epochs=0"]),
        ({"num_states": 2.5}, ["num_states=2.5", "integer"]),
        ({"pack": "maybe"}, ["pack='maybe'", "boolean"]),
        ({"max_length": 0}, ["max_length=0"]),
        ({"ratio": 1.5}, ["ratio", "1.5"]),
        ({"start": "now"}, ["start='now'", "train, current"]),
        ({"start": "current", "lora": {}}, ["start='current'", "LoRA"]),
        ({"start": "current", "tail_states": 2}, ["tail_states=2", "start='current'"]),
        ({"kind": "halves"}, ["kind='halves'", "nested, complementary"]),
        ({"kind": "complementary", "num_states": 3}, ["kind='complementary'", "num_states=3"]),
        ({"start_weights": "all"}, ["start_weights='all'", "reference, full, none"]),
        ({"tail_states": -1}, ["tail_states", "-1"]),
        ({"stratify": True}, ["stratify=True", "causal-lm"]),
        ({"image_column": "img"}, ["image_column='img'", "causal-lm"]),
        ({"training": {"num_train_epochs": 1}}, ["'num_train_epochs'", "epochs_per_stage"]),
        ({"training": {"hub_token": "hf_x"}}, ["'hub_token'", "auth login"]),
        ({"model": None}, ["model", "--model"]),
    ],
)
def test_wrong_arguments_are_named(content, words):
    with pytest.raises(ValueError, match=r"^it|in it;") as caught:
        RecordArguments.from_dict({**REQUIRED, **content}, "it")
    assert all(word in str(caught.value) for word in words)


def test_strings_are_converted_and_arguments_survive_json(text_arguments):
    content = {"epochs": "2", "pack": "true", "seed": "3", "eval_split": "none", "dataset_config": 2024}
    args = RecordArguments.from_dict({**REQUIRED, **content, "training": {"learning_rate": "1e-5"}})
    assert (args.epochs, args.pack, args.seed, args.eval_split) == (2.0, True, 3, None)
    assert (args.dataset_config, args.training) == ("2024", {"learning_rate": 1e-5})
    args = replace(text_arguments, lora=LoraArguments(target_modules=["query"]))
    assert RecordArguments.from_dict(json.loads(json.dumps(args.to_dict()))) == args


def test_overrides_replace_the_yaml_key_by_key(tmp_path):
    path = tmp_path / "a.yaml"
    more = "training: {learning_rate: 1e-5, seed_: 1, deep: {lr: 1e-6}}\nlora: {r: 4, use_dora: true}\n"
    path.write_text(yaml.safe_dump(REQUIRED) + more)
    args = RecordArguments.from_yaml(path, {"epochs": "2", "training": {"seed_": 2}, "lora": {"r": "16"}})
    assert args.training == {"learning_rate": 1e-5, "seed_": 2, "deep": {"lr": 1e-6}}  # PyYAML gives '1e-5'
    assert (args.lora.r, args.lora.use_dora, args.epochs) == (16, True, 2.0)
    assert RecordArguments.from_yaml(path, {"lora": None}).lora is None
    for content in ("- 1", "a: [", ""):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"a\.yaml"):
            RecordArguments.from_yaml(path)


@pytest.mark.parametrize("value", ["nan", "0.1", ".inf"])
def test_numbers_of_the_training_are_no_text(text_arguments, value):
    with pytest.raises(ValueError, match=f"training.learning_rate='{value}'"):
        prepare_task(replace(text_arguments, training={"learning_rate": value}))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"start": "current"}, r"start='current'.*'classifier\.bias'"),
        ({"training": {"learning_rat": 1e-4}}, "'learning_rat'.*'learning_rate'"),
        ({"training": {"learning_rate": [1]}}, r"training\.learning_rate=\[1\]: .*number"),
        ({"max_length": 17}, "max_length=17.*16"),
    ],
)
def test_arguments_that_do_not_fit_the_model_are_refused(text_arguments, change, match):
    with pytest.raises(ValueError, match=match):
        prepare_task(replace(text_arguments, **change))
