"""Protocols: what is measured of an arm, with the same number of trials for every arm.

Examples are a mapping of tensors whose first axis counts the examples, keyword arguments of the model with "labels"
among them; the loss is the model's own.

A protocol has a grid of R learning rates, or of R pairs of rates of body and head, and every arm has K trials at each
of them. An arm with options of its own (the factor of a shrink) spends its K trials on K settings of them. An arm
without options spends them on K learning rates around each one of the grid: it evaluates R · K rates, where the other
evaluates K settings at R rates each. An arm with K/2 settings is between the two ([`refined`]).
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from .comparison import ACCURACY, LOSS, Measure
from .fine_tuning import Evaluate, Examples, Scores, head_parameters, with_new_head
from .splits import Split
from .trials import Start, Training, measure_trained, with_trained_heads


@dataclass(frozen=True)
class Trial:
    """Scores of one setting.

    Attributes:
        learning_rate (`float`, *optional*):
            Learning rate; `None` without training.
        validation, test (`dict[str, float]`):
            From the name of each measure to its value.
        options (`dict[str, float]`):
            Other settings of the protocol, such as the penalty of a ridge regression.
        head_learning_rate (`float`, *optional*):
            Learning rate of the head, if it is not that of the body.
    """

    learning_rate: float | None
    validation: Scores
    test: Scores
    options: Mapping[str, float] = field(default_factory=dict)
    head_learning_rate: float | None = None


class MeasuringProtocol(Protocol):
    """Interface of a protocol; any class with it can be passed to [`compare_arms`]."""

    @property
    def name(self) -> str: ...

    @property
    def what(self) -> str:
        """What it measures, such as `"few-shot fine-tuning"`; sentences start with it."""

    @property
    def on_source(self) -> bool:
        """Whether it measures on the source task instead of the target task."""

    def trials(
        self,
        model: PreTrainedModel,
        split: Split,
        seed: int,
        evaluate: Evaluate,
        measures: Sequence[Measure] = (ACCURACY, LOSS),
        refinement: int = 1,
    ) -> Iterator[Trial]:
        """Run all trials of one arm at one setting of its options.

        Args:
            model (`PreTrainedModel`):
                The initial weights; they are not changed.
            split ([`Split`]):
                The data.
            seed (`int`):
                Seed of heads and of the order of examples, the same for every arm.
            evaluate (`Callable`):
                From a model and examples to its scores.
            measures (sequence of [`Measure`], *optional*):
                Measures to choose by, the most important first.
            refinement (`int`, *optional*, defaults to `1`):
                Trials at each learning rate of the grid, see [`refined`].
        """

    def to_dict(self) -> dict[str, Any]:
        """Settings, JSON values only."""


@dataclass(frozen=True)
class ZeroShot:
    """The source task without further training: one trial per setting."""

    name: str = "source"
    on_source = True
    what = "the source task, zero-shot"

    def trials(
        self, model: PreTrainedModel, split: Split, seed: int, evaluate: Evaluate, *_: Any, **__: Any
    ) -> Iterator[Trial]:
        yield Trial(None, evaluate(model, split.validation), evaluate(model, split.test))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "as_they_are", **asdict(self)}  # the name of 0.1, which comparison folders store


@dataclass(frozen=True)
class FineTuning:
    """Fine-tuning: the new head alone, then all weights at each learning rate of a grid.

    A new head on trained features distorts them while it is learned (Kumar et al., arXiv 2202.10054), hence the first
    phase. The KNOW paper's code has the same two phases with fixed learning rates.

    Args:
        learning_rates (`tuple[float, ...]`):
            Grid for all weights, or for the body if the head has a grid of its own; Adam with cosine decay to 0.
        steps (`int`, *optional*, defaults to `40`):
            Optimizer steps for all weights.
        head_steps (`int`, *optional*, defaults to `100`):
            Optimizer steps for the head before, with the body frozen.
        head_learning_rate (`float` or `tuple[float, ...]`, *optional*, defaults to `1e-2`):
            Learning rate for the head. Of several, the best on validation data is used for each arm, setting and draw.
        batch_size (`int`, *optional*):
            Examples per step; all by default.
        labels_per_class (`int`, *optional*):
            Number of training examples of each class to use, the first ones; all by default.
        name (`str`, *optional*, defaults to `"few-shot"`):
            Name in tables and reports.
        head_rates (`tuple[float, ...]`, *optional*):
            Grid for the head while all weights are trained: each of its rates is combined with each of
            `learning_rates`. By default head and body have one rate. Arms differ in the size of their features, and
            one rate favours those whose features suit it.
        one_trial (`bool`, *optional*, defaults to `False`):
            Give every arm a single trial, at the given rates and with the first of its settings: a fixed recipe.
            Every grid then has one rate.

    Raises:
        `ValueError`: If a grid is empty, repeats a rate, or has several rates for one trial.
    """

    learning_rates: tuple[float, ...]
    steps: int = 40
    head_steps: int = 100
    head_learning_rate: float | tuple[float, ...] = 1e-2
    batch_size: int | None = None
    labels_per_class: int | None = None
    name: str = "few-shot"
    head_rates: tuple[float, ...] = ()
    one_trial: bool = False
    on_source = False

    def __post_init__(self) -> None:
        check_rates(self.learning_rates)
        check_rates(self._first_rates)
        if self.head_rates:
            check_rates(self.head_rates)
        if self.one_trial:
            for name in ("learning_rates", "head_rates", "head_learning_rate"):
                if isinstance(rates := getattr(self, name), Sequence) and len(rates) > 1:
                    raise ValueError(f"one_trial has one rate, got {name}={rates}; remove rates or one_trial")

    @property
    def grid(self) -> tuple[float, ...]:
        """The grid that [`refined`] refines."""
        return self.learning_rates

    @property
    def what(self) -> str:
        labels = labels_in_words(self.labels_per_class)
        return f"{self.name} fine-tuning with {labels}{' in one trial' if self.one_trial else ''}"

    def trials(
        self,
        model: PreTrainedModel,
        split: Split,
        seed: int,
        evaluate: Evaluate,
        measures: Sequence[Measure] = (ACCURACY, LOSS),
        refinement: int = 1,
    ) -> Iterator[Trial]:
        (trials,) = self.trials_of([(model, split, seed)], evaluate, measures, refinement)
        yield from trials

    def trials_of(
        self,
        runs: Sequence[tuple[PreTrainedModel, Split, int]],
        evaluate: Evaluate,
        measures: Sequence[Measure] = (ACCURACY, LOSS),
        refinement: int = 1,
        stacked: bool | None = None,
    ) -> list[list[Trial]]:
        """Run all trials of several models, splits and seeds; `stacked` as in [`compare_arms`]."""
        starts = [self._start(*run) for run in runs]
        if self.head_steps:

            def best(scores: Sequence[Scores]) -> int:
                return choose([{"validation": or_none(of_head)} for of_head in scores], measures)

            heads = self._first_rates, self.head_steps, self.batch_size
            starts = with_trained_heads(starts, *heads, evaluate, best, stacked)
        rates = list(product(refined(self.learning_rates, refinement), self.head_rates or (None,)))
        trainings = [Training(start, *pair) for start in starts for pair in rates]
        scores = measure_trained(trainings, self.steps, self.batch_size, evaluate, stacked)
        trials = [
            Trial(training.learning_rate, *pair, head_learning_rate=training.head_learning_rate)
            for training, pair in zip(trainings, scores, strict=True)
        ]
        return [trials[start : start + len(rates)] for start in range(0, len(trials), len(rates))]

    def to_dict(self) -> dict[str, Any]:
        unused = {name for name in ("head_rates", "one_trial") if not getattr(self, name)}  # 0.2 lacks them
        return {"kind": "fine_tuning", **{key: value for key, value in asdict(self).items() if key not in unused}}

    @property
    def _first_rates(self) -> Sequence[float]:
        rates = self.head_learning_rate
        return (rates,) if isinstance(rates, float | int) else rates

    def _start(self, model: PreTrainedModel, split: Split, seed: int) -> Start:
        train = first_of_each_class(split.train, self.labels_per_class)
        start = copy.deepcopy(model) if split.num_labels is None else with_new_head(model, split.num_labels, seed)
        if self.head_steps:
            head_parameters(start)
        return Start(start, train, split.validation, split.test, seed)


def labels_in_words(labels_per_class: int | None) -> str:
    """Return "all labels" or "5 labels per class"."""
    return "all labels" if labels_per_class is None else f"{labels_per_class} labels per class"


def refined(learning_rates: Sequence[float], refinement: int) -> list[float]:
    """Return K = `refinement` rates around each rate of a grid, evenly spaced in the logarithm, of three digits.

    With a mean ratio q between neighbouring rates, they are `rate · q^((j - (K-1)/2) / K)` for j = 0 … K - 1: from an
    evenly spaced grid of R rates follow R · K evenly spaced rates.

    Raises:
        `ValueError`: If K > 1 and the grid has a single rate, and so no spacing.
    """
    if refinement == 1:
        return list(learning_rates)
    if len(learning_rates) < 2:
        raise ValueError(f"learning_rates={tuple(learning_rates)} cannot be refined; give at least two rates")
    low, high = min(learning_rates), max(learning_rates)
    step = (high / low) ** (1 / (len(learning_rates) - 1))
    exponents = [(j - (refinement - 1) / 2) / refinement for j in range(refinement)]
    return [float(f"{rate * step**exponent:.3g}") for rate in sorted(learning_rates) for exponent in exponents]


def choose(trials: Sequence[Mapping[str, Any]], measures: Sequence[Measure]) -> int:
    """Return the index of the trial that is best on validation data: by the first measure, the next among equals, then
    the first trial.

    Each trial has `"validation"`, from the name of each measure to its value; `None`, for a training that diverged, is
    the worst.

    Raises:
        `ValueError`: If a trial lacks a measure.
    """
    for trial in trials:
        if missing := [measure.name for measure in measures if measure.name not in trial["validation"]]:
            raise ValueError(
                f"validation scores have no {missing[0]!r}, only {', '.join(trial['validation'])}; return it from"
                " evaluate and the protocol's trials, or list the measures in ComparisonTask(measures=…)"
            )

    def rank(index: int) -> tuple[float, ...]:
        values = [(trials[index]["validation"][measure.name], measure) for measure in measures]
        return tuple(-math.inf if value is None else measure.gain(value) for value, measure in values)

    return max(range(len(trials)), key=rank)


def or_none(scores: Scores) -> dict[str, float | None]:
    """Replace all scores by `None` if one is not finite: the training diverged."""
    finite = all(math.isfinite(value) for value in scores.values())
    return {name: float(value) if finite else None for name, value in scores.items()}


def first_of_each_class(examples: Examples, count: int | None) -> Examples:
    """Return the first `count` examples of each class in their order; all for `None`.

    Raises:
        `ValueError`: If a class has fewer.
    """
    if count is None:
        return examples
    labels, rows = examples["labels"], []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        if len(members) < count:
            raise ValueError(f"class {int(label)} has {len(members)} examples; lower labels_per_class={count}")
        rows.append(members[:count])
    selected = torch.cat(rows).sort().values
    return {name: tensor[selected] for name, tensor in examples.items()}


def check_rates(learning_rates: Sequence[float]) -> None:
    """Raise a `ValueError` if a grid is empty or repeats a rate."""
    if not learning_rates or len(set(learning_rates)) < len(learning_rates):
        raise ValueError(f"learning rates must be distinct and at least one, got {learning_rates}")
