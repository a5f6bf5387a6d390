"""Linear probe: a linear classifier on frozen features."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from .fine_tuning import Examples, Scores, batches, inputs_of
from .protocols import Trial, check_rates, first_of_each_class, labels_in_words, refined
from .splits import Split, check_labels


@dataclass(frozen=True)
class LinearProbe:
    """A new linear layer on the frozen features, trained at each learning rate of a grid.

    The features are the input of the first layer of the model's head. They are computed once; the layer starts at
    zero and sees all training examples in each step, by Adam with cosine decay to 0. Nothing in it is random.

    Args:
        learning_rates (`tuple[float, ...]`):
            The grid.
        steps (`int`, *optional*, defaults to `200`):
            Optimizer steps.
        labels_per_class (`int`, *optional*):
            Use only that many training examples of each class, the first; all by default.
        batch_size (`int`, *optional*, defaults to `256`):
            Examples per forward pass for the features.
        name (`str`, *optional*, defaults to `"linear-probe"`):
            Name in tables and reports.

    Raises:
        `ValueError`: If the grid is empty or repeats a rate.
    """

    learning_rates: tuple[float, ...]
    steps: int = 200
    labels_per_class: int | None = None
    batch_size: int = 256
    name: str = "linear-probe"
    on_source = False

    def __post_init__(self) -> None:
        check_rates(self.learning_rates)

    @property
    def what(self) -> str:
        return f"a linear probe with {labels_in_words(self.labels_per_class)}"

    def trials(
        self, model: PreTrainedModel, split: Split, seed: int, evaluate: Any, measures: Any = (), refinement: int = 1
    ) -> Iterator[Trial]:
        """Run all trials, as [`MeasuringProtocol`]; a probe has its own accuracy and loss instead of `evaluate`."""
        num_labels = split.num_labels or model.config.num_labels
        check_labels(split, f"the split of {self.name!r}", num_labels)
        train = first_of_each_class(split.train, self.labels_per_class)
        parts = [
            (features(model, examples, self.batch_size), examples["labels"].to(model.device))
            for examples in (train, split.validation, split.test)
        ]
        for learning_rate in refined(self.learning_rates, refinement):
            probe = self._trained(*parts[0], num_labels, learning_rate)
            validation, test = (_scores(probe, *part) for part in parts[1:])
            yield Trial(learning_rate, validation, test)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "linear_probe", **asdict(self)}

    def _trained(self, inputs: Tensor, labels: Tensor, num_labels: int, learning_rate: float) -> nn.Linear:
        probe = nn.Linear(inputs.shape[1], num_labels, device=inputs.device)
        nn.init.zeros_(probe.weight)
        nn.init.zeros_(probe.bias)
        optimizer = torch.optim.Adam(probe.parameters(), lr=learning_rate)
        schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=self.steps)
        for _ in range(self.steps):
            optimizer.zero_grad()
            cross_entropy(probe(inputs), labels).backward()
            optimizer.step()
            schedule.step()
        return probe


@torch.no_grad()
def features(model: PreTrainedModel, examples: Examples, batch_size: int = 256) -> Tensor:
    """Compute the input of the first layer of a model's head.

    Args:
        model (`PreTrainedModel`):
            A classifier with a head on its base model.
        examples (mapping of tensors):
            Keyword arguments of the model.
        batch_size (`int`, *optional*, defaults to `256`):
            Examples per forward pass.

    Returns:
        `torch.Tensor` of shape `(N, features)`, float32, on the device of the model.

    Raises:
        `ValueError`: If the model has no head, or its head takes more than one vector per example.
    """
    body = set(model.base_model.modules())
    outside = [module for module in model.modules() if module not in body and module is not model]
    layers = [module for module in outside if next(module.parameters(recurse=False), None) is not None]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no head to read features from; use its class for classification")
    inputs: list[Tensor] = []

    def store(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if len(inputs) == before:  # the first layer that runs
            inputs.append(arguments[0].detach().float())

    training = model.training
    hooks = [layer.register_forward_pre_hook(store) for layer in layers]
    model.eval()
    try:
        for batch in batches(inputs_of(examples), batch_size, device=model.device):
            before = len(inputs)
            model(**batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    shape = tuple(inputs[0].shape[1:])
    if len(shape) != 1:
        raise ValueError(f"the head of {type(model).__name__} takes {shape} values per example; leave out the probe")
    return torch.cat(inputs)


@torch.no_grad()
def _scores(probe: nn.Linear, inputs: Tensor, labels: Tensor) -> Scores:
    logits = probe(inputs)
    accuracy = float((logits.argmax(dim=1) == labels).float().mean())
    return {"accuracy": accuracy, "loss": float(cross_entropy(logits, labels))}
