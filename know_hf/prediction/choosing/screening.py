"""[`screen_and_choose`]: drop most candidates on a part of the validation data, test the rest on the other part."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..selection import MINIMUM_VALUES, REFERENCE, GateCandidate, GateResult, check_reference, choose

MINIMUM_TO_SCREEN = 80  # the test has most of them, and with fewer values it is less exact

Evaluate = Callable[[str, Sequence[int] | None], float | Sequence[float]]


def screen_and_choose(
    names: Sequence[str],
    evaluate: Evaluate,
    *,
    screening: float = 0.2,
    num_confirmed: int = 5,
    margin: float | None = None,
    seed: int = 0,
    **rule: Any,
) -> GateResult:
    """Choose among many candidates, Θ0 first, with few evaluations.

    `evaluate` returns the losses of a candidate for the numbers of values, or for all. A value can depend on what
    else is evaluated, as with a temperature, so both parts are evaluated for Θ0 too. A random part of the values,
    drawn with the seed, screens the candidates: those with the lowest means are compared with Θ0 by [`choose`] on
    the other values. The error rate counts every candidate, also those that were screened out. Which ones are tested
    depends on the first part alone, so given this part they are a fixed set, and on the independent second part the
    probability that `choose` prefers any member of a fixed set that is not better than Θ0 is at most `level`. An
    average over the first part keeps this bound. A candidate that was screened out cannot be chosen.

    Every candidate is tested on all values, corrected for all of them, if there are fewer than 80 values, no more
    candidates than `num_confirmed`, or `screening=0`.

    Raises:
        `ValueError`: as [`choose`] does.
    """
    rule |= {"margin": margin, "seed": seed}
    reference = check_reference(evaluate(REFERENCE, None), margin)
    count, others = len(reference), [name for name in names if name != REFERENCE]
    if not screening or len(others) <= num_confirmed or count < MINIMUM_TO_SCREEN:
        return choose({REFERENCE: reference.tolist(), **{name: evaluate(name, None) for name in others}}, **rule)
    order = np.random.RandomState(seed % 2**32).permutation(count)
    size = min(max(MINIMUM_VALUES, round(screening * count)), count - MINIMUM_VALUES)
    first, second = np.sort(order[:size]), np.sort(order[size:])
    means = {name: float(np.mean(evaluate(name, first.tolist()))) for name in (REFERENCE, *others)}
    screened = {name: GateCandidate(name, None) for name in others}
    for name in others:
        if math.isfinite(means[name]):
            screened[name] = GateCandidate(name, means[name], means[name] - means[REFERENCE])
    ranked = sorted(screened.values(), key=lambda candidate: math.inf if candidate.loss is None else candidate.loss)
    confirmed = {candidate.name for candidate in ranked[:num_confirmed] if candidate.loss is not None}
    tested = [REFERENCE, *(name for name in others if name in confirmed)]
    result = choose({name: evaluate(name, second.tolist()) for name in tested}, **rule)
    left = tuple(candidate for candidate in ranked if candidate.name not in confirmed)
    return replace(result, screened=left, num_screening_values=size)
