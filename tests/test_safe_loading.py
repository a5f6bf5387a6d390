"""Pretrained models are read from safetensors files only."""

import json
import shutil

import pytest
import torch
from conftest import make_resnet
from transformers import AutoModel, AutoModelForImageClassification

from know_hf.checkpoint.safe_loading import from_safetensors


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    make_resnet().save_pretrained(tmp_path / "model", max_shard_size="10KB")
    return tmp_path / "model"


def test_shards_are_read(folder):
    assert (folder / "model.safetensors.index.json").exists()
    model, info = from_safetensors(AutoModelForImageClassification, folder, output_loading_info=True)
    assert not info["missing_keys"] and type(model) is type(make_resnet())


def test_pickled_weights_are_refused_with_the_command_that_converts_them(folder):
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model has only pickled weights.*AutoModel\.from_pretrained.*save_pretrained"):
        from_safetensors(AutoModel, folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        from_safetensors(AutoModel, folder)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "../model.safetensors",
        "/etc/x.safetensors",
        "a/../../x.safetensors",
        "..",
        "",
        5,
        None,
        [],
    ],
)
def test_an_index_names_safetensors_files_of_its_folder(folder, name):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = name
    index.write_text(json.dumps(content))
    shutil.copy(next(folder.glob("*.safetensors")), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"index\.json names .*not a safetensors file"):
        from_safetensors(AutoModel, folder)


def test_states_may_refer_to_earlier_states_of_their_trajectory(folder):
    for path in list(folder.iterdir()):
        (folder / "state-0").mkdir(exist_ok=True)
        path.rename(folder / "state-0" / path.name)
    shutil.copytree(folder / "state-0", folder / "state-1", ignore=shutil.ignore_patterns("*.safetensors"))
    index = folder / "state-1/model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name: f"../state-0/{file}" for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not a safetensors file of its folder"):
        from_safetensors(AutoModelForImageClassification, folder / "state-1")
    (folder / "trajectory.json").write_text("{}")
    _, info = from_safetensors(AutoModelForImageClassification, folder / "state-1", output_loading_info=True)
    assert not info["missing_keys"]


def test_a_config_or_adapter_that_leads_to_pickles_is_refused(folder):
    config = folder / "config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"transformers_weights": "adapter_model.bin"}))
    shutil.copy(next(folder.glob("*.safetensors")), folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"transformers_weights='adapter_model\.bin'"):
        from_safetensors(AutoModelForImageClassification, folder)
    config.write_text(before)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    with pytest.raises(ValueError, match=r"adapter_config\.json without adapter_model\.safetensors"):
        from_safetensors(AutoModelForImageClassification, folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", "[]"), ("config.json", "[" * 100_000), ("config.json", ""), ("shard", ""), ("shard", "x" * 100)],
)
def test_damaged_files_are_named(folder, name, content):
    (next(folder.glob("*.safetensors")) if name == "shard" else folder / name).write_text(content)
    with pytest.raises((ValueError, OSError), match=str(folder)):
        from_safetensors(AutoModelForImageClassification, folder)


@pytest.mark.parametrize(
    "values",
    [
        {"embedding_size": 10**7},
        {"hidden_sizes": [10**6, 10**6]},
        {"hidden_sizes": [-1, 4]},
        {"num_labels": 10**9},
        {"num_hidden_layers": 10**6},
    ],
)
def test_sizes_are_compared_with_the_files_before_memory_is_allocated(folder, values, monkeypatch):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(ValueError, match=str(folder)):
        from_safetensors(AutoModelForImageClassification, folder, ignore_mismatched_sizes=True)
