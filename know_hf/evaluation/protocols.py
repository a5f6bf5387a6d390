"""What is measured of an arm: its weights as they are, and few-shot transfer with a tuned learning rate.

Examples are a mapping of tensors whose first axis counts the examples, keyword arguments of the model with "labels"
among them; the loss is the model's own.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..batch_norm import recalibrate_batch_norm

Examples = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class FewShot:
    """Fine-tuning on few labels: the new head alone first, then all weights at each learning rate of a grid.

    Two phases as in the KNOW paper's code; there the learning rate is fixed, here every arm tries the whole grid.

    Args:
        learning_rates (`tuple[float, ...]`): Tried one by one for all weights, Adam, cosine decay to 0.
        steps (`int`, *optional*, defaults to `40`): Optimizer steps of all weights.
        head_steps (`int`, *optional*, defaults to `100`): Optimizer steps of the head before, the rest frozen.
        head_learning_rate (`float`, *optional*, defaults to `1e-2`): Of the head alone.
        batch_size (`int`, *optional*): Examples of a step; by default all of them.

    Raises:
        `ValueError`: for an empty grid, or one that names a rate twice.
    """

    learning_rates: tuple[float, ...]
    steps: int = 40
    head_steps: int = 100
    head_learning_rate: float = 1e-2
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not self.learning_rates or len(set(self.learning_rates)) < len(self.learning_rates):
            raise ValueError(f"learning_rates must be different and at least one, got {self.learning_rates}")


@dataclass(frozen=True)
class TunedAccuracy:
    """
    Attributes:
        learning_rate (`float`): The one with the highest validation accuracy, the smallest of equals.
        accuracy (`float`): Test accuracy at this learning rate, in [0, 1].
        validation, test (`dict[float, float]`): Accuracy at every learning rate.
    """

    learning_rate: float
    accuracy: float
    validation: dict[float, float]
    test: dict[float, float]


@torch.inference_mode()
def accuracy(model: PreTrainedModel, examples: Examples, batch_size: int = 512) -> float:
    """Share of the examples whose largest logit is their label, in [0, 1], with the weights as they are.

    Args:
        model (`PreTrainedModel`): A classifier; it is in evaluation mode meanwhile.
        examples (mapping of tensors): Keyword arguments of the model with `"labels"` `(N,)`.
        batch_size (`int`, *optional*, defaults to `512`): Examples of a forward pass.
    """
    training = model.training
    model.eval()
    try:
        correct = sum(
            int((model(**batch).logits.argmax(dim=-1) == batch["labels"]).sum())
            for batch in batches(examples, batch_size, device=model.device)
        )
    finally:
        model.train(training)
    return correct / len(examples["labels"])


def few_shot_accuracy(
    model: PreTrainedModel,
    train: Examples,
    validation: Examples,
    test: Examples,
    protocol: FewShot,
    num_labels: int,
    seed: int,
) -> TunedAccuracy:
    """Transfers a model to new classes and tests it at the learning rate that is best on validation examples.

    Args:
        model (`PreTrainedModel`): The initial weights; left as it is.
        train, validation, test (mapping of tensors): Examples of the new task, as for [`accuracy`].
        protocol ([`FewShot`]): The grid and the lengths.
        num_labels (`int`): Classes of the new task.
        seed (`int`): Of the new head and the order of examples: with the same seed every arm gets the same.

    Returns:
        [`TunedAccuracy`]: with the accuracies at every learning rate.
    """
    warm = with_new_head(model, num_labels, seed)
    backbone = {id(parameter) for parameter in warm.base_model.parameters()}
    head = [parameter for parameter in warm.parameters() if id(parameter) not in backbone]
    _train(warm, head, train, protocol.head_learning_rate, protocol.head_steps, seed, protocol.batch_size)

    on_validation, on_test = {}, {}
    for learning_rate in protocol.learning_rates:
        tuned = copy.deepcopy(warm)
        fine_tune(tuned, train, learning_rate, protocol.steps, seed, protocol.batch_size)
        on_validation[learning_rate] = accuracy(tuned, validation)
        on_test[learning_rate] = accuracy(tuned, test)
    best = min(protocol.learning_rates, key=lambda rate: (-on_validation[rate], rate))
    return TunedAccuracy(best, on_test[best], on_validation, on_test)


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
    _train(model, list(model.parameters()), examples, learning_rate, steps, seed, batch_size)
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

    Args:
        examples (mapping of tensors): Tensors of the same length N.
        batch_size (`int`): Examples of a batch; the last one may be smaller.
        order (`torch.Tensor` of shape `(N,)`, *optional*): Indices; by default as they come.
        device (`torch.device`, *optional*): Where the batches go.
    """
    length = len(next(iter(examples.values())))
    for start in range(0, length, batch_size):
        chosen = slice(start, start + batch_size) if order is None else order[start : start + batch_size]
        yield {name: tensor[chosen].to(device) for name, tensor in examples.items()}


def _train(
    model: PreTrainedModel,
    parameters: list[torch.nn.Parameter],
    examples: Examples,
    learning_rate: float,
    steps: int,
    seed: int,
    batch_size: int | None,
) -> None:
    """Trains the given parameters; the others are frozen meanwhile, and no gradient is computed for them."""
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
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
        everything = {name: tensor.to(device) for name, tensor in examples.items()}
        while True:
            yield everything
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from batches(examples, batch_size, torch.randperm(length, generator=generator), device)
