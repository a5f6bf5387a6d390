"""No file that can be pushed tells the folders of this machine."""

import json

import pytest
import torch
from conftest import SCHEDULE
from doubles.old_paths import record_path
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from know_hf import WeightTrajectory, predict_overflowed_weights
from know_hf.local_paths import public_command, public_config, public_name, public_values
from know_hf.trajectory.merging import merge_adapters

SHA = "a" * 40


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("bert-base-uncased", "bert-base-uncased"),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("models/bert", "models/bert"),
        ("./models/bert", "./models/bert"),
        ("/home/someone/bert", ".../bert"),
        ("/home/someone/bert/", ".../bert"),
        ("~/bert", ".../bert"),
        ("../../someone/bert", ".../bert"),
        ("models/../../bert", ".../bert"),
        (r"C:\Users\someone\bert", ".../bert"),
        (f"/home/someone/.cache/huggingface/hub/models--me--bert/snapshots/{SHA}", "me/bert"),
        (".../bert", ".../bert"),
    ],
)
def test_of_a_local_path_the_last_part_is_public(name, public):
    assert public_name(name) == public
    assert public_name(public) == public


def test_values_commands_and_configs(tmp_path):
    values = {"data": "/home/someone/data", "ids": ["me/data", 3, "/"], "text": "a /home/someone"}
    assert public_values(values) == {"data": ".../data", "ids": ["me/data", 3, "/"], "text": "a /home/someone"}
    command = "know-hf compare digits --output-dir '/home/some one/out' --data me/x=/home/someone/x --known=~/k"
    assert public_command(command) == "know-hf compare digits --output-dir .../out --data me/x=.../x --known=.../k"
    config = {"name_or_path": "/home/someone/bert", "vocab_file": None, "pad_token": "/", "a": [{"x_file": "/b/c"}]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    public = json.loads(public_config(tmp_path / "config.json"))
    assert public == config | {"name_or_path": ".../bert", "a": [{"x_file": ".../c"}]}
    (tmp_path / "config.json").write_text(json.dumps(public))
    assert public_config(tmp_path / "config.json") is None


def tokenizer(path):
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a", name_or_path=str(path), vocab_file=str(path))


@pytest.fixture
def base(tmp_path):
    """A model that was loaded from a folder with a user's name in its path."""
    folder = tmp_path / "home" / "secretuser" / "llama"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def record(model, folder, processing_class=None):
    trajectory = WeightTrajectory.create(folder, SCHEDULE)
    for state in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
        stage = {"num_examples": 10 - state, "steps": 1, "metrics": {"eval_loss": 1.0 + state}}
        trajectory.record(model, processing_class=processing_class, **stage)
    return trajectory


def with_secret(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return [path.name for path in paths if b"secretuser" in path.read_bytes()]


def test_models_and_checkpoints_made_of_them(base, tmp_path):
    trajectory = record(base, tmp_path / "runs" / "trajectory", tokenizer(base.config.name_or_path))
    result = predict_overflowed_weights(trajectory, output_dir=tmp_path / "runs" / "enhanced")
    assert trajectory.base_model == ".../llama"
    assert "llama" in (result.path / "README.md").read_text()
    assert with_secret(tmp_path / "runs") == []
    assert result.load_model().config.vocab_size == 50


def test_adapters_and_what_loads_them(base, tmp_path):
    runs, loaded_from = tmp_path / "runs", base.config.name_or_path
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trajectory = record(get_peft_model(base, config), runs / "trajectory")
    result = predict_overflowed_weights(trajectory, output_dir=runs / "enhanced")
    with pytest.raises(ValueError, match=r"llama .*base_model="):
        merge_adapters(trajectory, output_dir=runs / "merged")
    merged = merge_adapters(trajectory, loaded_from, output_dir=runs / "merged")
    assert (trajectory.base_model, merged.base_model) == (".../llama", ".../llama")
    assert with_secret(runs) == []
    for folder in (result.path, trajectory.path / "state-1"):
        adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(loaded_from), folder)
        assert isinstance(adapted, PeftModel)
        with pytest.raises(OSError, match=r"\.\.\./llama"):  # the base model has to be given
            AutoPeftModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_of_an_old_trajectory(base, tmp_path):
    """0.2 recorded the path of the base model."""
    path = base.config.name_or_path
    trajectory = record(get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "old")
    record_path(trajectory.path, path)
    old = WeightTrajectory(trajectory.path)
    result = predict_overflowed_weights(old, output_dir=tmp_path / "enhanced")
    assert with_secret(result.path) == []
    assert merge_adapters(old, output_dir=tmp_path / "merged").num_states == 5  # the path leads to the base model
    assert with_secret(tmp_path / "merged") == []
