"""Wrappers and ties: names on disk are those of the plain model, and tied weights are found by their memory."""

import copy

import pytest
import torch
from accelerate.utils import compile_regions
from conftest import make_resnet, make_trainer
from doubles.constant_predictor import Constant
from doubles.small_trainers import BALANCED
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from know_hf import WeightTrajectory, induce_forgetting, predict_overflowed_weights, tensor_roles
from know_hf.model_tensors import unwrapped
from know_hf.recording.validation import check_reloadable
from know_hf.trajectory import TrajectoryError, state_nbytes
from know_hf.trajectory.snapshot import recorded_tensors

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def llama(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes, **options))


def lora(model, **options):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], **options))


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_layer(model):
    model.model.layers[0] = compiled(model.model.layers[0])
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def regions(model):
    return compile_regions(model, backend="eager")


def with_head(model):
    return lora(model, modules_to_save=["lm_head"])


WRAPPERS = {
    "compiled": (compiled, llama),
    "compiled_layer": (compiled_layer, llama),
    "compiled_in_place": (compiled_in_place, llama),
    "compiled_regions": (regions, llama),
    "parallel": (lambda model: nn.DataParallel(compiled(model)), llama),
    "compiled_parallel": (lambda model: compiled(nn.DataParallel(model)), llama),
    "tied": (compiled_layer, lambda: llama(tie_word_embeddings=True)),
    "adapter_compiled": (lambda model: compiled(lora(model)), lambda: lora(llama())),
    "adapter_of_compiled": (lambda model: lora(compiled(model)), lambda: lora(llama())),
    "adapter_of_compiled_regions": (lambda model: with_head(regions(model)), lambda: with_head(llama())),
}


@pytest.mark.parametrize("case", WRAPPERS)
def test_a_wrapped_model_is_recorded_and_loaded_as_the_plain_one(tmp_path, case):
    wrap, make_plain = WRAPPERS[case]
    plain = make_plain()
    model = wrap(llama(tie_word_embeddings=plain.config.tie_word_embeddings))
    ours, expected = (WeightTrajectory.create(tmp_path / name) for name in ("ours", "expected"))
    ours.record(model, num_examples=2, steps=1)
    expected.record(plain, num_examples=2, steps=1)
    assert (ours.names, ours.roles, ours.tied_weights) == (expected.names, expected.roles, expected.tied_weights)
    for record in expected.states[0].files:
        assert (ours.path / record.path).read_bytes() == (expected.path / record.path).read_bytes()
    assert state_nbytes(model) == state_nbytes(plain) and tensor_roles(model) == tensor_roles(plain)
    assert [tensor.shape for tensor in recorded_tensors(model)] == [tensor.shape for tensor in recorded_tensors(plain)]

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for tensor in recorded_tensors(model):
            tensor.add_(1)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ours.load_into(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_plain_model_is_not_wrapped():
    for model in (llama(), lora(llama()), nn.Linear(2, 2)):
        assert unwrapped(model) is model


def test_a_compiled_model_is_trained_and_recorded(tmp_path):
    trainer = make_trainer(tmp_path / "out", compiled(make_resnet()), max_steps=1, remove_unused_columns=False)
    trajectory = induce_forgetting(trainer, BALANCED, tmp_path / "compiled")
    assert (trajectory.path / "config.json").exists()
    state_0 = make_resnet(seed=1)
    trajectory.load_into(state_0)
    torch.testing.assert_close(dict(state_0.state_dict()), dict(unwrapped(trainer.model).state_dict()))
    trajectory.load_model(2)


class Tied(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.decoder = nn.Linear(4, 6, bias=False)
        share(self)


def same_parameter(module):
    module.decoder.weight = module.embedding.weight


def same_memory(module):
    module.decoder.weight = nn.Parameter(module.embedding.weight.detach())


@pytest.mark.parametrize("share", [same_parameter, same_memory])
def test_ties_of_a_plain_module_are_recorded_and_predicted_once(record_states, tmp_path, share):
    module = Tied(share)
    assert tensor_roles(module)["decoder.weight"].tied_to == "embedding.weight"
    assert state_nbytes(module) == (96, 96) and len(recorded_tensors(module)) == 1
    trajectory = record_states(module, 2)
    (name,) = trajectory.names
    (other,) = {"embedding.weight", "decoder.weight"} - {name}
    assert WeightTrajectory(trajectory.path).tied_weights == {other: name}
    role = trajectory.roles[name]
    assert (role.role, role.tied_to) == ("fc", None) and "tied" not in role.reason
    result = predict_overflowed_weights(trajectory, predictor=Constant(0.5), output_dir=tmp_path / "predicted")
    result.load_into(module)
    assert torch.equal(module.embedding.weight, trajectory.tensor(name) + 0.5)
    assert torch.equal(module.decoder.weight, module.embedding.weight)


def tie_head(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def tie_layers(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


LAYERS = {f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)}


@pytest.mark.parametrize(
    ("tie", "names"), [(tie_head, {EMBEDDINGS, HEAD}), (tie_layers, LAYERS)], ids=["head", "layers"]
)
@pytest.mark.parametrize("declared", [False, True])
def test_ties_by_hand_are_stored_once_with_a_warning(record_states, caplog, tie, names, declared):
    model = llama(tie_word_embeddings=declared and tie is tie_layers)
    tie(model)
    check_reloadable(model)
    assert "from_pretrained" in caplog.text and "tie_word_embeddings=True" in caplog.text
    trajectory = record_states(model, 2)
    (tied,) = names - set(trajectory.names)
    assert trajectory.tied_weights[tied] == (names - {tied}).pop()
    assert not [name for name, role in trajectory.roles.items() if "tied" in role.reason]
    other = copy.deepcopy(model)
    trajectory.load_into(other, 0)
    first, second = (other.get_parameter(name) for name in names)
    assert first.data_ptr() == second.data_ptr() and torch.equal(first, trajectory.tensor((names - {tied}).pop()))
    with pytest.raises(TrajectoryError, match=tied):
        trajectory.load_model()


def test_ties_by_hand_that_the_config_declares_load_with_from_pretrained(record_states, caplog):
    model = llama(tie_word_embeddings=False)
    tie_head(model)
    model.config.tie_word_embeddings = True
    check_reloadable(model)
    assert not caplog.records
    loaded = record_states(model, 1).load_model()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_tie_that_ends_between_states_is_refused(tmp_path):
    trajectory, module = WeightTrajectory.create(tmp_path / "states"), Tied(same_parameter)
    trajectory.record(module, num_examples=2, steps=1)
    module.decoder.weight = nn.Parameter(module.embedding.weight.detach().clone())
    with pytest.raises(TrajectoryError, match=r"(embedding|decoder)\.weight.* missing in state 0"):
        trajectory.record(module, num_examples=1, steps=1)
