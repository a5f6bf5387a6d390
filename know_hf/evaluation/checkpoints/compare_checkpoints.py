"""[`compare_checkpoints`]: which of two checkpoints is better on a dataset, before and after fine-tuning."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median_low
from typing import Any

import torch
from accelerate.utils import tqdm
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ...prediction import PredictionResult
from ...prediction.choosing.batch_losses import CALIBRATED, inverse_temperature
from ...prediction.selection import MINIMUM_VALUES, REFERENCE, choose
from ...terminal import aligned
from ...trajectory import WeightTrajectory
from ..comparison import ACCURACY, ALPHA, LOSS, Measure
from ..fine_tuning import Examples, batches, evaluate_classifier, inputs_of, order_by_length
from ..measure import device
from ..protocols import FineTuning, Trial, first_of_each_class, or_none
from ..protocols import choose as choose_trial
from ..splits import Split, check_split
from ..statistics import Estimate, paired_difference, scipy_stats
from .checkpoint_data import are_equal, as_examples, load_checkpoint

_MOST_LABELS, _MOST_VALIDATION = 20, 200  # labels per class, examples
_RATES = (1e-5, 1e-4, 1e-3, 1e-2)  # wide, for models of any size
_CALIBRATED_LOSS = replace(LOSS, name=CALIBRATED)
_LIMITS = (
    "What this cannot show: each checkpoint comes from one training. Another seed gives other weights, and that noise"
    " is in no interval above. A difference says which of these two to use on such data, not that the method which"
    " made one of them helps in general; for that, compare 10 trajectories or more with compare_arms (know-hf compare"
    " SUITE). Test data that a gate has chosen on favours the choice."
)
_EQUAL = "A and B have the same weights: there is nothing to compare. A gate writes Θ0 unless a candidate is better."


@dataclass(frozen=True)
class PairedScore:
    """One quantity of both checkpoints on the same examples or draws.

    Attributes:
        what (`str`):
            What was measured.
        measure ([`Measure`]):
            The measured quantity.
        a, b (`float`):
            Mean of each checkpoint.
        difference (`float`):
            Mean of b minus mean of a.
        low, high (`float`, *optional*):
            95% interval of the difference; `None` if the values do not bound it.
        p_value (`float`, *optional*):
            p value of the null hypothesis of no difference.
        test (`str`):
            The test and what it counts.
    """

    what: str
    measure: Measure
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    test: str

    @property
    def interval(self) -> str:
        ends = [end for end in (self.low, self.high) if end is not None]
        return "–" if len(ends) < 2 else self.measure.interval(Estimate(self.difference, *ends), "+")

    @property
    def sentence(self) -> str:
        """Which checkpoint is better."""
        p_value = 1.0 if self.p_value is None else self.p_value
        better = "B" if self.measure.gain(self.difference) > 0 else "A"
        verdict = f"{better} is significantly better" if p_value < ALPHA else "no significant difference"
        difference = f"{self.measure.format(self.difference, '+')} {self.measure.difference_unit}".rstrip()
        numbers = f"{self.measure.name} of B minus A {difference}, 95% interval {self.interval}"
        return f"{self.what}: {verdict} ({numbers}; {self.test}, p = {p_value:.2g})."


@dataclass(frozen=True)
class CheckpointComparison:
    """Result of [`compare_checkpoints`]; `str(result)` is a verdict, a table and its limits.

    Attributes:
        a, b (`str`):
            The checkpoints.
        scores (`tuple[PairedScore, ...]`):
            Everything that was measured; nothing if both have the same weights.
        notes (`tuple[str, ...]`):
            How it was measured, and what it cannot show.
    """

    a: str
    b: str
    scores: tuple[PairedScore, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        names = [f"A: {self.a}", f"B: {self.b}"]
        if not self.scores:
            return "\n".join([*self.notes, "", *names])
        rows = [["", "A", "B", "B minus A", "95% interval", "p"]]
        for score in self.scores:
            values = [score.measure.format(value) for value in (score.a, score.b)]
            p_value = "–" if score.p_value is None else f"{score.p_value:.2g}"
            name = f"{score.what}, {score.measure.name} {score.measure.unit}".rstrip()
            rows.append([name, *values, score.measure.format(score.difference, "+"), score.interval, p_value])
        verdict = [score.sentence for score in self.scores]
        return "\n".join([*verdict, "", *names, aligned(rows), "", *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def compare_checkpoints(
    a: str | Path | WeightTrajectory | PredictionResult | PreTrainedModel,
    b: str | Path | WeightTrajectory | PredictionResult | PreTrainedModel,
    *,
    test: Any,
    train: Any = None,
    num_labels: int | None = None,
    data_collator: Callable[[list[Any]], Any] | None = None,
    draws: int = 10,
    protocol: FineTuning | None = None,
    base_model: str | Path | None = None,
) -> CheckpointComparison:
    """Compare two checkpoints of a classifier on the same data, for example Θ0 and an enhanced checkpoint.

    Both are evaluated on every example of `test` without training. With `train`, both are also fine-tuned on small
    random subsets of it. Every draw has different examples in a different order and, if `num_labels` is given, a
    different new head; all are the same for both checkpoints. The learning rate of each is the best of a grid on other
    examples of `train`.

    ```python
    print(compare_checkpoints("trajectory/", "enhanced/", train=train_set, test=test_set))
    ```

    Args:
        a, b (`str`, `Path`, [`WeightTrajectory`], [`PredictionResult`] or `PreTrainedModel`):
            A folder, a Hub id such as `"me/model@revision"`, a trajectory (its Θ0) or its folder, a prediction, or a
            model, which may have an adapter.
        test, train (mapping of tensors or `torch.utils.data.Dataset`):
            Examples with `labels`. `train` is *optional*.
        num_labels (`int`, *optional*):
            Number of classes of new heads, to fine-tune on a different task. The checkpoints are then not evaluated
            before fine-tuning. By default, the heads are kept.
        data_collator (`Callable`, *optional*):
            Collates the examples of a dataset, as in `Trainer`; needed for texts of different lengths.
        draws (`int`, *optional*, defaults to `10`):
            Number of subsets to fine-tune on, at least 2.
        protocol ([`FineTuning`], *optional*):
            Learning rates, steps and number of labels per class; by default four rates from 1e-5 to 1e-2, 20 steps,
            and 20 labels per class or half of the smallest class.
        base_model (`str` or `Path`, *optional*):
            Hub id or folder of the base model of adapters; by default the one that they name.

    Raises:
        `ValueError`: If the models are not classifiers with the classes of `test`, `test` has fewer than 10 examples,
            `num_labels` is given without `train`, `draws` is below 2, or a class of `train` has too few examples.
        `FileNotFoundError`: If a checkpoint does not exist.
        `ImportError`: If scipy is missing.
    """
    scipy_stats()
    if num_labels is not None and train is None:
        raise ValueError(f"num_labels={num_labels} needs new heads, which must be trained; pass train as well")
    if train is not None and draws < 2:
        raise ValueError(f"draws must be at least 2, got {draws}")
    given: list[str | Path | PreTrainedModel] = [
        x.path if isinstance(x, WeightTrajectory | PredictionResult) else x for x in (a, b)
    ]
    models = [load_checkpoint(checkpoint, base_model).to(device()) for checkpoint in given]
    first, second = (str(x) if isinstance(x, str | Path) else type(x).__name__ for x in given)
    tested = as_examples(test, models[0], data_collator)
    trained = tested if train is None else as_examples(train, models[0], data_collator)
    for name, model in zip((first, second), models, strict=True):
        _check(trained, tested, model, name, num_labels)
    if train is not None:
        count = _labels_per_class(trained, protocol)
        protocol = protocol or FineTuning(_RATES, 20, 0 if num_labels is None else 100, labels_per_class=count)
    if are_equal(*(model.state_dict() for model in models)):
        return CheckpointComparison(first, second, (), (_EQUAL,))
    scores: list[PairedScore] = []
    notes: list[str] = []
    if num_labels is None:
        scores += _zero_shot(models, (first, second), tested)
        calibrated = "The calibrated loss is the loss after temperature scaling of each checkpoint on these examples."
        notes.append(f"Zero-shot: the intervals are over {len(tested['labels'])} test examples. {calibrated}")
    if protocol is not None and train is not None:
        splits = [Split(*_draw(trained, count, draw), tested, num_labels) for draw in range(draws)]
        score, note = _fine_tuned(models, splits, protocol)
        scores.append(score)
        notes.append(note)
    return CheckpointComparison(first, second, tuple(scores), (*notes, _LIMITS))


def _zero_shot(models: Sequence[PreTrainedModel], names: Sequence[str], test: Examples) -> list[PairedScore]:
    what, examples = "Zero-shot", f"{len(test['labels'])} examples"
    logits, labels = zip(*(_outputs(model, test) for model in models), strict=True)
    a_right, b_right = ((of.argmax(dim=-1) == labels[0]).double().tolist() for of in logits)
    d = paired_difference(b_right, a_right)
    changes = [b - a for a, b in zip(a_right, b_right, strict=True) if a != b]
    only_b, only_a = changes.count(1), changes.count(-1)
    p_value = float(scipy_stats().binomtest(only_b, len(changes)).pvalue) if changes else 1.0
    test_of = f"McNemar's test over {examples}, of which only B gets {only_b} right and only A {only_a}"
    scores = [PairedScore(what, ACCURACY, mean(a_right), mean(b_right), d.mean, d.low, d.high, p_value, test_of)]
    scales = [inverse_temperature(of, labels[0]) for of in logits]
    for measure, factors in ((LOSS, (1.0, 1.0)), (_CALIBRATED_LOSS, scales)):
        a, b = (
            cross_entropy(factor * of, labels[0], reduction="none").tolist()
            for factor, of in zip(factors, logits, strict=True)
        )
        for name, losses in zip(names, (a, b), strict=True):
            if not all(map(math.isfinite, losses)):
                raise ValueError(f"{name} has a loss that is not finite on the test data; the weights are not usable")
        loss = choose({REFERENCE: a, "B": b}).candidates[1]
        values = mean(a), mean(b), mean(b) - mean(a), loss.low, loss.high, loss.p_value
        scores.append(PairedScore(what, measure, *values, f"studentised bootstrap of {examples}"))
    return scores


def _fine_tuned(
    models: Sequence[PreTrainedModel], splits: Sequence[Split], protocol: FineTuning
) -> tuple[PairedScore, str]:
    chosen: list[list[Trial]] = [[], []]
    for seed, split in enumerate(tqdm(splits, main_process_only=True, desc="fine-tuning")):
        for of_model, model in zip(chosen, models, strict=True):
            (trials,) = protocol.trials_of([(model, split, seed)], evaluate_classifier)
            validation = [{"validation": or_none(trial.validation)} for trial in trials]
            of_model.append(trials[choose_trial(validation, (ACCURACY, LOSS))])
    a, b = ([trial.test[ACCURACY.name] for trial in of_model] for of_model in chosen)
    d, test_of = paired_difference(b, a), f"paired t-test over {len(splits)} draws"
    what = f"{protocol.what[:1].upper()}{protocol.what[1:]}"
    score = PairedScore(what, ACCURACY, mean(a), mean(b), d.mean, d.low, d.high, d.p_value, test_of)
    medians = [median_low(trial.learning_rate or 0.0 for trial in of_model) for of_model in chosen]
    grid, (a_rate, b_rate) = protocol.learning_rates, (f"{rate:g}" for rate in medians)
    wider = ""
    if len(grid) > 1 and {min(grid), max(grid)} & {*medians}:
        wider = (
            f" They are at the edge of the grid, {min(grid):g} to {max(grid):g}: a rate outside may be better. In"
            " Python, compare_checkpoints(protocol=FineTuning(learning_rates=…)) evaluates other rates."
        )
    head = "" if splits[0].num_labels is None else ", of the new head"
    note = (
        f"{what}: the interval is over {len(splits)} draws of the examples{head} and of their order, the same for"
        f" both. Each has the best of {len(grid)} learning rates, by validation examples (median {a_rate} for A,"
        f" {b_rate} for B).{wider} The draws share the training data and the test examples."
    )
    return score, note


@torch.inference_mode()
def _outputs(model: PreTrainedModel, examples: Examples) -> tuple[Tensor, Tensor]:
    """Return the logits and labels of all examples, in the same order for every model."""
    model.eval()
    logits, labels = [], []
    for batch in batches(examples, 64, order_by_length(examples), model.device):
        labels.append(batch.pop("labels"))
        logits.append(model(**batch).logits.float())
    return torch.cat(logits), torch.cat(labels)


def _draw(train: Examples, count: int, seed: int) -> tuple[Examples, Examples]:
    """Return `count` random examples of each class, and others for validation."""
    order = torch.randperm(len(train["labels"]), generator=torch.Generator().manual_seed(seed))
    few = first_of_each_class({"labels": train["labels"][order], "row": order}, count)["row"]
    others = order[~torch.isin(order, few)][:_MOST_VALIDATION]
    first, second = ({name: tensor[rows] for name, tensor in train.items()} for rows in (few, others))
    return first, second


def _labels_per_class(train: Examples, protocol: FineTuning | None) -> int:
    labels, counts = train["labels"].unique(return_counts=True)
    smallest = int(counts.min())
    count = min(_MOST_LABELS, smallest // 2) if protocol is None else protocol.labels_per_class or smallest // 2
    if not 1 <= count < smallest:
        raise ValueError(
            f"class {int(labels[counts.argmin()])} of train has {smallest} examples, too few for {max(count, 1)} per"
            " draw and others for validation; pass more examples, or a protocol with fewer labels_per_class"
        )
    return count


@torch.inference_mode()
def _check(train: Examples, test: Examples, model: PreTrainedModel, name: str, num_labels: int | None) -> None:
    labels = test.get("labels")
    if labels is None or labels.ndim != 1:
        raise ValueError("test needs 'labels', one class per example; compare_checkpoints compares classifiers")
    if len(labels) < MINIMUM_VALUES:
        raise ValueError(f"test has {len(labels)} examples; an interval needs at least {MINIMUM_VALUES}")
    kind = type(model).__name__
    try:
        output = model.eval()(**next(batches(inputs_of(test), 1, device=model.device)))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:  # the model takes other inputs
        raise ValueError(f"{name} is a {kind}, which cannot evaluate test ({error}); give a classifier") from error
    logits = getattr(output, "logits", None)
    is_choice = kind.endswith("ForMultipleChoice")  # a score per choice
    if logits is None or logits.ndim != 2 or logits.shape[-1] < 2 or is_choice:
        raise ValueError(f"{name} is a {kind}, which gives no score per class; give a classifier")
    if num_labels is None and (problem := model.config.problem_type) not in (None, "single_label_classification"):
        raise ValueError(f"{name} is for {problem} (problem_type in its config), not for one class per example")
    check_split(Split(train, train, test, num_labels or logits.shape[-1]), f"the data for {name}", classifies=True)
