"""Recordings of models with an adapter: only the adapter is recorded."""

import pytest
import torch
from conftest import make_resnet, make_trainer
from datasets import Dataset
from doubles.constant_predictor import Constant
from doubles.small_trainers import (
    BALANCED,
    KINDS,
    PEFT_WARNING,
    SCHEDULE,
    TARGETS,
    StopAfter,
    adapt,
    assert_equal_weights,
    assert_same_states,
    make_adapter,
    make_case,
)
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
)

from know_hf import WeightTrajectory, induce_forgetting, predict_overflowed_weights
from know_hf.trajectory import TrajectoryError

pytestmark = PEFT_WARNING
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


def record(folder, model, name="trajectory", callbacks=()):
    trainer = make_trainer(folder / "out", model, num_train_epochs=1)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer, induce_forgetting(trainer, BALANCED, folder / name)


def predict(trajectory, folder, residual):
    """Predict with one residual for every weight; returns the result and its tensors."""
    result = predict_overflowed_weights(trajectory, predictor=Constant(residual), output_dir=folder)
    return result, load_file(folder / "adapter_model.safetensors")


def assert_zero_residual_is_state_0(trajectory, folder):
    result, _ = predict(trajectory, folder, 0.0)
    before = trajectory.path / "state-0/adapter_model.safetensors"
    assert (result.path / "adapter_model.safetensors").read_bytes() == before.read_bytes()
    return result


def copied_batch_norm(model, source):
    """The model with the BatchNorm statistics of another one, which are not part of an adapter."""
    for module, other in zip(model.modules(), source.modules(), strict=False):
        if isinstance(module, torch.nn.BatchNorm2d):
            module.load_state_dict(other.state_dict())
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_recorded_reloaded_and_predicted(tmp_path, kind):
    trainer, trajectory = record(tmp_path, make_adapter(kind, name="mine"))
    assert all("lora" in name or "classifier" in name for name in trajectory.names)
    assert not [name for name in trajectory.names if "mine" in name]
    assert {path.name for path in (trajectory.path / "state-1").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    for name, role in trajectory.roles.items():
        expected = "kept" if "magnitude" in name else "bias" if name.endswith("bias") else "fc"
        assert role.role == expected, name
        assert "unknown" not in role.reason

    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = trainer.model.eval()(images).logits
        for reloaded in (
            PeftModel.from_pretrained(make_resnet(), trajectory.path / "state-0"),
            trajectory.load_model(base_model=make_resnet()),
        ):
            torch.testing.assert_close(copied_batch_norm(reloaded, trainer.model)(images).logits, expected)

    result = assert_zero_residual_is_state_0(trajectory, tmp_path / "zero")
    assert not (result.path / "model.safetensors").exists()
    assert isinstance(result.load_model(make_resnet()), PeftModel)
    _, moved = predict(trajectory, tmp_path / "half", 0.5)
    for name, role in trajectory.roles.items():
        assert torch.equal(moved[name], trajectory.tensor(name) + (0.5 if role.role in ("fc", "bias") else 0)), name


@pytest.mark.parametrize("name", TARGETS)
def test_adapters_of_other_models(tmp_path, name):
    trainer = adapt(make_case(name, tmp_path / "out"), name)
    trajectory = induce_forgetting(trainer, SCHEDULE, tmp_path / "trajectory")
    assert trajectory.is_adapter
    assert all("lora_" in tensor for tensor in trajectory.names)
    assert {role.role for role in trajectory.roles.values()} == {"fc"}
    history = trajectory.history(trajectory.names[0])
    assert not torch.equal(history[0], history[-1])
    result = assert_zero_residual_is_state_0(trajectory, tmp_path / "zero")
    weights = get_peft_model_state_dict(result.load_model(trainer.model.unload()))
    assert all(torch.equal(weights[tensor], trajectory.tensor(tensor)) for tensor in trajectory.names)


@pytest.mark.parametrize("held", [False, True])
def test_batch_norm_statistics_below_an_adapter_give_one_warning(tmp_path, caplog, held):
    modules = ["classifier"] + ["normalization"] * held
    trainer, trajectory = record(tmp_path, make_adapter("modules_to_save", modules_to_save=modules))
    messages = [record.message for record in caplog.records if "BatchNorm" in record.message]
    assert any("running_mean" in name for name in trajectory.names) == held
    if held:  # then only the adapter moves
        assert messages == []
        reloaded = trajectory.load_model(base_model=make_resnet()).eval()
        images = torch.randn(4, 1, 8, 8)
        with torch.no_grad():
            assert torch.equal(reloaded(images).logits, trainer.model.eval()(images).logits)
    else:
        assert len(messages) == 1 and "modules_to_save" in messages[0]


def test_a_resumed_adapter_ends_in_the_same_weights(tmp_path):
    _, complete = record(tmp_path, make_adapter("dora"))
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, make_adapter("dora"), "resumed", [StopAfter(2)])
    _, resumed = record(tmp_path, make_adapter("dora"), "resumed")
    assert_same_states(resumed, complete)


def test_a_recording_is_not_resumed_over_another_base(tmp_path):
    def adapted(seed, dtype=torch.float32):
        return get_peft_model(make_resnet(seed).to(dtype), LoraConfig(r=2, **KINDS["lora"]))

    trajectory = WeightTrajectory.create(tmp_path / "states")
    trajectory.record(adapted(0), num_examples=3, steps=1)
    for same in (adapted(0), adapted(0, torch.bfloat16)):
        WeightTrajectory(trajectory.path).check_base(same)
    trajectory.record(adapted(0), num_examples=2, steps=1)
    other = adapted(1)
    with pytest.raises(TrajectoryError, match="base model of the recording"):
        trajectory.check_base(other)
    with pytest.raises(TrajectoryError, match="base model of the recording"):
        trajectory.record(other, num_examples=1, steps=1)
    assert trajectory.num_states == 2

    record(tmp_path, adapted(0))
    with pytest.raises(TrajectoryError, match="base model of the recording"):
        record(tmp_path, other)


def test_each_state_holds_the_complete_adapter_and_the_biases_beside_it(tmp_path):
    model = make_adapter("modules_to_save", bias="all")
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    _, trajectory = record(tmp_path, model)
    for state in range(3):  # peft reads one file and initializes what it lacks
        saved = load_file(trajectory.path / f"state-{state}/adapter_model.safetensors")
        assert sorted(saved) == trajectory.names
        assert all(torch.equal(saved[name], trajectory.tensor(name, state)) for name in saved)
    frozen = next(name for name in trajectory.names if "lora_A" in name)
    assert torch.equal(predict(trajectory, tmp_path / "predicted", 0.5)[1][frozen], trajectory.tensor(frozen))
    biases = [name for name in trajectory.names if name.endswith("normalization.bias")]
    assert biases
    assert not any(torch.equal(trajectory.tensor(name, 0), trajectory.tensor(name, 1)) for name in biases)


def two_adapters(train):
    """A model with the adapters "default", which is active, and "second"."""
    model = make_adapter("lora")
    model.add_adapter("second", LoraConfig(r=2, init_lora_weights=False, **KINDS["lora"]))
    for name in ("default", "second"):
        model.set_requires_grad(name, name in train)
    return model


@pytest.mark.parametrize("name", ["default", "second"])
def test_the_adapter_that_trains_is_recorded_beside_a_frozen_one(tmp_path, name):
    frozen = {"default": "second", "second": "default"}[name]
    model = two_adapters([name])
    model.set_adapter(name)
    before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    _, trajectory = record(tmp_path, model)
    saved = get_peft_model_state_dict(model, adapter_name=name)
    assert trajectory.names == sorted(saved)
    assert all(torch.equal(trajectory.tensor(path), tensor) for path, tensor in saved.items())
    moved = {path for path, tensor in model.state_dict().items() if "lora" in path and (tensor != before[path]).any()}
    assert moved and not [path for path in moved if frozen in path.split(".")]
    assert not (trajectory.path / "state-0" / name).exists()
    assert_zero_residual_is_state_0(trajectory, tmp_path / "zero")


def stacked_adapters():
    model = two_adapters(["second"])
    model.base_model.set_adapter(["default", "second"])
    model.set_requires_grad("default", False)
    return model


def trained_head():
    model = make_adapter("lora")
    model.get_base_model().resnet.embedder.embedder.convolution.weight.requires_grad_(True)
    return model


def prompt_tuning():
    bert = BertForSequenceClassification(BertConfig(vocab_size=8, **SIZES))
    return get_peft_model(bert, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: two_adapters(["default", "second"]), "default, second train"),
        (stacked_adapters, "'second' trains on top of .* 'default'"),
        (trained_head, r"'.*embedder\.convolution\.weight' trains.*modules_to_save"),
        (prompt_tuning, "PROMPT_TUNING"),
        (lambda: get_peft_model(make_resnet(), LoraConfig(r=2, **KINDS["lora"]), mixed=True), "PeftMixedModel"),
    ],
)
def test_adapters_that_cannot_be_recorded_are_refused_before_training(tmp_path, make, words):
    with pytest.raises(ValueError, match=words):
        record(tmp_path, make())
    assert not (tmp_path / "trajectory").exists()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_beside_an_adapter_are_recorded_and_loaded(tmp_path, tied):
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **SIZES, tie_word_embeddings=tied)).save_pretrained(tmp_path / "base")
    modules = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]

    def trainer():
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        base.resize_token_embeddings(20)
        torch.manual_seed(1)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules))
        ids = [[(i * k) % 20 for k in range(1, 5)] for i in range(32)]
        args = make_trainer(tmp_path / "out", model).args
        return Trainer(model, args, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}))

    first, again = trainer(), trainer()
    trajectory = induce_forgetting(first, SCHEDULE, tmp_path / "trajectory")
    induce_forgetting(again, SCHEDULE, tmp_path / "trajectory")  # loads state 0
    assert_equal_weights(first.model, again.model)
    moved = first.model.get_input_embeddings().weight
    names = [name for name in trajectory.names if name.endswith("embed_tokens.weight")]
    assert [torch.equal(trajectory.tensor(name), moved) for name in names] == [True]


def test_an_adapter_needs_its_own_base(record_states):
    trajectory = record_states(make_adapter("modules_to_save"), 2)
    other = ResNetForImageClassification(ResNetConfig(**{**make_resnet().config.to_dict(), "num_labels": 5}))
    with pytest.raises(TrajectoryError, match=r"ResNetForImageClassification.*classifier"):
        trajectory.load_model(base_model=other)
    with pytest.raises(TrajectoryError, match="base_model="):
        trajectory.load_model()
