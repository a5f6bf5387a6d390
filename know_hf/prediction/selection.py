"""[`choose`]: compare candidates with Θ0 by their losses on the same examples.

Losses have a heavy right tail, and a t-test takes the rare large losses it did not see for a gain. The studentised
bootstrap of the largest |t| over all candidates sees the tail and the correlation of candidates (single-step form,
two-sided; Romano and Wolf, *Stepwise Multiple Testing as Formalized Data Snooping*, Econometrica 73, 2005).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..markdown import quantity
from ..terminal import aligned

REFERENCE = "Θ0"
CALIBRATED = "calibrated loss"
_ON_CALIBRATED = (
    f"The {CALIBRATED} is the cross-entropy after temperature scaling: confidence alone does not change it."
)
MINIMUM_VALUES = 10  # with fewer losses the bootstrap cannot separate noise from gain
_ROUNDING = float(np.finfo(np.float32).eps)  # relative, of a loss computed in float32
_MOST_SHOWN = 10  # candidates in a table
_CHUNK = 4_000_000  # random numbers per draw


@dataclass(frozen=True)
class GateCandidate:
    """One candidate of a gate.

    The interval is simultaneous over all candidates, and the p-value, of a two-sided test against the margin,
    corrected for their number. Both are `None` for a single value; the interval also if too few values differ to bound
    it, and the p-value for differences that are all equal.
    """

    name: str
    loss: float | None  # mean; None if it is not finite
    difference: float | None = None  # loss minus that of Θ0; negative is better
    low: float | None = None
    high: float | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class GateResult:
    """The candidates of a gate and its choice; `str(result)` is the verdict, a table and the rule.

    Attributes:
        chosen (`str`):
            Name of the chosen candidate.
        candidates (`tuple[GateCandidate, ...]`):
            The candidates that were tested, Θ0 first.
        metric (`str`):
            Name of the losses.
        num_values (`int`):
            Number of paired losses per candidate.
        level, margin (`float`):
            Level and margin of the rule.
        recipe (`dict`, *optional*):
            How to make the chosen candidate again: its `state` (0 for Θ0, a name for another snapshot, `None`
            for a prediction); for a prediction `predictor` (`None` for the requested
            one), `predictor_options` (`None` for the requested one and for an object) and `steps`; and whether
            BatchNorm statistics were `recalibrated`.
        screened (`tuple[GateCandidate, ...]`):
            The candidates that were screened out, best first; loss and difference are those of the screening.
        num_screening_values (`int`):
            Number of paired losses of the screening, none of which is among `num_values`; 0 without screening.
        requested (`str`, *optional*):
            Name of the candidate that is the requested prediction.
        is_cross_fitted (`bool`):
            Whether the losses are those of branches, see [`CrossFit`]; then "Θ0" stands for the branches themselves.
    """

    chosen: str
    candidates: tuple[GateCandidate, ...]
    metric: str
    num_values: int
    level: float
    margin: float
    recipe: Mapping[str, Any] | None = None
    screened: tuple[GateCandidate, ...] = ()
    num_screening_values: int = 0
    requested: str | None = None
    is_cross_fitted: bool = False

    @property
    def scores(self) -> dict[str, float]:
        """Mean loss of every tested candidate with a finite loss, by name."""
        return {candidate.name: candidate.loss for candidate in self.candidates if candidate.loss is not None}

    @property
    def is_reference(self) -> bool:
        """Whether Θ0 was chosen."""
        return self.chosen == REFERENCE

    @property
    def rule(self) -> str:
        """The decision rule, as sentences."""
        beyond, untested = f" by more than {self.margin:g}" if self.margin else "", ""
        if self.num_values == 1:
            return (
                f"Each candidate has a single loss, so its noise is unknown and no test is possible. The lowest loss"
                f" is chosen if it is below that of {REFERENCE}{beyond}."
            )
        if any(self._is_untested(candidate) for candidate in self.candidates):
            decided = f"is better if it is lower{beyond}" if self.margin else "is chosen only if a margin is set"
            untested = f" A candidate that differs by the same amount on every value cannot be tested: it {decided}."
        return (
            f"A candidate is better than {REFERENCE} if the interval of its paired difference is below"
            f" {-self.margin if self.margin else 0:g} ({1 - self.level:.0%}, simultaneous over all candidates that"
            f" were tested, studentised bootstrap of the largest |t|, Romano and Wolf 2005). Of the better candidates,"
            f" the one with the lowest mean is chosen; without any, {REFERENCE} is kept.{untested}{self._screening}"
            f"{self._branches}{f' {_ON_CALIBRATED}' if self._is_calibrated else ''}"
        )

    @property
    def short_rule(self) -> str:
        """The decision rule, in one line, and what a calibrated loss is."""
        low = f"{-self.margin:g}" if self.margin else "0"
        what = "difference" if self.num_values == 1 else "interval"
        text = f"Only a candidate whose {what} is below {low} can be written; of these, the one with the lowest mean."
        return f"{text}\n{_ON_CALIBRATED}" if self._is_calibrated else text

    @property
    def _is_calibrated(self) -> bool:
        return self.metric.endswith(CALIBRATED)

    @property
    def sentence(self) -> str:
        """The verdict: what was chosen and why."""
        return f"{'Kept' if self.is_reference else 'Chose'} {with_article(self.chosen)}: {self.reason}"

    @property
    def reason(self) -> str:
        """Why it was chosen, in a sentence or two, and how the requested prediction compares with Θ0."""
        others = self.candidates[1:]
        number = quantity(len(others) + len(self.screened), "candidate")
        finite = [candidate for candidate in others if candidate.loss is not None]
        if not finite:
            return f"no other candidate has a finite {self.metric}."
        best = min(finite, key=_rank)
        if self.is_reference:
            noise = "the margin" if self.num_values == 1 else "noise"
            text = f"none of {number} is better by more than {noise}."
            text += f" The best is {with_article(best.name)}: {self._compared(best)}."
        else:
            best = next(candidate for candidate in others if candidate.name == self.chosen)
            is_state = (self.recipe or {}).get("state") is not None
            text = "a recorded state, not a prediction; " if is_state else ""
            text += f"{self._compared(best)}; {number}."
        if self.is_cross_fitted:
            text += " The losses are of two branches in the place of Θ0, each on the half that it has not seen."
        return text if self.requested in (None, best.name) else f"{text} {self._on_requested}"

    @property
    def _on_requested(self) -> str:
        """What the test says about the requested prediction."""
        name = f"{self.requested}," if "," in (self.requested or "") else self.requested
        one = next((candidate for candidate in self.candidates if candidate.name == self.requested), None)
        if one is None:
            return f"{name} was screened out."
        if one.difference is None:
            return f"{name} has no finite {self.metric}."
        verdict = "is neither better nor worse than"
        if _is_better(one, self.num_values, self.level, self.margin):
            verdict = "is better than"
        elif one.difference > 0 and (one.low is None or one.low > 0):
            verdict = "is worse than"
        p_value = "" if one.p_value is None else f", p = {one.p_value:.2g}"
        return f"{name} {verdict} {REFERENCE} ({one.difference:+z.3g}{p_value})."

    @property
    def _screening(self) -> str:
        if not self.num_screening_values:
            return ""
        count = len(self.screened)
        return (
            f" {count} other{'s were' if count > 1 else ' was'} screened out on {self.num_screening_values} batches"
            f" drawn at random; the test used the remaining {self.num_values} alone, so its level holds for all"
            " candidates."
        )

    @property
    def _branches(self) -> str:
        if not self.is_cross_fitted:
            return ""
        return (
            f" Each loss is that of a branch on half of the data, in the place of {REFERENCE} and moved twice as far,"
            f" on a batch of the other half. {REFERENCE} itself has seen both halves and is not tested."
        )

    def _is_untested(self, candidate: GateCandidate) -> bool:
        """Whether its differences are all equal."""
        return self.num_values > 1 and candidate.difference is not None and candidate.p_value is None

    def _compared(self, candidate: GateCandidate) -> str:
        difference = candidate.difference or 0.0
        size = f"{abs(difference):.3g} {'below' if difference < 0 else 'above'} {REFERENCE}"
        text = f"{self.metric} {candidate.loss:.4g}, {size if difference else f'equal to {REFERENCE}'}"
        if self._is_untested(candidate):
            return f"{text} on every value, so its noise is unknown"
        if candidate.p_value is None:
            return text
        interval = "unbounded" if candidate.low is None else f"[{candidate.low:+z.3g}, {candidate.high:+z.3g}]"
        return f"{text} ({1 - self.level:.0%} interval {interval}, p = {candidate.p_value:.2g})"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, as a card takes them."""
        first = {name: getattr(self, name) for name in ("metric", "scores", "chosen", "sentence", "rule")}
        last = {
            name: getattr(self, name)
            for name in ("num_values", "level", "margin", "recipe", "num_screening_values", "requested")
        }
        lists = {name: [asdict(candidate) for candidate in getattr(self, name)] for name in ("candidates", "screened")}
        return {**first, **lists, **last}

    def __str__(self) -> str:
        return f"{self.sentence}\n\n{self.table}\n\n{self.rule}"

    @property
    def table(self) -> str:
        """The tested candidates with their losses and differences from Θ0, best first; at most about ten of them."""
        ranked = sorted(self.candidates[1:], key=_rank)
        shown = [one for one in ranked if one in ranked[:_MOST_SHOWN] or one.name in (self.chosen, self.requested)]
        hidden = len(ranked) - len(shown)
        table = aligned(candidate_rows(self.metric, self.level, (self.candidates[0], *shown)))
        return table + (f"\n{hidden} more in the model card" if hidden else "")


def candidate_rows(metric: str, level: float, candidates: Sequence[GateCandidate]) -> list[list[str]]:
    """Return the cells of a table of candidates, Θ0 first, the others by their losses."""
    rows = [["candidate", metric, f"minus {REFERENCE}", f"{1 - level:.0%} interval", "p (corrected)"]]
    for candidate in (candidates[0], *sorted(candidates[1:], key=_rank)):
        loss = "not finite" if candidate.loss is None else f"{candidate.loss:.4g}"
        difference = "" if candidate.difference is None else f"{candidate.difference:+z.3g}"
        interval = "" if candidate.low is None else f"[{candidate.low:+z.3g}, {candidate.high:+z.3g}]"
        p_value = "" if candidate.p_value is None else f"{candidate.p_value:.2g}"
        rows.append([candidate.name, loss, difference, interval, p_value])
    return rows


def choose(
    losses: Mapping[str, float | Sequence[float]],
    *,
    metric: str = "validation loss",
    level: float = 0.05,
    margin: float | None = None,
    num_resamples: int = 4999,
    seed: int = 0,
) -> GateResult:
    """Compare candidates with Θ0 on the same examples and choose one.

    A candidate is better if its interval is below `-margin`. The intervals hold for all candidates at once: mean ± c ·
    (standard error), where c is the `1 - level` quantile of the largest |t| over candidates in bootstrap resamples of
    the examples. A single number, or losses that differ from Θ0's by the same amount on every example (up to float32
    rounding), have no standard error: they are better only by more than a given margin.

    Args:
        losses (`Mapping[str, float | Sequence[float]]`):
            Losses of each candidate by name, `(n,)` on the same n examples or batches in the same order, or one
            number. `"Θ0"` is among them.
        metric, level, margin:
            See [`Gate`].
        num_resamples (`int`, *optional*, defaults to `4999`):
            Number of bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resamples.

    Raises:
        `ValueError`: if Θ0 is missing or its loss is not finite, candidates have different numbers of losses or fewer
            than 10, or single numbers come without a margin.
    """
    check_rule(level, margin)
    if REFERENCE not in losses:
        raise ValueError(f"losses has no {REFERENCE!r}, only {', '.join(losses)}; add those of the full-data state")
    values = {name: np.atleast_1d(np.asarray(given, dtype=np.float64)) for name, given in losses.items()}
    reference = check_reference(values.pop(REFERENCE), margin)
    count = len(reference)
    for name, array in values.items():
        if array.shape != reference.shape:
            raise ValueError(
                f"{name} has losses of shape {array.shape}, {REFERENCE} of shape {reference.shape}; return the losses"
                " of the same examples in the same order for every model"
            )
    least = margin or 0.0
    candidates, differences = {}, {}
    for name, array in values.items():
        candidates[name] = GateCandidate(name, None)
        if np.isfinite(array).all():
            difference = array - reference
            candidates[name] = GateCandidate(name, float(array.mean()), float(difference.mean()))
            if not _is_shifted(array, reference):
                differences[name] = difference
    if differences:
        stacked = np.stack(list(differences.values()), axis=1)
        tests = _simultaneous(stacked, level, least, num_resamples, np.random.default_rng(seed))
        for name, (low, high, p_value) in zip(differences, tests, strict=True):
            candidates[name] = replace(candidates[name], low=low, high=high, p_value=p_value)
    first = GateCandidate(REFERENCE, float(reference.mean()))
    better = [candidate for candidate in candidates.values() if _is_better(candidate, count, level, least)]
    best = min(better, key=_rank, default=first)
    return GateResult(best.name, (first, *candidates.values()), metric, count, level, least)


def _is_shifted(values: np.ndarray, reference: np.ndarray) -> bool:
    """Whether two sets of losses `(n,)` differ by the same amount everywhere, up to rounding."""
    difference = values - reference
    rounding = _ROUNDING * (np.abs(values) + np.abs(reference))
    return bool((np.abs(difference - difference.mean()) <= rounding).all())


def _simultaneous(
    differences: np.ndarray, level: float, margin: float, num_resamples: int, random: np.random.Generator
) -> list[tuple[float | None, float | None, float]]:
    """Return low and high of the simultaneous interval of each mean of differences `(n, m)`, and the corrected p."""
    count = len(differences)
    mean = differences.mean(axis=0)
    error = differences.std(axis=0, ddof=1) / math.sqrt(count)
    scaled = (differences - mean) / (error * math.sqrt(count))
    largest = np.concatenate(list(_largest_t(scaled, num_resamples, random)))
    critical = float(np.quantile(largest, 1 - level, method="higher"))
    tests: list[tuple[float | None, float | None, float]] = []
    for centre, spread in zip(mean.tolist(), error.tolist(), strict=True):
        p_value = (1 + int((largest >= abs(centre + margin) / spread).sum())) / (1 + num_resamples)
        width = critical * spread
        tests.append((centre - width, centre + width, p_value) if math.isfinite(width) else (None, None, p_value))
    return tests


def _largest_t(scaled: np.ndarray, num_resamples: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the largest |t| over candidates in each bootstrap resample of centred values `(n, m)`."""
    count = len(scaled)
    both = np.concatenate([scaled, scaled**2], axis=1).astype(np.float32)
    size = max(1, _CHUNK // count)
    for start in range(0, num_resamples, size):
        rows = min(size, num_resamples - start)
        drawn = random.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float32)
        means, squares = np.split(times @ both / count, 2, axis=1)
        errors = np.sqrt(np.maximum(squares - means**2, 0) / (count - 1))
        # a resample without spread, up to rounding, means too few examples: it counts against every candidate
        yield np.where(errors > 1e-3 * np.abs(means), np.abs(means) / np.maximum(errors, 1e-30), np.inf).max(axis=1)


def _is_better(candidate: GateCandidate, count: int, level: float, margin: float) -> bool:
    if candidate.difference is None or not candidate.difference < -margin:
        return False
    return count == 1 or margin > 0 if candidate.p_value is None else candidate.p_value <= level


def check_rule(level: float, margin: float | None) -> None:
    """Raise a `ValueError` if level or margin is out of range."""
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1 (exclusive), got {level}")
    if margin is not None and not 0 <= margin < math.inf:
        raise ValueError(f"margin must be 0 or more, in units of the loss, got {margin}")


def check_reference(losses: float | Sequence[float] | np.ndarray, margin: float | None) -> np.ndarray:
    """Return the losses of Θ0 as an array `(n,)`. Raises a `ValueError` if others cannot be compared with them."""
    reference = np.atleast_1d(np.asarray(losses, dtype=np.float64))
    if reference.ndim != 1 or not np.isfinite(reference).all():
        raise ValueError(f"the losses of {REFERENCE} must be finite numbers, got {reference.tolist()}")
    count = len(reference)
    if count == 1 and margin is None:
        raise ValueError(
            "the noise of one number is unknown; return the loss of every example or batch, or set margin="
        )
    if count < MINIMUM_VALUES and count != 1:
        raise ValueError(f"got {count} losses of {REFERENCE}, too few for a test; give at least {MINIMUM_VALUES}")
    return reference


def with_article(name: str) -> str:
    """Return the name of a candidate for a sentence: `the average of the states`, `Θ1`."""
    return f"the {name}" if name == "start" or name.startswith("average") else name


def _rank(candidate: GateCandidate) -> float:
    return math.inf if candidate.loss is None else candidate.loss
