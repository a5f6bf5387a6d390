"""Scale symmetries of small models of common families, and outputs before and after rescaling them."""

import copy

import pytest
import torch
from doubles.small_models import small_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import set_seed

from know_hf.model_tensors import names_in_memory
from know_hf.predictors import Composition, Rescale, TensorFactor, get_predictor, scale_symmetries
from know_hf.predictors.rescaling.equalisation import equal_channels, equal_layers
from know_hf.predictors.rescaling.forward_pass import evaluated
from know_hf.predictors.rescaling.scale_equations import ScaleEquations

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**SMALL, "vocab_size": 50, "initializer_range": 0.3}
LLAMA = {**TEXT, "num_key_value_heads": 1}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 32, "initializer_range": 0.3}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 1}
MODELS = {
    "resnet": (
        "ResNetForImageClassification",
        {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"},
    ),
    "vit": ("ViTForImageClassification", {**SMALL, "image_size": 16, "patch_size": 4}),
    "bert": ("BertForSequenceClassification", TEXT),
    "albert": ("AlbertForSequenceClassification", {**TEXT, "embedding_size": 8}),
    "llama": ("LlamaForCausalLM", LLAMA),
    "tied-llama": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 8}),
    "mixtral": ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 2}),
    "gpt2": ("GPT2LMHeadModel", {**GPT2, **SPECIAL}),
    "phi3": ("Phi3ForCausalLM", {**LLAMA, "pad_token_id": 0, **SPECIAL}),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50},
    ),
}


def make(name: str) -> nn.Module:
    set_seed(0)
    model = small_model(MODELS[name][0], **MODELS[name][1])
    for buffer_name, buffer in model.named_buffers():  # BatchNorm statistics of a trained model
        if buffer_name.endswith("running_mean"):
            buffer.normal_()
    return model.eval()


def mlp() -> nn.Sequential:
    set_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))


def cnn() -> nn.Sequential:
    set_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.LeakyReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(24, 3),
    )


def lora(**options: object) -> nn.Module:
    model = get_peft_model(make("bert"), LoraConfig(r=2, target_modules=["query", "value"], **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model.eval()


BATCHES = {"mlp": torch.linspace(-1, 1, 24).view(4, 6), "cnn": torch.linspace(-9, 9, 392).sin().view(2, 1, 14, 14)}
OWN = {"mlp": mlp, "cnn": cnn, "lora": lora, "dora": lambda: lora(use_dora=True)}


def apply(model: nn.Module, factors: dict[str, TensorFactor]) -> nn.Module:
    """A copy of a model with its tensors scaled in place, tied ones once."""
    model = copy.deepcopy(model)
    tensors, scaled = model.state_dict(keep_vars=True), set()
    for name, path in names_in_memory(model).items():
        if name in factors and id(tensors[path]) not in scaled:
            scaled.add(id(tensors[path]))
            tensors[path].data.copy_(factors[name].scale(tensors[path].data))
    return model


@pytest.mark.parametrize("options", [{"factor": 0.5}, {"factor": 2.0}, {"equalise": "layers"}], ids=str)
@pytest.mark.parametrize("name", [*OWN, *MODELS])
def test_outputs_are_kept(name, options):
    model, batch = (OWN[name](), BATCHES.get(name)) if name in OWN else (make(name), None)
    rescaling = Rescale(**options, batch=batch).rescaling(model)
    scaled = apply(model, rescaling.factors)
    changed = [n for n, tensor in model.state_dict().items() if not torch.equal(tensor, scaled.state_dict()[n])]
    assert changed and rescaling.deviation <= 1e-3
    for old, new in zip(evaluated(model, batch), evaluated(scaled, batch), strict=True):
        # rounding of float32, and where an epsilon is involved the stated deviation
        torch.testing.assert_close(new, old, rtol=0, atol=float(old.abs().max()) * max(rescaling.deviation, 1e-6))


@pytest.mark.parametrize("name", ["mlp", "cnn", "bert", "vit", "llama", "mixtral", "t5", "lora", "dora"])
def test_channels_are_equalised_across_layers(name):
    model, batch = (OWN[name](), BATCHES.get(name)) if name in OWN else (make(name), None)
    rescaling = Rescale(equalise="channels", batch=batch).rescaling(model)
    assert rescaling.deviation <= 2e-5  # no epsilon is involved
    scaled = apply(model, rescaling.factors)
    for old, new in zip(evaluated(model, batch), evaluated(scaled, batch), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=2e-5 * float(old.abs().max()))


def test_equal_channels_have_equal_ranges():
    model = mlp()
    scaled = apply(model, Rescale(equalise="channels", batch=BATCHES["mlp"]).rescaling(model).factors)
    first, second, third = (scaled[i].weight.detach().abs() for i in (0, 2, 4))
    torch.testing.assert_close(first.amax(1), second.amax(0), rtol=1e-3, atol=0)
    torch.testing.assert_close(second.amax(1), third.amax(0), rtol=1e-3, atol=0)


def test_equal_layers_have_the_geometric_mean():
    model = mlp()
    before = [float(model[i].weight.detach().square().mean().sqrt()) for i in (0, 2, 4)]
    scaled = apply(model, Rescale(equalise="layers", batch=BATCHES["mlp"]).rescaling(model).factors)
    after = [float(scaled[i].weight.detach().square().mean().sqrt()) for i in (0, 2, 4)]
    mean = (before[0] * before[1] * before[2]) ** (1 / 3)
    assert after == pytest.approx([mean] * 3, rel=1e-5)


def test_the_factors_of_a_chain():
    """Layer l has f in its weights and f**l in its bias; the last layer undoes it."""
    factors = Rescale(factor=0.5, batch=BATCHES["mlp"]).rescaling(mlp()).factors
    expected = {"0.weight": 0.5, "0.bias": 0.5, "2.weight": 0.5, "2.bias": 0.25, "4.weight": 4.0}
    assert {name: factor.scalar for name, factor in factors.items()} == expected


def exponents(model: nn.Module, leading: str) -> dict[str, float]:
    (symmetry,) = (s for s in scale_symmetries(model) if s.tensor == leading)
    return symmetry.exponents


def test_pairs_of_attention_and_gated_layers():
    layer = "model.layers.1."
    model = make("llama")
    for first, second in [("self_attn.q", "self_attn.k"), ("self_attn.v", "self_attn.o"), ("mlp.up", "mlp.down")]:
        pair = {f"{layer}{first}_proj.weight": 1.0, f"{layer}{second}_proj.weight": -1.0}
        assert exponents(model, f"{layer}{first}_proj.weight") == pair
    scaled = {name for symmetry in scale_symmetries(model) for name in symmetry.exponents}
    assert not any("gate_proj" in name or "norm" in name for name in scaled)
    # normalised queries and keys scale alone
    assert list(exponents(make("qwen3"), f"{layer}self_attn.k_proj.weight").values()) == [1.0]


def test_parts_of_fused_projections_scale_apart():
    layer = "transformer.h.1.attn."
    query, value = (s for s in scale_symmetries(make("gpt2")) if s.tensor == f"{layer}c_attn.weight")
    for symmetry, exponents in [(query, (1, -1, 0)), (value, (0, 0, 1))]:
        weight, bias = (symmetry.parts[f"{layer}c_attn.{name}"] for name in ("weight", "bias"))
        assert (weight.axis, weight.exponents) == (1, exponents) and (bias.axis, bias.exponents) == (0, exponents)
        assert weight.part_of.tolist() == bias.part_of.tolist() == [0] * 16 + [1] * 16 + [2] * 16
    assert query.exponents == {} and value.exponents == {f"{layer}c_proj.weight": -1}
    factors = query.factors(0.5)[f"{layer}c_attn.bias"].scale(torch.ones(48))
    assert factors.unique_consecutive().tolist() == [0.5, 2.0, 1.0]
    (up,) = (s for s in scale_symmetries(make("phi3")) if s.tensor == "model.layers.0.mlp.gate_up_proj.weight")
    assert up.parts[up.tensor].exponents == (0, 1)


class Split(nn.Module):
    """Splits the output of a projection, and maybe uses it in another way."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.fused, self.last, self.function = nn.Linear(6, 8), nn.Linear(4, 3), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.function(self, self.fused(x)))


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        (lambda net, x: x.chunk(2, dim=1)[0].sigmoid() * x.chunk(2, dim=1)[1], (0, 1)),
        (lambda net, x: x.split([4, 4], dim=-1)[0] + x.split([4, 4], dim=-1)[1], None),
        (lambda net, x: x.chunk(2, dim=1)[0].sigmoid() * x.chunk(2, dim=1)[1] + x.sum(), None),
        (lambda net, x: x.chunk(2, dim=1)[0].sigmoid() * x[:, 4:], (0, 1)),
        (lambda net, x: x.view(4, 4, 2)[..., 0].sigmoid() * x.view(4, 4, 2).unbind(-1)[1], (0, 1)),
        (lambda net, x: x.chunk(2, dim=1)[0].sigmoid() * x[:, 2:6], None),
        (lambda net, x: torch.view_as_real(torch.view_as_complex(x.view(4, 4, 2))).flatten(1)[:, :4], None),
        (lambda net, x: x.view(torch.int32).view(torch.float32)[:, :4], None),
        (lambda net, x: x.as_strided((4, 4), (8, 2)) + x.view(2, 2, 8).transpose(0, 1).reshape(4, 8)[:, :4], None),
        (lambda net, x: x.chunk(2, dim=1)[0].sigmoid() * x.split([2, 4, 2], dim=1)[1], None),
        (lambda net, x: x.chunk(2, dim=1)[0].sigmoid() * x.chunk(2, dim=1)[1] / net.fused.weight.norm(), None),
        (lambda net, x: x.chunk(2, dim=1)[0].sigmoid() * x.chunk(2, dim=1)[1] * net.fused.bias.abs().sum(), None),
    ],
)
def test_a_projection_that_is_used_as_a_whole_has_one_scale(function, parts):
    torch.manual_seed(0)
    model, batch = Split(function), torch.linspace(-1, 1, 24).view(4, 6)
    symmetries = scale_symmetries(model, batch)
    assert [s.parts["fused.weight"].exponents for s in symmetries if s.parts] == ([] if parts is None else [parts])
    if symmetries:
        assert Rescale(batch=batch).rescaling(model).deviation < 1e-6


def test_batch_norm_statistics_scale_with_the_weights():
    model = make("resnet")
    block = "resnet.encoder.stages.0.layers.0.layer.0."
    expected = {"convolution.weight": 1.0, "normalization.running_mean": 1.0, "normalization.running_var": 2.0}
    assert exponents(model, f"{block}convolution.weight") == {block + name: e for name, e in expected.items()}
    assert not any(symmetry.is_exact for symmetry in scale_symmetries(model))


def test_tied_embeddings_are_undone_in_the_last_norm():
    scales = exponents(make("tied-llama"), "model.embed_tokens.weight")
    assert (scales["model.embed_tokens.weight"], scales["lm_head.weight"], scales["model.norm.weight"]) == (1, 1, -1)
    assert "model.norm.weight" not in exponents(make("llama"), "model.embed_tokens.weight")


def test_weights_that_share_memory_have_one_scale():
    model = mlp()
    model[2] = nn.Linear(8, 8)
    model[4] = nn.Linear(8, 8)
    model[4].weight.data = model[2].weight.data
    # the shared weight is used twice and is the head too, so that each use undoes half
    (symmetry,) = scale_symmetries(model, BATCHES["mlp"])
    assert symmetry.exponents == {
        **{"0.weight": 1.0, "0.bias": 1.0, "2.bias": 0.5},
        **{"2.weight": -0.5, "4.weight": -0.5},
    }
    assert Rescale(factor=0.25, batch=BATCHES["mlp"]).rescaling(model).deviation < 1e-6


def test_lora_matrices_undo_each_other():
    symmetries = scale_symmetries(lora())
    assert len(symmetries) == 4
    for symmetry in symmetries:
        assert symmetry.is_exact
        assert symmetry.exponents == {symmetry.tensor: 1.0, symmetry.tensor.replace("lora_A", "lora_B"): -1.0}


class Net(nn.Module):
    """Two linear layers with a function between them."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(6, 6), nn.Linear(6, 3), function
        self.slope = nn.Parameter(torch.full((1,), 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.function(self.first(x)))


@pytest.mark.parametrize(
    "function",
    [
        nn.functional.gelu,
        nn.functional.silu,
        torch.tanh,
        torch.exp,
        nn.functional.relu6,
        lambda x: x + 1,
        lambda x: 1 - x,
        lambda x: x + x.square(),
        lambda x: torch.where(x > 0.1, x, 0.0),
        lambda x: torch.where(x > 0, x, 1),
        lambda x: x.masked_fill(x.isnan(), 3.0),
        lambda x: torch.cat([x[:, :3], torch.ones_like(x[:, :3])], dim=1),
        lambda x: torch.ones_like(x).index_put((torch.tensor([0]),), x[0]),
        lambda x: nn.functional.pad(x[:, 1:], (0, 1), value=2.0),
        lambda x: x.round().to(torch.int32).float(),
        lambda x: x / float(x.abs().max()),
        lambda x: nn.functional.softmax(x, dim=1),
        lambda x: x.clamp(max=0.5),
        lambda x: (x > 0.5) * x,
    ],
)
def test_other_functions_admit_no_scale(function):
    model, batch = Net(function), torch.linspace(-1, 1, 24).view(4, 6)
    assert scale_symmetries(model, batch) == []
    with pytest.raises(ValueError, match="Net"):
        Rescale(batch=batch).rescaling(model)


@pytest.mark.parametrize(
    "function",
    [
        torch.relu,
        torch.abs,
        nn.functional.leaky_relu,
        nn.functional.relu_,
        lambda x: nn.functional.prelu(x, torch.tensor([0.3])),
        lambda x: x.clamp(min=0),
        lambda x: x * (x > 0),
        lambda x: torch.where(x > -x, x, x / 2),
        lambda x: torch.maximum(x, -x / 2),
        lambda x: (x.square() + 1e-12).sqrt(),
        lambda x: x.square() / x.abs().mean(),
        lambda x: x.masked_fill(torch.eye(4, 6).bool(), 0.0),
        lambda x: torch.zeros_like(x).index_copy_(0, torch.tensor([2, 3]), x[:2]),
        lambda x: nn.functional.pad(x[:, 1:], (0, 1)),
        lambda x: x.sort(dim=1).values,
        lambda x: x.view(4, 2, 3).transpose(1, 2).flatten(1),
    ],
)
def test_homogeneous_functions_admit_any_scale(function):
    model, batch = Net(function), torch.linspace(-1, 1, 24).view(4, 6)
    rescaling = Rescale(factor=0.5, batch=batch).rescaling(model)
    values = {name: factor.scalar for name, factor in rescaling.factors.items()}
    assert values == {"first.weight": 0.5, "first.bias": 0.5, "last.weight": 2.0}
    assert rescaling.deviation < 1e-6


def test_an_epsilon_that_counts_is_refused_with_the_tensor():
    set_seed(0)
    small = small_model("LlamaForCausalLM", **{**LLAMA, "initializer_range": 0.02})
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight"):
        Rescale(factor=0.25).rescaling(small)
    rest = Rescale(factor=0.25, skip=["model.embed_tokens.weight"]).rescaling(small)
    assert rest.deviation < 1e-6 and "model.embed_tokens.weight" not in rest.factors
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        Rescale(skip=["lm_head.weight"]).rescaling(small)


def test_the_model_is_left_unchanged():
    model = make("bert").train()
    before = copy.deepcopy(model.state_dict())
    Rescale(equalise="channels").rescaling(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


class Experts(nn.Module):
    """A residual layer whose rows go to one of two experts by the sign of their first value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(6, 6), nn.Linear(6, 3), nn.LayerNorm(6, eps=1e-12)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        for i, expert in enumerate(self.experts):
            (rows,) = torch.where((x[:, 0] > 0) == bool(i))
            if len(rows):
                hidden = hidden.index_add(0, rows, expert(self.norm(hidden[rows])))
        return self.last(self.norm(hidden))


def test_experts_that_the_batch_does_not_use_keep_the_scale_of_all():
    torch.manual_seed(0)
    model, batch = Experts(), torch.randn(8, 6)
    (symmetry,) = scale_symmetries(model, batch)
    assert symmetry.exponents == {
        f"{name}.{kind}": 1.0 for name in ("first", "experts.0", "experts.1") for kind in ("weight", "bias")
    }
    assert scale_symmetries(model, batch.abs()) == []


def test_random_draws_of_a_model_do_not_count():
    sizes = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    model = small_model("ViTMAEForPreTraining", **SMALL, **sizes, image_size=16, patch_size=4)  # masks at random
    state = torch.random.get_rng_state()
    assert Rescale().rescaling(model).deviation < 1e-5
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_without_known_inputs_needs_a_batch():
    with pytest.raises(ValueError, match="batch="):
        Rescale().rescaling(mlp())


@pytest.mark.parametrize(
    "options",
    [
        {"factor": 0},
        {"factor": -1},
        {"factor": float("nan")},
        {"equalise": "rows"},
        {"factor": 1, "equalise": "layers"},
    ],
)
def test_invalid_options(options):
    with pytest.raises(ValueError):
        Rescale(**options)


def test_compositions():
    composition = get_predictor("average+rescale", rescale={"factor": 0.25})
    assert composition == Composition([get_predictor("average"), Rescale(factor=0.25)])
    history = torch.tensor([[1.0, 3.0]])
    assert composition.residual(history, "fc").tolist() == [-1.0]
    assert Rescale().residual(history, "fc").tolist() == [0.0]
    assert Composition([Rescale()]).rescalers == [Rescale()]
    with pytest.raises(ValueError, match="Average"):
        get_predictor("rescale+average")
    with pytest.raises(ValueError):
        Composition([])
    with pytest.raises(TypeError, match="factor"):
        get_predictor("average+rescale", factor=0.25)


def test_factors_of_pieces():
    tensor = torch.randn(4, 3, 2)
    factor = TensorFactor(2.0, {0: torch.rand(4), 1: torch.rand(3)}) * TensorFactor(0.5, {1: torch.rand(3)})
    expected = factor.scale(tensor).flatten()
    pieces = [factor.scale_piece(tensor.flatten()[i : i + 5], tensor.shape, i) for i in range(0, 24, 5)]
    torch.testing.assert_close(torch.cat(pieces), expected)
    torch.testing.assert_close(factor.mean(), float((expected / tensor.flatten()).log().mean().exp()))


def test_equations():
    equations = ScaleEquations()
    a, b, c = (equations.variable() for _ in range(3))
    equations.require_equal({**a, **b}, {key: 2 * value for key, value in c.items()})  # a + b = 2 c
    equations.require_zero({**a, **c})
    assert equations.reduced(c) == {0: -1} and equations.reduced(b) == {0: -3}
    equations.require_zero(b)
    assert equations.reduced(a) == {}


def test_equal_layers_ignore_zero_matrices_and_no_symmetry():
    symmetries = scale_symmetries(lora())
    tensors = {name: torch.zeros(2, 2) for symmetry in symmetries for name in symmetry.exponents}
    assert equal_layers(symmetries, tensors).tolist() == [0.0] * 4
    assert equal_channels([], {}) == []
