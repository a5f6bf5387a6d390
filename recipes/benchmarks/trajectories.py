"""Trajectories of random weights in the shapes of real models, and their prediction end to end."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory import current_memory, peak_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

NUM_STATES = 5
BLOCK = 1 << 22

RESNET = {"layer_type": "basic", "num_labels": 1000}
LLAMA = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}

# By name: title, transformers class, config, dtype of the states.
SIZES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "tiny": (
        "tiny ResNet",
        "ResNetForImageClassification",
        {**RESNET, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 4},
        "float32",
    ),
    "resnet18": (
        "ResNet18",
        "ResNetForImageClassification",
        {**RESNET, "embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
        "float32",
    ),
    "bert": ("BERT base", "BertModel", {}, "float32"),
    "1b": ("Llama of the shapes of Llama 3.2 1B", "LlamaForCausalLM", LLAMA, "bfloat16"),
}


def plan(size: str) -> dict[str, Any]:
    """Return parameters and disk space of a size, from shapes alone."""
    from know_hf.trajectory import state_nbytes

    title, _, _, dtype = SIZES[size]
    model = _meta_model(size)
    first, further = state_nbytes(model)
    return {
        "title": title,
        "dtype": dtype,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "disk_bytes": first + (NUM_STATES - 1) * further + first,
    }


def prepare_trajectory(size: str, folder: Path, threads: int) -> tuple[Callable, dict[str, Any]]:
    """Record `NUM_STATES` states of random weights; only the model and a copy of one state are in memory."""
    import torch

    from know_hf import WeightTrajectory

    torch.set_num_threads(threads)
    start = time.perf_counter()
    model = _meta_model(size).to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        tensor.zero_()
    trajectory = WeightTrajectory.create(folder)
    for state in range(NUM_STATES):
        for parameter in model.parameters():
            _add_noise(parameter.data, 0.001 if state else 0.05, generator)
        trajectory.record(model, num_examples=1 << (NUM_STATES - state), steps=1)
    return dict, {"recording_seconds": time.perf_counter() - start}


def prepare_prediction(
    trajectory: Path, known: Path, output_dir: Path, kernel: str, device: str, threads: int
) -> tuple[Callable[[], dict[str, Any]], dict[str, Any]]:
    """Prepare one step of `predict_overflowed_weights`, timed without imports."""
    import torch

    from know_hf import KNOWNModel, predict_overflowed_weights

    torch.set_num_threads(threads)
    model = KNOWNModel.from_pretrained(known).to(device)
    base = current_memory()

    def run() -> dict[str, Any]:
        start = time.perf_counter()
        predict_overflowed_weights(trajectory, model, steps=1, output_dir=output_dir, kernel=kernel)
        seconds = time.perf_counter() - start
        written = sum(path.stat().st_size for path in output_dir.rglob("*") if path.is_file())
        return {"seconds": seconds, "memory_bytes": max(0, peak_memory() - base), "written_bytes": written}

    return run, {}


def _meta_model(size: str) -> "PreTrainedModel":
    import torch
    import transformers

    _, class_name, config, dtype = SIZES[size]
    model_class = getattr(transformers, class_name)
    with torch.device("meta"):
        return model_class(model_class.config_class(**config)).to(getattr(torch, dtype))


def _add_noise(weight: "torch.Tensor", scale: float, generator: "torch.Generator") -> None:
    """Add normal noise. One block is repeated over the tensor: drawing a billion numbers takes minutes."""
    import torch

    flat = weight.view(-1)
    noise = scale * torch.randn(min(flat.numel(), BLOCK), generator=generator)
    for piece in flat.split(BLOCK):
        piece += noise[: piece.numel()]
