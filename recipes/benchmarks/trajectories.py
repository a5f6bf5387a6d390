"""Trajectories of random weights in the shapes of real models, and their prediction end to end."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory import current_memory, peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from know_hf import KNOWNModel

NUM_STATES = 5
BLOCK = (1 << 22) - 3  # weights

RESNET = {"layer_type": "basic", "num_labels": 1000}
LLAMA = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}
SMALL_LLAMA = {**LLAMA, "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
SMALL_LLAMA |= {"num_attention_heads": 12, "num_key_value_heads": 4}
MEDIUM_LLAMA = {**SMALL_LLAMA, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24}
MEDIUM_LLAMA |= {"num_attention_heads": 16}
LARGE_LLAMA = {**LLAMA, "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24}

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
    "100m": ("small Llama", "LlamaForCausalLM", SMALL_LLAMA, "bfloat16"),
    "300m": ("medium Llama", "LlamaForCausalLM", MEDIUM_LLAMA, "bfloat16"),
    "1b": ("Llama of the shapes of Llama 3.2 1B", "LlamaForCausalLM", LLAMA, "bfloat16"),
    "3b": ("Llama of the shapes of Llama 3.2 3B", "LlamaForCausalLM", LARGE_LLAMA, "bfloat16"),
    "7b": ("Llama of the shapes of Llama 2 7B", "LlamaForCausalLM", {}, "bfloat16"),
}
SPARSE = {"7b"}  # only the first BLOCK weights of a tensor are not 0, and the files of the states have holes


def plan(size: str) -> dict[str, Any]:
    """Return parameters and disk space of a size, from shapes alone."""
    from know_hf.trajectory import state_nbytes

    title, _, _, dtype = SIZES[size]
    model = _meta_model(size)
    nbytes = state_nbytes(model)[0]
    return {
        "title": title,
        "dtype": dtype,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "disk_bytes": 2 * nbytes if size in SPARSE else 3 * nbytes,  # two states and the prediction
    }


def prepare_trajectory(size: str, folder: Path, threads: int) -> tuple[Callable, dict[str, Any]]:
    """Write `NUM_STATES` states of random weights, piece by piece: the model is never in memory.

    Two sets of files take turns as hard links, so that the disk holds two states.
    """
    import torch

    from know_hf import WeightTrajectory

    torch.set_num_threads(threads)
    model = _meta_model(size)
    checkpoints = [folder.with_name(f"{folder.name}-{number}") for number in range(2)]
    for number, checkpoint in enumerate(checkpoints):
        _write_weights(model, checkpoint, number, size in SPARSE)
    states = [checkpoints[k % 2] for k in range(NUM_STATES)]
    sizes = [1 << (NUM_STATES - k) for k in range(NUM_STATES)]
    WeightTrajectory.from_checkpoints(states, folder, "ordered", num_examples=sizes)
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint)
    return dict, {}


def prepare_prediction(
    trajectory: Path, known: Path, output_dir: Path, way: str, device: str, threads: int
) -> tuple[Callable[[], dict[str, Any]], dict[str, Any]]:
    """Prepare one step of `predict_overflowed_weights`, timed without imports.

    A way is a kernel, or `"linear"` for that predictor instead of KNOWN. With `+gate`, a gate evaluates Θ0 and the
    prediction on ten short texts, and writes one of them.
    """
    import torch

    from know_hf import KNOWNModel, predict_overflowed_weights
    from know_hf.prediction import Gate

    torch.set_num_threads(threads)
    model = KNOWNModel.from_pretrained(known).to(device)
    tokens = torch.arange(1, 9)
    examples = [{"input_ids": tokens + number, "labels": tokens + number} for number in range(10)]
    how = _options(way, model)
    gate = Gate(dataset=examples, batch_size=1, candidates=(), device=device) if way.endswith("+gate") else None
    base = current_memory()

    def run() -> dict[str, Any]:
        start, cpu_start = time.perf_counter(), time.process_time()
        predict_overflowed_weights(trajectory, steps=1, output_dir=output_dir, gate=gate, **how)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        written = sum(path.stat().st_size for path in output_dir.rglob("*") if path.is_file())
        memory = {"memory_bytes": max(0, peak_memory() - base), "peak_bytes": peak_memory()}
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, **memory, "written_bytes": written}

    return run, {}


def prepare_plan(
    trajectory: Path, known: Path, way: str, device: str, threads: int
) -> tuple[Callable[[], dict[str, Any]], dict[str, Any]]:
    """Prepare what `know-hf predict --dry-run` estimates for [`prepare_prediction`]."""
    import torch

    from know_hf import KNOWNModel
    from know_hf.prediction import plan_prediction

    torch.set_num_threads(threads)
    plan = plan_prediction(trajectory, **_options(way, KNOWNModel.from_pretrained(known).to(device)))
    plan.evaluates = way.endswith("+gate")
    return dict, {"planned_peak_bytes": plan.peak_memory, "planned_disk_bytes": plan.disk}


def _options(way: str, model: "KNOWNModel") -> dict[str, Any]:
    kernel = way.removesuffix("+gate")
    return {"predictor": "linear"} if kernel == "linear" else {"known": model, "kernel": kernel}


def _meta_model(size: str) -> "PreTrainedModel":
    import torch
    import transformers

    _, class_name, config, dtype = SIZES[size]
    model_class = getattr(transformers, class_name)
    with torch.device("meta"):
        return model_class(model_class.config_class(**config)).to(getattr(torch, dtype))


def _write_weights(model: "PreTrainedModel", folder: Path, seed: int, is_sparse: bool) -> None:
    """Write a checkpoint of the shapes of a model: normal weights, and buffers of zeros."""
    import torch

    from know_hf.checkpoint import CheckpointWriter, TensorSpec
    from know_hf.model_tensors import names_on_disk, tied_names

    tied, names, parameters = tied_names(model), names_on_disk(model), dict(model.named_parameters())
    tensors = {names[name]: tensor for name, tensor in model.state_dict().items() if name not in tied}
    trained = {names[name] for name in parameters}
    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    writer = CheckpointWriter(folder, {name: TensorSpec(t.dtype, t.shape) for name, t in tensors.items()})
    writer.create()
    # The block is repeated: drawing billions of numbers takes long. Its length divides no matrix.
    generator = torch.Generator().manual_seed(0)
    weights = 0.05 * torch.randn(BLOCK, generator=generator)
    weights += 0.001 * torch.randn(BLOCK, generator=generator.manual_seed(1 + seed))
    for name, tensor in tensors.items():
        block = (weights if name in trained else torch.zeros(BLOCK)).to(tensor.dtype)
        for first in range(0, min(tensor.numel(), BLOCK) if is_sparse else tensor.numel(), BLOCK):
            writer.write(name, block[: tensor.numel() - first], first)
    writer.close(sum(tensor.nbytes for tensor in tensors.values()) if is_sparse else None)
