"""What is measured of an arm: its weights as they are, and transfer with a learning rate that is tuned for each arm.

Examples are a mapping of tensors whose first axis counts the examples, keyword arguments of the model with "labels"
among them; the loss is the model's own.

The number of trials is the same for all arms. A protocol has a grid of R learning rates, and every arm has K trials
at each of them. An arm whose own options are tuned too (the factor of a shrink) spends its K trials on K settings of
them. An arm without options spends them on K learning rates around each one of the grid, so that it tries R · K rates
where the other tries K settings at R rates each; one with K/2 settings is between the two ([`refined`]).
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from .comparison import ACCURACY, LOSS, Measure
from .fine_tuning import Examples, batches, by_length, fine_tune, train_parameters, with_new_head
from .splits import Split

Scores = dict[str, float]


@dataclass(frozen=True)
class Trial:
    """One attempt.

    Attributes:
        learning_rate (`float`, *optional*): Its learning rate, if anything was trained.
        validation, test (`dict[str, float]`): From the name of each measure to its value.
    """

    learning_rate: float | None
    validation: Scores
    test: Scores


Evaluate = Callable[[PreTrainedModel, Examples], Scores]


class MeasuringProtocol(Protocol):
    """What the engine asks of a protocol; those here have it, and so may any class."""

    @property
    def name(self) -> str: ...

    @property
    def what(self) -> str:
        """What it measures, as it stands in a sentence."""

    @property
    def on_source(self) -> bool:
        """Whether it measures on the source task instead of the downstream one."""

    def trials(
        self,
        model: PreTrainedModel,
        split: Split,
        seed: int,
        evaluate: Evaluate,
        measures: Sequence[Measure] = (ACCURACY, LOSS),
        refinement: int = 1,
    ) -> Iterator[Trial]:
        """All trials of one arm at one setting of its options.

        Args:
            model (`PreTrainedModel`): The initial weights; left as they are.
            split ([`Split`]): The data.
            seed (`int`): Of heads and of the order of examples: with the same seed every arm gets the same.
            evaluate (callable): From a model and examples to its scores.
            measures (sequence of [`Measure`], *optional*): What is chosen by on the way, the most important first.
            refinement (`int`, *optional*, defaults to `1`): Trials at each learning rate of the grid, see [`refined`].
        """

    def to_dict(self) -> dict[str, Any]:
        """Its settings, JSON values only."""


@dataclass(frozen=True)
class AsTheyAre:
    """The source task with the weights as they are: nothing is trained, so that there is one trial a setting."""

    name: str = "source"
    on_source = True
    what = "the source task, weights as they are"

    def trials(
        self,
        model: PreTrainedModel,
        split: Split,
        seed: int,
        evaluate: Evaluate,
        measures: Sequence[Measure] = (ACCURACY, LOSS),
        refinement: int = 1,
    ) -> Iterator[Trial]:
        yield Trial(None, evaluate(model, split.validation), evaluate(model, split.test))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "as_they_are", **asdict(self)}


@dataclass(frozen=True)
class FineTuning:
    """Fine-tuning: the new head alone, then all weights at each learning rate of a grid.

    Two phases as in the KNOW paper's code; there the learning rates are fixed, here every arm tries the whole grid. A
    new head on trained features distorts them while it is learned (Kumar et al., arXiv 2202.10054), so that without
    the first phase little is left to compare.

    Args:
        learning_rates (`tuple[float, ...]`): Tried one by one for all weights, Adam, cosine decay to 0.
        steps (`int`, *optional*, defaults to `40`): Optimizer steps of all weights.
        head_steps (`int`, *optional*, defaults to `100`): Optimizer steps of the head before, the rest frozen.
        head_learning_rate (`float` or `tuple[float, ...]`, *optional*, defaults to `1e-2`): Of the head alone. Arms
            differ in the size of their features: of several rates the one is taken whose head is best on validation
            data, for each arm, setting and draw.
        batch_size (`int`, *optional*): Examples of a step; by default all of them.
        labels_per_class (`int`, *optional*): Only the first so many training examples of each class; by default all.
        name (`str`, *optional*, defaults to `"few-shot"`): What tables and reports call it.

    Raises:
        `ValueError`: for an empty grid, or one that names a rate twice.
    """

    learning_rates: tuple[float, ...]
    steps: int = 40
    head_steps: int = 100
    head_learning_rate: float | tuple[float, ...] = 1e-2
    batch_size: int | None = None
    labels_per_class: int | None = None
    name: str = "few-shot"
    on_source = False

    def __post_init__(self) -> None:
        check_rates(self.learning_rates)
        if not isinstance(self.head_learning_rate, float | int):
            check_rates(self.head_learning_rate)

    @property
    def what(self) -> str:
        labels = "all labels" if self.labels_per_class is None else f"{self.labels_per_class} labels a class"
        return f"{self.name} fine-tuning with {labels}"

    def trials(
        self,
        model: PreTrainedModel,
        split: Split,
        seed: int,
        evaluate: Evaluate,
        measures: Sequence[Measure] = (ACCURACY, LOSS),
        refinement: int = 1,
    ) -> Iterator[Trial]:
        train = first_of_each_class(split.train, self.labels_per_class)
        warm = copy.deepcopy(model) if split.num_labels is None else with_new_head(model, split.num_labels, seed)
        if self.head_steps:
            warm = self._with_trained_head(warm, train, split.validation, seed, evaluate, measures)
        for learning_rate in refined(self.learning_rates, refinement):
            tuned = copy.deepcopy(warm)
            fine_tune(tuned, train, learning_rate, self.steps, seed, self.batch_size)
            yield Trial(learning_rate, evaluate(tuned, split.validation), evaluate(tuned, split.test))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "fine_tuning", **asdict(self)}

    def _with_trained_head(
        self,
        model: PreTrainedModel,
        train: Examples,
        validation: Examples,
        seed: int,
        evaluate: Evaluate,
        measures: Sequence[Measure],
    ) -> PreTrainedModel:
        rates = self.head_learning_rate
        rates = (rates,) if isinstance(rates, float | int) else rates
        models = [copy.deepcopy(model) for _ in rates]
        for warm, rate in zip(models, rates, strict=True):
            backbone = {id(parameter) for parameter in warm.base_model.parameters()}
            head = [parameter for parameter in warm.parameters() if id(parameter) not in backbone]
            if not head:
                raise ValueError(
                    f"{type(warm).__name__} has no head of its own to train for head_steps={self.head_steps}: its"
                    " weights are all its body's, tied ones too; give head_steps=0"
                )
            train_parameters(warm, head, train, rate, self.head_steps, seed, self.batch_size)
        if len(models) == 1:
            return models[0]
        return models[choose([{"validation": or_none(evaluate(warm, validation))} for warm in models], measures)]


def accuracy(model: PreTrainedModel, examples: Examples, batch_size: int | None = None) -> float:
    """Share of the examples whose largest logit is their label, in [0, 1], with the weights as they are.

    Args:
        model (`PreTrainedModel`): A classifier; it is in evaluation mode meanwhile.
        examples (mapping of tensors): Keyword arguments of the model with `"labels"` `(N,)`.
        batch_size (`int`, *optional*): Examples of a forward pass; by default 64 texts, which go in order of length,
            or 512 others.
    """
    return evaluate_classifier(model, examples, batch_size)["accuracy"]


@torch.inference_mode()
def evaluate_classifier(model: PreTrainedModel, examples: Examples, batch_size: int | None = None) -> Scores:
    """`"accuracy"`, as [`accuracy`], and `"loss"`, the mean over the examples of the model's own.

    Args:
        model, examples, batch_size: As of [`accuracy`].
    """
    training = model.training
    model.eval()
    correct, loss, count, order = 0, 0.0, len(examples["labels"]), by_length(examples)
    try:
        for batch in batches(examples, batch_size or (512 if order is None else 64), order, model.device):
            output = model(**batch)
            correct += int((output.logits.argmax(dim=-1) == batch["labels"]).sum())
            loss += float(output.loss) * len(batch["labels"])
    finally:
        model.train(training)
    return {"accuracy": correct / count, "loss": loss / count}


def refined(learning_rates: Sequence[float], refinement: int) -> list[float]:
    """Several rates around each one of a grid, evenly spaced in the logarithm and three digits long.

    With K around each of R rates that are q times the one before on average, they are `rate · q^((j - (K-1)/2) / K)`
    for j = 0 … K - 1: with a grid of even steps, these R · K rates have even steps too.

    Args:
        learning_rates (`Sequence[float]`): The grid.
        refinement (`int`): K.

    Raises:
        `ValueError`: when there is a single rate to refine: it has no step.
    """
    if refinement == 1:
        return list(learning_rates)
    if len(learning_rates) < 2:
        raise ValueError(
            f"a grid of one learning rate, {learning_rates[0]:g}, has no step to refine; give at least two"
        )
    low, high = min(learning_rates), max(learning_rates)
    step = (high / low) ** (1 / (len(learning_rates) - 1))
    places = [(j - (refinement - 1) / 2) / refinement for j in range(refinement)]
    return [float(f"{rate * step**place:.3g}") for rate in sorted(learning_rates) for place in places]


def choose(trials: Sequence[Mapping[str, Any]], measures: Sequence[Measure]) -> int:
    """Index of the trial that is best on validation data by the first measure; of equals by the next, then the first.

    Args:
        trials (sequence of mappings): Each with `"validation"`, from the name of each measure to its value; `None`,
            for a training that diverged, is the worst.
        measures (sequence of [`Measure`]): What decides, the most important first.
    """

    def rank(index: int) -> tuple[float, ...]:
        values = (trials[index]["validation"][measure.name] for measure in measures)
        return tuple(
            -math.inf if value is None else measure.gain(value)
            for value, measure in zip(values, measures, strict=True)
        )

    return max(range(len(trials)), key=rank)


def or_none(scores: Scores) -> dict[str, float | None]:
    """Scores of a model that diverged, some of which are not finite, are none."""
    finite = all(math.isfinite(value) for value in scores.values())
    return {name: float(value) if finite else None for name, value in scores.items()}


def first_of_each_class(examples: Examples, count: int | None) -> Examples:
    """The first `count` examples of each class, in their order; all of them for `None`.

    Raises:
        `ValueError`: when a class has fewer.
    """
    if count is None:
        return examples
    labels, chosen = examples["labels"], []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        if len(members) < count:
            raise ValueError(f"class {int(label)} has {len(members)} training examples, {count} were asked for")
        chosen.append(members[:count])
    rows = torch.cat(chosen).sort().values
    return {name: tensor[rows] for name, tensor in examples.items()}


def check_rates(learning_rates: Sequence[float]) -> None:
    """Raises `ValueError` for an empty grid, or one that names a rate twice."""
    if not learning_rates or len(set(learning_rates)) < len(learning_rates):
        raise ValueError(f"learning_rates must be different and at least one, got {learning_rates}")
