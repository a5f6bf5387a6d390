"""Cards with fixed numbers are equal to the files in tests/cards. `python tests/test_cards.py` writes these files."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_resnet
from doubles.card_fields import COMPARISON, FIXED, FIXED_CHECKPOINT, GATE, assert_readable, blocks
from huggingface_hub import ModelCardData
from peft import LoraConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from know_hf import KNOWNConfig, WeightTrajectory, predict_overflowed_weights
from know_hf.cards import CheckpointCard, TrajectoryCard, checkpoint_card, known_card, trajectory_card
from know_hf.cards.base import source
from know_hf.cards.evidence import recorded_gate
from know_hf.plotting import forgetting_picture
from know_hf.trajectory.summary import inspect_trajectory

GOLDEN = Path(__file__).parent / "cards"

KNOWN = FIXED_CHECKPOINT["predictor"] | {
    "known": FIXED_CHECKPOINT["predictor"]["known"] | {"shipped": False, "revision": "3f2b"}
}
RESCALE = {"name": "Rescale", "module": "know_hf.predictors", "options": {"factor": 0.5}, "known": None}
RESCALED_KNOWN = KNOWN | {"name": "known+Rescale", "members": [KNOWN, RESCALE]}
TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}


def tiny_bert():
    return BertForSequenceClassification(BertConfig(**TINY))


def tiny_llama():
    return LlamaForCausalLM(LlamaConfig(**TINY))


def tiny_bart():
    sizes = {f"{part}_{size}": 2 for part in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 16}
    return BartForConditionalGeneration(BartConfig(d_model=8, max_position_embeddings=8, **tokens, **sizes))


def full_card():
    full = CheckpointCard(
        **FIXED_CHECKPOINT
        | {
            "title": "Enhanced checkpoint of resnet-18",
            "repo_id": "me/resnet-know",
            "license": {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
            "base_model": source("microsoft/resnet-18", "c6ad2a1"),
            "datasets": [source("ylecun/mnist", "77f3279"), source("uoft-cs/cifar10")],
            "trajectory": source("me/resnet-trajectory", "3f2b"),
            "norm": "predict",
            "recalibrated": True,
            "warnings": ["fc: 2.00% of the weights lie outside the training data of KNOWN"],
            "picture": "forgetting.png",
            "gate": recorded_gate(GATE),
        }
    )
    full.compare(COMPARISON, "known-x4")
    return full


def golden_cards():
    roles = [
        {"role": "conv", "tensors": 5, "parameters": 5000, "moved": [0.0, 0.125, 0.25]},
        {"role": "copied", "tensors": 18, "parameters": 150, "moved": None},
    ]
    about = {"title": "Forgetting trajectory", "repo_id": "me/trajectory", "license": {"license": "mit"}}
    return {
        "checkpoint.md": CheckpointCard(**FIXED_CHECKPOINT).render(),
        "checkpoint_full.md": full_card().render(),
        "trajectory.md": TrajectoryCard(**FIXED | about, roles=roles, stored_once=0, bytes=123456).render(),
        "known.md": known_card(KNOWNConfig(hidden_size=8), title="mine", path="me/known"),
    }


@pytest.mark.parametrize("name", list(golden_cards()))
def test_golden_card(name):
    text = str(golden_cards()[name])
    assert text.splitlines() == (GOLDEN / name).read_text(encoding="utf-8").splitlines()
    assert_readable(text)


def test_card_of_a_real_prediction(opened, prediction, shipped, card):
    rendered = checkpoint_card(opened, prediction, shipped, 2)
    assert_readable(str(rendered))
    tags = ["know_hf", "weight-prediction"]
    assert rendered.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": tags,
    }
    assert card.has_batch_norm and not card.recalibrated and card.warnings == prediction.warnings
    assert [row["role"] for row in card.roles] == ["bias", "conv", "copied", "fc", "norm"]
    conv = prediction.report["conv"]
    assert (card.roles[1]["mean_residual"], card.roles[1]["predicted"]) == (conv.mean_residual, conv.predicted)
    assert [state["num_examples"] for state in card.states] == [64, 32, 16, 8, 4]
    assert card.known["shipped"] and re.fullmatch("[0-9a-f]{64}", card.known["sha256"])
    assert card.predicted_with.keys() == card.recorded_with.keys()


def test_card_of_a_real_trajectory(opened):
    summary = inspect_trajectory(opened)
    rendered = trajectory_card(opened, summary, repo_id="me/trajectory", license="mit")
    assert_readable(str(rendered))
    tags = ["know_hf", "weight-trajectory"]
    assert rendered.data.to_dict() == {"library_name": "know_hf", "license": "mit", "tags": tags}
    conv = next(row for row in TrajectoryCard.of(opened, summary).roles if row["role"] == "conv")
    assert conv == {"role": "conv", "tensors": 5, "parameters": 5000, "moved": summary.displacement["conv"]}


def test_license_is_inherited_from_the_base_model(opened, prediction, tmp_path, monkeypatch):
    def card_of(base_model, **about):
        return checkpoint_card(opened, prediction, "average", 1, base_model=str(base_model), **about)

    folder, snapshot = tmp_path / "secret/base", tmp_path / "models--me--base/snapshots/1234"
    for path in (folder, snapshot):
        path.mkdir(parents=True)
        (path / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Base\n")
    card = card_of(folder)
    assert card.data.license == "mit" and card.data.base_model is None and "secret" not in str(card)
    assert "fine-tuned from `base` (a local folder), first" in card.text
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")
    card = card_of(folder)
    assert card.data.license is None and "license of the base model could not" in card.text
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert card_of("me/base", base_revision="1234").data.license == "mit"
    license = {"license": "other", "license_name": "mine", "license_link": "LICENSE"}
    card = card_of("me/base", base_card=ModelCardData(**license, language="en"))
    assert card.data.to_dict().items() >= license.items() and "en" not in card.data.to_dict()


@pytest.mark.parametrize(
    ("make_model", "line"),
    [
        (tiny_bert, "model = AutoModelForSequenceClassification.from_pretrained"),
        (tiny_llama, "model = AutoModelForCausalLM.from_pretrained"),
        (tiny_bart, "model = AutoModelForSeq2SeqLM.from_pretrained"),
        (lambda: torch.nn.Linear(3, 2), 'load_file("enhanced/model.safetensors")'),
    ],
    ids=["bert", "llama", "bart", "module"],
)
def test_loading_code_runs(record_states, tmp_path, shipped, make_model, line):
    trajectory = record_states(make_model())
    result = predict_overflowed_weights(trajectory, steps=1, output_dir=tmp_path / "enhanced")
    card = checkpoint_card(trajectory, result, shipped, 1)
    assert line in card.text and "BatchNorm" not in card.text
    exec(result.next_step, namespace := {"model": make_model()})
    assert type(namespace["model"]) is type(make_model())
    assert "| schedule | not recorded; 5 states |" in card.text
    assert "The states were not evaluated" in card.text
    assert_readable(str(card))
    assert_readable(str(trajectory_card(trajectory)))
    if "AutoModel" in line:
        namespace = {}
        exec(blocks(str(card), "python")[0].replace('"enhanced/"', repr(str(tmp_path / "enhanced"))), namespace)
        assert type(namespace["model"]) is type(make_model())


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"load_with": None}, "model = ResNetForImageClassification.from_pretrained("),
        ({"load_with": None, "architecture": None, "repo_id": "me/x"}, 'hf_hub_download("me/x", "model.safetensors")'),
        ({"norm": "predict", "dtype": "bfloat16"}, 'steps=2, norm="predict", dtype=torch.bfloat16, output_dir='),
        ({"norm": "predict", "dtype": "bfloat16"}, "--predictor known --norm predict --dtype bfloat16 --output-dir"),
        ({"predictor": RESCALED_KNOWN}, 'known, predictor=["known", Rescale(factor=0.5)], '),
    ],
)
def test_code_of_fixed_fields(changes, line):
    text = str(CheckpointCard(**FIXED_CHECKPOINT | changes).render())
    assert line in text
    assert_readable(text)


def test_card_of_an_adapter(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    trajectory = WeightTrajectory.create(tmp_path / "trajectory")
    for state in range(5):
        trajectory.record(adapted, num_examples=64 >> state, steps=1)
        with torch.no_grad():
            adapted.base_model.model.classifier.modules_to_save["default"].weight += 0.01
    result = predict_overflowed_weights(trajectory, steps=1, predictor="average", output_dir=tmp_path / "enhanced")

    local = checkpoint_card(trajectory, result, "average", 1)
    assert local.data.library_name == "peft" and "lora" in local.data.tags and local.data.base_model is None
    assert "# base_model: the model that the adapter was trained on\nmodel = PeftModel.from_pretrained(" in local.text
    card = checkpoint_card(trajectory, result, "average", 1, base_model="google-bert/bert-base-uncased")
    assert card.data.base_model_relation == "adapter" and card.data.pipeline_tag == "text-classification"
    assert 'AutoModelForSequenceClassification.from_pretrained("google-bert/bert-base-uncased")' in card.text
    assert "adapter (LORA)" in card.text
    opened = trajectory_card(trajectory)
    assert "trajectory.load_model(4, base_model=base_model)" in opened.text
    for each in (local, card, opened):
        assert_readable(str(each))


@pytest.mark.parametrize(("num_states", "has_tail", "expected"), [(1, True, 0.5), (2, False, 1.5)])
def test_the_code_in_the_card_of_a_short_trajectory_runs(tmp_path, monkeypatch, num_states, has_tail, expected):
    trajectory, model = WeightTrajectory.create(tmp_path / "trajectory"), tiny_bert()
    if has_tail:
        trajectory.record_tail(model, 0, 1)
    for state in range(num_states):
        model.classifier.bias.data += 1
        trajectory.record(model, num_examples=8 >> state, steps=2)
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(str(trajectory_card(WeightTrajectory("trajectory"))), "python")
    exec(code, values := {})
    assert torch.equal(values["enhanced"].load_model().classifier.bias, torch.full((2,), expected))


def test_card_shows_the_arguments_of_the_recording(trajectory_copy, prediction, shipped):
    record = {"task": "image-classification", "model": "microsoft/resnet-18", "dataset": "ylecun/mnist"}
    record |= {"output_dir": "/home/me/out", "model_revision": "v1", "dataset_revision": "v2", "epochs": 2.0}
    (trajectory_copy.parent / "record.json").write_text(json.dumps(record))
    card = checkpoint_card(WeightTrajectory(trajectory_copy), prediction, shipped, 2, base_model="microsoft/resnet-18")
    assert card.data.base_model == "microsoft/resnet-18" and card.data.datasets == ["ylecun/mnist"]
    assert "(revision `v1`)" in card.text and "(revision `v2`)" in card.text
    assert "/home/me" not in str(card)
    (block,) = blocks(str(card), "yaml")
    assert yaml.safe_load(block) == {k: v for k, v in record.items() if k != "output_dir"}
    assert f"know-hf record --output-dir {trajectory_copy.parent.name} --config record.yaml\n" in card.text
    assert f"know-hf predict {trajectory_copy.parent.name}/trajectory/ --steps 2" in card.text
    assert "induce_forgetting" not in card.text
    assert_readable(str(card))

    (trajectory_copy.parent / "record.json").write_text('{"of": "something else"}')
    assert checkpoint_card(WeightTrajectory(trajectory_copy), prediction, shipped, 2).data.datasets is None


def test_unknown_keys_and_invalid_ids_raise(opened):
    with pytest.raises(ValueError, match=r"'dataset'.*'datasets'"):
        trajectory_card(opened, dataset={"ylecun/mnist": None})
    with pytest.raises(ValueError, match="me/x/y"):
        trajectory_card(opened, repo_id="me/x/y")


def test_states(card):
    card.warnings, card.predictor = [], card.predictor | {"name": "average", "known": None}
    card.states[0] |= {"num_examples": None, "size": "the entire stream", "steps": 0}
    for loss, forgot_nothing in ((0.5, False), (2.0, True)):
        card.states[0]["metrics"]["eval_loss"], card.states[-1]["metrics"]["eval_loss"] = loss, 1.0
        assert ("did not forget" in str(card.render())) == forgot_nothing
    text = str(card.render())
    assert "| Θ0 | the entire stream | 0 |" in text
    assert "15 optimizer steps on the smaller subsets. Θ0 is a given checkpoint" in text
    assert_readable(text)


def test_forgetting_picture(opened, record_states):
    pytest.importorskip("matplotlib")
    assert forgetting_picture(opened).axes[0].get_ylabel() == "loss on the evaluation split"
    assert forgetting_picture(record_states(make_resnet())) is None


if __name__ == "__main__":
    for golden_name, golden_card in golden_cards().items():
        golden_card.save(GOLDEN / golden_name)
