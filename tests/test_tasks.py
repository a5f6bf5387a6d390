"""Recording for the common tasks, each on a tiny model and dataset that stand in folders, as users have them."""

import json
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
    AutoModelForImageClassification,
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

from know_hf.config_files import check_keys
from know_hf.tasks import _keep_arguments, plan_task, prepare_task, record_task
from know_hf.tasks.arguments import LoraArguments, RecordArguments
from know_hf.tasks.task_data import CausalCollator, load_splits, tokenize
from know_hf.trajectory.summary import inspect_trajectory

RECIPES = Path(__file__).parents[1] / "recipes" / "record"
WORDS = ["good", "bad", "film", "a", "the", "was", "this"]
QUICK = {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing is left in the cache of whoever runs the tests."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before
    datasets.enable_progress_bars()


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
    folder.mkdir()
    make().to_parquet(folder / "train-00000-of-00001.parquet")
    make(8, seed=7).to_parquet(folder / "test-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "texts", make_texts)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "pictures", make_pictures)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = make_tokenizer(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    set_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    set_seed(0)
    ViTModel(
        ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    ).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Tied embeddings; a tokenizer without a padding token, as most language models have."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = make_tokenizer(unk_token="<unk>", eos_token="</s>")
    set_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text_arguments(bert, texts, tmp_path):
    return RecordArguments(
        task="text-classification",
        model=bert,
        dataset=texts,
        output_dir=str(tmp_path / "out"),
        num_states=3,
        epochs=2,
        training=QUICK,
    )


@pytest.fixture
def image_arguments(text_arguments, vit, pictures):
    return replace(text_arguments, task="image-classification", model=vit, dataset=pictures)


@pytest.fixture
def lm_arguments(text_arguments, llama):
    return replace(text_arguments, task="causal-lm", model=llama)


def test_text_classification_is_recorded_as_planned(text_arguments):
    plan = plan_task(text_arguments)
    output_dir = Path(text_arguments.output_dir)
    assert not output_dir.exists()  # nothing is written, nothing trained

    trajectory = record_task(text_arguments)
    assert trajectory.path == output_dir / "trajectory"
    assert [state.num_examples for state in trajectory.states] == plan.num_examples == [32, 16, 8]
    assert [state.steps for state in trajectory.states] == plan.steps == [16, 4, 2]
    assert plan.epochs == [2, 1, 1]
    assert plan.examples_seen == 2 * 32 + 16 + 8
    assert plan.relative_cost == 1.75
    assert plan.parameters == sum(trajectory.shape(name).numel() for name in trajectory.names)
    assert plan.bytes_needed == 3 * 4 * plan.parameters
    assert "22 steps, 88 examples seen: 2.75 epochs on all data, 1.38 times the training of state 0 alone" in str(plan)

    assert all(set(state.metrics) >= {"eval_loss", "eval_accuracy"} for state in trajectory.states)
    assert trajectory.states[0].metrics["eval_accuracy"] > 0.8  # one word tells the class
    model = trajectory.load_model()
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert AutoTokenizer.from_pretrained(trajectory.path).tokenize("good film") == ["good", "film"]
    assert json.loads((output_dir / "record.json").read_text())["model"] == text_arguments.model


def test_weights_in_parts_are_planned_as_the_whole(text_arguments, monkeypatch):
    whole, parts = plan_task(text_arguments), prepare_task(text_arguments)
    for parameter in parts.model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)  # as ZeRO-3 leaves it
    monkeypatch.setattr("know_hf.tasks.record.prepare_task", lambda args: parts)
    plan = plan_task(text_arguments)
    assert (plan.parameters, plan.bytes_needed) == (whole.parameters, whole.bytes_needed)


def test_the_forgetting_curve_is_drawn(text_arguments):
    pytest.importorskip("matplotlib")
    record_task(text_arguments)
    with Image.open(Path(text_arguments.output_dir) / "forgetting.png") as picture:
        assert picture.size[0] > 500


def test_the_same_arguments_go_on_and_others_are_refused(text_arguments):
    trajectory = record_task(text_arguments)
    written = (trajectory.path / "trajectory.json").read_bytes()
    assert record_task(text_arguments).num_states == 3
    assert (trajectory.path / "trajectory.json").read_bytes() == written
    with pytest.raises(ValueError, match=r"was recorded with epochs=2\.?0?, not 1; give what it was recorded with"):
        record_task(replace(text_arguments, epochs=1))


def test_the_arguments_are_compared_on_every_process_and_written_by_one(text_arguments, tmp_path, monkeypatch):
    _keep_arguments(text_arguments, tmp_path / "out", write=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.chdir(Path(text_arguments.model).parent)
    args = replace(text_arguments, model=Path(text_arguments.model).name)
    _keep_arguments(args, tmp_path / "out", write=True)
    (tmp_path / "out/trajectory").mkdir()
    (tmp_path / "out/trajectory/trajectory.json").touch()
    kept = json.loads((tmp_path / "out/record.json").read_text())
    assert kept["model"] == f"./{args.model}"  # else it would read as a Hub id elsewhere
    for write in (True, False):
        _keep_arguments(args, tmp_path / "out", write)
        _keep_arguments(RecordArguments.from_dict(kept), tmp_path / "out", write)
        with pytest.raises(ValueError, match="was recorded with epochs=2"):
            _keep_arguments(replace(args, epochs=1), tmp_path / "out", write)


def test_a_config_without_a_padding_token_gets_that_of_the_tokenizer(lm_arguments, tmp_path):
    folder = tmp_path / "codegen"
    tokenizer = AutoTokenizer.from_pretrained(lm_arguments.model)
    config = CodeGenConfig(
        vocab_size=len(tokenizer), n_positions=32, n_ctx=32, n_embd=16, n_layer=1, n_head=4, rotary_dim=4
    )
    CodeGenForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parts = prepare_task(replace(lm_arguments, model=str(folder)))
    assert parts.model.config.pad_token_id == tokenizer.eos_token_id


def test_image_classification_needs_no_torchvision(image_arguments):
    parts = prepare_task(image_arguments)
    assert parts.train_dataset[:3]["pixel_values"].shape == (3, 3, 8, 8)
    trajectory = record_task(image_arguments)
    assert trajectory.states[0].metrics["eval_accuracy"] > 0.8
    assert trajectory.load_model().config.id2label == {0: "dark", 1: "light"}
    processor = json.loads((trajectory.path / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 8, "width": 8}


def test_grey_images_stay_grey_for_a_model_of_one_channel(image_arguments, tmp_path):
    folder = tmp_path / "grey"
    ViTModel(
        ViTConfig(
            num_channels=1, image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    ).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)
    parts = prepare_task(replace(image_arguments, model=str(folder)))
    assert parts.train_dataset[:3]["pixel_values"].shape == (3, 1, 8, 8)
    batch = parts.data_collator([parts.train_dataset[index] for index in range(4)])
    assert parts.model(**batch).loss.isfinite()


def test_causal_language_modelling_reports_the_loss(lm_arguments):
    trajectory = record_task(lm_arguments)
    assert all("eval_loss" in state.metrics and "eval_accuracy" not in state.metrics for state in trajectory.states)
    assert trajectory.states[0].metrics["eval_loss"] < np.log(len(WORDS) + 2)  # better than guessing
    assert trajectory.tied_weights == {"lm_head.weight": "model.embed_tokens.weight"}
    assert AutoModelForCausalLM.from_pretrained(trajectory.path / "state-2").config.vocab_size == len(WORDS) + 2


def test_ends_of_texts_are_learned_and_padding_is_not(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.pad_token = tokenizer.eos_token
    dataset = datasets.Dataset.from_dict({"text": ["good film", "a bad bad film", "the", ""]})
    tokens = tokenize(dataset, tokenizer, max_length=4, causal=True, pack=False)
    decoded = [tokenizer.convert_ids_to_tokens(ids) for ids in tokens["input_ids"]]
    assert decoded == [["good", "film", "</s>"], ["a", "bad", "bad", "film"], ["the", "</s>"]]
    labels = CausalCollator(tokenizer)([tokens[0], tokens[1]])["labels"]
    assert labels[0].tolist() == [*tokens[0]["input_ids"], -100]

    packed = tokenize(dataset, tokenizer, max_length=5, causal=True, pack=True)
    decoded = [tokenizer.convert_ids_to_tokens(ids) for ids in packed["input_ids"]]
    assert decoded == [["good", "film", "</s>", "a", "bad"], ["bad", "film", "</s>", "the", "</s>"]]
    with pytest.raises(ValueError, match="none of the 4 texts gives an example of max_length=50 tokens"):
        tokenize(dataset, tokenizer, max_length=50, causal=True, pack=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize(
    ("task", "lora", "trained"),
    [
        ("text", LoraArguments(r=2, target_modules=["query"]), {"query", "classifier"}),
        ("text", LoraArguments(r=2, target_modules="query,value", use_dora=True), {"query", "value", "classifier"}),
        ("image", LoraArguments(r=2), {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "classifier"}),
        ("lm", LoraArguments(r=2, use_rslora=True), None),
    ],
)
def test_an_adapter_and_the_new_head_are_trained(request, task, lora, trained):
    args = replace(request.getfixturevalue(f"{task}_arguments"), lora=lora)
    parts = prepare_task(args)
    names = [name for name, parameter in parts.model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or "modules_to_save" in name for name in names)
    assert not any("classifier" in name and "lora_" in name for name in names)
    for word in trained or ():
        assert any(word in name for name in names), word
    config = parts.model.peft_config["default"]
    assert (config.r, config.use_dora, config.use_rslora) == (2, lora.use_dora, lora.use_rslora)
    assert plan_task(args).parameters == sum(p.numel() for p in parts.model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_statistics_are_recorded_with_an_adapter(image_arguments, tmp_path):
    make_resnet().save_pretrained(tmp_path / "resnet")
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]).save_pretrained(
        tmp_path / "resnet"
    )
    lora = LoraArguments(r=2, target_modules="convolution")
    trajectory = record_task(replace(image_arguments, model=str(tmp_path / "resnet"), lora=lora))
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "resnet")
    norms = [name for name, module in base.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and all(f"base_model.model.{name}.running_mean" in trajectory.names for name in norms)
    assert not torch.equal(*trajectory.history(f"base_model.model.{norms[0]}.running_mean")[1:])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize("task", ["text", "image", "lm"])
def test_an_adapter_is_recorded(request, task):
    args = replace(request.getfixturevalue(f"{task}_arguments"), lora=LoraArguments(r=2))
    plan = plan_task(args)
    trajectory = record_task(args)
    assert (trajectory.path / "adapter_config.json").exists()
    assert all("lora_" in name or "classifier" in name for name in trajectory.names)
    assert plan.parameters == sum(trajectory.shape(name).numel() for name in trajectory.names)
    assert [state.steps for state in trajectory.states] == plan.steps
    base = prepare_task(replace(args, lora=None)).model
    assert isinstance(trajectory.load_model(base_model=base), PeftModel)
    moved = inspect_trajectory(trajectory).displacement["fc"]
    assert moved[0] == 0 < moved[1]


def test_columns_and_splits_that_are_not_clear_are_named(text_arguments, image_arguments, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    rows = {"Sentence": ["good", "bad"], "review": ["a", "b"], "stars": [1.5, 2.5], "label": [0, -1]}
    datasets.Dataset.from_dict(rows).to_csv(folder / "train.csv")
    odd = replace(text_arguments, dataset=str(folder))
    with pytest.raises(
        ValueError, match=r"columns Sentence, .* \(Sentence and review may hold it\); give text_column"
    ):
        load_splits(odd)
    with pytest.raises(ValueError, match=r"image can't be told .* \(none is called image, img\); give image_column"):
        load_splits(replace(image_arguments, dataset=str(folder)))
    with pytest.raises(ValueError, match="text_column='txt' is not in the dataset; its columns are Sentence, review"):
        load_splits(replace(odd, text_column="txt"))
    with pytest.raises(ValueError, match="text_column='stars' holds float64, not text"):
        load_splits(replace(odd, text_column="stars"))
    with pytest.raises(ValueError, match=r"column 'stars': 1\.5 is no class"):
        load_splits(replace(odd, text_column="review", label_column="stars"))

    train, evaluation, names = load_splits(replace(odd, text_column="review"))
    assert evaluation is None  # said in the log: there is one split only
    assert names == ["-1", "0"]
    assert train["labels"][:] == [1, 0]
    assert train["text"][:] == ["a", "b"]


def test_rows_without_a_class_are_refused(text_arguments, tmp_path):
    folder = tmp_path / "hidden"
    folder.mkdir()
    make_texts().to_parquet(folder / "train.parquet")
    make_texts(8).map(lambda row: {"label": -1}).to_parquet(folder / "test.parquet")
    with pytest.raises(ValueError, match=r"split test of .* 8 rows have the class -1, which is none of bad, good"):
        load_splits(replace(text_arguments, dataset=str(folder)))


def test_a_split_that_is_trained_on_is_not_evaluated_on(text_arguments, tmp_path):
    folder = tmp_path / "splits"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        make_texts(8).to_parquet(folder / f"{split}.parquet")
    args = replace(text_arguments, dataset=str(folder))
    for train_split, expected in (("train", "validation"), ("train+validation[:50%]", "test")):
        evaluation = load_splits(replace(args, train_split=train_split))[1]
        assert str(evaluation.split) == expected


def test_booleans_are_classes_and_empty_cells_are_named(text_arguments, tmp_path):
    folder = tmp_path / "csv"
    folder.mkdir()
    (folder / "train.csv").write_text("text,label\ngood,True\nbad,False\n")
    args = replace(text_arguments, dataset=str(folder), eval_split=None)
    train, _, names = load_splits(args)
    assert (train["labels"][:], train.features["labels"].dtype, names) == ([1, 0], "int64", ["False", "True"])
    (folder / "train.csv").write_text("text,label\ngood,True\n,False\n")
    with pytest.raises(ValueError, match=r"column 'text': row 1 of those used, .* is empty, as are 1 in all; fill"):
        load_splits(args)


def test_max_examples_draws_the_same_rows_every_time(text_arguments):
    args = replace(text_arguments, max_examples=10, max_eval_examples=4)
    (train, evaluation, _), (again, _, _) = load_splits(args), load_splits(args)
    assert (len(train), len(evaluation)) == (10, 4)
    assert train["text"][:] == again["text"][:]
    assert load_splits(replace(args, seed=1))[0]["text"][:] != train["text"][:]


def test_current_weights_need_a_trained_head(text_arguments):
    with pytest.raises(ValueError, match=r"start='current' .* has none for 'classifier.bias'"):
        prepare_task(replace(text_arguments, start="current"))


def test_current_weights_are_planned_and_recorded_without_a_first_training(lm_arguments):
    args = replace(lm_arguments, start="current")
    assert plan_task(args).steps == [0, 4, 2]
    trajectory = record_task(args)
    assert [state.steps for state in trajectory.states] == [0, 4, 2]
    before = AutoModelForCausalLM.from_pretrained(args.model).state_dict()["model.embed_tokens.weight"]
    assert torch.equal(trajectory.tensor("model.embed_tokens.weight"), before)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
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
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"], rel=1e-4)
    assert losses[1]["grad_norm"] == pytest.approx(losses[0]["grad_norm"], rel=1e-4)


def test_lengths_in_steps_are_planned_and_recorded(lm_arguments):
    training = {**QUICK, "max_steps": 3, "gradient_accumulation_steps": 2}
    args = replace(lm_arguments, epochs_per_stage=1, steps_per_stage=2, training=training)
    plan = plan_task(args)
    assert plan.steps == [3, 2, 2]
    assert plan.epochs == [3 / 4, 1, 2]
    assert plan.examples_seen == 24 + 16 + 16
    assert [state.steps for state in record_task(args).states] == plan.steps


def test_training_arguments_are_checked_by_name(text_arguments):
    with pytest.raises(ValueError, match="training: unknown key 'learning_rat'; did you mean 'learning_rate'"):
        prepare_task(replace(text_arguments, training={"learning_rat": 1e-4}))


def test_texts_longer_than_the_model_takes_are_refused(text_arguments):
    with pytest.raises(ValueError, match=r"max_length=17: .* takes at most 16 tokens"):
        prepare_task(replace(text_arguments, max_length=17))
    assert len(prepare_task(replace(text_arguments, max_length=3)).train_dataset[0]["input_ids"]) == 3


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_parse(path):
    args = RecordArguments.from_yaml(path)
    check_keys(args.training, TrainingArguments.__dataclass_fields__, str(path))
    assert args.output_dir == f"outputs/record/{path.stem}"
    assert (args.lora is not None) == path.stem.endswith("_lora")
    sizes = args.schedule.sizes(args.max_examples or 10_000, args.training["per_device_train_batch_size"])
    assert all(small < large for large, small in pairwise(sizes))


def test_arguments_survive_their_own_json(text_arguments):
    args = replace(text_arguments, lora=LoraArguments(target_modules=["query"]))
    assert RecordArguments.from_dict(json.loads(json.dumps(args.to_dict()))) == args


REQUIRED = {"task": "causal-lm", "model": "m", "dataset": "d", "output_dir": "o"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"max_exampels": 3}, "unknown key 'max_exampels'; did you mean 'max_examples'?"),
        ({"lora": {"rank": 8}}, "unknown key 'rank'; known are r, alpha"),
        ({"lora": {"r": 0}}, "lora r=0: choose a rank of at least 1"),
        ({"lora": 8}, "lora=8 is not of the right kind; give a mapping"),
        ({"task": "causal_lm"}, "task='causal_lm' is not known; did you mean 'causal-lm'?"),
        ({"epochs": "many"}, "epochs='many' is not of the right kind; give float"),
        ({"num_states": 2.5}, r"num_states=2.5 is not of the right kind; give int"),
        ({"pack": 1}, "pack=1 is not of the right kind; give bool"),
        ({"max_length": 0}, "max_length=0: choose at least 1"),
        ({"ratio": 1.5}, "ratio must lie strictly between 0 and 1, got 1.5"),
        ({"start": "now"}, "start='now': choose one of train, current"),
        ({"start": "current", "lora": {}}, "start='current' has no meaning with lora"),
        ({"stratify": True}, "stratify=True has no meaning for causal-lm"),
        ({"image_column": "img"}, "image_column='img' has no meaning for causal-lm"),
        ({"training": {"num_train_epochs": 1}}, "training may not hold 'num_train_epochs': give epochs"),
        ({"model": None}, "model=None is not of the right kind; give str"),
    ],
)
def test_wrong_arguments_are_named(content, message):
    with pytest.raises(ValueError) as caught:
        RecordArguments.from_dict({**REQUIRED, **content}, "it")
    assert message in str(caught.value)


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match="it: dataset is missing; give it in the YAML or as --dataset"):
        RecordArguments.from_dict({"task": "causal-lm", "model": "m", "output_dir": "o"}, "it")


def test_yaml_and_overrides_have_one_meaning(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        yaml.safe_dump(REQUIRED)
        + "training: {learning_rate: 1e-5, seed_: 1, deep: {lr: 1e-6}}\nlora: {r: 4, use_dora: true}\n"
    )
    args = RecordArguments.from_yaml(path, {"epochs": "2", "training": {"seed_": 2}, "lora": {"r": "16"}})
    assert args.training == {"learning_rate": 1e-5, "seed_": 2, "deep": {"lr": 1e-6}}  # PyYAML gives '1e-5'
    assert (args.lora.r, args.lora.use_dora, args.epochs) == (16, True, 2.0)
    assert RecordArguments.from_yaml(path, {"lora": None}).lora is None
    path.write_text("- 1")
    with pytest.raises(ValueError, match=r"a\.yaml holds no keys"):
        RecordArguments.from_yaml(path)
    path.write_text("a: [")
    with pytest.raises(ValueError, match=r"a\.yaml is not valid YAML"):
        RecordArguments.from_yaml(path)
