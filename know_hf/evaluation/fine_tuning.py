"""Training and batches of the comparison: small loops in memory, seeded, the same for every arm."""

import copy
import math
from collections.abc import Iterator, Mapping

import torch
from transformers import PreTrainedModel

from ..batch_norm import recalibrate_batch_norm

Examples = Mapping[str, torch.Tensor]


def fine_tune(
    model: PreTrainedModel,
    examples: Examples,
    learning_rate: float,
    steps: int,
    seed: int,
    batch_size: int | None = None,
) -> None:
    """Trains all weights in place by Adam with cosine decay; BatchNorm statistics are then measured on the examples.

    Args:
        model (`PreTrainedModel`): With the loss of its task.
        examples (mapping of tensors): As for [`accuracy`].
        learning_rate (`float`): Of the first step; it falls to 0 along half a cosine.
        steps (`int`): Optimizer steps.
        seed (`int`): Of the order of examples and of dropout.
        batch_size (`int`, *optional*): Examples of a step; by default all of them.
    """
    train_parameters(model, list(model.parameters()), examples, learning_rate, steps, seed, batch_size)
    inputs = {name: tensor for name, tensor in examples.items() if name != "labels"}
    recalibrate_batch_norm(model, batches(inputs, batch_size or len(examples["labels"])))


def with_new_head(model: PreTrainedModel, num_labels: int, seed: int) -> PreTrainedModel:
    """A model of the same class with the given one's body and a new head, which depends on the seed only.

    Args:
        model (`PreTrainedModel`): One with a head, such as `ResNetForImageClassification`; left as it is.
        num_labels (`int`): Classes of the new head.
        seed (`int`): Of the head's weights.

    Raises:
        `ValueError`: when the model has no head: it is its own base model.
    """
    if model.base_model is model:
        raise ValueError(f"{type(model).__name__} has no head to replace; use its class for classification")
    config = copy.deepcopy(model.config)
    config.num_labels = num_labels
    config.problem_type = None  # that of the old head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        renewed = type(model)(config)
    renewed.base_model.load_state_dict(model.base_model.state_dict())
    return renewed.to(device=model.device, dtype=model.dtype)


def batches(
    examples: Examples,
    batch_size: int,
    order: torch.Tensor | None = None,
    device: torch.device | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """The examples in batches, all of them once.

    Where there is an `attention_mask` `(N, T)`, columns at the end that no example of a batch attends to are left out
    of all tensors of T columns: texts padded to the longest of all cost no more than they have to.

    Args:
        examples (mapping of tensors): Tensors of the same length N.
        batch_size (`int`): Examples of a batch; the last one may be smaller.
        order (`torch.Tensor` of shape `(N,)`, *optional*): Indices; by default as they come.
        device (`torch.device`, *optional*): Where the batches go.
    """
    length = len(next(iter(examples.values())))
    for start in range(0, length, batch_size):
        chosen = slice(start, start + batch_size) if order is None else order[start : start + batch_size]
        yield trimmed({name: tensor[chosen].to(device) for name, tensor in examples.items()})


def train_parameters(
    model: PreTrainedModel,
    parameters: list[torch.nn.Parameter],
    examples: Examples,
    learning_rate: float,
    steps: int,
    seed: int,
    batch_size: int | None,
) -> None:
    """Trains the given parameters by Adam with cosine decay to 0; the others are frozen meanwhile, and no gradient is
    computed for them. The model is in evaluation mode afterwards.

    Args:
        model (`PreTrainedModel`): With the loss of its task.
        parameters (`list[torch.nn.Parameter]`): Those of the model that are trained.
        examples, learning_rate, steps, seed, batch_size: As of [`fine_tune`].
    """
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model.requires_grad_(False)
            for parameter in parameters:
                parameter.requires_grad_(True)
            model.train()
            for step, batch in zip(range(steps), _epochs(examples, batch_size, seed, model.device), strict=False):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()
        finally:
            for parameter, required in trainable.items():
                parameter.requires_grad_(required)
    optimizer.zero_grad()
    model.eval()


def _epochs(
    examples: Examples, batch_size: int | None, seed: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    length = len(examples["labels"])
    if batch_size is None or batch_size >= length:
        everything = trimmed({name: tensor.to(device) for name, tensor in examples.items()})
        while True:
            yield everything
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from batches(examples, batch_size, torch.randperm(length, generator=generator), device)


def by_length(examples: Examples) -> torch.Tensor | None:
    """Indices `(N,)` of texts from the shortest to the longest, for batches with little padding; `None` for others."""
    mask = examples.get("attention_mask")
    return None if mask is None else mask.sum(dim=1).argsort(stable=True)


def trimmed(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of texts without the columns at its end that no `attention_mask` `(B, T)` attends to."""
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    columns = mask.shape[1]
    used = int(mask.any(dim=0).nonzero().max()) + 1 if mask.any() else columns
    return {
        name: tensor[:, :used] if tensor.ndim > 1 and tensor.shape[1] == columns else tensor
        for name, tensor in batch.items()
    }
