"""Relative depth from names on disk of real models."""

import random
from collections.abc import Callable

import pytest
from doubles.small_models import small_model
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from know_hf.checkpoint import CheckpointReader
from know_hf.predictors.relative_depth import relative_depths

SIZES = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.fixture
def names_of(tmp_path) -> Callable[[PreTrainedModel], list[str]]:
    """Names in a checkpoint, in random order."""

    def save(model: PreTrainedModel) -> list[str]:
        model.save_pretrained(tmp_path / type(model).__name__)
        names = CheckpointReader(list((tmp_path / type(model).__name__).glob("*.safetensors"))).names
        random.Random(0).shuffle(names)
        return names

    return save


def depth_of(depths: dict[str, float], start: str) -> float:
    """The common depth of all names with this start."""
    (depth,) = {depth for name, depth in depths.items() if name.startswith(start)}
    return depth


def llama() -> PreTrainedModel:
    return small_model("LlamaForCausalLM", vocab_size=8, num_hidden_layers=11, **SIZES)


def stacks():
    """Models with one stack of blocks: the prefix of the blocks, their number, and names at depths 0 and 1."""
    bert = small_model("BertForSequenceClassification", vocab_size=8, num_hidden_layers=12, **SIZES)
    yield bert, "bert.encoder.layer", 12, ["bert.embeddings."], ["bert.pooler.", "classifier."]
    yield llama(), "model.layers", 11, ["model.embed_tokens."], ["model.norm.", "lm_head."]
    gpt2 = small_model("GPT2LMHeadModel", vocab_size=8, n_embd=8, n_layer=3, n_head=2, n_positions=8)
    yield gpt2, "transformer.h", 3, ["transformer.wte.", "transformer.wpe."], ["transformer.ln_f."]
    vit = small_model("ViTForImageClassification", image_size=8, patch_size=4, num_hidden_layers=3, **SIZES)
    yield vit, "vit.encoder.layer", 3, ["vit.embeddings."], ["vit.layernorm.", "classifier."]
    experts = {"num_key_value_heads": 2, "num_local_experts": 4}
    mixtral = small_model("MixtralForCausalLM", vocab_size=8, num_hidden_layers=3, **experts, **SIZES)
    yield mixtral, "model.layers", 3, ["model.embed_tokens."], ["model.norm.", "lm_head."]


@pytest.mark.parametrize(
    ("model", "blocks", "count", "inputs", "outputs"), list(stacks()), ids=lambda value: type(value).__name__
)
def test_a_stack_of_blocks(names_of, model, blocks, count, inputs, outputs):
    names = names_of(model)
    depths = relative_depths(names)
    assert list(depths) == names
    for index in range(count):  # with all experts of Mixtral
        assert depth_of(depths, f"{blocks}.{index}.") == index / (count - 1)
    assert {depth_of(depths, start) for start in inputs} == {0}
    assert {depth_of(depths, start) for start in outputs} == {1}


def structures():
    """Models with several stacks, and depths by the start of a name."""
    sizes = {"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2}
    parts = [f"encoder.block.{block}.layer.{part}." for block in range(2) for part in range(2)]
    parts += [f"decoder.block.{block}.layer.{part}." for block in range(2) for part in range(3)]
    ends = {"shared.": 0, "encoder.final_layer_norm.": 3 / 9, "decoder.final_layer_norm.": 1}
    t5 = small_model("T5ForConditionalGeneration", num_layers=2, num_decoder_layers=2, **sizes)
    yield t5, {part: rank / 9 for rank, part in enumerate(parts)} | ends

    parts = [
        "0.layers.0.layer.0.", "0.layers.0.layer.1.", "0.layers.1.layer.0.", "0.layers.1.layer.1.",
        "1.layers.0.shortcut.", "1.layers.0.layer.0.", "1.layers.0.layer.1.",
    ]  # fmt: skip
    depths = {f"resnet.encoder.stages.{part}": rank / 6 for rank, part in enumerate(parts)}
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [2, 1], "layer_type": "basic"}
    yield small_model("ResNetForImageClassification", **sizes), depths | {"resnet.embedder.": 0, "classifier.": 1}

    parts = ["0.layers.0.", "1.downsampling_layer.", "1.layers.0.", "1.layers.1."]
    depths = {f"convnext.encoder.stages.{part}": rank / 3 for rank, part in enumerate(parts)}
    ends = {"convnext.embeddings.": 0, "convnext.layernorm.": 1, "classifier.": 1}
    convnext = small_model("ConvNextForImageClassification", num_stages=2, hidden_sizes=[4, 8], depths=[1, 2])
    yield convnext, depths | ends

    text = {"vocab_size": 8, "num_hidden_layers": 3, **SIZES}
    vision = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 5, **SIZES}
    depths = {"text_model.encoder.layers.1.": 0.5, "vision_model.encoder.layers.1.": 0.25}
    ends = {"vision_model.embeddings.": 0, "vision_model.pre_layrnorm.": 0, "text_projection.": 1, "logit_scale": 1}
    yield small_model("CLIPModel", text_config=text, vision_config=vision), depths | ends

    features = {"conv_dim": (4, 4), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
    sizes = {"vocab_size": 8, "num_hidden_layers": 2, "num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 2}
    depths = {"feature_extractor.conv_layers.1.": 1 / 3, "encoder.layers.0.": 2 / 3, "encoder.pos_conv_embed.": 0}
    wav2vec2 = small_model("Wav2Vec2ForCTC", **features, **sizes, **SIZES)
    yield wav2vec2, {f"wav2vec2.{name}": depth for name, depth in depths.items()}


@pytest.mark.parametrize(("model", "expected"), list(structures()), ids=lambda value: type(value).__name__)
def test_several_stacks(names_of, model, expected):
    depths = relative_depths(names_of(model))
    assert {start: depth_of(depths, start) for start in expected} == expected


def test_adapters_of_some_layers(names_of):
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[5, 10])
    names = names_of(get_peft_model(llama(), config))
    depths = relative_depths(names)
    assert len(names) == 4 and all(name.startswith("base_model.model.model.layers.") for name in names)
    for index in (5, 10):  # of 11 layers; the first five have no adapter
        assert depth_of(depths, f"base_model.model.model.layers.{index}.") == index / 10


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # vision and language
        (["vision_tower.encoder.layers.0.weight", "vision_tower.encoder.layers.1.weight", "vision_tower.norm.weight",
          "language_model.layers.0.weight", "language_model.layers.1.weight", "language_model.norm.weight"],
         [0, 1 / 3, 1 / 3, 2 / 3, 1, 1]),
        # torchvision
        (["conv1.weight", "layer1.0.conv1.weight", "layer1.1.conv2.weight", "layer2.0.conv1.weight", "fc.weight"],
         [0, 0, 0.5, 1, 1]),
        (["features.0.weight", "features.1.weight", "features.4.weight", "classifier.0.weight", "classifier.3.weight"],
         [0, 0.25, 1, 1, 1]),
        # lists beside the blocks
        (["enc.patch_embeddings.1.weight", "enc.block.0.0.weight", "enc.block.1.0.weight", "enc.block.1.1.weight"],
         [0.5, 0, 0.5, 1]),
        (["x.layers.0.mlp.experts.1.weight", "x.layers.1.mlp.0.weight", "decode_head.layers.0.weight"], [0, 1, 1]),
        # no list of blocks, no list, one layer
        (["0.weight", "2.weight", "4.bias"], [0, 0.5, 1]),
        (["attentions.0.q.weight", "ffns.0.bias", "attentions.1.q.weight", "embeddings.weight"], [0, 0, 1, 0]),
        (["fc1.weight", "conv2.weight", "conv10.bias", "conv2.bias", "embed.weight", "head.bias"],
         [1, 0, 0.5, 0, 0, 1]),
        (["base_model.model.wq.lora_A.weight", "base_model.model.wq.lora_B.weight"], [0.5, 0.5]),
        (["base_model.model.classifier.1.lora_A.weight"], [1]),
        (["embed_tokens.weight", "layers.0.mlp.weight", "embed_out.weight"], [0, 0.5, 1]),
        (["weight"], [0.5]),
        ([], []),
    ],
)  # fmt: skip
def test_names_of_other_models(names, expected):
    assert list(relative_depths(names).values()) == expected
    assert relative_depths(names[::-1]) == dict(zip(names, expected, strict=True))
