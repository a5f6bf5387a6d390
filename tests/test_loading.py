"""Load a state as a model, or into a model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_resnet
from torch import nn
from transformers import (
    MarianConfig,
    MarianMTModel,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    ResNetForImageClassification,
)

from know_hf import WeightTrajectory
from know_hf.trajectory import TrajectoryError

NAME = "classifier.1.weight"
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
EXPERTS = {"vocab_size": 16, "num_key_value_heads": 2, "num_local_experts": 2, **SIZES}


def make_marian():
    """A model whose saving leaves out the positions of encoder and decoder, which are computed."""
    sizes = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 8}
    layers = dict.fromkeys(
        ["encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"], 1
    )
    return MarianMTModel(MarianConfig(vocab_size=16, **sizes, **layers, pad_token_id=0, decoder_start_token_id=0))


def make_experts_with_a_custom_head():
    model = MixtralForSequenceClassification(MixtralConfig(**EXPERTS))
    model.score = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    return model


def test_a_state_loads_as_an_ordinary_checkpoint(trajectory):
    for state in (0, 4):
        weight = trajectory.tensor(NAME, state)
        model = ResNetForImageClassification.from_pretrained(trajectory.path, subfolder=f"state-{state}")
        assert torch.equal(model.classifier[1].weight, weight)
        assert torch.equal(trajectory.load_model(state).classifier[1].weight, weight)
    model = make_resnet(seed=5)
    trajectory.load_into(model, 3)
    assert torch.equal(model.classifier[1].weight, trajectory.tensor(NAME, 3))


@pytest.mark.parametrize("make", [make_marian, make_experts_with_a_custom_head])
def test_load_into_a_model_whose_saving_leaves_out_or_splits_tensors(record_states, make):
    model = make()
    trajectory = record_states(model, num_states=2)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trajectory.record(model, num_examples=1, steps=1)
    other = make()
    other.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in expected.items()})
    for name in other._keys_to_ignore_on_save or ():
        other.get_parameter(name).data.copy_(expected[name])
    trajectory.load_into(other, 2)
    torch.testing.assert_close(dict(other.state_dict()), expected, rtol=0, atol=0)


def edit_config(trajectory, **changes):
    path = trajectory.path / "state-0/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_load_into_a_model_with_another_head_or_that_cannot_be_built(record_states):
    trajectory = record_states(make_experts_with_a_custom_head(), num_states=1)
    plain = make_experts_with_a_custom_head()
    plain.score = nn.Linear(8, 2, bias=False)
    with pytest.raises(TrajectoryError, match=r"'score.weight' is not in both"):
        trajectory.load_into(plain)
    edit_config(trajectory, hidden_act="unknown")
    with pytest.raises(TrajectoryError, match=r"split or merged .*MixtralForSequenceClassification"):
        trajectory.load_into(make_experts_with_a_custom_head())


def test_experts_that_saving_splits(record_states):
    config = MixtralConfig(**EXPERTS)
    trajectory = record_states(MixtralForCausalLM(config), num_states=2)
    assert trajectory.roles["model.layers.0.block_sparse_moe.experts.1.w2.weight"].role == "fc"
    assert trajectory.roles["model.layers.0.block_sparse_moe.gate.weight"].role == "fc"
    model = MixtralForCausalLM(config)
    trajectory.load_into(model, 1)
    trajectory.record(model, num_examples=1, steps=1)
    for name in trajectory.names:
        assert torch.equal(trajectory.tensor(name, 1), trajectory.tensor(name, 2))


class More(ResNetForImageClassification):
    def __init__(self, config):
        super().__init__(config)
        self.more = nn.Linear(2, 2, bias=False)


def test_a_tensor_that_only_model_or_state_has(record_states, trajectory):
    more = More(make_resnet().config)
    of_more = record_states(more, num_states=1)
    with pytest.raises(TrajectoryError, match=r"'more\.weight' is not in both .* More"):
        trajectory.load_into(more)
    with pytest.raises(TrajectoryError, match=r"'more\.weight' is not in both .* ResNet"):
        of_more.load_into(make_resnet())
    with pytest.raises(TrajectoryError, match=r"'more\.weight' of More is not .* More\.from_pretrained"):
        trajectory.load_model(0, More)
    with pytest.raises(TrajectoryError, match=r"no class 'More'.*model_class="):
        of_more.load_model()
    assert isinstance(of_more.load_model(model_class=More), More)
    edit_config(of_more, architectures=["ResNetForImageClassification"])
    with pytest.raises(TrajectoryError, match=r"'more\.weight' .* not in ResNetForImageClassification.*load_into"):
        of_more.load_model()
    assert isinstance(of_more.load_model(0, ResNetForImageClassification), ResNetForImageClassification)


def test_a_tensor_of_another_shape(record_states):
    model = make_resnet()
    model.classifier[1] = nn.Linear(16, 7)
    trajectory = record_states(model, num_states=1)
    with pytest.raises(TrajectoryError, match=r"'classifier\.1\.bias' is \(7,\) .*\(4,\) .*load_into"):
        trajectory.load_model()
    with pytest.raises(TrajectoryError, match=r"'classifier\.1\.(bias|weight)' is \(7,.* \(4,"):
        trajectory.load_into(make_resnet())


def test_a_plain_module(record_states):
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    module[2].weight = module[1].weight
    trajectory = record_states(module, num_states=3)
    assert trajectory.tied_weights == {"2.weight": "1.weight"}
    assert {name: role.role for name, role in trajectory.roles.items()} == {
        "0.weight": "fc", "0.bias": "bias", "1.weight": "fc", "1.bias": "bias", "2.bias": "bias"
    }  # fmt: skip
    trajectory.load_into(module, 0)
    assert torch.equal(module[2].weight, trajectory.tensor("1.weight", 0))
    with pytest.raises(TrajectoryError, match=r"config\.json.*load_into"):
        trajectory.load_model()


def test_a_trajectory_of_0_1_is_continued(tmp_path):
    old = Path(__file__).parent / "fixtures/v0_1/trajectory"
    trajectory = WeightTrajectory(shutil.copytree(old, tmp_path / "trajectory"))
    before, names = trajectory.history(trajectory.names[0]), trajectory.names
    model = trajectory.load_model(2)
    trajectory.record(model, num_examples=1, steps=0)
    again = WeightTrajectory(trajectory.path)
    again.verify()
    assert (again.num_states, again.names) == (4, names)
    assert torch.equal(again.history(names[0])[1:], before)
    assert any(role.is_batch_norm for role in again.roles.values())
