"""Existing checkpoints become a trajectory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_resnet, make_trainer
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from know_hf import Gate, WeightTrajectory, predict_overflowed_weights
from know_hf.cli import main
from know_hf.trajectory import TrajectoryError

NAME = "classifier.1.weight"
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a `Trainer` with checkpoints at the steps 8, 16 and 24."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = {"max_steps": 24, "save_strategy": "steps", "save_steps": 8, "eval_strategy": "steps", "eval_steps": 8}
    make_trainer(folder / "out", **arguments).train()
    (folder / "out/checkpoint-best").mkdir()  # of a script
    return folder / "out"


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Three folders of models of other seeds."""
    for seed in range(3):
        make_resnet(seed).save_pretrained(tmp_path / f"seed-{seed}")
    return [tmp_path / f"seed-{seed}" for seed in range(3)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return type(make_resnet()).from_pretrained(folder).state_dict()


def test_the_checkpoints_of_a_trainer(trained, tmp_path):
    trajectory = WeightTrajectory.from_checkpoints(trained, tmp_path / "trajectory")
    trajectory.verify()
    assert [state.name for state in (*trajectory.states, *trajectory.tail)] == ["state-0", "tail-0", "tail-1"]
    assert [state.steps for state in (*trajectory.states, *trajectory.tail)] == [24, 8, 16]
    assert all(state.metrics.keys() == {"eval_loss"} for state in trajectory.tail)
    assert [path.name for path in trajectory.model_files] == ["config.json"]
    for state, step in ((0, 24), ("tail-0", 8), ("tail-1", 16), ("state-0", 24)):
        expected = weights(trained / f"checkpoint-{step}")
        loaded = trajectory.load_model(state).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
        assert torch.equal(trajectory.tensor(NAME, state), expected[NAME])
    linked = trained / "checkpoint-8/model.safetensors"
    assert (trajectory.path / "tail-0/model.safetensors").samefile(linked)
    recorded = WeightTrajectory.create(tmp_path / "recorded")
    recorded.record(make_resnet(), num_examples=1, steps=1)
    assert trajectory.roles == recorded.roles
    with pytest.raises(FileNotFoundError, match=rf"such as {trained}/checkpoint-"):
        WeightTrajectory.from_checkpoints([trained, trained], tmp_path / "other", "branches")


def test_checkpoints_are_averaged_gated_and_loaded(trained, tmp_path):
    paths = [trained / "checkpoint-24", trained / "checkpoint-8"]
    trajectory = WeightTrajectory.from_checkpoints(paths, tmp_path / "trajectory", copy=True)  # sorted by step
    mean = (trajectory.tensor(NAME) + trajectory.tensor(NAME, "tail-0")) / 2
    predict_overflowed_weights(trajectory, predictor="tail_average", output_dir=tmp_path / "average")
    torch.testing.assert_close(weights(tmp_path / "average")[NAME], mean)
    assert not (trajectory.path / "tail-0/model.safetensors").samefile(paths[1] / "model.safetensors")

    def distance_from(target: torch.Tensor) -> Gate:
        return Gate(lambda model: float((model.classifier[1].weight - target).norm()), margin=0.0)

    for target, chosen, state in (
        (mean, "tail_average", None),
        (trajectory.tensor(NAME, "tail-0"), "tail-0", "tail-0"),
        (trajectory.tensor(NAME), "Θ0", 0),
    ):
        output = tmp_path / f"enhanced {chosen}"
        result = predict_overflowed_weights(
            trajectory, predictor="average", output_dir=output, gate=distance_from(target)
        )
        assert (result.gate.chosen, result.gate.recipe["state"]) == (chosen, state)
        assert [candidate.name for candidate in result.gate.candidates] == ["Θ0", "tail-0", "tail_average"]
        torch.testing.assert_close(result.load_model().classifier[1].weight, nn.Parameter(target))
        card = (output / "README.md").read_text()
        assert "nested subsets" not in card and ('predictor="tail_average"' in card) == (state is None)
    with pytest.raises(ValueError, match="1 state,"):
        predict_overflowed_weights(trajectory, output_dir=tmp_path / "known")


def test_seeds_become_branches_and_an_order_becomes_states(models, tmp_path):
    trajectory = WeightTrajectory.from_checkpoints(models, tmp_path / "branches", "branches")
    trajectory.verify()
    assert [state.name for state in trajectory.branches] == ["branch-0", "branch-1", "branch-2"]
    assert torch.equal(trajectory.tensor(NAME), trajectory.tensor(NAME, "branch-0"))
    assert torch.equal(trajectory.load_model("branch-2").classifier[1].weight, make_resnet(2).classifier[1].weight)
    ordered = WeightTrajectory.from_checkpoints(models, tmp_path / "ordered", "ordered", num_examples=[8, 4, 2])
    assert [state.num_examples for state in ordered.states] == [8, 4, 2]
    assert torch.equal(ordered.history(NAME)[0], make_resnet(2).classifier[1].weight)
    result = predict_overflowed_weights(ordered, predictor="average", output_dir=tmp_path / "average")
    mean = ordered.history(NAME).mean(dim=0)
    torch.testing.assert_close(result.load_model().classifier[1].weight, nn.Parameter(mean))


@pytest.mark.parametrize("kind", ["tail", "branches"])
def test_the_start_of_a_training(models, tmp_path, capsys, kind):
    before, *after = models
    output = tmp_path / "trajectory"
    arguments = ["--kind", kind, "--start", str(before), "--output-dir", str(output)]
    assert main(["import", *map(str, after), *arguments]) == 0
    assert capsys.readouterr().out.startswith("start, state-0, ")
    trajectory = WeightTrajectory(output)
    trajectory.verify()
    assert torch.equal(trajectory.load_model("start").classifier[1].weight, make_resnet(0).classifier[1].weight)
    options = {"predictor": "start_interpolation", "predictor_options": {"scale": 0.5}}
    result = predict_overflowed_weights(trajectory, output_dir=tmp_path / "half", **options)
    half = (trajectory.tensor(NAME) + trajectory.tensor(NAME, "start")) / 2
    torch.testing.assert_close(result.load_model().classifier[1].weight, nn.Parameter(half))
    BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(tmp_path / "other")
    with pytest.raises(TrajectoryError, match=r"tensor '.* in .*other and .*seed-"):
        WeightTrajectory.from_checkpoints(after, tmp_path / "third", start=tmp_path / "other")


def test_shards_ties_and_tokenizers(tmp_path):
    for seed in range(2):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8))
        model.save_pretrained(tmp_path / str(seed), max_shard_size="5KB")
        (tmp_path / str(seed) / "optimizer.pt").write_bytes(b"a pickle")
        (tmp_path / str(seed) / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    folders = [tmp_path / "0", tmp_path / "1"]
    trajectory = WeightTrajectory.from_checkpoints(folders, tmp_path / "trajectory")
    trajectory.verify()
    assert trajectory.tied_weights == {"lm_head.weight": "transformer.wte.weight"}
    assert {path.name for path in trajectory.model_files} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    }
    assert torch.equal(trajectory.load_model().lm_head.weight, model.lm_head.weight)
    (folders[0] / "tokenizer.json").write_text('{"model": {"vocab": {"b": 0}}}')
    with pytest.raises(TrajectoryError, match=rf"tokenizers in {folders[0]} and {folders[1]}"):
        WeightTrajectory.from_checkpoints(folders, tmp_path / "other")


def test_adapters_of_one_configuration(tmp_path):
    def save(name, r):
        base = BertForSequenceClassification(BertConfig(vocab_size=32, **SIZES))
        get_peft_model(base, LoraConfig(r=2, lora_alpha=r, target_modules=["query"])).save_pretrained(tmp_path / name)
        return tmp_path / name

    folders = [save("a", 2), save("b", 2)]
    trajectory = WeightTrajectory.from_checkpoints(folders, tmp_path / "trajectory", "branches")
    trajectory.verify()
    assert trajectory.is_adapter and {role.role for role in trajectory.roles.values()} == {"fc"}
    base = BertForSequenceClassification(BertConfig(vocab_size=32, **SIZES))
    assert trajectory.load_model("branch-1", base_model=base).peft_config["default"].r == 2
    with pytest.raises(TrajectoryError, match=r"lora_alpha .*is 4 in .*c and 2 in .*a"):
        WeightTrajectory.from_checkpoints([folders[0], save("c", 4)], tmp_path / "other", "branches")


def damage(name):
    def change(folder):
        model = make_resnet()
        if name == "head":
            model.classifier[1] = nn.Linear(16, 7)
        elif name == "dtype":
            model.half()
        elif name == "key":
            model.extra = nn.Linear(1, 1)
        model.save_pretrained(folder)

    return change


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (damage("head"), TrajectoryError, r"'classifier.1.bias' is \(7,\) .* in .*seed-2 and \(4,\) .* in .*seed-0"),
        (damage("dtype"), TrajectoryError, r"torch.float16 in .*seed-2 and .*torch.float32 in .*seed-0"),
        (damage("key"), TrajectoryError, r"'extra.bias' is \(1,\) .* in .*seed-2 and missing in .*seed-0"),
        (pickled, ValueError, r"seed-2 has its weights in pytorch_model.bin"),
        (shutil.rmtree, FileNotFoundError, "seed-2 is neither a folder nor a Hub id"),
        (lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, "seed-2 has no model.safetensors"),
    ],
)
def test_checkpoints_that_do_not_fit(models, tmp_path, change, error, match):
    change(models[2])
    with pytest.raises(error, match=match):
        WeightTrajectory.from_checkpoints(models, tmp_path / "trajectory", "branches")
    assert not (tmp_path / "trajectory").exists()


@pytest.mark.parametrize(
    ("count", "options", "match"),
    [
        (1, {}, "at least two"),
        (2, {"kind": "nested"}, "kind must be one of tail, branches, ordered"),
        (2, {"kind": "ordered"}, "needs num_examples"),
        (2, {"kind": "ordered", "num_examples": [3]}, "each of the 2"),
        (2, {"kind": "ordered", "num_examples": [3, 5]}, "subsets must shrink"),
        (2, {"num_examples": [3, 2]}, "other kinds take none"),
    ],
)
def test_arguments_that_are_refused(models, tmp_path, count, options, match):
    with pytest.raises(ValueError, match=match):
        WeightTrajectory.from_checkpoints(models[:count], tmp_path / "trajectory", **options)
    assert not (tmp_path / "trajectory").exists()


def test_a_revision_in_the_hub_cache(models, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "cache/models--me--base"
    shutil.copytree(models[1], repo / "snapshots" / ("b" * 40))
    (repo / "refs").mkdir()
    (repo / "refs/v2").write_text("b" * 40)
    trajectory = WeightTrajectory.from_checkpoints([models[0], "me/base@v2"], tmp_path / "trajectory", "branches")
    assert torch.equal(trajectory.tensor(NAME, "branch-1"), make_resnet(1).classifier[1].weight)


def test_the_command(trained, tmp_path, capsys):
    output = tmp_path / "trajectory"
    assert main(["import", str(trained), "--output-dir", str(output)]) == 0
    printed = capsys.readouterr()
    assert f"state-0, tail-0, tail-1 written to {output}" in printed.out and "optimizer" not in printed.err
    assert f"know-hf predict {output} --validation DATASET" in printed.out
    assert main(["import", str(trained), "--output-dir", str(output)]) == 1
    assert "not empty" in capsys.readouterr().err
    manifest = json.loads((output / "trajectory.json").read_text())
    assert [state["kind"] for state in manifest["tail"]] == ["tail", "tail"]
