"""What peft saves is what is recorded, for every kind of adapter, or it is refused."""

import peft
import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from know_hf.model_tensors import memory_key
from know_hf.trajectory import TrajectoryError, check_recordable

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9]])
TARGETS = {"target_modules": ["q_proj", "v_proj"]}
OPTIONS = {  # of kinds that need more than target modules
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "BOFT": {"boft_block_size": 4, **TARGETS},
    "C3A": {"block_size": 4, **TARGETS},
    "FOURIERFT": {"n_frequency": 8, **TARGETS},
    "IA3": {"feedforward_modules": [], **TARGETS},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4, **TARGETS},
    "OFT": {"oft_block_size": 4, **TARGETS},
    "PSOFT": {"r": 4, **TARGETS},
    "ROAD": {"group_size": 4, **TARGETS},
    "SHADOW": {},
    "SHIRA": {"r": 2, **TARGETS},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
    "VBLORA": {"num_vectors": 8, "vector_length": 4, "topk": 2, **TARGETS},
    "WAVEFT": {"n_frequency": 8, **TARGETS},
}
REFUSED = {"ADALORA": {"total_step": 10, **TARGETS}}
NEEDS_MORE = {"ADAMSS": "scikit-learn", "POLY": "task ids", "XLORA": "adapters on disk"}  # than a model and tokens
PROMPTS = {"CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
KINDS = sorted({kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - PROMPTS - REFUSED.keys() - NEEDS_MORE.keys())
VARIANTS = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 2]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "replicated": {"layer_replication": [[0, 1], [0, 1]]},
}


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return LlamaForCausalLM(config)


def adapted(kind="LORA", **options):
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](task_type="CAUSAL_LM", **options)
    torch.manual_seed(1)
    return get_peft_model(llama(), config)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS, use_cache=False).logits


def check_recorded(model, record_states, folder):
    """The states are what peft saves, they load onto a new base, and into the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    saved, expected = load_file(folder / "adapter_model.safetensors"), logits(model)
    trajectory = record_states(model, 2)
    assert trajectory.names == sorted(saved)
    for name, tensor in saved.items():
        assert trajectory.dtype(name) == tensor.dtype and torch.equal(trajectory.tensor(name), tensor), name
    torch.manual_seed(2)
    torch.testing.assert_close(logits(trajectory.load_model(0, base_model=llama())), expected, rtol=0, atol=1e-6)
    assert not torch.equal(logits(model), expected)
    trajectory.load_into(model, 0)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_what_peft_saves(kind, record_states, tmp_path):
    check_recorded(adapted(kind, **OPTIONS.get(kind, TARGETS)), record_states, tmp_path / "saved")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_of_a_variant_of_lora_is_what_peft_saves(variant, record_states, tmp_path):
    check_recorded(adapted(r=4, **{**TARGETS, **VARIANTS[variant]}), record_states, tmp_path / "saved")


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("ADALORA", REFUSED["ADALORA"], "ADALORA .*ranks"),
        ("VBLORA", {**OPTIONS["VBLORA"], "save_only_topk_weights": True}, r"topk_indices'.*save_only_topk_weights"),
        ("LORA", {**TARGETS, "init_lora_weights": "pissa_niter_1"}, "init_lora_weights='pissa_niter_1'"),
    ],
)
def test_an_adapter_that_saving_or_loading_would_change_is_refused(kind, options, words):
    with pytest.raises(ValueError, match=words):
        check_recordable(adapted(kind, **options))


def test_a_recorded_adapter_over_a_random_base_is_not_loaded(record_states):
    trajectory = record_states(adapted(**TARGETS), 1)
    config = peft.LoraConfig.from_pretrained(trajectory.path / "state-0")
    config.init_lora_weights = "pissa_niter_1"  # 0.2 recorded such adapters
    config.save_pretrained(trajectory.path / "state-0")
    with pytest.raises(TrajectoryError, match=r"state-0 .*init_lora_weights='pissa_niter_1'"):
        trajectory.load_model(base_model=llama())


def test_a_base_model_with_an_adapter_in_training_is_refused(record_states):
    model = adapted(**TARGETS)
    trajectory, base = record_states(model, 2), llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = trajectory.load_model(base_model=base)
    for other in (model, model.get_base_model(), loaded):
        with pytest.raises(TrajectoryError, match=r"has an adapter.*unload\(\)"):
            trajectory.load_model(1, base_model=other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    expected = logits(trajectory.load_model(1, base_model=llama()))
    assert torch.equal(logits(trajectory.load_model(1, base_model=base)), expected)  # in the place of state 0


def test_a_subclass_of_peft_model_is_an_adapter(record_states):
    class Mine(PeftModel):
        pass

    trajectory = record_states(Mine(llama(), peft.LoraConfig(**TARGETS)), 1)
    assert trajectory.is_adapter and all("lora_" in name for name in trajectory.names)


class Overlapping(nn.Module):
    def __init__(self, view):
        super().__init__()
        self.encoder = nn.Linear(3, 3, bias=False)
        self.decoder = nn.Linear(3, 3, bias=False)
        self.decoder.weight = nn.Parameter(view(self.encoder.weight.detach()))


@pytest.mark.parametrize(("view", "name"), [(torch.t, "transposed"), (lambda weight: weight[1:], "part")])
def test_weights_that_share_a_part_of_their_memory_are_refused(view, name):
    with pytest.raises(ValueError, match=r"encoder\.weight.*decoder\.weight.*clone\(\)"):
        check_recordable(Overlapping(view))
    check_recordable(Overlapping(view).requires_grad_(False))


def test_slices_of_one_memory_are_separate_weights(record_states):
    module = nn.Module()
    memory = torch.arange(6.0)
    module.first, module.second = nn.Parameter(memory[:3]), nn.Parameter(memory[3:])
    assert memory_key(module.first) != memory_key(module.second)
    trajectory = record_states(module, 1)
    assert torch.equal(trajectory.tensor("second"), torch.arange(3.0, 6.0)) and not trajectory.tied_weights
