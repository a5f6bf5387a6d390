"""Recordings of the common tasks, on small models and datasets in folders."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_resnet
from doubles.task_fixtures import QUICK, WORDS, make_texts, write_vit
from peft import PeftModel
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    CodeGenConfig,
    CodeGenForCausalLM,
    ViTImageProcessorPil,
    set_seed,
)

from know_hf import RecordArguments, record_task
from know_hf.tasks import LoraArguments
from know_hf.tasks.record import _check_or_write_arguments, read_arguments
from know_hf.tasks.recording_plan import plan_task
from know_hf.tasks.trainer_parts import load_model, prepare_task

RECIPES = Path(__file__).parents[1] / "recipes"
pytestmark = pytest.mark.usefixtures("own_cache")


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


def test_tensorboard_gets_the_values_of_every_state(text_arguments):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = replace(text_arguments, num_states=2, epochs=1, training={**QUICK, "report_to": "tensorboard"})
    trajectory = record_task(args)
    files = sorted(Path(args.output_dir, "trainer").rglob("events*"))
    assert files
    scalars: dict[str, list[tuple[int, float]]] = {}
    for file in files:
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    for name in ("eval_loss", "eval_accuracy"):
        expected = [(8, trajectory.states[0].metrics[name]), (12, trajectory.states[1].metrics[name])]
        assert scalars[f"train/forgetting/{name}"] == [(step, pytest.approx(value)) for step, value in expected]
    assert [value for _, value in scalars["train/forgetting/num_examples"]] == [32, 16]


def test_branches_and_tail_states_are_planned_and_recorded(text_arguments):
    args = replace(text_arguments, kind="complementary", num_states=1, tail_states=2, start_weights="none")
    plan = plan_task(args)
    assert (plan.num_examples, plan.steps, plan.epochs) == ([32, 16, 16], [16, 4, 4], [2, 1, 1])
    assert (plan.relative_cost, plan.bytes_needed) == (2, 5 * plan.bytes_per_state)
    assert "1 state, 2 tail states, 2 branches, each" in str(plan) and "branch-1" in str(plan)
    from_start = plan_task(replace(args, branch_from="start", tail_states=0, start_weights="full"))
    assert (from_start.steps, from_start.epochs) == ([16, 8, 8], [2, 2, 2])
    trajectory = record_task(args)
    records = [*trajectory.states, *trajectory.branches]
    assert [(record.num_examples, record.steps) for record in records] == [(32, 16), (16, 4), (16, 4)]
    assert [record.steps for record in trajectory.tail] == [8, 12] and trajectory.start is None
    with pytest.raises(ValueError, match=r"tail_states=9.*18.*16"):
        plan_task(replace(args, tail_states=9))


def test_recordings_of_older_versions_resume_with_their_evaluation_split(text_arguments):
    args = replace(text_arguments, num_states=2, epochs=1)
    trajectory = record_task(args)
    path, written = trajectory.path.with_name("record.json"), (trajectory.path / "trajectory.json").read_bytes()
    content = json.loads(path.read_text())
    new = ("kind", "branch_from", "tail_states", "start_weights")
    old = {key: value for key, value in content.items() if key not in new}
    path.write_text(json.dumps({**old, "eval_split": "auto"}))  # which was test, as there is no validation split
    assert read_arguments(path) == args
    for eval_split in ("auto", "test"):
        record_task(replace(args, eval_split=eval_split))
    assert (trajectory.path / "trajectory.json").read_bytes() == written
    with pytest.raises(ValueError, match="eval_split='test', not 'held-out'"):
        record_task(replace(args, eval_split="held-out"))
    with pytest.raises(ValueError, match="tail_states=0, not 1"):
        record_task(replace(args, tail_states=1))
    path.write_text(json.dumps({**content, "eval_split": "auto"}))  # of this version: held-out
    assert read_arguments(path).eval_split == "auto"


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


def test_current_weights_need_the_classes_in_their_own_order(text_arguments, tmp_path):
    names = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    config = BertConfig.from_pretrained(text_arguments.model, **names)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    args = replace(text_arguments, model=str(tmp_path / "model"), start="current")
    with pytest.raises(ValueError, match=r"good, bad.* bad, good.*ClassLabel"):
        load_model(args, ["bad", "good"], None)
    assert load_model(args, ["good", "bad"], None)[1] == []


@pytest.mark.parametrize(("problem", "num_labels"), [("regression", 1), ("multi_label_classification", 2)])
def test_models_for_other_labels_become_classifiers(text_arguments, tmp_path, problem, num_labels):
    config = BertConfig.from_pretrained(text_arguments.model, problem_type=problem, num_labels=num_labels)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    model, _ = load_model(replace(text_arguments, model=str(tmp_path / "model")), ["bad", "good"], None)
    ids, labels = torch.ones(3, 2, dtype=torch.int64), torch.tensor([0, 1, 1])
    outputs = model.eval()(ids, labels=labels)
    assert torch.equal(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, labels))


def test_a_config_without_a_padding_token_gets_that_of_the_tokenizer(lm_arguments, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(lm_arguments.model)
    sizes = {"n_positions": 32, "n_ctx": 32, "n_embd": 16, "n_layer": 1, "n_head": 4, "rotary_dim": 4}
    CodeGenForCausalLM(CodeGenConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "codegen")
    tokenizer.save_pretrained(tmp_path / "codegen")
    parts = prepare_task(replace(lm_arguments, model=str(tmp_path / "codegen")))
    assert parts.model.config.pad_token_id == tokenizer.eos_token_id


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


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # on CPUs
def test_the_text_classification_recipe(bert, tmp_path, run_script):
    for split, size in (("train", 64), ("test", 8)):
        rows = make_texts(size).rename_columns({"text": "review", "label": "kind"})
        rows.to_parquet(tmp_path / f"reviews/{split}.parquet")
    flags = f"--output-dir {tmp_path}/out --model {bert} --dataset {tmp_path}/reviews --text-column review"
    flags += " --label-column kind --epochs 1 --batch-size 4 --max-length 8"
    printed = run_script(RECIPES / "text_classification/text_classification.py", *flags.split())
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    states = [f"state {index} ({size} examples)" for index, size in enumerate((64, 32, 16, 8, 4))]
    assert list(results) == [*states, "known-1", "known-2", "known-3", "average"]
    assert all(0 <= result["eval_accuracy"] <= 1 and result["eval_loss"] > 0 for result in results.values())
    assert "weights" in printed
