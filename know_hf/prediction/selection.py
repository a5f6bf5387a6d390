"""Choosing among candidates by their losses on the same examples: Θ0 stays unless another one is better than chance.

The comparison is one of many candidates with one reference. Losses have a heavy right tail, so that a t-test takes
the rare disasters it did not see for a gain; the studentised bootstrap of the largest |t| over all candidates sees the
tail and how candidates hang together (Romano and Wolf, *Stepwise Multiple Testing as Formalized Data Snooping*,
Econometrica 73, 2005; its single-step form, two-sided).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

REFERENCE = "Θ0"
MINIMUM_VALUES = 10  # of fewer losses the bootstrap can't tell chance from gain
_ROUNDING = float(np.finfo(np.float32).eps)  # of a loss, as models compute it
_CHUNK = 4_000_000  # numbers drawn at a time


@dataclass(frozen=True)
class GateCandidate:
    """
    Attributes:
        name (`str`): What was tried.
        loss (`float`, *optional*): Mean over the values; `None` when it is not finite.
        difference (`float`, *optional*): To the loss of Θ0; below 0 is better.
        low, high (`float`, *optional*): Ends of the interval of the difference, simultaneous over all candidates;
            `None` where there was one value only, or too few that differ to bound it.
        p_value (`float`, *optional*): Of the two-sided test against the margin, corrected for the number of
            candidates; `None` where no test was made: of one value, or of differences that are all equal.
    """

    name: str
    loss: float | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class GateResult:
    """What the gate tried and what it chose; printable with `str`.

    Attributes:
        chosen (`str`): Name of what was kept.
        candidates (`tuple[GateCandidate, ...]`): All that was tried, Θ0 first.
        metric (`str`): What the losses are.
        num_values (`int`): Losses of each candidate, over which differences were paired.
        level, margin (`float`): The rule's.
        recipe (`dict`, *optional*): `predictor`, `predictor_options` and `steps` with which
            [`predict_overflowed_weights`] makes what was chosen without a gate, `predictor` being `None` for the one
            that was given; whether BatchNorm statistics were `recalibrated`; and the `state` that was chosen, 0 for
            Θ0, `None` where it is none. Of a later state it makes the predicted weights alone, up to rounding: the
            whole state is `trajectory.load_model(state)`.
    """

    chosen: str
    candidates: tuple[GateCandidate, ...]
    metric: str
    num_values: int
    level: float
    margin: float
    recipe: Mapping[str, Any] | None = None

    @property
    def scores(self) -> dict[str, float]:
        """From candidate to its mean loss, of those whose loss is finite."""
        return {candidate.name: candidate.loss for candidate in self.candidates if candidate.loss is not None}

    @property
    def is_reference(self) -> bool:
        """Whether Θ0 was kept."""
        return self.chosen == REFERENCE

    @property
    def rule(self) -> str:
        """How it was chosen."""
        beyond = f" by more than {self.margin:g}" if self.margin else ""
        if self.num_values == 1:
            return (
                f"Each candidate gave one number, which says nothing of its noise: no test was made, and the lowest"
                f" was taken if it lies below that of {REFERENCE}{beyond}."
            )
        untested = ""
        if any(self._is_untested(candidate) for candidate in self.candidates):
            decided = f"is better when it is lower{beyond}" if self.margin else "is not chosen unless a margin is set"
            untested = f" One that differs by the same amount on every value has no noise to test it by: it {decided}."
        return (
            f"A candidate is better than {REFERENCE} when the whole interval of its paired difference lies below"
            f" {-self.margin if self.margin else 0:g} ({1 - self.level:.0%}, simultaneous over all candidates,"
            f" studentised bootstrap of the largest |t|, Romano and Wolf 2005). Of these the one with the lowest mean"
            f" is chosen; where there is none, {REFERENCE} stays.{untested}"
        )

    @property
    def sentence(self) -> str:
        """What was chosen, and by how much."""
        tried = len(self.candidates) - 1
        others = f"{tried} other candidate{'s' if tried != 1 else ''}"
        best = next((c for c in self.candidates if c.name == self.chosen), None)
        if best is not None and not self.is_reference:
            return (
                f"Of {REFERENCE} and {others} the gate chose {best.name}, {self._compared(best)};"
                f" {REFERENCE} has {self.candidates[0].loss:.4g}."
            )
        rest = [candidate for candidate in self.candidates[1:] if candidate.loss is not None]
        if not rest:
            return f"The gate kept {REFERENCE}: it had no other candidate with a finite {self.metric}."
        lowest = min(rest, key=lambda candidate: candidate.loss or 0.0)
        reason = "by more than the margin" if self.num_values == 1 else "by more than noise"
        return (
            f"The gate kept {REFERENCE}: none of {others} is better {reason}. {REFERENCE} has a {self.metric} of"
            f" {self.candidates[0].loss:.4g}; the lowest of the others is that of {lowest.name},"
            f" {self._compared(lowest)}."
        )

    def _is_untested(self, candidate: GateCandidate) -> bool:
        """Whether its differences are all equal."""
        return self.num_values > 1 and candidate.difference is not None and candidate.p_value is None

    def _compared(self, candidate: GateCandidate) -> str:
        text = f"with a {self.metric} of {candidate.loss:.4g} ({candidate.difference:+.4g}"
        if self._is_untested(candidate):
            return f"{text} on every value, so that nothing says how sure that is)"
        if candidate.p_value is None:
            return f"{text})"
        return f"{text}, interval {_interval(candidate)}, p = {candidate.p_value:.2g})"

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; what a card takes as `gate`."""
        return {
            "metric": self.metric,
            "scores": self.scores,
            "chosen": self.chosen,
            "sentence": self.sentence,
            "rule": self.rule,
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "num_values": self.num_values,
            "level": self.level,
            "margin": self.margin,
            "recipe": dict(self.recipe) if self.recipe else None,
        }

    def markdown(self) -> str:
        """The table of all candidates, for a card."""
        rows = [["candidate", self.metric, f"minus {REFERENCE}", f"{1 - self.level:.0%} interval", "p (corrected)"]]
        for candidate in self.candidates:
            name = f"**{candidate.name}** (chosen)" if candidate.name == self.chosen else candidate.name
            loss = "not finite" if candidate.loss is None else f"{candidate.loss:.4g}"
            difference = "" if candidate.difference is None else f"{candidate.difference:+.4g}"
            p_value = "" if candidate.p_value is None else f"{candidate.p_value:.3g}"
            rows.append([name, loss, difference, _interval(candidate), p_value])
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], "| --- |" + " ---: |" * (len(rows[0]) - 1), *lines[1:]])

    def __str__(self) -> str:
        return f"{self.sentence}\n{self.rule}"


def choose(
    losses: Mapping[str, float | Sequence[float]],
    *,
    metric: str = "validation loss",
    level: float = 0.05,
    margin: float | None = None,
    num_resamples: int = 4999,
    seed: int = 0,
) -> GateResult:
    """Compares candidates with Θ0 on the same examples and chooses.

    A candidate is better when the whole of its interval lies below `-margin`. The intervals hold for all candidates at
    once: mean ± c · (standard error), c the `1 - level` quantile of the largest |t| over candidates when examples are
    drawn anew, each draw studentised with its own standard error. A candidate that differs from Θ0 by the same amount
    on every example, up to the rounding of float32, has no standard error. As of a single number, nothing says how
    sure the difference is: no test is made, and it is better only when there is a margin and it is lower by more.

    Args:
        losses (`Mapping[str, float | Sequence[float]]`): From candidate to its losses, `(n,)` of the same n examples
            or batches in the same order, or one number; `"Θ0"` is among them.
        metric, level, margin: As of [`Gate`].
        num_resamples (`int`, *optional*, defaults to `4999`): Draws of the bootstrap.
        seed (`int`, *optional*, defaults to `0`): Of the draws.

    Returns:
        [`GateResult`].

    Raises:
        `ValueError`: when Θ0 is missing or its loss is not finite, candidates have different numbers of losses or
            fewer than 10, or one number each without a margin.
    """
    check_rule(level, margin)
    if REFERENCE not in losses:
        raise ValueError(f"there are no losses of {REFERENCE}, only of {', '.join(losses)}")
    values = {name: np.atleast_1d(np.asarray(given, dtype=np.float64)) for name, given in losses.items()}
    reference = check_reference(values.pop(REFERENCE), margin)
    count = len(reference)
    for name, array in values.items():
        if array.shape != reference.shape:
            raise ValueError(
                f"{name} has losses of shape {array.shape}, {REFERENCE} of shape {reference.shape}: compute_loss is to"
                " give the losses of the same examples in the same order for every model"
            )
    finite = {name: array for name, array in values.items() if np.isfinite(array).all()}
    candidates = {name: GateCandidate(name, None) for name in values}
    least = margin or 0.0
    differences = {name: array - reference for name, array in finite.items()}
    for name, difference in differences.items():
        candidates[name] = GateCandidate(name, float(finite[name].mean()), float(difference.mean()))
    vary = [name for name, array in finite.items() if not _is_shifted(array, reference)]
    if vary:
        stacked = np.stack([differences[name] for name in vary], axis=1)
        tested = _simultaneous(stacked, level, least, num_resamples, np.random.default_rng(seed))
        for name, (low, high, p_value) in zip(vary, tested, strict=True):
            candidates[name] = replace(candidates[name], low=low, high=high, p_value=p_value)
    better = [candidate for candidate in candidates.values() if _is_better(candidate, count, level, least)]
    best = min(better, key=lambda candidate: candidate.loss or 0.0).name if better else REFERENCE
    first = GateCandidate(REFERENCE, float(reference.mean()))
    return GateResult(best, (first, *candidates.values()), metric, count, level, least)


def _is_shifted(values: np.ndarray, reference: np.ndarray) -> bool:
    """Whether all differences of two sets of losses `(n,)` are equal, up to rounding; of one value they are."""
    difference = values - reference
    rounding = _ROUNDING * (np.abs(values) + np.abs(reference))
    return bool((np.abs(difference - difference.mean()) <= rounding).all())


def _simultaneous(
    differences: np.ndarray, level: float, margin: float, num_resamples: int, random: np.random.Generator
) -> list[tuple[float | None, float | None, float]]:
    """Ends of the simultaneous interval of each mean of differences `(n, m)`, and its p value corrected for m."""
    count = len(differences)
    mean = differences.mean(axis=0)
    error = differences.std(axis=0, ddof=1) / math.sqrt(count)
    scaled = (differences - mean) / (error * math.sqrt(count))
    largest = np.concatenate(list(_largest_t(scaled, num_resamples, random)))
    critical = float(np.quantile(largest, 1 - level, method="higher"))
    found: list[tuple[float | None, float | None, float]] = []
    for centre, spread in zip(mean.tolist(), error.tolist(), strict=True):
        p_value = (1 + int((largest >= abs(centre + margin) / spread).sum())) / (1 + num_resamples)
        bounded = math.isfinite(critical)
        ends = (centre - critical * spread, centre + critical * spread) if bounded else (None, None)
        found.append((*ends, p_value))
    return found


def _largest_t(scaled: np.ndarray, num_resamples: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """The largest |t| over candidates of each draw with replacement, from centred values `(n, m)`."""
    count = len(scaled)
    both = np.concatenate([scaled, scaled**2], axis=1).astype(np.float32)
    size = max(1, _CHUNK // count)
    for start in range(0, num_resamples, size):
        rows = min(size, num_resamples - start)
        drawn = random.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float32)
        means, squares = np.split(times @ both / count, 2, axis=1)
        errors = np.sqrt(np.maximum(squares - means**2, 0) / (count - 1))
        # a draw without spread, up to rounding, says that the sample is too small: it counts against every candidate
        yield np.where(errors > 1e-3 * np.abs(means), np.abs(means) / np.maximum(errors, 1e-30), np.inf).max(axis=1)


def _is_better(candidate: GateCandidate, count: int, level: float, margin: float) -> bool:
    if candidate.difference is None or not candidate.difference < -margin:
        return False
    return count == 1 or margin > 0 if candidate.p_value is None else candidate.p_value <= level


def check_rule(level: float, margin: float | None) -> None:
    """Raises a `ValueError` for numbers that make no rule."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
    if margin is not None and not 0 <= margin < math.inf:
        raise ValueError(f"margin must be 0 or more, in the units of the loss; got {margin}")


def check_reference(losses: float | Sequence[float] | np.ndarray, margin: float | None) -> np.ndarray:
    """The losses of Θ0 as an array `(n,)`, if the others can be compared with them.

    Raises:
        `ValueError`: when they are not finite, fewer than 10, or one number without a margin.
    """
    reference = np.atleast_1d(np.asarray(losses, dtype=np.float64))
    if reference.ndim != 1 or not np.isfinite(reference).all():
        raise ValueError(f"the losses of {REFERENCE} are to be finite numbers, one each; got {reference.tolist()}")
    count = len(reference)
    if count == 1 and margin is None:
        raise ValueError(
            "compute_loss gave one number, which says nothing of its noise; let it give a list with the loss of every"
            " example or batch, or set margin= to how much lower a loss must be"
        )
    if count < MINIMUM_VALUES and count != 1:
        raise ValueError(
            f"there are {count} losses of {REFERENCE}, from which chance can't be told from gain; at least"
            f" {MINIMUM_VALUES} are needed: one an example, or smaller batches"
        )
    return reference


def _interval(candidate: GateCandidate) -> str:
    if candidate.p_value is None:
        return ""
    return "unbounded" if candidate.low is None else f"[{candidate.low:+.4g}, {candidate.high:+.4g}]"
