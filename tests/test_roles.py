"""Roles of tensors by module, and names on disk."""

import warnings

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
AUDIO = {name: size for name, size in VISION.items() if name != "image_size"}
AUDIO |= {"conv_dim": (4,), "conv_stride": (2,), "conv_kernel": (3,), "num_feat_extract_layers": 1}
AUDIO |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
PARAMETRIZATIONS = "parametrizations.weight.original"


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


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
        (nn.MultiheadAttention(4, 2, bias=False, add_bias_kv=True),
         {"in_proj_weight": "fc", "out_proj.weight": "fc", "bias_k": "bias", "bias_v": "bias"}),
        (nn.EmbeddingBag(1, 4), {"weight": "fc"}),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)),
         {"bias": "bias", f"{PARAMETRIZATIONS}0": "kept", f"{PARAMETRIZATIONS}1": "kept"}),
        (old_weight_norm(nn.Linear(2, 3)), {"bias": "bias", "weight_g": "kept", "weight_v": "kept"}),
        (old_weight_norm(nn.Conv1d(2, 3, 3)), {"bias": "bias", "weight_g": "kept", "weight_v": "kept"}),
        (nn.utils.spectral_norm(nn.Linear(2, 3)),
         {"bias": "bias", "weight_orig": "kept", "weight_u": "copied", "weight_v": "copied"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_roles_of_torch_modules(module, expected):
    roles = tensor_roles(module)
    assert {name: role.role for name, role in roles.items()} == expected
    assert {role.is_batch_norm for role in roles.values()} == {isinstance(module, nn.BatchNorm2d)}


def test_roles_of_own_convolutions_and_of_dictionaries():
    class OwnConv(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 3, 5, 5))
            self.pointwise = nn.Parameter(torch.zeros(4, 3, 1, 1))
            self.values = nn.ParameterDict(
                {"bias": torch.zeros(2, 4), "scale": torch.zeros(4), "w": torch.zeros(4, 3)}
            )

    roles = {name: role.role for name, role in tensor_roles(OwnConv()).items()}
    assert (roles["weight"], roles["pointwise"]) == ("conv", "fc")
    assert [roles[f"values.{name}"] for name in ("bias", "scale", "w")] == ["bias", "kept", "fc"]


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("logit_scale", (4, 1, 1), "kept"),
        ("logit_scale", (), "kept"),
        ("temperature", (4, 3), "kept"),
        ("q_scale", (4, 3), "kept"),
        ("layer_scale_parameter", (4, 1, 1), "kept"),
        ("lambda_1", (2, 4), "kept"),
        ("gamma", (2, 4), "kept"),
        ("ls1", (2, 4), "kept"),
        ("skip_gain", (2, 4), "kept"),
        ("A_log", (4, 3), "kept"),
        ("time_decay", (4, 3), "kept"),
        ("translate", (4, 1), "kept"),
        ("token_scale", (2, 4), "kept"),
        ("norm_weight", (2, 4), "norm"),
        ("norm_bias", (4,), "norm"),
        ("r_w_bias", (2, 4), "bias"),
        ("down_proj_bias", (2, 4), "bias"),
        ("attention_biases", (2, 1), "bias"),
        ("pos_bias_u", (2, 4), "bias"),
        ("logit_bias", (), "bias"),
        ("bias_proj", (2, 4), "fc"),
        ("cls_token", (1, 1, 4), "fc"),
        ("class_embedding", (4,), "fc"),
        ("masked_spec_embed", (4,), "fc"),
        ("mask_emb", (1, 1, 4), "fc"),
        ("image_newline", (4,), "fc"),
        ("position_embeddings", (1, 3, 4), "fc"),
        ("relative_position_bias_table", (9, 2), "fc"),
        ("experts", (2, 3, 4), "fc"),
        ("ensemble_weight", (4,), "kept"),
        ("trainable_sums", (4,), "kept"),
        ("data_logits", (2, 4), "fc"),
    ],
)
def test_names_decide_before_axes(name, shape, role):
    module = nn.Module()
    module.register_parameter(name, nn.Parameter(torch.ones(shape)))
    assert tensor_roles(module)[name].role == role
    module = nn.Module()
    setattr(module, name, nn.ParameterList([torch.ones(shape)]))
    assert tensor_roles(module)[f"{name}.0"].role == role


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))


class NormHead(nn.Linear):
    """A matrix, in spite of the name of its class, and a vector that is none."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.alpha = nn.Parameter(torch.ones(4))


class Adapter(nn.Module):
    """Parameters under the name of an adapter, as peft has them."""

    def __init__(self):
        super().__init__()
        self.ia3_l = nn.ParameterDict({"default": torch.ones(1, 4)})
        self.lora_embedding_A = nn.ParameterDict({"default": torch.ones(1, 4)})
        self.lora_A = nn.ParameterDict({"default": torch.ones(1, 4)})
        self.vera_lambda_b = nn.ParameterDict({"default": torch.ones(4)})


def test_owners_decide_before_names():
    model = nn.ModuleDict({"gamma": nn.Linear(4, 1), "norm": NormHead(4, 2), "scale": LayerScale(), "peft": Adapter()})
    roles = {name: role.role for name, role in tensor_roles(model).items()}
    assert roles == {
        "gamma.weight": "fc", "gamma.bias": "bias", "norm.weight": "fc", "norm.bias": "bias", "norm.alpha": "kept",
        "scale.weight": "kept",
        "peft.ia3_l.default": "kept", "peft.lora_embedding_A.default": "fc", "peft.lora_A.default": "fc",
        "peft.vera_lambda_b.default": "kept",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "role"),
    [(torch.float64, "fc"), (torch.bfloat16, "fc"), (torch.complex64, "kept"), (torch.float8_e4m3fn, "kept"),
     (torch.float8_e8m0fnu, "kept"), (torch.int8, "copied"), (torch.bool, "copied")],
)  # fmt: skip
def test_dtypes_that_are_not_predicted(dtype, role):
    module = nn.Linear(2, 2, bias=False)
    module.weight = nn.Parameter(torch.ones(2, 2).to(dtype), requires_grad=False)
    assert tensor_roles(module)["weight"].role == role


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


# Parameters whose role their axes alone would not tell, by model.
SURPRISING = [
    ("CLIPVisionModel", VISION, {"embeddings.class_embedding": "fc"}),
    ("ViTModel", VISION, {"embeddings.cls_token": "fc", "embeddings.position_embeddings": "fc"}),
    ("SiglipVisionModel", VISION, {"head.probe": "fc", "head.attention.in_proj_weight": "fc"}),
    ("BeitModel", VISION | {"use_relative_position_bias": True, "use_mask_token": True},
     {"embeddings.mask_token": "fc", "lambda_1": "kept", "relative_position_bias_table": "fc"}),
    ("Dinov2Model", VISION, {"layer_scale1.lambda1": "kept", "embeddings.mask_token": "fc"}),
    ("Swinv2Model", {"image_size": 8, "patch_size": 2, "embed_dim": 4, "depths": [1], "num_heads": [2],
                     "window_size": 2}, {"logit_scale": "kept", "continuous_position_bias_mlp.0.weight": "fc"}),
    ("LevitModel", {"image_size": 32, "hidden_sizes": [8] * 3, "num_attention_heads": [2] * 3, "key_dim": [4] * 3,
                    "depths": [1] * 3}, {"attention_biases": "bias"}),
    ("ConvNextModel", {"hidden_sizes": [4], "depths": [1], "num_stages": 1}, {"layer_scale_parameter": "kept"}),
    ("Wav2Vec2Model", AUDIO, {"masked_spec_embed": "fc", "weight.original0": "kept", "weight.original1": "kept"}),
    ("WavLMModel", AUDIO, {"gru_rel_pos_const": "kept", "rel_attn_embed.weight": "fc"}),
    ("XLNetModel", {"vocab_size": 20, "d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8},
     {"mask_emb": "fc", "rel_attn.r_w_bias": "bias", "rel_attn.seg_embed": "fc", "rel_attn.q": "fc"}),
    ("ConvBertModel", TEXT | {"embedding_size": 8}, {"key_conv_attn_layer.bias": "bias"}),
    ("GptOssModel", TEXT | {"num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 2},
     {"experts.down_proj_bias": "bias", "experts.down_proj": "fc", "self_attn.sinks": "kept", "router.bias": "bias"}),
    ("RecurrentGemmaModel", TEXT | {"num_key_value_heads": 1, "lru_width": 8},
     {"rg_lru.input_gate_bias": "bias", "rg_lru.recurrent_param": "kept", "rg_lru.input_gate_weight": "fc"}),
    ("MambaModel", {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4},
     {"mixer.A_log": "kept", "mixer.D": "kept", "mixer.conv1d.weight": "conv"}),
    ("RwkvModel", {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1},
     {"attention.time_mix_key": "kept", "attention.time_decay": "kept", "attention.key.weight": "fc"}),
    ("CohereModel", TEXT | {"num_key_value_heads": 2, "use_qk_norm": True}, {"q_norm.weight": "norm"}),
    ("DebertaModel", TEXT | {"relative_attention": True, "pos_att_type": "c2p|p2c"},
     {"self.q_bias": "bias", "rel_embeddings.weight": "fc"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "expected"), SURPRISING, ids=lambda value: value if value is str else "")
def test_roles_that_axes_do_not_tell(name, config, expected):
    with torch.device("meta"):
        roles = tensor_roles(small_model(name, **config))
    for ending, role in expected.items():
        assert {r.role for tensor, r in roles.items() if f".{tensor}".endswith(f".{ending}")} == {role}, ending


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
        ("experts.down_proj_bias", (2, 4), True, "bias"),
        ("block.norm1.linear.weight", (4, 8), True, "fc"),
        ("q_norm.weight", (2, 4), True, "norm"),
        ("scale", (4,), True, "kept"),
        ("logit_scale", (4, 8), True, "kept"),
        ("class_embedding", (4,), True, "fc"),
        ("conv.weight_g", (4, 1, 1), True, "kept"),
        ("conv.parametrizations.weight.original1", (4, 2, 3), True, "kept"),
        ("position_ids", (1, 8), False, "copied"),
    ],
)
def test_role_by_shape(name, shape, floating, role):
    assert role_by_shape(name, shape, floating).role == role
