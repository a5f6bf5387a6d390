"""Roles of tensors by module, and names on disk."""

import pytest
import torch
from conftest import make_resnet
from doubles.small_models import small_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from know_hf import tensor_roles
from know_hf.model_tensors import is_partitioned, names_on_disk
from know_hf.roles import TensorRole, role_by_shape
from know_hf.trajectory import state_nbytes

TEXT = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
VISION = {name: size for name, size in TEXT.items() if name != "vocab_size"} | {"image_size": 8}
PARAMETRIZATIONS = "parametrizations.weight.original"


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv1d(2, 3, 5), {"weight": "conv", "bias": "bias"}),
        (nn.Conv2d(2, 3, 3), {"weight": "conv", "bias": "bias"}),
        (nn.Conv3d(2, 3, (1, 3, 3)), {"weight": "conv", "bias": "bias"}),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), {"weight": "conv"}),
        (nn.Conv2d(2, 3, 1), {"weight": "fc", "bias": "bias"}),
        (nn.ConvTranspose2d(2, 3, 2), {"weight": "conv", "bias": "bias"}),
        (nn.Linear(2, 3), {"weight": "fc", "bias": "bias"}),
        (Conv1D(3, 2), {"weight": "fc", "bias": "bias"}),
        (nn.Embedding(4, 2), {"weight": "fc"}),
        (nn.LayerNorm(4), {"weight": "norm", "bias": "norm"}),
        (nn.GroupNorm(2, 4), {"weight": "norm", "bias": "norm"}),
        (nn.RMSNorm(4), {"weight": "norm"}),
        (nn.BatchNorm2d(3), {"weight": "norm", "bias": "norm", "running_mean": "copied", "running_var": "copied",
                             "num_batches_tracked": "copied"}),
        (nn.PReLU(4), {"weight": "kept"}),
        (nn.MultiheadAttention(4, 2), {"in_proj_weight": "fc", "in_proj_bias": "bias", "out_proj.weight": "fc",
                                       "out_proj.bias": "bias"}),
        (nn.LSTM(2, 3), {"weight_ih_l0": "fc", "weight_hh_l0": "fc", "bias_ih_l0": "bias", "bias_hh_l0": "bias"}),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)),
         {"bias": "bias", f"{PARAMETRIZATIONS}0": "kept", f"{PARAMETRIZATIONS}1": "kept"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_roles_of_torch_modules(module, expected):
    roles = tensor_roles(module)
    assert {name: role.role for name, role in roles.items()} == expected
    assert {role.is_batch_norm for role in roles.values()} == {isinstance(module, nn.BatchNorm2d)}


class Scales(nn.Module):
    """Parameters of two or more axes, some of which are not matrices."""

    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones(4, 1, 1))
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.A_log = nn.Parameter(torch.ones(4, 3))
        self.ia3_l = nn.ParameterDict({"default": torch.ones(1, 4)})
        self.lora_embedding_A = nn.ParameterDict({"default": torch.ones(1, 4)})
        self.cls_token = nn.Parameter(torch.ones(1, 1, 4))
        self.position_embeddings = nn.Parameter(torch.ones(1, 3, 4))
        self.experts = nn.Parameter(torch.ones(2, 3, 4))
        self.last = nn.Linear(4, 1, bias=False)
        self.rnn = nn.LSTM(1, 2, bias=False)


def test_scales_with_several_axes_are_kept():
    roles = {name.split(".")[0]: role for name, role in tensor_roles(Scales()).items()}
    kept = {name for name, role in roles.items() if role.role == "kept"}
    assert kept == {"logit_scale", "temperature", "A_log", "ia3_l"}
    assert {role.role for role in roles.values()} == {"kept", "fc"}
    assert "1×4" in roles["ia3_l"].reason


def test_partitioned_weights_have_the_same_roles():
    conv, partitioned = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)
    for parameter in partitioned.parameters():  # as under ZeRO-3
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert tensor_roles(partitioned) == tensor_roles(conv)
    assert (is_partitioned(partitioned), is_partitioned(conv)) == (True, False)
    assert state_nbytes(partitioned) == state_nbytes(conv) == (228, 228)


def test_frozen_experts_count_in_every_state_because_saving_splits_them():
    model = small_model("MixtralForCausalLM", **TEXT, num_key_value_heads=1, num_local_experts=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    first, further = state_nbytes(model)
    assert first == further
    model.get_input_embeddings().weight.requires_grad_(False)  # saving only renames it
    assert state_nbytes(model) == (first, first - 20 * 8 * 4)


MODELS = [
    (small_model("BertModel", **TEXT),
     {"embeddings.word_embeddings.weight": "fc", "embeddings.LayerNorm.weight": "norm",
      "encoder.layer.0.attention.self.query.bias": "bias"}),
    (small_model("GPT2LMHeadModel", vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2),
     {"transformer.wte.weight": "fc", "transformer.h.0.attn.c_attn.weight": "fc", "lm_head.weight": "fc",
      "transformer.h.0.ln_1.bias": "norm"}),
    (small_model("LlamaForCausalLM", **TEXT, tie_word_embeddings=True),
     {"model.norm.weight": "norm", "model.layers.0.mlp.gate_proj.weight": "fc", "lm_head.weight": "fc"}),
    (small_model("T5ForConditionalGeneration", vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2),
     {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "fc",
      "encoder.final_layer_norm.weight": "norm"}),
    (small_model("ViTForImageClassification", **VISION),
     {"vit.embeddings.cls_token": "fc", "vit.embeddings.position_embeddings": "fc", "vit.layernorm.bias": "norm",
      "vit.embeddings.patch_embeddings.projection.weight": "conv"}),
    (small_model("ConvNextV2Model", hidden_sizes=[4], depths=[1], num_stages=1, patch_size=2, image_size=8),
     {"encoder.stages.0.layers.0.grn.weight": "norm"}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "expected"), MODELS, ids=lambda value: type(value).__name__)
def test_roles_and_names_of_transformers_models(model, expected, tmp_path):
    roles, kind = tensor_roles(model), type(model).__name__
    assert list(roles) == list(model.state_dict())
    assert {name: roles[name].role for name in expected} == expected
    if kind == "LlamaForCausalLM":
        tied = {name: role.tied_to for name, role in roles.items() if role.tied_to}
        assert tied == {"lm_head.weight": "model.embed_tokens.weight"}
    names = names_on_disk(model)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) <= set(names.values())
    if kind == "ViTForImageClassification":
        assert names["vit.layers.0.mlp.fc1.weight"] == "vit.encoder.layer.0.intermediate.dense.weight"


def test_names_reasons_and_unknown_roles():
    assert names_on_disk(nn.Linear(2, 2)) == {"weight": "weight", "bias": "bias"}
    roles = tensor_roles(make_resnet())
    assert roles["resnet.embedder.embedder.convolution.weight"].reason == "7×7 kernel of Conv2d"
    assert roles["classifier.1.bias"].reason == "bias of Linear"
    with pytest.raises(ValueError, match=r"'convolution'.* conv, fc"):
        TensorRole("convolution", "")


@pytest.mark.parametrize(
    ("name", "shape", "floating", "role"),
    [
        ("experts.0.w1.weight", (4, 8), True, "fc"),
        ("experts.w1", (2, 4, 8), True, "fc"),
        ("patch.weight", (4, 3, 16, 16), True, "conv"),
        ("shortcut.weight", (4, 3, 1, 1), True, "fc"),
        ("experts.0.bias", (4,), True, "bias"),
        ("experts.0.norm.bias", (4,), True, "norm"),
        ("scale", (4,), True, "kept"),
        ("position_ids", (1, 8), False, "copied"),
    ],
)
def test_role_by_shape(name, shape, floating, role):
    assert role_by_shape(name, shape, floating).role == role
