"""Linear probe: a linear classifier on frozen features."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..model_tensors import restored_modes
from .fine_tuning import Examples, Scores, batches, inputs_of, order_by_length
from .protocols import Trial, check_rates, first_of_each_class, labels_in_words, refined
from .splits import Split, check_labels
from .trials import Heads, adam_heads, logistic_heads, logits, ridge_heads

_TEXTS = 64  # most texts of a forward pass, so that they have similar lengths
_OPTIMA = {"ridge": ridge_heads, "logistic": logistic_heads}


@dataclass(frozen=True)
class LinearProbe:
    """A new linear layer on the frozen features.

    The features are the input of the first layer of the model's head. They are computed once, in evaluation mode.
    Nothing in it is random, and the probes of all trials are trained at once.

    Args:
        learning_rates (`tuple[float, ...]`, *optional*):
            Grid of the solver `"adam"`: the layer starts at zero and sees all training examples in each step, by Adam
            with cosine decay to 0.
        steps (`int`, *optional*, defaults to `200`):
            Optimizer steps of Adam.
        labels_per_class (`int`, *optional*):
            Number of training examples of each class to use, the first ones; all by default.
        batch_size (`int`, *optional*, defaults to `256`):
            Examples per forward pass for the features.
        name (`str`, *optional*, defaults to `"linear-probe"`):
            Name in tables and reports.
        solver (`str`, *optional*, defaults to `"adam"`):
            `"adam"`, or an optimum with a penalty on the weights: `"ridge"` (least squares to one-hot classes, in
            closed form) or `"logistic"` (cross-entropy, by L-BFGS).
        penalties (`tuple[float, ...]`, *optional*):
            Grid of `"ridge"` and `"logistic"`, relative to the mean variance of the features.

    Raises:
        `ValueError`: If the solver is unknown, or its grid is empty or repeats a value, or the other grid is given.
    """

    learning_rates: tuple[float, ...] = ()
    steps: int = 200
    labels_per_class: int | None = None
    batch_size: int = 256
    name: str = "linear-probe"
    solver: str = "adam"
    penalties: tuple[float, ...] = ()
    on_source = False

    def __post_init__(self) -> None:
        if self.solver not in ("adam", *_OPTIMA):
            raise ValueError(f"unknown solver {self.solver!r} of a linear probe; use adam, {', '.join(_OPTIMA)}")
        if unused := (self.penalties if self.solver == "adam" else self.learning_rates):
            needed = "learning_rates" if self.solver == "adam" else "penalties"
            raise ValueError(f"solver {self.solver!r} takes {needed}, not {tuple(unused)}; give only {needed}")
        check_rates(self.grid)

    @property
    def grid(self) -> tuple[float, ...]:
        """The grid of the solver."""
        return self.learning_rates if self.solver == "adam" else self.penalties

    @property
    def what(self) -> str:
        return f"a linear probe with {labels_in_words(self.labels_per_class)}"

    def trials(
        self, model: PreTrainedModel, split: Split, seed: int, evaluate: Any, measures: Any = (), refinement: int = 1
    ) -> Iterator[Trial]:
        """Run all trials, as [`MeasuringProtocol`]; a probe has its own accuracy and loss instead of `evaluate`."""
        (trials,) = self.trials_of([(model, split, seed)], evaluate, measures, refinement)
        yield from trials

    def trials_of(
        self,
        runs: Sequence[tuple[PreTrainedModel, Split, int]],
        evaluate: Any,
        measures: Any = (),
        refinement: int = 1,
        stacked: bool | None = None,
    ) -> list[list[Trial]]:
        """Run all trials of several models and splits at once."""
        values = refined(self.grid, refinement)
        groups: dict[Any, list[int]] = {}
        parts = []
        for index, (model, split, _) in enumerate(runs):
            num_labels = split.num_labels or model.config.num_labels
            check_labels(split, f"the split of {self.name!r}", num_labels)
            parts.append(self._features(model, split))
            groups.setdefault((num_labels, *(inputs.shape for inputs, _ in parts[-1])), []).append(index)
        trials: dict[int, list[Trial]] = {}
        for (num_labels, *_), indices in groups.items():
            train, *unseen = (_stacked([parts[index][part] for index in indices]) for part in range(3))
            if self.solver == "adam":
                heads = adam_heads(*train, num_labels, values, self.steps)
            else:
                heads = _OPTIMA[self.solver](*train, num_labels, values)
            validation, test = (_scores(*part, heads) for part in unseen)
            for index, *scores in zip(indices, validation, test, strict=True):
                trials[index] = [self._trial(*of_trial) for of_trial in zip(values, *scores, strict=True)]
        return [trials[index] for index in range(len(runs))]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings; those of the solver are left out for Adam, as comparison folders of 0.1 store it."""
        settings = {"kind": "linear_probe", **asdict(self)}
        return {k: v for k, v in settings.items() if self.solver != "adam" or k not in ("solver", "penalties")}

    def _features(self, model: PreTrainedModel, split: Split) -> list[tuple[Tensor, Tensor]]:
        """Return features and labels of training, validation and test data."""
        parts = first_of_each_class(split.train, self.labels_per_class), split.validation, split.test
        return [(features(model, part, self.batch_size), part["labels"].to(model.device)) for part in parts]

    def _trial(self, value: float, validation: Scores, test: Scores) -> Trial:
        if self.solver == "adam":
            return Trial(value, validation, test)
        return Trial(None, validation, test, {"penalty": value})


@torch.no_grad()
def features(model: PreTrainedModel, examples: Examples, batch_size: int = 256) -> Tensor:
    """Compute the input of the first layer of a model's head, in batches of at most 64 texts, in order of length.

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

    if (order := order_by_length(examples)) is not None:
        batch_size = min(batch_size, _TEXTS)
    with restored_modes(model), ExitStack() as hooks:
        model.eval()
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(store))
        for batch in batches(inputs_of(examples), batch_size, order, model.device):
            before = len(inputs)
            model(**batch)
    shape = tuple(inputs[0].shape[1:])
    if len(shape) != 1:
        raise ValueError(f"the head of {type(model).__name__} takes {shape} values per example; leave out the probe")
    return torch.cat(inputs) if order is None else torch.cat(inputs)[order.argsort()]


def _stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inputs, labels = zip(*pairs, strict=True)
    return torch.stack(inputs), torch.stack(labels)


@torch.no_grad()
def _scores(inputs: Tensor, labels: Tensor, heads: Heads) -> list[list[Scores]]:
    """Return the scores of each set of examples and trial."""
    outputs = logits(inputs, heads)
    targets = labels[:, None].expand(outputs.shape[:-1])
    accuracies = (outputs.argmax(dim=-1) == targets).float().mean(dim=-1)
    losses = cross_entropy(outputs.flatten(0, 2), targets.flatten(), reduction="none").view(targets.shape).mean(dim=-1)
    return [
        [{"accuracy": float(accuracy), "loss": float(loss)} for accuracy, loss in zip(*of_set, strict=True)]
        for of_set in zip(accuracies, losses, strict=True)
    ]
