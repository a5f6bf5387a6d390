"""Merge adapters: merged models compute what peft computes with the adapter."""

import copy
import json
import shutil

import pytest
import torch
from conftest import SCHEDULE, make_resnet
from doubles.constant_predictor import Constant
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from know_hf import WeightTrajectory, predict_overflowed_weights
from know_hf.trajectory import TrajectoryError
from know_hf.trajectory.merging import merge_adapters

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),  # get_peft_model
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),  # recording
]

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9]])
IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


OF_GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "bos_token_id": 1, "eos_token_id": 2}
OF_EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 2}
OF_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def maker(model_class, config_class, **sizes):
    """A function that builds the same model each time."""

    def make():
        set_seed(0)
        return model_class(config_class(vocab_size=32, **sizes))

    return make


llama = maker(LlamaForCausalLM, LlamaConfig, initializer_range=0.1, **SIZES)
tied_llama = maker(LlamaForCausalLM, LlamaConfig, initializer_range=0.1, tie_word_embeddings=True, **SIZES)
gpt2 = maker(GPT2LMHeadModel, GPT2Config, **OF_GPT2)
bert = maker(BertForSequenceClassification, BertConfig, num_labels=4, **SIZES)
mixtral = maker(MixtralForCausalLM, MixtralConfig, **SIZES, **OF_EXPERTS)
t5 = maker(T5ForConditionalGeneration, T5Config, **OF_T5)


def masked_lm():
    model = maker(BertForMaskedLM, BertConfig, **SIZES)()
    model.cls.predictions.bias.data.normal_()
    return model


def lora(*targets, **options):
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **options)


@pytest.fixture
def record(record_states):
    """Records states of an adapter with other weights in each."""

    def record(base, config, name="adapters", num_states=2):
        torch.manual_seed(1)
        model = get_peft_model(base, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape).to(parameter)
        return record_states(model, num_states=num_states, name=name)

    return record


@torch.no_grad()
def logits(model):
    model.eval()
    if model.config.is_encoder_decoder:
        return model(TOKENS, decoder_input_ids=TOKENS).logits
    return model(IMAGES if hasattr(model.config, "num_channels") else TOKENS).logits


CASES = {
    "lora": (llama, lora("q_proj", "down_proj")),
    "rslora": (llama, lora("q_proj", "down_proj", use_rslora=True)),
    "dora": (llama, lora("q_proj", "down_proj", use_dora=True)),
    "ranks": (llama, lora("q_proj", "v_proj", rank_pattern={"v_proj": 4}, alpha_pattern={"q_proj": 3})),
    "biases": (bert, lora("query", "dense", bias="all", task_type=TaskType.SEQ_CLS)),
    "modules_to_save": (bert, lora("query", modules_to_save=["classifier", "pooler"])),
    "convolution": (make_resnet, lora("convolution", "classifier.1")),
    "convolution_dora": (make_resnet, lora("shortcut.convolution", use_dora=True)),
    "transposed": (gpt2, lora("c_attn", "c_fc", fan_in_fan_out=True)),
    "transposed_dora": (gpt2, lora("c_attn", "c_proj", fan_in_fan_out=True, use_dora=True)),
    "embeddings": (llama, lora("embed_tokens", "lm_head", "q_proj")),
    "tied_embeddings": (tied_llama, lora("embed_tokens", "q_proj")),
    "tied_embeddings_of_gpt2": (gpt2, lora("wte", "c_attn", fan_in_fan_out=True)),
    "tied_head": (tied_llama, lora("lm_head")),
    "tied_together": (tied_llama, lora("embed_tokens", ensure_weight_tying=True)),
    "tied_saved": (tied_llama, lora("q_proj", modules_to_save=["embed_tokens"])),
    "tied_saved_together": (tied_llama, lora("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "tied_elsewhere": (tied_llama, lora("q_proj")),
    "tied_biases": (masked_lm, lora("word_embeddings", "query")),
    "tokens": (tied_llama, lora("q_proj", trainable_token_indices=[1, 3])),
    "experts": (mixtral, lora("q_proj", target_parameters=["mlp.experts.gate_up_proj"])),
    "encoder_decoder": (t5, lora("q", "wo")),
    "ia3": (llama, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "loha": (llama, LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False)),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_states_are_what_peft_computes(tmp_path, record, case):
    make, config = CASES[case]
    trajectory = record(make(), config)
    base = make()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = merge_adapters(trajectory, base, output_dir=tmp_path / "merged")
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert not merged.is_adapter and not any("lora" in name for name in merged.names)

    plain, last = logits(make()), None
    for state in range(2):
        expected = logits(PeftModel.from_pretrained(make(), trajectory.path / f"state-{state}"))
        model = merged.load_model(state)
        assert type(model) is type(base)
        assert (plain - expected).abs().max() > 1e-3 and (last is None or (last - expected).abs().max() > 3e-4)
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
        last = expected
    if hasattr(base.config, "tie_word_embeddings") and make is tied_llama:
        stays = case in ("tied_together", "tied_saved_together", "tied_elsewhere", "tokens")
        assert model.config.tie_word_embeddings is stays
        assert ("lm_head.weight" in merged.names) is not stays


RESIZED = {
    "frozen": (masked_lm, lora("query")),
    "adapted": (tied_llama, lora("embed_tokens", "q_proj")),
    "saved": (llama, lora("q_proj", modules_to_save=["embed_tokens", "lm_head"])),
    "tokens": (tied_llama, lora("q_proj", trainable_token_indices=[33])),
    "encoder_decoder": (t5, lora("q")),
}


@pytest.mark.parametrize("case", RESIZED)
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
def test_a_vocabulary_resized_before_the_training(tmp_path, record, case):
    make, config = RESIZED[case]
    make().save_pretrained(tmp_path / "base")
    as_loaded = type(make()).from_pretrained(tmp_path / "base")
    resized = copy.deepcopy(as_loaded)
    resized.resize_token_embeddings(36)
    trajectory = record(copy.deepcopy(resized), config)
    for name, base in {"named": None, "as-loaded": as_loaded, "as-trained": resized}.items():
        merged = merge_adapters(trajectory, base, output_dir=tmp_path / name)
        model = merged.load_model(1)
        assert (model.config.vocab_size, len(model.get_input_embeddings().weight)) == (36, 36)
        expected = logits(PeftModel.from_pretrained(copy.deepcopy(resized), trajectory.path / "state-1"))
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert as_loaded.config.vocab_size == len(as_loaded.get_input_embeddings().weight) == 32


def test_a_resized_vocabulary_that_adapters_hold_in_part(tmp_path, record):
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(36)
    trajectory = record(copy.deepcopy(base), lora("embed_tokens"))
    with pytest.raises(
        ValueError, match=r"embed_tokens\.weight' .*\(36, 16\) .*\(32, 16\) .*'lm_head\.weight'.*base_model="
    ):
        merge_adapters(trajectory, output_dir=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merged = merge_adapters(trajectory, base, output_dir=tmp_path / "merged")
    assert torch.equal(merged.tensor("lm_head.weight"), base.lm_head.weight)


def test_unadapted_tensors_are_stored_once_and_not_changed(tmp_path, record):
    trajectory = record(llama(), lora("q_proj", "gate_proj"))
    merged = merge_adapters(trajectory, llama(), output_dir=tmp_path / "merged")
    moved = {name for name in merged.names if not merged.is_unchanged(name)}
    assert moved == {name for name in merged.names if "q_proj" in name or "gate_proj" in name} != set()
    on_disk = {name: tensor for name, tensor in llama().state_dict().items() if name not in moved}
    assert all(torch.equal(merged.tensor(name, 1), tensor) for name, tensor in on_disk.items())
    assert {role.role for name, role in merged.roles.items() if name in moved} == {"fc"}

    result = predict_overflowed_weights(merged, predictor=Constant(0.5), output_dir=tmp_path / "out")
    predicted = result.load_model()
    for name, tensor in predicted.state_dict().items():
        assert torch.equal(tensor, merged.tensor(name) + 0.5 if name in moved else merged.tensor(name)), name
    assert logits(predicted).shape == (1, 6, 32)


def test_the_records_of_the_states_are_kept(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a")
    base = bert()
    base.config._name_or_path, base.config._commit_hash = "someone/base", "a" * 40
    model = get_peft_model(base, lora("query"))
    source = WeightTrajectory.create(tmp_path / "adapters", SCHEDULE)
    stages = [
        {"num_examples": 8, "steps": 5, "fraction": 1.0, "subset_fingerprint": "f0", "seed": 3},
        {"num_examples": 4, "steps": 2, "fraction": 0.5, "subset_fingerprint": "f1", "seed": 4},
    ]
    for state, stage in enumerate(stages):
        source.record(model, metrics={"loss": 0.5 + state}, processing_class=tokenizer, **stage)
    merged = merge_adapters(source.path, base.__class__(base.config), output_dir=tmp_path / "merged")
    for state, stage in zip(merged.states, stages, strict=True):
        assert {name: getattr(state, name) for name in stage} == stage
        assert state.metrics == {"loss": 0.5 + state.index}
    assert merged.schedule == SCHEDULE
    assert (merged.base_model, merged.base_revision) == ("someone/base", "a" * 40)
    names = {path.name for path in merged.model_files}
    assert names == {path.name for path in source.model_files} - {"adapter_config.json"} | {"config.json"}
    assert "tokenizer.json" in names
    merged.verify()


def test_tail_states_and_branches_are_merged(tmp_path):
    model, source = get_peft_model(bert(), lora("query")), WeightTrajectory.create(tmp_path / "adapters")
    (factor,) = (parameter for name, parameter in model.named_parameters() if "lora_B" in name)
    source.record_tail(model, 0, 3)
    factor.data += 1
    source.record(model, num_examples=8, steps=5)
    factor.data += 1
    source.record(model, kind="branch", num_examples=4, steps=2, metrics={"loss": 0.5})
    source.update_metrics("tail-0", {"loss": 0.7})
    merged = merge_adapters(source, bert(), output_dir=tmp_path / "merged")
    assert (merged.tail[0].steps, merged.tail[0].metrics) == (3, {"loss": 0.7})
    assert (merged.branches[0].num_examples, merged.branches[0].metrics) == (4, {"loss": 0.5})
    for name in ("tail-0", "state-0", "branch-0"):
        expected = logits(source.load_model(name, base_model=bert()))
        torch.testing.assert_close(logits(merged.load_model(name)), expected)
    merged.verify()


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, lora("q_proj")),
        (llama, lora("q_proj", task_type=TaskType.CAUSAL_LM)),
        (bert, lora("query", task_type=TaskType.SEQ_CLS)),
    ],
)
def test_a_base_model_by_its_folder(tmp_path, record, make, config):
    make().bfloat16().save_pretrained(tmp_path / "base")
    base = make().from_pretrained(tmp_path / "base")
    trajectory = record(base, config)
    by_name = merge_adapters(trajectory, output_dir=tmp_path / "by-name")
    assert trajectory.base_model == by_name.base_model == "../base"
    by_object = merge_adapters(trajectory, make().bfloat16(), output_dir=tmp_path / "by-object")
    for name in by_object.names:
        assert by_object.dtype(name) == by_name.dtype(name) == torch.float32
        assert torch.equal(by_name.history(name), by_object.history(name))


@pytest.mark.parametrize("damage", ["truncated", "not finite", "no config", "nested config", "other sizes"])
def test_a_damaged_base_model_is_named(tmp_path, record, damage):
    base, weights = tmp_path / "base", tmp_path / "base" / "model.safetensors"
    llama().save_pretrained(base)
    trajectory = record(llama(), lora("q_proj"))
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "not finite":
        weights.write_bytes(weights.read_bytes()[:-4] + b"\xff\xff\xff\xff")
    elif damage == "no config":
        (base / "config.json").unlink()
    elif damage == "nested config":
        (base / "config.json").write_text("[" * 50_000)
    else:
        content = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**content, "hidden_size": "16"}))
    with pytest.raises((ValueError, OSError), match=str(base)) as raised:
        merge_adapters(trajectory, base, output_dir=tmp_path / "merged")
    assert "\n" not in str(raised.value)


def test_bfloat16_rounds_changes_away(tmp_path, record, caplog):
    trajectory = record(llama(), lora("q_proj", lora_alpha=0.001), num_states=3)
    fine = merge_adapters(trajectory, llama().bfloat16(), output_dir=tmp_path / "fine")
    coarse = merge_adapters(trajectory, llama(), output_dir=tmp_path / "coarse", dtype=torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert fine.dtype(name) == torch.float32 and coarse.dtype(name) == torch.bfloat16
    assert (fine.history(name).diff(dim=0) != 0).float().mean() > 0.9
    assert (coarse.history(name).diff(dim=0) != 0).float().mean() < 0.1
    assert "torch.bfloat16 rounds away changes below 0.004" in caplog.text


def test_a_head_that_adapters_do_not_hold(tmp_path, record):
    model = bert()
    model.bert.save_pretrained(tmp_path / "base")  # its classifier is initialised at random
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "id2label": None, "label2id": None}))
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=4)
    with_head = record(base, lora("query", modules_to_save=["classifier"]), name="with-head")
    merged = merge_adapters(with_head, output_dir=tmp_path / "merged")  # the base has two classes by default
    assert merged.load_model(1).config.num_labels == 4
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    assert torch.equal(merged.tensor("classifier.bias", 1), with_head.tensor("base_model.model.classifier.bias", 1))
    without = record(BertForSequenceClassification.from_pretrained(tmp_path / "base"), lora("query"), name="without")
    with pytest.raises(ValueError, match=r"'classifier.bias'.* at random.*base_model="):
        merge_adapters(without, output_dir=tmp_path / "lost")
    assert not (tmp_path / "lost").exists() and not list(tmp_path.glob(".lost*"))
    merged = merge_adapters(without, type(base).from_pretrained(tmp_path / "base"), output_dir=tmp_path / "kept")
    assert merged.num_states == 2


def test_a_plain_module(tmp_path, record):
    base, inputs = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(3, 4)
    trajectory = record(copy.deepcopy(base), lora("0"))
    merged = merge_adapters(trajectory, base, output_dir=tmp_path / "merged")
    restored = copy.deepcopy(base)
    merged.load_into(restored, 1)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, trajectory.path / "state-1")(inputs)
        torch.testing.assert_close(restored(inputs), expected)


def test_wrong_trajectories_and_bases(tmp_path, record, recorded):
    def refused(message, base=None, source=None, error=ValueError):
        with pytest.raises(error, match=message):
            merge_adapters(source or trajectory, base, output_dir=tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    def write_json(path, **content):
        path.write_text(json.dumps(content))

    trajectory = record(llama(), lora("q_proj"))
    refused("full models", make_resnet(), recorded)
    refused("base_model=")
    refused(r"base_model is a PeftModel.*model.unload\(\)", get_peft_model(llama(), lora("q_proj")))
    refused(r"state-0 of .*GPT2LMHeadModel", gpt2())
    with pytest.warns(UserWarning, match="missing adapter keys"):
        deeper = LlamaForCausalLM(LlamaConfig(vocab_size=32, **{**SIZES, "num_hidden_layers": 2}))
        refused(r"'.*layers\.1\..*lora_A\.weight' .*base_model=", deeper)
    quantised = llama()
    quantised.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    refused(r"LlamaForCausalLM is quantised.*model.dequantize\(\)", quantised)
    base, adapter = tmp_path / "base", trajectory.path / "adapter_config.json"
    base.mkdir()
    write_json(base / "config.json", model_type="llama", quantization_config={"quant_method": "awq"})
    refused("base is quantised", base)
    write_json(base / "config.json", model_type="llama", architectures=["MyLlama"])
    write_json(adapter, **{**json.loads(adapter.read_text()), "auto_mapping": None})
    refused(r"MyLlama; pass .*base_model=", base)
    refused(r"adapter_config.json has \d+ bytes", llama(), error=TrajectoryError)
    PromptTuningConfig(num_virtual_tokens=2, task_type=TaskType.CAUSAL_LM).save_pretrained(trajectory.path)
    refused("PROMPT_TUNING adapters", llama())
    alora = lora("q_proj", alora_invocation_tokens=[1], task_type=TaskType.CAUSAL_LM)
    refused(r"LORA adapters .*NotImplementedError: aLoRA", llama(), record(llama(), alora, "alora"))
    replicated = lora("q_proj", layer_replication=[[0, 1], [0, 1]])
    refused(r"layer_replication=\[\[0, 1\], \[0, 1\]\]", llama(), record(llama(), replicated, "replicated"))
    refused(r"lm_head\.weight.* T5For.* 'shared\.weight'", t5(), record(t5(), lora("shared"), "t5"))


def test_the_folder_appears_when_it_is_complete(tmp_path, record, monkeypatch):
    trajectory, out = record(llama(), lora("q_proj")), tmp_path / "merged"
    record_state = WeightTrajectory.record

    def fail(self, model, **stages):
        if self.num_states == 1:
            raise OSError("no space left on device")
        record_state(self, model, **stages)

    with monkeypatch.context() as patch:
        patch.setattr(WeightTrajectory, "record", fail)
        with pytest.raises(OSError, match="no space left"):
            merge_adapters(trajectory, llama(), output_dir=out)
    assert not out.exists() and not list(tmp_path.glob(".merged*"))
    merge_adapters(trajectory, llama(), output_dir=out)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        merge_adapters(trajectory, llama(), output_dir=out)
    assert merge_adapters(trajectory, llama(), output_dir=out, overwrite=True).num_states == 2
    monkeypatch.setattr("know_hf.checkpoint.files.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(OSError, match=r"0.00 GB free"):
        merge_adapters(trajectory, llama(), output_dir=tmp_path / "full")


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"peft_type": "EVIL"}', {"r": 10**9}, {"r": "2"}])
def test_a_damaged_adapter_config_is_named(tmp_path, record, content):
    trajectory = record(llama(), lora("q_proj"))
    config = trajectory.path / "state-0/adapter_config.json"
    config.write_text(content if isinstance(content, str) else json.dumps(json.loads(config.read_text()) | content))
    with pytest.raises(TrajectoryError, match=str(trajectory.path)):
        trajectory.load_model(base_model=llama())
    shutil.copy(config, trajectory.path)
    if isinstance(content, str):
        with pytest.raises(ValueError, match=str(trajectory.path)):
            merge_adapters(trajectory, llama(), output_dir=tmp_path / "merged")


def test_only_merged_trajectories_are_replaced(tmp_path, record):
    trajectory, out = record(llama(), lora("q_proj")), tmp_path / "outputs"
    for _ in range(2):
        merge_adapters(trajectory, llama(), output_dir=out / "merged", overwrite=True)
    with pytest.raises(ValueError, match="holds the trajectory"):
        merge_adapters(trajectory, llama(), output_dir=out, overwrite=True)
    assert WeightTrajectory(out / "merged").num_states == trajectory.num_states
