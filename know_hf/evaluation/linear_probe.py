"""The linear probe: how well classes can be told apart by a linear layer on features that are not trained."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .comparison import ACCURACY, LOSS, Measure
from .fine_tuning import Examples, batches
from .protocols import Evaluate, Scores, Trial, check_rates, first_of_each_class, refined
from .splits import Split, check_labels


@dataclass(frozen=True)
class LinearProbe:
    """A new linear layer on the frozen features, trained at each learning rate of a grid.

    Features are what the first layer of the model's head is given. They are computed once; the layer starts at zero
    and sees all training examples at every step, by Adam with cosine decay to 0. Nothing in it is random.

    Args:
        learning_rates (`tuple[float, ...]`): Tried one by one.
        steps (`int`, *optional*, defaults to `200`): Optimizer steps.
        labels_per_class (`int`, *optional*): Only the first so many training examples of each class; by default all.
        batch_size (`int`, *optional*, defaults to `256`): Examples of a forward pass for the features.
        name (`str`, *optional*, defaults to `"linear-probe"`): What tables and reports call it.

    Raises:
        `ValueError`: for an empty grid, or one that names a rate twice.
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
        labels = "all labels" if self.labels_per_class is None else f"{self.labels_per_class} labels a class"
        return f"a linear probe with {labels}"

    def trials(
        self,
        model: PreTrainedModel,
        split: Split,
        seed: int,
        evaluate: Evaluate,
        measures: Sequence[Measure] = (ACCURACY, LOSS),
        refinement: int = 1,
    ) -> Iterator[Trial]:
        """As of [`MeasuringProtocol`]; a probe has an accuracy and a loss of its own, `evaluate` is not asked."""
        num_labels = split.num_labels or model.config.num_labels
        check_labels(split, f"the split of {self.name!r}", num_labels)
        parts = {
            "train": first_of_each_class(split.train, self.labels_per_class),
            "validation": split.validation,
            "test": split.test,
        }
        inputs = {name: features(model, examples, self.batch_size) for name, examples in parts.items()}
        labels = {name: examples["labels"].to(model.device) for name, examples in parts.items()}
        for learning_rate in refined(self.learning_rates, refinement):
            probe = nn.Linear(inputs["train"].shape[1], num_labels, device=model.device)
            nn.init.zeros_(probe.weight)
            nn.init.zeros_(probe.bias)
            self._train(probe, inputs["train"], labels["train"], learning_rate)
            validation, test = (_scores(probe, inputs[name], labels[name]) for name in ("validation", "test"))
            yield Trial(learning_rate, validation, test)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "linear_probe", **asdict(self)}

    def _train(self, probe: nn.Linear, inputs: Tensor, labels: Tensor, learning_rate: float) -> None:
        optimizer = torch.optim.Adam(probe.parameters(), lr=learning_rate)
        for step in range(self.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 + math.cos(math.pi * step / self.steps)) / 2
            optimizer.zero_grad()
            cross_entropy(probe(inputs), labels).backward()
            optimizer.step()


@torch.no_grad()
def features(model: PreTrainedModel, examples: Examples, batch_size: int = 256) -> Tensor:
    """What the first layer of a model's head is given.

    Args:
        model (`PreTrainedModel`): A classifier with a head on top of its base model.
        examples (mapping of tensors): Keyword arguments of the model.
        batch_size (`int`, *optional*, defaults to `256`): Examples of a forward pass.

    Returns:
        `torch.Tensor` of shape `(N, features)`, float32, on the model's device.

    Raises:
        `ValueError`: when the model has no head, or its head takes more than one vector an example.
    """
    of_base = set(model.base_model.modules())
    layers = [
        module
        for module in model.modules()
        if module not in of_base and module is not model and next(module.parameters(recurse=False), None) is not None
    ]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no head to read features from; use its class for classification")
    found: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if len(found) == before:  # the first layer that runs
            found.append(arguments[0].detach().float())

    training = model.training
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    model.eval()
    try:
        for batch in batches({k: v for k, v in examples.items() if k != "labels"}, batch_size, device=model.device):
            before = len(found)
            model(**batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if found[0].ndim != 2:
        raise ValueError(
            f"the head of {type(model).__name__} takes {tuple(found[0].shape[1:])} values an example, a linear probe"
            " needs one vector; leave this protocol out"
        )
    return torch.cat(found)


@torch.no_grad()
def _scores(probe: nn.Linear, inputs: Tensor, labels: Tensor) -> Scores:
    logits = probe(inputs)
    right = float((logits.argmax(dim=1) == labels).float().mean())
    return {"accuracy": right, "loss": float(cross_entropy(logits, labels))}
