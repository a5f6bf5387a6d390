"""Relative depth from names on disk of real models."""

import random
from collections.abc import Callable

import pytest
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

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


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(vocab_size=8, num_hidden_layers=12, **SIZES))


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=11, **SIZES))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=3, n_head=2, n_positions=8))


def vit() -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_hidden_layers=3, num_labels=3, **SIZES))


def mixtral() -> PreTrainedModel:
    config = MixtralConfig(vocab_size=8, num_hidden_layers=3, num_key_value_heads=2, num_local_experts=4, **SIZES)
    return MixtralForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "blocks", "inputs", "outputs"),
    [
        (bert, "bert.encoder.layer", ["bert.embeddings."], ["bert.pooler.", "classifier."]),
        (llama, "model.layers", ["model.embed_tokens."], ["model.norm.", "lm_head."]),
        (gpt2, "transformer.h", ["transformer.wte.", "transformer.wpe."], ["transformer.ln_f."]),
        (vit, "vit.encoder.layer", ["vit.embeddings."], ["vit.layernorm.", "classifier."]),
        (mixtral, "model.layers", ["model.embed_tokens."], ["model.norm.", "lm_head."]),
    ],
)
def test_a_stack_of_blocks(names_of, make, blocks, inputs, outputs):
    names = names_of(make())
    depths = relative_depths(names)
    assert list(depths) == names
    count = len({name.split(".")[blocks.count(".") + 1] for name in names if name.startswith(f"{blocks}.")})
    assert count >= 3
    for index in range(count):
        assert depth_of(depths, f"{blocks}.{index}.") == index / (count - 1)
    for start in inputs:
        assert depth_of(depths, start) == 0
    for start in outputs:
        assert depth_of(depths, start) == 1


def test_experts_share_the_depth_of_their_block(names_of):
    names = names_of(mixtral())
    assert any(".experts.3." in name for name in names)
    assert {depth for name, depth in relative_depths(names).items() if ".layers.1." in name} == {0.5}


def test_encoder_before_decoder(names_of):
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_heads=2, num_layers=2, num_decoder_layers=2)
    depths = relative_depths(names_of(T5ForConditionalGeneration(config)))
    # two encoder blocks of two parts each, two decoder blocks of three
    places = [("encoder", b, part) for b in range(2) for part in range(2)]
    places += [("decoder", b, part) for b in range(2) for part in range(3)]
    for rank, (side, block, part) in enumerate(places):
        assert depth_of(depths, f"{side}.block.{block}.layer.{part}.") == rank / 9
    assert depths["shared.weight"] == 0
    assert depths["encoder.final_layer_norm.weight"] == 3 / 9
    assert depths["decoder.final_layer_norm.weight"] == 1


def test_nested_stages_of_resnet(names_of):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[2, 1], layer_type="basic", num_labels=3)
    depths = relative_depths(names_of(ResNetForImageClassification(config)))
    order = [
        "stages.0.layers.0.layer.0.", "stages.0.layers.0.layer.1.", "stages.0.layers.1.layer.0.",
        "stages.0.layers.1.layer.1.", "stages.1.layers.0.shortcut.", "stages.1.layers.0.layer.0.",
        "stages.1.layers.0.layer.1.",
    ]  # fmt: skip
    for rank, place in enumerate(order):
        assert depth_of(depths, f"resnet.encoder.{place}") == rank / 6
    assert depth_of(depths, "resnet.embedder.") == 0
    assert depth_of(depths, "classifier.") == 1


def test_stages_of_convnext(names_of):
    config = ConvNextConfig(num_stages=2, hidden_sizes=[4, 8], depths=[1, 2], num_labels=3)
    depths = relative_depths(names_of(ConvNextForImageClassification(config)))
    stages = "convnext.encoder.stages."
    assert depth_of(depths, f"{stages}0.layers.0.") == 0
    assert depth_of(depths, f"{stages}1.downsampling_layer.") == 1 / 3  # before the blocks of its stage
    assert depth_of(depths, f"{stages}1.layers.0.") == 2 / 3
    assert depth_of(depths, f"{stages}1.layers.1.") == 1
    assert depth_of(depths, "convnext.embeddings.") == 0
    assert depth_of(depths, "convnext.layernorm.") == depth_of(depths, "classifier.") == 1


def test_towers_side_by_side_and_one_after_the_other(names_of):
    config = CLIPConfig(
        text_config={"vocab_size": 8, "num_hidden_layers": 3, **SIZES},
        vision_config={"image_size": 8, "patch_size": 4, "num_hidden_layers": 5, **SIZES},
    )
    depths = relative_depths(names_of(CLIPModel(config)))
    assert depth_of(depths, "text_model.encoder.layers.1.") == 0.5
    assert depth_of(depths, "vision_model.encoder.layers.1.") == 0.25
    assert depth_of(depths, "vision_model.embeddings.") == depth_of(depths, "vision_model.pre_layrnorm.") == 0
    assert depth_of(depths, "text_projection.") == depths["logit_scale"] == 1

    config = Wav2Vec2Config(
        conv_dim=(4, 4), conv_kernel=(3, 3), conv_stride=(2, 2), num_feat_extract_layers=2, vocab_size=8,
        num_hidden_layers=2, num_conv_pos_embedding_groups=2, num_conv_pos_embeddings=2, **SIZES,
    )  # fmt: skip
    depths = relative_depths(names_of(Wav2Vec2ForCTC(config)))
    assert depth_of(depths, "wav2vec2.feature_extractor.conv_layers.1.") == 1 / 3
    assert depth_of(depths, "wav2vec2.encoder.layers.0.") == 2 / 3
    assert depth_of(depths, "wav2vec2.encoder.pos_conv_embed.") == 0

    vision_language = [
        "vision_tower.encoder.layers.0.weight", "vision_tower.encoder.layers.1.weight", "vision_tower.norm.weight",
        "language_model.layers.0.weight", "language_model.layers.1.weight", "language_model.norm.weight",
    ]  # fmt: skip
    assert list(relative_depths(vision_language).values()) == [0, 1 / 3, 1 / 3, 2 / 3, 1, 1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # raised by peft
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
