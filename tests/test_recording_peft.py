"""Trajectories of adapters: only the adapter is recorded, whatever its kind."""

import pytest
import torch
from conftest import SCHEDULE, make_resnet, make_trainer
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, ShiraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from test_predict import Constant
from test_recording_models import CASES
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    set_seed,
)

from know_hf import ForgettingSchedule, induce_forgetting, predict_overflowed_weights
from know_hf.trajectory import TrajectoryError

PEFT_WARNING = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # its own
pytestmark = PEFT_WARNING

SHORT = ForgettingSchedule(num_states=3, stratify_by="labels")
KINDS = {
    "lora": {"target_modules": ["shortcut.convolution", "classifier.1"]},
    "rslora": {"target_modules": ["shortcut.convolution", "classifier.1"], "use_rslora": True},
    "dora": {"target_modules": ["classifier.1"], "use_dora": True},
    "modules_to_save": {"target_modules": ["shortcut.convolution"], "modules_to_save": ["classifier"]},
}


def make_adapter(kind, name="default"):
    torch.manual_seed(1)
    return get_peft_model(make_resnet(), LoraConfig(r=2, **KINDS[kind]), adapter_name=name)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_recorded_reloaded_and_predicted(tmp_path, kind):
    trainer = make_trainer(tmp_path, make_adapter(kind))
    trajectory = induce_forgetting(trainer, SHORT, tmp_path / "trajectory")
    assert all("lora" in name or "classifier" in name for name in trajectory.names)
    assert (trajectory.path / "adapter_config.json").exists()
    assert not [role for role in trajectory.roles.values() if "unknown" in role.reason]
    for name, role in trajectory.roles.items():
        expected = "kept" if "magnitude" in name else "bias" if name.endswith("bias") else "fc"
        assert role.role == expected, name

    images = {"pixel_values": torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        expected = trainer.model.eval()(**images).logits
        for reloaded in (
            PeftModel.from_pretrained(make_resnet(), trajectory.path / "state-0"),
            trajectory.load_model(base_model=make_resnet()),
        ):
            for module, source in zip(reloaded.modules(), trainer.model.modules(), strict=False):
                if isinstance(module, torch.nn.BatchNorm2d):  # no part of an adapter, moved by the training
                    module.load_state_dict(source.state_dict())
            torch.testing.assert_close(reloaded.eval()(**images).logits, expected)

    result = predict_overflowed_weights(trajectory, predictor=Constant(0.0), output_dir=tmp_path / "zero")
    before = trajectory.path / "state-0/adapter_model.safetensors"
    assert (result.path / "adapter_model.safetensors").read_bytes() == before.read_bytes()
    assert not (result.path / "model.safetensors").exists()
    predict_overflowed_weights(trajectory, predictor=Constant(0.5), output_dir=tmp_path / "half")
    moved = load_file(tmp_path / "half/adapter_model.safetensors")
    for name, role in trajectory.roles.items():
        assert torch.equal(moved[name], trajectory.tensor(name) + (0.5 if role.role in ("fc", "bias") else 0)), name
    loaded = result.load_model(make_resnet())
    assert isinstance(loaded, PeftModel)


@pytest.mark.parametrize("held", [False, True])
def test_statistics_that_move_below_an_adapter_are_warned_of_once(tmp_path, caplog, held):
    torch.manual_seed(1)
    config = LoraConfig(
        r=2, target_modules=["shortcut.convolution"], modules_to_save=["classifier"] + ["normalization"] * held
    )
    trainer = make_trainer(tmp_path, get_peft_model(make_resnet(), config), num_train_epochs=1)
    trajectory = induce_forgetting(trainer, SHORT, tmp_path / "trajectory")
    told = [record.message for record in caplog.records if "BatchNorm" in record.message]
    assert len(told) == (not held)
    assert any("running_mean" in name for name in trajectory.names) == held
    if held:  # the adapter is then all that moved
        reloaded = trajectory.load_model(base_model=make_resnet()).eval()
        images = torch.randn(4, 1, 8, 8)
        with torch.no_grad():
            assert torch.equal(reloaded(images).logits, trainer.model.eval()(images).logits)
    else:
        assert "modules_to_save" in told[0]


def test_a_resumed_adapter_ends_in_the_same_weights(tmp_path):
    from test_recording import Spy, assert_same_states

    class Stop(Spy):
        def on_train_begin(self, args, state, control, **kwargs):
            self.starts.append(None)

    whole = induce_forgetting(make_trainer(tmp_path, make_adapter("dora")), SHORT, tmp_path / "whole")
    trainer = make_trainer(tmp_path, make_adapter("dora"))
    trainer.add_callback(Stop(crash_at=3))
    with pytest.raises(KeyboardInterrupt):
        induce_forgetting(trainer, SHORT, tmp_path / "resumed")
    # BatchNorm statistics are no part of an adapter: an eval mode without them is what a real LoRA run has
    resumed = induce_forgetting(make_trainer(tmp_path, make_adapter("dora")), SHORT, tmp_path / "resumed")
    assert_same_states(resumed, whole)


def test_each_state_of_an_adapter_is_whole_whatever_is_frozen(tmp_path):
    model = make_adapter("lora")
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    trajectory = induce_forgetting(make_trainer(tmp_path, model), SHORT, tmp_path / "trajectory")
    for state in range(3):  # peft reads one file, and takes what isn't there as new
        saved = load_file(trajectory.path / f"state-{state}/adapter_model.safetensors")
        assert sorted(saved) == trajectory.names
        assert all(torch.equal(saved[name], trajectory.tensor(name, state)) for name in saved)
    frozen = next(name for name in trajectory.names if "lora_A" in name)
    result = predict_overflowed_weights(trajectory, predictor=Constant(0.5), output_dir=tmp_path / "out")
    assert torch.equal(load_file(result.path / "adapter_model.safetensors")[frozen], trajectory.tensor(frozen))


def test_an_adapter_of_another_name(tmp_path):
    trainer = make_trainer(tmp_path, make_adapter("lora", name="mine"))
    trajectory = induce_forgetting(trainer, SHORT, tmp_path / "trajectory")
    assert not [name for name in trajectory.names if "mine" in name]
    assert {path.name for path in (trajectory.path / "state-1").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_two_adapters_are_refused(tmp_path):
    model = make_adapter("lora")
    model.add_adapter("second", LoraConfig(r=2, **KINDS["lora"]))
    with pytest.raises(ValueError, match="has the adapters default, second; a trajectory records one: delete"):
        induce_forgetting(make_trainer(tmp_path, model), SHORT, tmp_path / "trajectory")


def test_adapters_that_cannot_be_recorded_are_refused_before_training(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    bert = BertForSequenceClassification(BertConfig(vocab_size=8, **sizes))
    prompt = get_peft_model(bert, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    mixed = get_peft_model(make_resnet(), LoraConfig(r=2, **KINDS["lora"]), mixed=True)
    for model, message in (
        (prompt, "PROMPT_TUNING learns a prompt, .* use an adapter such as LoRA"),
        (mixed, r"peft can't save a PeftMixedModel; make it with get_peft_model\(…, mixed=False\)"),
    ):
        with pytest.raises(ValueError, match=message):
            induce_forgetting(make_trainer(tmp_path, model), SHORT, tmp_path / "trajectory")
    assert not (tmp_path / "trajectory").exists()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_beside_an_adapter_are_recorded_resumed_and_given_back(tmp_path, tied):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes, tie_word_embeddings=tied)).save_pretrained(tmp_path / "base")
    modules = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]

    def trainer():
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        base.resize_token_embeddings(20)
        torch.manual_seed(1)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules))
        ids = [[(i * k) % 20 for k in range(1, 5)] for i in range(32)]
        made = make_trainer(tmp_path / "out", model)
        return Trainer(model, made.args, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}))

    schedule = ForgettingSchedule(num_states=3)
    first = trainer()
    trajectory = induce_forgetting(first, schedule, tmp_path / "trajectory")
    again = trainer()
    induce_forgetting(again, schedule, tmp_path / "trajectory")
    for (name, ours), theirs in zip(first.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    moved = first.model.get_input_embeddings().weight
    names = [name for name in trajectory.names if name.endswith("embed_tokens.weight")]
    assert [torch.equal(trajectory.tensor(name), moved) for name in names] == [True]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_an_adapter_with_tensors_that_are_no_part_of_its_state_dict(tmp_path):
    def adapted():
        torch.manual_seed(1)
        return get_peft_model(make_resnet(), ShiraConfig(r=1, target_modules=["classifier.1"]))

    trajectory = induce_forgetting(make_trainer(tmp_path, adapted()), SHORT, tmp_path / "trajectory")
    assert [name for name in trajectory.names if "shira_indices" in name]
    other = adapted()
    trajectory.load_into(other, 1)
    found = get_peft_model_state_dict(other)
    assert all(torch.equal(found[name], trajectory.tensor(name, 1)) for name in trajectory.names)


def test_biases_trained_beside_an_adapter_are_recorded(tmp_path):
    torch.manual_seed(1)
    model = get_peft_model(make_resnet(), LoraConfig(r=2, bias="all", **KINDS["modules_to_save"]))
    trajectory = induce_forgetting(make_trainer(tmp_path, model), SHORT, tmp_path / "trajectory")
    biases = [name for name in trajectory.names if name.endswith("normalization.bias")]
    assert biases
    assert not any(torch.equal(trajectory.tensor(name, 0), trajectory.tensor(name, 1)) for name in biases)


def test_an_adapter_on_another_base_names_what_does_not_fit(tmp_path):
    model = make_adapter("modules_to_save")
    trajectory = induce_forgetting(make_trainer(tmp_path, model), SHORT, tmp_path / "trajectory")
    other = ResNetForImageClassification(ResNetConfig(**{**make_resnet().config.to_dict(), "num_labels": 5}))
    with pytest.raises(TrajectoryError, match=r"does not fit on this ResNetForImageClassification; .*classifier"):
        trajectory.load_model(base_model=other)


def test_an_adapter_without_its_base_says_so(tmp_path):
    trajectory = induce_forgetting(make_trainer(tmp_path, make_adapter("lora")), SHORT, tmp_path / "trajectory")
    with pytest.raises(TrajectoryError, match="holds an adapter; pass base_model="):
        trajectory.load_model()
    assert trajectory.num_states == SHORT.num_states != SCHEDULE.num_states


TARGETS = {"bert": "query", "llama": "q_proj", "gpt2": "c_attn", "vit": "q_proj", "t5": "q", "sft": "q_proj"}


def adapt(trainer):
    """Puts an adapter around the model that a trainer was made with."""
    kind = type(trainer.model).__name__
    target = next(target for name, target in TARGETS.items() if kind.lower().startswith(name))
    config = LoraConfig(r=2, target_modules=[target], fan_in_fan_out=target == "c_attn")
    torch.manual_seed(1)
    trainer.model = trainer.model_wrapped = get_peft_model(trainer.model, config)
    return trainer


@pytest.mark.parametrize("name", TARGETS)
def test_adapters_of_other_trainers_and_models(tmp_path, name):
    set_seed(0)
    trainer = adapt(CASES[name][0](tmp_path / "out"))
    trajectory = induce_forgetting(trainer, ForgettingSchedule(num_states=3), tmp_path / "trajectory")
    assert trajectory.is_adapter
    assert all("lora_" in tensor for tensor in trajectory.names)
    assert {role.role for role in trajectory.roles.values()} == {"fc"}
    history = trajectory.history(trajectory.names[0])
    assert not torch.equal(history[0], history[-1])
    result = predict_overflowed_weights(trajectory, predictor=Constant(0.0), output_dir=tmp_path / "zero")
    before = trajectory.path / "state-0/adapter_model.safetensors"
    assert (result.path / "adapter_model.safetensors").read_bytes() == before.read_bytes()
    reloaded = result.load_model(trainer.model.unload())
    weights = get_peft_model_state_dict(reloaded)
    assert all(torch.equal(weights[tensor], trajectory.tensor(tensor)) for tensor in trajectory.names)
