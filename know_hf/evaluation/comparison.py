"""One measure of several arms over the same trajectories, against naive: table, verdict, and whether a gain could have
shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .statistics import Estimate, PairedDifference, cluster_means, holm, mean_and_interval, paired_difference

ALPHA = 0.05
ENOUGH_SEEDS = 10


@dataclass(frozen=True)
class Measure:
    """What a comparison compares, and how it is written.

    Args:
        name (`str`): Such as `"accuracy"`.
        scale (`float`, *optional*, defaults to `1.0`): What values are multiplied by in tables.
        unit (`str`, *optional*): Behind a value, after scaling.
        difference_unit (`str`, *optional*): Behind a difference, after scaling.
        digits (`int`, *optional*, defaults to `3`): Behind the decimal point.
        higher_is_better (`bool`, *optional*, defaults to `True`): Whether it is.
    """

    name: str
    scale: float = 1.0
    unit: str = ""
    difference_unit: str = ""
    digits: int = 3
    higher_is_better: bool = True

    def format(self, value: float, sign: str = "") -> str:
        return f"{self.scale * value:{sign}.{self.digits}f}"

    def interval(self, estimate: Estimate, sign: str = "") -> str:
        return f"[{self.format(estimate.low, sign)}, {self.format(estimate.high, sign)}]"

    def difference(self, difference: Estimate) -> str:
        """In words, with its interval."""
        unit = f" {self.difference_unit}" if self.difference_unit else ""
        return f"{self.format(difference.mean, '+')}{unit}, 95% interval {self.interval(difference, '+')}"

    def gain(self, difference: float) -> float:
        """The difference with the sign with which more is better."""
        return difference if self.higher_is_better else -difference


ACCURACY = Measure("accuracy", 100, "%", "points", 1)
LOSS = Measure("loss", higher_is_better=False)


@dataclass(frozen=True)
class ArmResult:
    """
    Attributes:
        per_seed (`tuple[float, ...]`): One value a trajectory, the mean over its draws; accuracies are in [0, 1].
        estimate ([`Estimate`]): Mean and 95% interval over trajectories.
        difference ([`PairedDifference`], *optional*): To naive, paired over trajectories; none for naive itself.
        corrected_p (`float`, *optional*): p of the difference, corrected by Holm for the number of candidates; for
            candidates only.
        per_draw (`tuple[tuple[float, ...], ...]`, *optional*): One sequence a trajectory, with a value a draw.
    """

    per_seed: tuple[float, ...]
    estimate: Estimate
    difference: PairedDifference | None = None
    corrected_p: float | None = None
    per_draw: tuple[tuple[float, ...], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        result: dict[str, Any] = {
            "mean": self.estimate.mean,
            "ci95": [self.estimate.low, self.estimate.high],
            "per_seed": list(self.per_seed),
            "per_draw": [list(values) for values in self.per_draw],
        }
        if self.difference is not None:
            result["minus_naive"] = {
                "mean": self.difference.mean,
                "ci95": [self.difference.low, self.difference.high],
                "p": self.difference.p_value,
                "p_holm": self.corrected_p,
                "effect_size": self.difference.effect_size,
                "minimum_detectable": self.difference.minimum_detectable,
            }
        return result


@dataclass(frozen=True)
class AgainstControls:
    """Whether a method is better than every control: than having done something trivial, or nothing.

    Attributes:
        differences (`dict[str, PairedDifference]`): From control, naive last, to the method's difference to it.
        hardest (`str`): The control, or naive, with the largest one-sided p.
        p_value (`float`): That p. To be better than all of them the method must be better than each, each tested at
            the full level (an intersection-union test: R. L. Berger, Technometrics 24, 1982), so that no correction
            for the number of controls is needed; [`Comparison`] corrects for that of the methods.
    """

    differences: dict[str, PairedDifference]
    hardest: str
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        differences = {
            name: {"mean": d.mean, "ci95": [d.low, d.high], "p": d.p_value} for name, d in self.differences.items()
        }
        return {"differences": differences, "hardest": self.hardest, "p": self.p_value}


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        what (`str`): What was measured, as it stands in a sentence after "In".
        results (`dict[str, ArmResult]`): From arm to its result; `"naive"` is among them.
        candidates (`tuple[str, ...]`): The arms that can be better than naive; the others are points of reference.
        against_controls (`dict[str, AgainstControls]`): From each method among the candidates to how it stands against
            the controls among them.
        measure ([`Measure`]): What the values are.
        counted (`str`): What one value a seed is of.
    """

    what: str
    results: dict[str, ArmResult]
    candidates: tuple[str, ...]
    against_controls: dict[str, AgainstControls] = field(default_factory=dict)
    measure: Measure = ACCURACY
    counted: str = "seeds"

    @property
    def num_seeds(self) -> int:
        return len(self.results["naive"].per_seed)

    @property
    def better(self) -> tuple[str, ...]:
        """The candidates that are significantly better than naive, corrected for their number."""
        return self._significant(sign=1)

    @property
    def worse(self) -> tuple[str, ...]:
        """The candidates that are significantly worse than naive, corrected for their number."""
        return self._significant(sign=-1)

    @property
    def better_than_controls(self) -> tuple[str, ...]:
        """The methods that are significantly better than every control, and than naive, corrected for their number."""
        corrected = holm({name: against.p_value for name, against in self.against_controls.items()})
        return tuple(name for name, p_value in corrected.items() if p_value < ALPHA / 2)

    @property
    def without_spread(self) -> tuple[str, ...]:
        """The arms whose difference to naive is the same for all trajectories, and not 0."""
        differences = {name: result.difference for name, result in self.results.items() if result.difference}
        return tuple(name for name, d in differences.items() if d.effect_size is None and d.mean)

    @property
    def valid(self) -> bool | None:
        """Whether naive beats random initialisation, and the pretrained weights where the training started from some;
        `None` when neither was run. Without it the comparison shows nothing."""
        gaps = self._gaps(("naive", "random"), ("naive", "pretrained"))
        return all(self._beats(gap) for gap in gaps.values()) if gaps else None

    @property
    def headroom(self) -> bool | None:
        """Whether the oracle beats naive: whether there was anything to gain; `None` when it was not run."""
        gaps = self._gaps(("oracle", "naive"))
        return all(self._beats(gap) for gap in gaps.values()) if gaps else None

    def verdict(self) -> str:
        """One sentence: whether any candidate is better than naive; or that nothing is shown."""
        if self.valid is False:
            return f"In {self.what}, nothing is shown: naive does not clearly beat what it started from."
        if not self.candidates:
            return f"In {self.what}, no arm was run that could be chosen instead of naive."
        test = (
            f"paired t-test over {self.num_seeds} {self.counted}, Holm-corrected for {len(self.candidates)} arms,"
            f" level {ALPHA:g}"
        )
        if self.better:
            are = "is" if len(self.better) == 1 else "are"
            found = ", ".join(f"{name} ({self._difference(name)})" for name in self.better)
            return f"In {self.what}, {found} {are} significantly better than naive ({test})."
        best = max(self.candidates, key=lambda name: self.measure.gain(self.results[name].estimate.mean))
        worse = f"; significantly worse: {', '.join(self.worse)}" if self.worse else ""
        tried = ", ".join(self.candidates) if len(self.candidates) < 8 else f"the {len(self.candidates)} arms"
        return (
            f"In {self.what}, none of {tried} is significantly better than naive; the best is"
            f" {best} with {self._difference(best)}{worse} ({test})."
        )

    def verdict_on_methods(self) -> str:
        """One sentence: whether a method is better than naive and every control; empty where there is none."""
        if not self.against_controls or self.valid is False:
            return ""
        if self.better_than_controls:
            return f"In {self.what}, better than naive and every control: {', '.join(self.better_than_controls)}."
        nearest = [
            f"{name} minus {against.hardest} {self.measure.difference(against.differences[against.hardest])}"
            for name, against in self.against_controls.items()
        ]
        return f"In {self.what}, no method is better than naive and every control: {'; '.join(nearest)}."

    def validity(self) -> str:
        """One sentence: whether naive beat random initialisation and the oracle naive, without which a suite can show
        no gain."""
        gaps = self._gaps(("naive", "random"), ("naive", "pretrained"), ("oracle", "naive"))
        if not gaps:
            return "Neither random initialisation nor an oracle was run: nothing says whether a gain could have shown."
        parts = [
            f"{upper} {'beats' if self._beats(gap) else 'does not clearly beat'} {lower}"
            f" ({self.measure.difference(gap)})"
            for (upper, lower), gap in gaps.items()
        ]
        if self.valid is False:
            end = "this shows nothing."
        elif self.headroom is False:
            end = "a gain could hardly have shown: take a missing one as no answer."
        elif self.valid is None:
            end = (
                "what naive learned is not known, since neither random initialisation nor pretrained weights were run."
            )
        else:
            end = "a gain could have shown."
        return f"In {self.what}, {' and '.join(parts)}: {end}"

    def sensitivity(self) -> str:
        """One sentence: the smallest difference to naive that the design would have found."""
        smallest = {
            name: difference.minimum_detectable
            for name in self.candidates
            if (difference := self.results[name].difference) is not None and difference.minimum_detectable
        }
        if not smallest:
            return ""
        least, most = (self.measure.format(end) for end in (min(smallest.values()), max(smallest.values())))
        unit = f" {self.measure.difference_unit}" if self.measure.difference_unit else ""
        span = f"{least}" if least == most else f"{least} to {most}"
        return (
            f"In {self.what}, a true difference to naive of {span}{unit}, depending on the arm, would have been found"
            f" with a chance of 80 % ({self.num_seeds} {self.counted}, level {ALPHA:g}/{len(self.candidates)})."
        )

    def table(self, extra: Mapping[str, Mapping[str, str]] | None = None) -> str:
        """A table for people; accuracies in per cent.

        Args:
            extra (`Mapping[str, Mapping[str, str]]`, *optional*): More columns: from heading to arm to cell.
        """
        rows = self._rows(extra or {})
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """From arm to `{"mean", "ci95": [low, high], "per_seed", "per_draw"}`, and `"minus_naive"` for all but
        naive."""
        return {name: result.to_dict() for name, result in self.results.items()}

    def to_record(self) -> dict[str, Any]:
        """Return what a model card shows of the comparison: `what`, `arms` ([`to_dict`]), `verdict` and `validity`."""
        return {"what": self.what, "arms": self.to_dict(), "verdict": self.verdict(), "validity": self.validity()}

    def _rows(self, extra: Mapping[str, Mapping[str, str]]) -> list[list[str]]:
        measure = self.measure
        heading = f"{measure.name} {measure.unit}".rstrip()
        rows = [["arm", heading, "95% interval", "minus naive", "95% interval", "p (Holm)", *extra]]
        for name, result in self.results.items():
            row = [name, measure.format(result.estimate.mean), measure.interval(result.estimate)]
            if result.difference is None:
                row += ["", "", ""]
            else:
                p = "reference" if result.corrected_p is None else f"{result.corrected_p:.3f}"
                row += [measure.format(result.difference.mean, "+"), measure.interval(result.difference, "+"), p]
            rows.append(row + [column.get(name, "") for column in extra.values()])
        return rows

    def _gaps(self, *pairs: tuple[str, str]) -> dict[tuple[str, str], PairedDifference]:
        return {
            (upper, lower): paired_difference(self.results[upper].per_seed, self.results[lower].per_seed)
            for upper, lower in pairs
            if upper in self.results and lower in self.results
        }

    def _beats(self, gap: PairedDifference) -> bool:
        return self.measure.gain(gap.mean) > 0 and gap.p_value < ALPHA

    def _significant(self, sign: int) -> tuple[str, ...]:
        found = []
        for name in self.candidates:
            result = self.results[name]
            assert result.difference is not None and result.corrected_p is not None
            if result.corrected_p < ALPHA and sign * self.measure.gain(result.difference.mean) > 0:
                found.append(name)
        return tuple(found)

    def _difference(self, name: str) -> str:
        result = self.results[name]
        assert result.difference is not None
        return f"{self.measure.difference(result.difference)}, p = {result.corrected_p:.2g}"


def compare_with_naive(
    scores: Mapping[str, Sequence[float] | Sequence[Sequence[float]]],
    candidates: Sequence[str],
    what: str = "accuracy",
    *,
    controls: Sequence[str] = (),
    measure: Measure = ACCURACY,
    counted: str = "seeds",
) -> Comparison:
    """Compares arms with naive over the same trajectories.

    Args:
        scores (`Mapping`): From arm to one value a trajectory, or to one sequence a trajectory with a value for each
            of its draws; the same trajectories and draws in the same order for every arm; `"naive"` is among them.
        candidates (`Sequence[str]`): The arms that are tested for being better than naive.
        what (`str`, *optional*): What was measured, for sentences.
        controls (`Sequence[str]`, *optional*): The candidates that are trivial; the other ones, the methods, are
            compared with each of them as well.
        measure ([`Measure`], *optional*): What the values are; by default accuracies in [0, 1].
        counted (`str`, *optional*): What one value is of, for sentences.

    Returns:
        [`Comparison`].

    Raises:
        `ValueError`: when there is no naive arm, a candidate has no scores, arms differ in their draws, or as
            [`paired_difference`].
    """
    for name in ("naive", *candidates):
        if name not in scores:
            raise ValueError(f"there are no scores of the arm {name!r}, only of {', '.join(scores)}")
    draws = {name: [_draws(value) for value in values] for name, values in scores.items()}
    expected = [len(values) for values in draws["naive"]]
    for name, of_arm in draws.items():
        if (found := [len(values) for values in of_arm]) != expected:
            raise ValueError(
                f"arms are compared over the same draws; a trajectory has {expected} of naive, {found} of {name!r}"
            )
    means = {name: cluster_means(values) for name, values in draws.items()}
    differences = {
        name: paired_difference(
            values, means["naive"], num_tests=len(candidates) if candidates and name in candidates else 1
        )
        for name, values in means.items()
        if name != "naive"
    }
    corrected = holm({name: differences[name].p_value for name in candidates})
    results = {
        name: ArmResult(
            tuple(values),
            mean_and_interval(values),
            differences.get(name),
            corrected.get(name),
            tuple(tuple(of_trajectory) for of_trajectory in draws[name]),
        )
        for name, values in means.items()
    }
    controls = [name for name in candidates if name in controls]
    methods = [name for name in candidates if name not in controls] if controls else []
    against = {name: _against(means, name, [*controls, "naive"], measure) for name in methods}
    return Comparison(what, results, tuple(candidates), against, measure, counted)


def _draws(value: float | Sequence[float]) -> list[float]:
    return [float(v) for v in value] if isinstance(value, Sequence) else [float(value)]


def _against(
    means: Mapping[str, Sequence[float]], method: str, controls: Sequence[str], measure: Measure
) -> AgainstControls:
    differences = {control: paired_difference(means[method], means[control]) for control in controls}
    one_sided = {
        control: d.p_value / 2 if measure.gain(d.mean) > 0 else 1 - d.p_value / 2 for control, d in differences.items()
    }
    hardest = max(one_sided, key=lambda control: one_sided[control])
    return AgainstControls(differences, hardest, one_sided[hardest])
