"""Trainings of a protocol: one after the other, or those of one architecture in a stack."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..fine_tuning import Evaluate, Examples, Scores, evaluate_classifier, fine_tune, head_parameters
from .frozen_body import HeadOnFeatures, with_features
from .stack import Stack, stackable

Choose = Callable[[Sequence[Scores]], int]
Module = tuple[Any, Examples, int]  # a module with its training examples and seed
State = dict[str, Tensor]  # parameters of a head by name

STACK_BYTES = 2**30  # of a stack in a training step
_SMALL_BATCH, _SMALL_MODEL = 16, 500_000  # examples per step and parameters up to which a CPU is faster with a stack


@dataclass(frozen=True)
class Start:
    """Initial weights and data of trainings; `seed` is that of the order of examples and of dropout."""

    model: PreTrainedModel
    train: Examples
    validation: Examples
    test: Examples
    seed: int


@dataclass(frozen=True)
class Training:
    """A training from a start; `head_learning_rate` is `None` if the head has the rate of the body."""

    start: Start
    learning_rate: float
    head_learning_rate: float | None = None


def measure_trained(
    trainings: Sequence[Training],
    steps: int,
    batch_size: int | None,
    evaluate: Evaluate,
    stacked: bool | None = None,
) -> list[tuple[Scores, Scores]]:
    """Train all weights from each start, which stays as it is, and return the scores on validation and test data.

    Trainings run in stacks by default (`stacked=None`) on an accelerator, and on a CPU for tiny models with at most 16
    examples per step: larger steps do not get faster there. Scores are equal up to rounding with and without stacks.

    Raises:
        `ValueError`: If `stacked=True` and the model cannot be stacked.
    """
    results: dict[int, tuple[Scores, Scores]] = {}
    starts = [training.start for training in trainings]
    modules = [(start.model, start.train, start.seed) for start in starts]
    for indices, fits in _groups(modules, batch_size, _whole_models(starts, batch_size, stacked)):
        measure = _measure_stack if fits and len(indices) > 1 else _measure_one_by_one
        scores = measure([trainings[index] for index in indices], steps, batch_size, evaluate)
        results |= zip(indices, scores, strict=True)
    return [results[index] for index in range(len(trainings))]


def with_trained_heads(
    starts: Sequence[Start],
    learning_rates: Sequence[float],
    steps: int,
    batch_size: int | None,
    evaluate: Evaluate,
    choose: Choose,
    stacked: bool | None = None,
) -> list[Start]:
    """Train the heads of models whose bodies are frozen, at each learning rate, and keep the chosen head.

    The body runs once, in evaluation mode: without dropout, and with the BatchNorm statistics of the model. If the
    head cannot be separated from it ([`with_features`]), it runs in training mode in each step instead. The models are
    changed. Heads are stacked by default if they can be.
    """
    cached = [with_features(start.model, start.train) for start in starts]
    separable = [index for index, pair in enumerate(cached) if pair is not None]
    modules = [(*pair, starts[index].seed) for index, pair in enumerate(cached) if pair is not None]
    heads: dict[int, list[State]] = {}
    for group, fits in _groups(modules, batch_size, stacked, len(learning_rates)):
        train = _head_stack if fits else _heads_one_by_one
        states = train([modules[number] for number in group], learning_rates, steps, batch_size)
        heads |= zip((separable[number] for number in group), states, strict=True)
    trained = []
    for index, start in enumerate(starts):
        if index in heads:
            model = _with_best_head(start, heads[index], evaluate, choose)
        else:
            model = _best_whole(start, learning_rates, steps, batch_size, evaluate, choose)
        trained.append(replace(start, model=model))
    return trained


def _whole_models(starts: Sequence[Start], batch_size: int | None, stacked: bool | None) -> bool | None:
    """Decide whether to stack whole models, if the caller did not."""
    model, examples = starts[0].model, len(starts[0].train["labels"])
    small = min(batch_size or examples, examples) <= _SMALL_BATCH and model.num_parameters() <= _SMALL_MODEL
    return None if stacked is None and (small or model.device.type != "cpu") else bool(stacked)


def _groups(
    modules: Sequence[Module], batch_size: int | None, stacked: bool | None, copies: int = 1
) -> Iterator[tuple[list[int], bool]]:
    """Divide modules into groups of equal shapes that fit into memory; tell of each whether it can be stacked.

    Raises:
        `ValueError`: If they must be stacked and cannot be.
    """
    groups: dict[Any, list[int]] = {}
    for index, (module, examples, _) in enumerate(modules):
        sizes = [(name, parameter.shape) for name, parameter in module.named_parameters()]
        groups.setdefault((type(module), *sizes, *((key, t.shape) for key, t in examples.items())), []).append(index)
    for indices in groups.values():
        module, examples, _ = modules[indices[0]]
        fit = None if stacked is False else stackable(copy.deepcopy(module), examples, batch_size)
        if fit is None:
            if stacked:
                raise ValueError(f"{type(module).__name__} cannot be trained in stacks; leave out stacked=True")
            yield indices, False
            continue
        by_data: dict[Any, list[int]] = {}
        for index in indices:
            _, data, seed = modules[index]
            by_data.setdefault((id(data), seed) if fit.one_set else None, []).append(index)
        size = max(1, STACK_BYTES // (fit.nbytes * copies))
        for same in by_data.values():
            yield from ((same[start : start + size], True) for start in range(0, len(same), size))


def _measure_one_by_one(
    trainings: Sequence[Training], steps: int, batch_size: int | None, evaluate: Evaluate
) -> Iterator[tuple[Scores, Scores]]:
    for training in trainings:
        start, model = training.start, copy.deepcopy(training.start.model)
        rates = training.learning_rate, training.head_learning_rate
        fine_tune(model, start.train, rates[0], steps, start.seed, batch_size, head_learning_rate=rates[1])
        yield evaluate(model, start.validation), evaluate(model, start.test)


def _measure_stack(
    trainings: Sequence[Training], steps: int, batch_size: int | None, evaluate: Evaluate
) -> list[tuple[Scores, Scores]]:
    starts = list({id(training.start): training.start for training in trainings}.values())
    of_copy = [starts.index(training.start) for training in trainings]
    template = copy.deepcopy(starts[0].model)
    stack = Stack(template, [training.start.model for training in trainings])
    own_rate = trainings[0].head_learning_rate is not None  # of the head; a model without a head has one rate
    heads = {name for name, _ in head_parameters(template)} if own_rate else set()
    rates = {
        name: [(t.head_learning_rate if name in heads else None) or t.learning_rate for t in trainings]
        for name in stack.parameters
    }
    train = [start.train for start in starts]
    stack.train(train, of_copy, rates, steps, [start.seed for start in starts], batch_size)
    stack.recalibrate(train, of_copy, batch_size)
    if evaluate is evaluate_classifier and template.device.type != "cpu":
        validation, test = ([getattr(start, part) for start in starts] for part in ("validation", "test"))
        return list(zip(stack.evaluate(validation, of_copy), stack.evaluate(test, of_copy), strict=True))
    scores = []
    for index, training in enumerate(trainings):  # a CPU is slower at many models in turns for each layer
        stack.copy_to(index, template)
        scores.append((evaluate(template, training.start.validation), evaluate(template, training.start.test)))
    return scores


def _head_stack(
    heads: Sequence[Module], learning_rates: Sequence[float], steps: int, batch_size: int | None
) -> list[list[State]]:
    template, count = copy.deepcopy(heads[0][0]), len(learning_rates)
    names = _names(template)
    stack = Stack(template, [head for head, *_ in heads for _ in learning_rates], names.__contains__)
    of_copy = [index for index in range(len(heads)) for _ in learning_rates]
    rates = list(learning_rates) * len(heads)
    seeds = [seed for *_, seed in heads]
    stack.train([part for _, part, _ in heads], of_copy, dict.fromkeys(names, rates), steps, seeds, batch_size)
    states = [stack.state(index) for index in range(len(stack))]
    return [states[start : start + count] for start in range(0, len(states), count)]


def _heads_one_by_one(
    heads: Sequence[Module], learning_rates: Sequence[float], steps: int, batch_size: int | None
) -> Iterator[list[State]]:
    for head, examples, seed in heads:
        names, states = _names(head), []
        start = {name: tensor.clone() for name, tensor in head.state_dict().items() if name in names}
        for rate in learning_rates:
            head.load_state_dict(start, strict=False)
            parameters = [parameter for name, parameter in head.named_parameters() if name in names]
            fine_tune(head, examples, rate, steps, seed, batch_size, parameters)
            states.append({name: tensor.clone() for name, tensor in head.state_dict().items() if name in names})
        yield states


def _with_best_head(start: Start, states: Sequence[State], evaluate: Evaluate, choose: Choose) -> PreTrainedModel:
    model, examples = start.model.eval(), start.validation
    module: Any = HeadOnFeatures(model, Tensor)
    best = 0
    if len(states) > 1:
        cached = with_features(model, examples) if evaluate is evaluate_classifier else None
        evaluated, examples = (model, examples) if cached is None else cached
        scores = []
        for state in states:
            module.load_state_dict(state, strict=False)
            scores.append(evaluate(evaluated, examples))
        best = choose(scores)
    module.load_state_dict(states[best], strict=False)
    return model


def _best_whole(
    start: Start,
    learning_rates: Sequence[float],
    steps: int,
    batch_size: int | None,
    evaluate: Evaluate,
    choose: Choose,
) -> PreTrainedModel:
    models = [copy.deepcopy(start.model) for _ in learning_rates]
    for model, rate in zip(models, learning_rates, strict=True):
        head = [parameter for _, parameter in head_parameters(model)]
        fine_tune(model, start.train, rate, steps, start.seed, batch_size, head)
    return models[choose([evaluate(model, start.validation) for model in models]) if len(models) > 1 else 0]


def _names(head: HeadOnFeatures) -> set[str]:
    """Names of the parameters that are trained."""
    return {f"model.{name}" for name, _ in head_parameters(head.model)}
