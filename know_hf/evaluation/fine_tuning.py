"""Seeded training and evaluation of a model on examples in memory, the same for every arm."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from ..batch_norm import recalibrate_batch_norm
from ..model_tensors import restored_modes

Examples = Mapping[str, Tensor]
Scores = dict[str, float]
Evaluate = Callable[[PreTrainedModel, Examples], Scores]


def fine_tune(
    model: PreTrainedModel,
    examples: Examples,
    learning_rate: float,
    steps: int,
    seed: int,
    batch_size: int | None = None,
    parameters: list[torch.nn.Parameter] | None = None,
    head_learning_rate: float | None = None,
) -> None:
    """Train weights in place by Adam with cosine decay to 0; the model is in evaluation mode afterwards.

    Args:
        model (`PreTrainedModel`):
            A model that returns its loss.
        examples (mapping of tensors):
            Keyword arguments of the model, `"labels"` included; the first axis counts the examples.
        learning_rate (`float`):
            Learning rate of the first step.
        steps (`int`):
            Number of optimizer steps.
        seed (`int`):
            Seed of the order of examples and of dropout.
        batch_size (`int`, *optional*):
            Examples per step; all by default.
        parameters (`list[torch.nn.Parameter]`, *optional*):
            Train only these. By default all are trained, and BatchNorm statistics are then recomputed on the examples.
        head_learning_rate (`float`, *optional*):
            Learning rate of the parameters outside of the base model; the same by default.
    """
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    trained = list(trainable) if parameters is None else parameters
    head = set() if head_learning_rate is None else {parameter for _, parameter in head_parameters(model)}
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter not in head], "lr": learning_rate},
        {"params": [parameter for parameter in trained if parameter in head], "lr": head_learning_rate},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            model.train()
            for _, batch in zip(range(steps), _epochs(examples, batch_size, seed, model.device), strict=False):
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()
                schedule.step()
        finally:
            for parameter, required in trainable.items():
                parameter.requires_grad_(required)
    optimizer.zero_grad()
    model.eval()
    if parameters is None:
        recalibrate_batch_norm(model, batches(inputs_of(examples), batch_size or len(examples["labels"])))


def head_parameters(model: PreTrainedModel) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the parameters outside of the base model with their names.

    Raises:
        `ValueError`: If there is none.
    """
    body = set(model.base_model.parameters())
    head = [(name, parameter) for name, parameter in model.named_parameters() if parameter not in body]
    if not head:
        raise ValueError(f"{type(model).__name__} has no head parameters outside its body; use head_steps=0")
    return head


def with_new_head(model: PreTrainedModel, num_labels: int, seed: int) -> PreTrainedModel:
    """Return a model with the body of the given one and a new head that depends on the seed only.

    The given model, such as a `ResNetForImageClassification`, is not changed.

    Raises:
        `ValueError`: If the model is its own base model and so has no head.
    """
    if model.base_model is model:
        raise ValueError(f"{type(model).__name__} has no head to replace; use its class for classification")
    config = copy.deepcopy(model.config)
    config.num_labels = num_labels
    config.problem_type = None  # that of the old head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new_model = type(model)(config)
    new_model.base_model.load_state_dict(model.base_model.state_dict())
    return new_model.to(device=model.device, dtype=model.dtype)


def batches(
    examples: Examples, batch_size: int, order: Tensor | None = None, device: torch.device | None = None
) -> Iterator[dict[str, Tensor]]:
    """Iterate over the examples once in batches on a device, trimmed by [`trimmed`]. The last batch may be smaller.

    `order`, of shape `(N,)`, is the order of the N examples.
    """
    length = len(next(iter(examples.values())))
    for start in range(0, length, batch_size):
        rows = slice(start, start + batch_size) if order is None else order[start : start + batch_size]
        yield trimmed({name: tensor[rows].to(device) for name, tensor in examples.items()})


def trimmed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the last columns of padded texts, those that no `attention_mask` `(B, T)` attends to."""
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    columns = mask.shape[1]
    used = int(mask.any(dim=0).nonzero().max()) + 1 if mask.any() else columns
    return {
        name: tensor[:, :used] if tensor.ndim > 1 and tensor.shape[1] == columns else tensor
        for name, tensor in batch.items()
    }


def inputs_of(examples: Examples) -> Examples:
    """Return the examples without their labels."""
    return {name: tensor for name, tensor in examples.items() if name != "labels"}


def rows_of(examples: Examples) -> list[dict[str, Tensor]]:
    """Return one mapping per example, as the dataset of a gate."""
    return [{name: tensor[row] for name, tensor in examples.items()} for row in range(len(examples["labels"]))]


def accuracy(model: PreTrainedModel, examples: Examples, batch_size: int | None = None) -> float:
    """Compute the accuracy in [0, 1] of a classifier on examples with `"labels"` `(N,)`.

    By default, a forward pass has 64 texts in order of length, or 256 other examples.
    """
    return evaluate_classifier(model, examples, batch_size)["accuracy"]


@torch.inference_mode()
def evaluate_classifier(model: PreTrainedModel, examples: Examples, batch_size: int | None = None) -> Scores:
    """Compute `"accuracy"`, as [`accuracy`], and `"loss"`, the mean loss per example."""
    order = order_by_length(examples)
    correct, loss, count = 0, 0.0, len(examples["labels"])
    with restored_modes(model):
        model.eval()
        for batch in batches(examples, batch_size or (256 if order is None else 64), order, model.device):
            output = model(**batch)
            correct += int((output.logits.argmax(dim=-1) == batch["labels"]).sum())
            loss += float(output.loss) * len(batch["labels"])
    return {"accuracy": correct / count, "loss": loss / count}


@torch.inference_mode()
def evaluate_next_token(model: PreTrainedModel, examples: Examples, batch_size: int = 64) -> Scores:
    """Compute the mean `"loss"` per token of a causal language model, and the `"accuracy"` of its best next token, of
    examples with labels `(N, T)`, without padding.
    """
    correct, loss, count = 0.0, 0.0, len(examples["labels"])
    with restored_modes(model):
        model.eval()
        for batch in batches(examples, batch_size, device=model.device):
            output, labels = model(**batch), batch["labels"][:, 1:]
            correct += float((output.logits[:, :-1].argmax(dim=-1) == labels).float().mean()) * len(labels)
            loss += float(output.loss) * len(labels)
    return {"accuracy": correct / count, "loss": loss / count}


def order_by_length(examples: Examples) -> Tensor | None:
    """Return the order of padded texts by length, so that batches need little padding; `None` for other examples."""
    mask = examples.get("attention_mask")
    return None if mask is None else mask.sum(dim=1).argsort(stable=True)


def _epochs(
    examples: Examples, batch_size: int | None, seed: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    length = len(examples["labels"])
    if batch_size is None or batch_size >= length:
        full_batch = trimmed({name: tensor.to(device) for name, tensor in examples.items()})
        while True:
            yield full_batch
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from batches(examples, batch_size, torch.randperm(length, generator=generator), device)
