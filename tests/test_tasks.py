"""Recordings of the common tasks, on small models and datasets in folders."""

import importlib.util
import json
import pickle
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import make_resnet
from peft import PeftModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CodeGenConfig,
    CodeGenForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    set_seed,
)

from know_hf import RecordArguments, record_task
from know_hf.config_files import check_keys
from know_hf.tasks import LoraArguments
from know_hf.tasks.record import _check_or_write_arguments
from know_hf.tasks.recording_plan import plan_task
from know_hf.tasks.task_data import CausalCollator, load_splits, tokenize
from know_hf.tasks.trainer_parts import prepare_task

RECIPES = Path(__file__).parents[1] / "recipes"
WORDS = ["good", "bad", "film", "a", "the", "was", "this"]
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
QUICK = {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
PEFT_WARNING = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def make_tokenizer(**tokens):
    special = list(dict.fromkeys(tokens.values()))
    vocabulary = {word: index for index, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=tokens["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def make_texts(num_examples=32, seed=0):
    random = np.random.RandomState(seed)
    labels = np.arange(num_examples) % 2
    texts = [f"{('bad', 'good')[label]} {' '.join(random.choice(WORDS[2:], 4))}" for label in labels]
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


def make_pictures(num_examples=32, seed=0):
    """Grey images, dark or light, with string classes."""
    random = np.random.RandomState(seed)
    labels = np.arange(num_examples) % 2
    pixels = (random.randint(0, 100, (num_examples, 10, 12)) + 150 * labels[:, None, None]).astype(np.uint8)
    images = {"img": [Image.fromarray(p) for p in pixels], "label": [("dark", "light")[label] for label in labels]}
    features = datasets.Features(img=datasets.Image(), label=datasets.Value("string"))
    return datasets.Dataset.from_dict(images, features=features)


def write_dataset(folder, make):
    make().to_parquet(folder / "train-00000-of-00001.parquet")
    make(8, seed=7).to_parquet(folder / "test-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("texts"), make_texts)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("pictures"), make_pictures)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = make_tokenizer(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    set_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_vit(folder, **options):
    set_seed(0)
    mean = [0.5] * options.get("num_channels", 3)
    ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZES, **options)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=mean, image_std=mean).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return write_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Tied embeddings and, like most language models, a tokenizer without a padding token."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = make_tokenizer(unk_token="<unk>", eos_token="</s>")
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 1}
    set_seed(0)
    config = LlamaConfig(**tokens, max_position_embeddings=32, tie_word_embeddings=True, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text_arguments(bert, texts, tmp_path):
    paths = {"model": bert, "dataset": texts, "output_dir": str(tmp_path / "out")}
    return RecordArguments(task="text-classification", **paths, num_states=3, epochs=2, training=QUICK)


@pytest.fixture
def image_arguments(text_arguments, vit, pictures):
    return replace(text_arguments, task="image-classification", model=vit, dataset=pictures)


@pytest.fixture
def lm_arguments(text_arguments, llama):
    return replace(text_arguments, task="causal-lm", model=llama)


def test_text_classification_is_planned_recorded_and_resumed(text_arguments):
    output_dir = Path(text_arguments.output_dir)
    plan = plan_task(text_arguments)
    assert not output_dir.exists()

    trajectory = record_task(text_arguments)
    assert trajectory.path == output_dir / "trajectory"
    assert [state.num_examples for state in trajectory.states] == plan.num_examples == [32, 16, 8]
    assert [state.steps for state in trajectory.states] == plan.steps == [16, 4, 2]
    assert (plan.epochs, plan.examples_seen, plan.relative_cost) == ([2, 1, 1], 2 * 32 + 16 + 8, 1.75)
    assert plan.parameters == sum(trajectory.shape(name).numel() for name in trajectory.names)
    assert plan.bytes_needed == 4 * 4 * plan.parameters
    assert all(text in str(plan) for text in ("22 steps", "88 examples", "2.75 epochs", "1.38 times"))

    assert all(set(state.metrics) >= {"eval_loss", "eval_accuracy"} for state in trajectory.states)
    assert trajectory.states[0].metrics["eval_accuracy"] > 0.8  # one word decides the class
    assert trajectory.load_model().config.id2label == {0: "bad", 1: "good"}
    assert AutoTokenizer.from_pretrained(trajectory.path).tokenize("good film") == ["good", "film"]
    assert json.loads((output_dir / "record.json").read_text())["model"] == text_arguments.model
    with Image.open(output_dir / "forgetting.png") as picture:
        assert picture.size[0] > 500

    written = (trajectory.path / "trajectory.json").read_bytes()
    assert record_task(text_arguments).num_states == 3
    assert (trajectory.path / "trajectory.json").read_bytes() == written
    with pytest.raises(ValueError, match=r"epochs=2\.?0?.*1"):
        record_task(replace(text_arguments, epochs=1))


def test_partitioned_weights_are_planned_by_their_full_shape(text_arguments, monkeypatch):
    expected, parts = plan_task(text_arguments), prepare_task(text_arguments)
    for parameter in parts.model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)  # like ZeRO-3
    monkeypatch.setattr("know_hf.tasks.recording_plan.prepare_task", lambda args: parts)
    plan = plan_task(text_arguments)
    assert (plan.parameters, plan.bytes_needed) == (expected.parameters, expected.bytes_needed)


def test_arguments_are_compared_on_every_process_and_written_by_one(text_arguments, tmp_path, monkeypatch):
    _check_or_write_arguments(text_arguments, tmp_path / "out", write=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.chdir(Path(text_arguments.model).parent)
    args = replace(text_arguments, model=Path(text_arguments.model).name)
    _check_or_write_arguments(args, tmp_path / "out", write=True)
    (tmp_path / "out/trajectory").mkdir()
    (tmp_path / "out/trajectory/trajectory.json").touch()
    content = json.loads((tmp_path / "out/record.json").read_text())
    assert content["model"] == f"./{args.model}"  # without ./ it reads as a Hub id
    for write in (True, False):
        _check_or_write_arguments(args, tmp_path / "out", write)
        _check_or_write_arguments(RecordArguments.from_dict(content), tmp_path / "out", write)
        with pytest.raises(ValueError, match="epochs=2"):
            _check_or_write_arguments(replace(args, epochs=1), tmp_path / "out", write)


def test_image_classification(image_arguments, tmp_path):
    parts = prepare_task(image_arguments)
    assert parts.train_dataset[:3]["pixel_values"].shape == (3, 3, 8, 8)  # without torchvision
    pickle.loads(pickle.dumps(parts.train_dataset.format["format_kwargs"]["transform"]))  # for spawned workers
    trajectory = record_task(image_arguments)
    assert trajectory.states[0].metrics["eval_accuracy"] > 0.8
    assert trajectory.load_model().config.id2label == {0: "dark", 1: "light"}
    processor = json.loads((trajectory.path / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 8, "width": 8}
    grey = prepare_task(replace(image_arguments, model=write_vit(tmp_path / "grey", num_channels=1)))
    assert grey.train_dataset[:3]["pixel_values"].shape == (3, 1, 8, 8)
    batch = grey.data_collator([grey.train_dataset[index] for index in range(4)])
    assert grey.model(**batch).loss.isfinite()


def test_language_modelling_in_steps_and_from_current_weights(lm_arguments):
    training = {**QUICK, "max_steps": 3, "gradient_accumulation_steps": 2}
    args = replace(lm_arguments, steps_per_stage=2, training=training)
    plan = plan_task(args)
    assert (plan.steps, plan.epochs, plan.examples_seen) == ([3, 2, 2], [3 / 4, 1, 2], 24 + 16 + 16)
    trajectory = record_task(args)
    assert [state.steps for state in trajectory.states] == plan.steps
    assert all("eval_loss" in state.metrics and "eval_accuracy" not in state.metrics for state in trajectory.states)
    assert trajectory.states[0].metrics["eval_loss"] < np.log(len(WORDS) + 2)  # better than guessing
    assert trajectory.tied_weights == {"lm_head.weight": "model.embed_tokens.weight"}
    assert AutoModelForCausalLM.from_pretrained(trajectory.path / "state-2").config.vocab_size == len(WORDS) + 2
    args = replace(lm_arguments, start="current", output_dir=f"{args.output_dir}-current")
    assert plan_task(args).steps == [0, 4, 2]
    trajectory = record_task(args)
    assert [state.steps for state in trajectory.states] == [0, 4, 2]
    before = AutoModelForCausalLM.from_pretrained(args.model).state_dict()["model.embed_tokens.weight"]
    assert torch.equal(trajectory.tensor("model.embed_tokens.weight"), before)


def test_a_config_without_a_padding_token_gets_that_of_the_tokenizer(lm_arguments, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(lm_arguments.model)
    sizes = {"n_positions": 32, "n_ctx": 32, "n_embd": 16, "n_layer": 1, "n_head": 4, "rotary_dim": 4}
    CodeGenForCausalLM(CodeGenConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "codegen")
    tokenizer.save_pretrained(tmp_path / "codegen")
    parts = prepare_task(replace(lm_arguments, model=str(tmp_path / "codegen")))
    assert parts.model.config.pad_token_id == tokenizer.eos_token_id


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
    assert labels[0].tolist() == [*tokens[0]["input_ids"], -100]
    _, decoded = tokens_of(max_length=5, pack=True)
    assert decoded == [["good", "film", "</s>", "a", "bad"], ["bad", "film", "</s>", "the", "</s>"]]
    with pytest.raises(ValueError, match="max_length=50"):
        tokens_of(max_length=50, pack=True)
    texts = tokenize(dataset.select([1]), tokenizer, max_length=3, causal=False, pack=False)
    assert tokenizer.convert_ids_to_tokens(texts[0]["input_ids"]) == ["a", "bad", "bad"]


@PEFT_WARNING
@pytest.mark.parametrize(
    ("task", "lora", "trained"),
    [
        ("text", LoraArguments(r=2, target_modules="query,value", use_dora=True), {"query", "value", "classifier"}),
        ("image", LoraArguments(r=2), {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "classifier"}),
        ("lm", LoraArguments(r=2, use_rslora=True), {"q_proj", "down_proj"}),
    ],
)
def test_adapter_and_new_head_are_trained_and_recorded(request, task, lora, trained):
    args = replace(request.getfixturevalue(f"{task}_arguments"), lora=lora)
    parts = prepare_task(args)
    names = [name for name, parameter in parts.model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or "modules_to_save" in name for name in names)
    assert not any("classifier" in name and "lora_" in name for name in names)
    for word in trained:
        assert any(word in name for name in names), word
    config = parts.model.peft_config["default"]
    assert (config.r, config.use_dora, config.use_rslora) == (2, lora.use_dora, lora.use_rslora)

    plan = plan_task(args)
    assert plan.parameters == sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
    trajectory = record_task(args)
    assert (trajectory.path / "adapter_config.json").exists()
    assert all("lora_" in name or "classifier" in name for name in trajectory.names)
    assert plan.parameters == sum(trajectory.shape(name).numel() for name in trajectory.names)
    assert [state.steps for state in trajectory.states] == plan.steps
    base = prepare_task(replace(args, lora=None)).model
    assert isinstance(trajectory.load_model(base_model=base), PeftModel)


@PEFT_WARNING
def test_batch_norm_layers_are_trained_in_full_beside_an_adapter(image_arguments, tmp_path):
    set_seed(0)
    make_resnet().resnet.save_pretrained(tmp_path / "resnet")
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    processor.save_pretrained(tmp_path / "resnet")
    lora = LoraArguments(r=2, target_modules=["shortcut.convolution"])
    args = replace(image_arguments, model=str(tmp_path / "resnet"), lora=lora)
    trajectory = record_task(args)
    assert any("running_mean" in name for name in trajectory.names)
    assert not any("running_mean" in name and trajectory.is_unchanged(name) for name in trajectory.names)


@PEFT_WARNING
@pytest.mark.parametrize("lora", [None, LoraArguments(r=2)])
def test_accumulated_batches_are_averaged(text_arguments, lora):
    losses = []
    for batch_size, accumulated in ((8, 1), (2, 4)):
        training = {**QUICK, "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulated}
        training |= {"max_steps": 1, "logging_steps": 1}
        trainer = prepare_task(replace(text_arguments, training=training, lora=lora)).make_trainer()
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train()
        losses.append(trainer.state.log_history[0])
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"], rel=1e-3)
    assert losses[1]["grad_norm"] == pytest.approx(losses[0]["grad_norm"], rel=1e-3)


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


@pytest.fixture
def odd(text_arguments, tmp_path):
    """Arguments for a dataset of one split whose columns cannot be detected."""
    rows = {"Sentence": ["good", "bad"], "review": ["a", "b"], "stars": [1.5, 2.5], "label": [0, -1]}
    (tmp_path / "odd").mkdir()
    datasets.Dataset.from_dict(rows).to_csv(tmp_path / "odd/train.csv")
    return replace(text_arguments, dataset=str(tmp_path / "odd"))


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
    args = replace(text_arguments, dataset=str(tmp_path / "splits"))
    assert str(load_splits(args)[1].split) == "validation"
    with pytest.raises(ValueError, match=r"split test.*8 rows.*-1.*bad, good"):
        load_splits(replace(args, train_split="train+validation[:50%]"))


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


@pytest.mark.parametrize("path", sorted(RECIPES.glob("record/*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_parse(path):
    args = RecordArguments.from_yaml(path)
    check_keys(args.training, TrainingArguments.__dataclass_fields__, str(path))
    assert args.output_dir == f"outputs/record/{path.stem}"
    assert (args.lora is not None) == path.stem.endswith("_lora")
    sizes = args.schedule.sizes(args.max_examples or 10_000, args.training["per_device_train_batch_size"])
    assert all(small < large for large, small in pairwise(sizes))


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # on CPUs
def test_the_text_classification_recipe(bert, tmp_path, capsys):
    for split, size in (("train", 64), ("test", 8)):
        rows = make_texts(size).rename_columns({"text": "review", "label": "kind"})
        rows.to_parquet(tmp_path / f"reviews/{split}.parquet")
    path = RECIPES / "text_classification/text_classification.py"
    spec = importlib.util.spec_from_file_location("text_classification", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    flags = f"--output-dir {tmp_path}/out --model {bert} --dataset {tmp_path}/reviews --text-column review"
    flags += " --label-column kind --epochs 1 --batch-size 4 --max-length 8"
    recipe.main(recipe.make_parser().parse_args(flags.split()))
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    states = [f"state {index} ({size} examples)" for index, size in enumerate((64, 32, 16, 8, 4))]
    assert list(results) == [*states, "known-1", "known-2", "known-3", "average"]
    assert all(0 <= result["eval_accuracy"] <= 1 and result["eval_loss"] > 0 for result in results.values())
    assert "weights" in capsys.readouterr().out


REQUIRED = {"task": "causal-lm", "model": "m", "dataset": "d", "output_dir": "o"}


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


def test_a_damaged_dataset_is_named(text_arguments, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": [1], "label')
    with pytest.raises(ValueError, match=str(tmp_path)):
        prepare_task(replace(text_arguments, dataset=str(tmp_path), eval_split=None))
