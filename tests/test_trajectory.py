import json
import shutil

import pytest
import torch
from conftest import NUM_EXAMPLES, SCHEDULE, make_resnet
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from know_hf import WeightTrajectory
from know_hf.checkpoint import file_sha256
from know_hf.trajectory import TrajectoryBusyError, TrajectoryError
from know_hf.trajectory.snapshot import Snapshot
from know_hf.trajectory.summary import inspect_trajectory

NAME = "classifier.1.weight"


def edit_manifest(folder, edit):
    path = folder / "trajectory.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def rewrite_state(folder, state, edit):
    """Edits the tensors of a state and records the new file, as a program with a mistake would."""
    (path,) = folder.glob(f"state-{state}/*.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})

    def enter(content):
        for record in content["states"][state]["files"]:
            if record["path"].endswith(".safetensors"):
                record.update(size=path.stat().st_size, sha256=file_sha256(path))

    edit_manifest(folder, enter)


def test_a_base_model_in_a_folder_that_is_gone_is_recorded_by_its_path(tmp_path):
    model = make_resnet()
    model.config._name_or_path = "/gone/models/base"
    trajectory = WeightTrajectory.create(tmp_path / "trajectory")
    trajectory.record(model, num_examples=2, steps=1)
    trajectory = WeightTrajectory(tmp_path / "trajectory")
    assert (trajectory.base_model, trajectory.base_revision) == ("/gone/models/base", None)


TEXT = {"vocab_size": 16, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 8}
HEADS = {"encoder_attention_heads": 1, "decoder_attention_heads": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
EXPERTS = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def make_marian():
    """Of its kind: saving leaves out the positions of encoder and decoder, which are computed."""
    return MarianMTModel(MarianConfig(**TEXT, **HEADS, pad_token_id=0, decoder_start_token_id=0))


def make_experts_with_a_head_of_its_own():
    config = MixtralConfig(vocab_size=16, **EXPERTS, num_key_value_heads=1, num_local_experts=2, pad_token_id=0)
    model = MixtralForSequenceClassification(config)
    model.score = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    return model


@pytest.mark.parametrize("make", [make_marian, make_experts_with_a_head_of_its_own])
def test_load_into_a_model_of_which_saving_leaves_out_or_splits_tensors(record_states, make):
    model = make()
    trajectory = record_states(model, num_states=2)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trajectory.record(model, num_examples=1, steps=1)
    other = make()
    other.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in expected.items()})
    for name in other._keys_to_ignore_on_save or ():
        other.get_parameter(name).data.copy_(expected[name])
    trajectory.load_into(other, 2)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_model_with_fewer_experts_or_another_head_is_named(record_states):
    trajectory = record_states(make_experts_with_a_head_of_its_own(), num_states=2)
    plain = make_experts_with_a_head_of_its_own()
    plain.score = nn.Linear(8, 2, bias=False)
    with pytest.raises(TrajectoryError, match=r"tensor 'score.weight' is not both in"):
        trajectory.load_into(plain)


def test_a_tensor_that_only_model_or_state_has_is_named(record_states):
    class More(ResNetForImageClassification):
        def __init__(self, config):
            super().__init__(config)
            self.more = nn.Linear(2, 2, bias=False)

    more, less = More(make_resnet().config), make_resnet()
    with pytest.raises(TrajectoryError, match=r"tensor 'more\.weight' is not both in .* and in the given More"):
        record_states(less, num_states=2, name="less").load_into(more)
    trajectory = record_states(more, num_states=2, name="more")
    with pytest.raises(TrajectoryError, match=r"tensor 'more\.weight' is not both in .* and in the given ResNet"):
        trajectory.load_into(less)
    config = json.loads((trajectory.path / "state-0/config.json").read_text())
    config["architectures"] = ["ResNetForImageClassification"]
    (trajectory.path / "state-0/config.json").write_text(json.dumps(config))
    with pytest.raises(TrajectoryError, match=r"has a tensor 'more\.weight' that a ResNetForImageClassification made"):
        trajectory.load_model()
    assert isinstance(trajectory.load_model(0, ResNetForImageClassification), ResNetForImageClassification)
    with pytest.raises(TrajectoryError, match=r"'more.weight' .* would be random; where that is meant, use More.from"):
        WeightTrajectory(trajectory.path.parent / "less").load_model(0, More)


def test_the_generation_config_is_written_as_it_was_though_generating_changes_it_meanwhile(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
    snapshot = Snapshot.of(model)
    model.generation_config.max_length = 99
    snapshot.save(tmp_path)
    assert "max_length" not in json.loads((tmp_path / "generation_config.json").read_text())
    assert model.generation_config.max_length == 99


def test_what_the_manifest_says(trajectory):
    assert [state.num_examples for state in trajectory.states] == SCHEDULE.sizes(NUM_EXAMPLES)
    assert trajectory.schedule == SCHEDULE
    assert trajectory.roles[NAME].role == "fc"
    content = json.loads((trajectory.path / "trajectory.json").read_text())
    assert content["format_version"] == "1.0"
    assert {"know_hf", "torch", "transformers", "safetensors"} <= set(content["library_versions"])
    record = content["states"][2]["files"][-1]
    path = trajectory.path / record["path"]
    assert (record["path"], record["size"]) == ("state-2/model.safetensors", path.stat().st_size)
    assert record["sha256"] == file_sha256(path)


def test_history_has_the_full_data_state_last(trajectory):
    history = trajectory.history(NAME)
    assert history.shape == (5, 4, 16)
    assert history.dtype == torch.float32
    for position, state in enumerate([4, 3, 2, 1, 0]):
        weights = load_file(trajectory.path / f"state-{state}/model.safetensors")
        assert torch.equal(history[position], weights[NAME])
    assert not torch.equal(history[0], history[-1])


def test_every_state_loads_as_an_ordinary_checkpoint(trajectory):
    for state in (0, 4):
        model = ResNetForImageClassification.from_pretrained(trajectory.path, subfolder=f"state-{state}")
        assert torch.equal(model.classifier[1].weight, trajectory.tensor(NAME, state))
        assert torch.equal(trajectory.load_model(state).classifier[1].weight, model.classifier[1].weight)


def test_load_into_a_model_in_memory(trajectory):
    model = make_resnet(seed=5)
    trajectory.load_into(model, 3)
    assert torch.equal(model.classifier[1].weight, trajectory.tensor(NAME, 3))


def test_weights_in_parts_are_neither_recorded_nor_loaded(trajectory, tmp_path):
    model = make_resnet()
    for parameter in model.parameters():  # as ZeRO-3 leaves it
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    with pytest.raises(TrajectoryError, match=r"state-1 can't be copied .* ZeRO-3 can't be resumed"):
        trajectory.load_into(model, 1)
    with pytest.raises(TrajectoryError, match="ZeRO-3 has them in parts; give them as state_dict="):
        WeightTrajectory.create(tmp_path / "new").record(model, num_examples=8, steps=1)


def test_a_base_in_a_relative_folder_does_not_read_as_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_resnet().save_pretrained("models/tiny")
    for name, kept in (("models/tiny", "./models/tiny"), ("microsoft/resnet-18", "microsoft/resnet-18"), ("", None)):
        model = make_resnet()
        model.config._name_or_path = name
        trajectory = WeightTrajectory.create(tmp_path / kept.replace("/", "-") if kept else tmp_path / "none")
        trajectory.record(model, num_examples=8, steps=1)
        assert trajectory.base_model == kept


def test_verify_passes_on_a_whole_trajectory(trajectory):
    trajectory.verify()


def test_states_in_reversed_order(trajectory_copy):
    def reverse(content):
        content["states"] = [{**s, "index": 4 - s["index"]} for s in reversed(content["states"])]

    edit_manifest(trajectory_copy, reverse)
    with pytest.raises(TrajectoryError, match=r"state 1 was trained on 8 examples, state 0 on 4.*reversed order"):
        WeightTrajectory(trajectory_copy)


def test_state_indices_out_of_order(trajectory_copy):
    edit_manifest(trajectory_copy, lambda content: content["states"].reverse())
    with pytest.raises(TrajectoryError, match="state at position 0 has index 4"):
        WeightTrajectory(trajectory_copy)


def test_swapped_folders_do_not_verify(trajectory_copy):
    (trajectory_copy / "state-0").rename(trajectory_copy / "x")
    (trajectory_copy / "state-4").rename(trajectory_copy / "state-0")
    (trajectory_copy / "x").rename(trajectory_copy / "state-4")
    with pytest.raises(TrajectoryError, match=r"state-0/model\.safetensors of state 0 is not the file .* recorded"):
        WeightTrajectory(trajectory_copy).verify()


def test_a_truncated_file(trajectory_copy):
    path = trajectory_copy / "state-2/model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TrajectoryError, match=rf"state 2 has {size - 100} bytes, {size} were recorded.*truncated"):
        WeightTrajectory(trajectory_copy)


def test_a_missing_file(trajectory_copy):
    (trajectory_copy / "state-3/model.safetensors").unlink()
    with pytest.raises(TrajectoryError, match=r"state-3/model\.safetensors of state 3 is missing"):
        WeightTrajectory(trajectory_copy)


def test_a_damaged_byte_is_found_by_verify(trajectory_copy):
    path = trajectory_copy / "state-1/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    trajectory = WeightTrajectory(trajectory_copy)
    with pytest.raises(TrajectoryError, match="of state 1 is not the file that was recorded"):
        trajectory.verify()


def test_a_missing_tensor(trajectory_copy):
    rewrite_state(trajectory_copy, 3, lambda tensors: tensors.pop(NAME))
    with pytest.raises(TrajectoryError, match=r"state 3 .* has no tensor 'classifier\.1\.weight' that state 0 has"):
        _ = WeightTrajectory(trajectory_copy).names


def test_a_tensor_too_many(trajectory_copy):
    rewrite_state(trajectory_copy, 1, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(TrajectoryError, match=r"state 1 .* has a tensor 'extra' that state 0 has not"):
        _ = WeightTrajectory(trajectory_copy).names


def test_a_tensor_of_another_shape(trajectory_copy):
    rewrite_state(trajectory_copy, 2, lambda tensors: tensors.update({NAME: torch.zeros(5, 16)}))
    with pytest.raises(TrajectoryError, match=r"'classifier\.1\.weight' is \(5, 16\) .* in state 2 .* \(4, 16\)"):
        _ = WeightTrajectory(trajectory_copy).names


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(format_version="2.0"), "format version 2.0, this know_hf reads up to 1.0"),
        (lambda c: c.update(format_version="new"), "the format version 'new'"),
        (lambda c: c.pop("states"), "does not have the fields"),
        (lambda c: c.update(states=[1]), "does not have the fields"),
        (lambda c: c["roles"].update({NAME: {"role": "matrix", "reason": ""}}), "unknown role 'matrix'"),
        (lambda c: c["states"][0]["files"][0].update(path="../../secret"), "outside of its folder"),
    ],
)
def test_a_manifest_that_can_not_be_read(trajectory_copy, edit, message):
    edit_manifest(trajectory_copy, edit)
    with pytest.raises(TrajectoryError, match=message):
        WeightTrajectory(trajectory_copy)


def test_a_newer_minor_version_is_read(trajectory_copy):
    edit_manifest(trajectory_copy, lambda c: c.update(format_version="1.9", something_new=1))
    assert WeightTrajectory(trajectory_copy).num_states == 5


def test_half_a_manifest(trajectory_copy):
    path = trajectory_copy / "trajectory.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(TrajectoryError, match="is not JSON"):
        WeightTrajectory(trajectory_copy)


def test_no_trajectory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no trajectory\.json"):
        WeightTrajectory(tmp_path)


def test_create_refuses_a_folder_with_a_trajectory(trajectory):
    with pytest.raises(FileExistsError, match="already holds a trajectory"):
        WeightTrajectory.create(trajectory.path)


def test_a_trajectory_without_states_says_so(tmp_path):
    with pytest.raises(TrajectoryError, match="no finished state yet"):
        _ = WeightTrajectory.create(tmp_path / "new").names
    assert not (tmp_path / "new").exists()


def test_record_refuses_a_subset_that_does_not_shrink(record_states):
    trajectory = record_states(make_resnet(), num_states=2)
    with pytest.raises(TrajectoryError, match="state 2 was trained on 2 examples, state 1 on 2"):
        trajectory.record(make_resnet(), num_examples=2, steps=1)
    assert WeightTrajectory(trajectory.path).num_states == 2


def test_record_refuses_another_head(record_states):
    trajectory = record_states(make_resnet(), num_states=2)
    other = make_resnet()
    other.classifier[1] = nn.Linear(16, 7)
    with pytest.raises(TrajectoryError, match=r"'classifier\.1\.bias' is \(7,\) .* was the head replaced"):
        trajectory.record(other, num_examples=1, steps=1)
    assert WeightTrajectory(trajectory.path).num_states == 2
    assert not (trajectory.path / "state-2").exists()


def test_a_state_that_was_not_entered_is_written_again(record_states):
    trajectory = record_states(make_resnet(), num_states=2)
    shutil.copytree(trajectory.path / "state-1", trajectory.path / "state-2")  # killed before trajectory.json
    (trajectory.path / "state-2/model.safetensors").write_bytes(b"half")
    again = WeightTrajectory(trajectory.path)
    assert again.num_states == 2
    again.record(make_resnet(seed=3), num_examples=1, steps=1)
    WeightTrajectory(trajectory.path).verify()
    assert torch.equal(again.tensor(NAME, 2), make_resnet(seed=3).classifier[1].weight)


def test_metrics_can_be_added_later(record_states):
    trajectory = record_states(make_resnet(), num_states=2)
    trajectory.update_metrics(0, {"eval_loss": 0.5})
    trajectory.update_metrics(0, {"eval_accuracy": 1.0})
    again = WeightTrajectory(trajectory.path)
    assert [state.metrics for state in again.states] == [{"eval_loss": 0.5, "eval_accuracy": 1.0}, {}]


def test_a_plain_module_is_recorded_and_loaded(record_states):
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    module[2].weight = module[1].weight
    trajectory = record_states(module, num_states=3)
    assert trajectory.tied_weights == {"2.weight": "1.weight"}
    assert {name: role.role for name, role in trajectory.roles.items()} == {
        "0.weight": "fc", "0.bias": "bias", "1.weight": "fc", "1.bias": "bias", "2.bias": "bias"
    }  # fmt: skip
    trajectory.load_into(module, 0)
    assert torch.equal(module[2].weight, trajectory.tensor("1.weight", 0))
    with pytest.raises(TrajectoryError, match=r"no config\.json: it is of a plain module"):
        trajectory.load_model()


def test_scalars_and_empty_tensors_are_inspected(record_states):
    module = nn.Linear(2, 2)
    module.scale, module.none = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.empty(0))
    summary = inspect_trajectory(record_states(module, num_states=2))
    assert (summary.tensors["kept"], summary.parameters["kept"]) == (2, 1)
    assert summary.displacement["kept"][0] == 0 < summary.displacement["kept"][1]


def test_unchanged_tensors_are_read_from_the_state_that_has_them(tmp_path):
    model, trajectory = make_resnet(), WeightTrajectory.create(tmp_path / "trajectory")
    moved = [(), ("classifier", "stages.1"), ("classifier",), ("classifier", "stages.1")]
    expected = []
    for state, parts in enumerate(moved):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in parts):
                    parameter += 0.1
        expected.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        trajectory.record(model, num_examples=8 - state, steps=1)
    inner = "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight"
    outer = "resnet.embedder.embedder.convolution.weight"
    assert [state.unchanged.get(inner) for state in trajectory.states] == [None, None, 1, None]
    assert [state.unchanged.get(outer) for state in trajectory.states] == [None, 0, 0, 0]
    again = WeightTrajectory(trajectory.path)
    again.verify()
    for state, weights in enumerate(expected):
        loaded = ResNetForImageClassification.from_pretrained(again.path, subfolder=f"state-{state}").state_dict()
        for name, tensor in weights.items():
            assert torch.equal(again.tensor(name, state), tensor)
            assert torch.equal(loaded[name], tensor)
    assert again.is_unchanged(outer)
    assert not again.is_unchanged(inner)


@pytest.mark.parametrize("make", [make_resnet, lambda: nn.Linear(2, 2)])
def test_a_state_in_which_nothing_moved_is_whole(tmp_path, make):
    model, trajectory = make(), WeightTrajectory.create(tmp_path / "trajectory")
    for num_examples in (3, 2):
        trajectory.record(model, num_examples=num_examples, steps=0)
    trajectory.verify()
    assert trajectory.states[1].unchanged == {}
    other = make()
    trajectory.load_into(other, 1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


@pytest.mark.parametrize(("origin", "message"), [(3, "takes 'classifier.1.weight' from state 3, none before it")])
def test_an_unchanged_tensor_comes_from_an_earlier_state(trajectory_copy, origin, message):
    edit_manifest(trajectory_copy, lambda c: c["states"][2].update(unchanged={NAME: origin}))
    with pytest.raises(TrajectoryError, match=message):
        WeightTrajectory(trajectory_copy)


def test_an_error_of_the_background_writing_is_not_lost(tmp_path, monkeypatch):
    trajectory = WeightTrajectory.create(tmp_path / "trajectory")
    trajectory.record(make_resnet(), num_examples=3, steps=1, background=True)
    trajectory.check(wait=True)
    diverged = make_resnet()
    diverged.classifier[1].bias.data[0] = float("nan")
    trajectory.record(diverged, num_examples=2, steps=1, background=True)
    with pytest.raises(TrajectoryError, match=r"'classifier\.1\.bias' is not finite at the end .* state 1"):
        trajectory.record(make_resnet(), num_examples=1, steps=1)
    trajectory.record(make_resnet(seed=1), num_examples=2, steps=1)
    assert WeightTrajectory(trajectory.path).num_states == 2


def test_buffers_may_be_infinite_but_not_nan(tmp_path):
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
    trajectory = WeightTrajectory.create(tmp_path / "trajectory")
    trajectory.record(module, num_examples=3, steps=1)
    assert torch.equal(trajectory.tensor("mask"), module.mask)
    module.mask[0, 0] = float("nan")
    with pytest.raises(TrajectoryError, match=r"'mask' is not finite .* state 1"):
        trajectory.record(module, num_examples=2, steps=1)


def test_weights_are_copied_before_the_training_goes_on(tmp_path):
    trajectory = WeightTrajectory.create(tmp_path / "trajectory")
    model = make_resnet()
    trajectory.record(model, num_examples=3, steps=1, background=True)
    model.classifier[1].weight.data.zero_()
    assert torch.equal(trajectory.tensor(NAME), make_resnet().classifier[1].weight)


def test_a_second_recorder_is_refused(tmp_path):
    first = WeightTrajectory.create(tmp_path / "trajectory")
    second = WeightTrajectory.create(tmp_path / "trajectory")
    with first.recording():
        with pytest.raises(TrajectoryBusyError, match="another process is recording to"):
            second.record(make_resnet(), num_examples=3, steps=1)
        with pytest.raises(TrajectoryBusyError, match="another process is recording to"):
            second.record(make_resnet(), num_examples=3, steps=1, background=True)
            second.check(wait=True)
        first.record(make_resnet(), num_examples=3, steps=1)
    with pytest.raises(RuntimeError, match="holds 1 states, 0 were expected"):
        second.record(make_resnet(), num_examples=3, steps=1)
    assert WeightTrajectory(first.path).num_states == 1


def test_tied_weights_are_stored_once(record_states):
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    trajectory = record_states(LlamaForCausalLM(config), num_states=2)
    assert "lm_head.weight" not in trajectory.names
    assert trajectory.tied_weights == {"lm_head.weight": "model.embed_tokens.weight"}
    model = trajectory.load_model(1)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_roles_are_those_of_the_names_on_disk(record_states):
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    roles = record_states(ViTForImageClassification(config), num_states=2).roles
    assert roles["vit.encoder.layer.0.layernorm_before.bias"].reason == "bias of LayerNorm"
    assert roles["vit.encoder.layer.0.intermediate.dense.weight"].reason == "weight of Linear, 2 axes"
    assert not [name for name, role in roles.items() if "unknown" in role.reason]


def test_experts_that_are_split_on_disk_are_matrices(record_states):
    config = MixtralConfig(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, pad_token_id=0,
    )  # fmt: skip
    trajectory = record_states(MixtralForCausalLM(config), num_states=2)
    assert trajectory.roles["model.layers.0.block_sparse_moe.experts.1.w2.weight"].role == "fc"
    assert trajectory.roles["model.layers.0.block_sparse_moe.gate.weight"].role == "fc"
    model = MixtralForCausalLM(config)
    trajectory.load_into(model, 1)
    trajectory.record(model, num_examples=1, steps=1)
    for name in trajectory.names:
        assert torch.equal(trajectory.tensor(name, 1), trajectory.tensor(name, 2))


def test_an_unknown_architecture_asks_for_its_class(record_states):
    class MyResNet(ResNetForImageClassification):
        pass

    trajectory = record_states(MyResNet(make_resnet().config), num_states=2)
    with pytest.raises(TrajectoryError, match=r"no class 'MyResNet'.*pass model_class="):
        trajectory.load_model()
    assert isinstance(trajectory.load_model(model_class=MyResNet), MyResNet)


def test_a_tensor_without_a_role_is_named(trajectory_copy):
    edit_manifest(trajectory_copy, lambda content: content["roles"].pop("classifier.1.bias"))
    with pytest.raises(TrajectoryError, match=r"names no role for tensor 'classifier\.1\.bias'"):
        _ = WeightTrajectory(trajectory_copy).names


def test_the_revision_of_the_base_is_that_of_the_only_snapshot_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("know_hf.trajectory.model_files.HF_HUB_CACHE", str(tmp_path / "cache"))
    model = make_resnet()
    model.config._name_or_path = "someone/base"
    revisions = []
    for commit in ("a" * 40, "b" * 40):
        (tmp_path / "cache/models--someone--base/snapshots" / commit).mkdir(parents=True)
        trajectory = WeightTrajectory.create(tmp_path / commit)
        trajectory.record(model, num_examples=1, steps=1)
        revisions.append(trajectory.base_revision)
    assert revisions == ["a" * 40, None]
