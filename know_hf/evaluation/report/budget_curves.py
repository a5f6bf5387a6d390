"""Budget curves: what an arm reaches with b tuning trials instead of all of them.

An arm that only shifts the best learning rate gains a lot with one trial and nothing with many. The curve of an arm is
the expected test score of the best of b of its n trials by validation score, where each b of the n trials are equally
likely. With the trials in order, worst first, the i-th is the best of b in `C(i-1, b-1) / C(n, b)` of the draws
(without replacement, so that the estimate has no bias: Tang et al., *Showing Your Work Doesn't Always Work*, ACL 2020,
after Dodge et al., *Show Your Work*, EMNLP 2019).
"""

from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

import numpy as np

from ..comparison import Measure
from ..protocols import choose
from ..statistics import mean_and_interval, paired_difference

Draws = Sequence[Sequence[Mapping[str, Any]]]


def expected_best(scores: Sequence[float | None], budget: int) -> float | None:
    """Compute the expected test score of the best of `budget` trials; `None` if that may have diverged.

    The scores are in the order of the validation scores, worst first; `None` for a training that diverged.
    """
    possible = list(scores)[budget - 1 :]
    if None in possible:
        return None
    ways = [comb(rank, budget - 1) for rank in range(budget - 1, len(scores))]
    return float(np.dot(np.array(ways) / comb(len(scores), budget), np.array(possible, dtype=float)))


def budget_curves(draws: Mapping[str, Draws], measures: Sequence[Measure]) -> dict[str, Any] | None:
    """Compute the budget curves of all arms in one protocol, of the first measure; trials are selected by all.

    `draws` has those of every trajectory by arm, naive included, each with its `trials` as in `report.json`.

    Returns:
        `dict`, *optional*: An entry of `budgets` in `report.json` without its protocol; `None` if naive has a single
            trial or the statistics a single value.
    """
    num_trials = len(draws["naive"][0][0]["trials"])
    curves = {arm: _curve(of_arm, measures) for arm, of_arm in draws.items()}
    if num_trials < 2 or len(curves["naive"]) < 2:
        return None
    lengths = {curve.shape[1] for curve in curves.values()}
    budgets = sorted({2**power for power in range(max(lengths).bit_length())} | lengths)
    budgets = [budget for budget in budgets if budget <= max(lengths)]
    naive, arms = curves["naive"], {}
    for arm, curve in curves.items():
        columns = [curve[:, budget - 1] for budget in budgets if budget <= curve.shape[1]]
        entry: dict[str, Any] = {"mean": [], "ci95": [], "naive_trials": []}
        for column in columns:
            finite = bool(np.isfinite(column).all())
            estimate = mean_and_interval(column.tolist()) if finite else None
            entry["mean"].append(estimate and estimate.mean)
            entry["ci95"].append(estimate and [estimate.low, estimate.high])
            entry["naive_trials"].append(estimate and _trials_to_reach(estimate.mean, naive, measures[0]))
        if arm != "naive":
            entry["minus_naive"] = [_difference(column, naive, b) for column, b in zip(columns, budgets, strict=False)]
        arms[arm] = entry
    return {"measure": measures[0].name, "trials": budgets, "arms": arms}


def budget_sentence(
    budgets: Mapping[str, Any], what: str, measure: Measure, methods: Sequence[str], counted: str
) -> str:
    """Say what the best method reaches with one trial in `what`, and how many naive needs for it.

    `counted` is the unit of the statistics.
    """
    arms = budgets["arms"]
    most = budgets["trials"][len(arms["naive"]["mean"]) - 1]
    finite = [name for name in methods if arms[name]["minus_naive"][0] is not None]
    if not finite or arms["naive"]["mean"][0] is None:
        return ""
    best = max(finite, key=lambda name: measure.gain(arms[name]["mean"][0]))
    needed, difference = arms[best]["naive_trials"][0], arms[best]["minus_naive"][0]
    low, high = (measure.format(end, "+") for end in difference["ci95"])
    if needed is None:
        equal = f"naive does not reach it with {most} trials"
    else:
        equal = f"naive needs {needed} trial{'s' if needed > 1 else ''} for it"
    among = f", the best of {len(finite)} methods," if len(finite) > 1 else ""
    return (
        f"With one tuning trial in {what}, {best}{among} reaches {_text(measure, arms[best]['mean'][0])}; {equal}."
        f" Naive reaches {_text(measure, arms['naive']['mean'][0])} with one trial (difference"
        f" {measure.format(difference['mean'], '+')}, 95% interval [{low}, {high}], uncorrected, {counted}) and"
        f" {_text(measure, arms['naive']['mean'][-1])} with {most}."
    )


def _curve(draws: Draws, measures: Sequence[Measure]) -> np.ndarray:
    """Return expected scores with 1 to n trials: `(seeds, n)`, means over draws; `(draws, n)` for one trajectory."""
    values = [[_draw_curve(draw["trials"], measures) for draw in of_seed] for of_seed in draws]
    array = np.array(values, dtype=float)  # None becomes NaN
    return array[0] if len(draws) == 1 else array.mean(axis=1)


def _draw_curve(trials: Sequence[Mapping[str, Any]], measures: Sequence[Measure]) -> list[float | None]:
    remaining, scores = list(trials), []
    while remaining:  # the best first
        scores.append(remaining.pop(choose(remaining, measures))["test"][measures[0].name])
    return [expected_best(scores[::-1], budget) for budget in range(1, len(trials) + 1)]


def _trials_to_reach(score: float, naive: np.ndarray, measure: Measure) -> int | None:
    """Return the smallest number of trials with which naive is at least as good; `None` if there is none."""
    for budget, mean in enumerate(naive.mean(axis=0), start=1):
        if measure.gain(mean - score) >= 0:  # False for NaN
            return budget
    return None


def _difference(column: np.ndarray, naive: np.ndarray, budget: int) -> dict[str, Any] | None:
    if budget > naive.shape[1] or not np.isfinite([*column, *naive[:, budget - 1]]).all():
        return None
    difference = paired_difference(column.tolist(), naive[:, budget - 1].tolist())
    return {"mean": difference.mean, "ci95": [difference.low, difference.high], "p": difference.p_value}


def _text(measure: Measure, value: float) -> str:
    return f"{measure.format(value)} {measure.unit}".replace(" %", "%").rstrip()
