"""Comparison of arms with naive over the same trajectories: table, verdict and positive control."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..terminal import aligned
from .statistics import (
    Estimate,
    PairedDifference,
    VarianceComponents,
    holm,
    mean_and_interval,
    paired_difference,
    variance_components,
)

ALPHA = 0.05
ENOUGH_SEEDS = 10


@dataclass(frozen=True)
class Measure:
    """A measured quantity and its format in tables.

    Args:
        name (`str`):
            Such as `"accuracy"`.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor on values in tables.
        unit, difference_unit (`str`, *optional*):
            Unit of a scaled value and of a scaled difference.
        digits (`int`, *optional*, defaults to `3`):
            Digits after the decimal point.
        higher_is_better (`bool`, *optional*, defaults to `True`):
            Whether larger values are better.
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
        """Format a difference with its unit and interval."""
        mean = f"{self.format(difference.mean, '+')} {self.difference_unit}".rstrip()
        return f"{mean}, 95% interval {self.interval(difference, '+')}"

    def gain(self, difference: float) -> float:
        """Return the difference with the sign by which larger is better."""
        return difference if self.higher_is_better else -difference


ACCURACY = Measure("accuracy", 100, "%", "points", 1)
LOSS = Measure("loss", higher_is_better=False)


@dataclass(frozen=True)
class ArmResult:
    """Values of one arm.

    Attributes:
        per_seed (`tuple[float, ...]`):
            One value per trajectory, the mean over its draws (`per_draw`); accuracies are in [0, 1].
        estimate ([`Estimate`]):
            Mean and 95% interval over trajectories.
        difference ([`PairedDifference`], *optional*):
            Difference from naive; `None` for naive.
        corrected_p (`float`, *optional*):
            p of the difference after Holm's correction for the number of candidates; candidates only.
    """

    per_seed: tuple[float, ...]
    estimate: Estimate
    difference: PairedDifference | None = None
    corrected_p: float | None = None
    per_draw: tuple[tuple[float, ...], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        per_draw = [list(values) for values in self.per_draw]
        result: dict[str, Any] = {**_entry(self.estimate), "per_seed": list(self.per_seed), "per_draw": per_draw}
        if (d := self.difference) is not None:
            sizes = {key: getattr(d, key) for key in ("effect_size", "minimum_detectable")}
            result["minus_naive"] = {**_entry(d), "p_holm": self.corrected_p, **sizes}
        return result


@dataclass(frozen=True)
class AgainstControls:
    """Differences of a method from every control and from naive, the last, and the largest one-sided p (`hardest`).

    A method that is better than all controls is better than each, so that each is tested at the full level
    (intersection-union test: R. L. Berger, Technometrics 24, 1982) without a correction for the number of controls;
    [`Comparison`] corrects for the number of methods.
    """

    differences: dict[str, PairedDifference]
    hardest: str
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        differences = {name: _entry(difference) for name, difference in self.differences.items()}
        return {"differences": differences, "hardest": self.hardest, "p": self.p_value}


@dataclass(frozen=True)
class Comparison:
    """Comparison of arms with naive in one protocol and measure.

    Attributes:
        what (`str`):
            What was measured, such as `"few-shot fine-tuning, accuracy"`; sentences start with it.
        results (`dict[str, ArmResult]`):
            From arm to its result; includes `"naive"`.
        candidates (`tuple[str, ...]`):
            Arms tested against naive; the others are references.
        against_controls (`dict[str, AgainstControls]`):
            From each method to its comparison with the controls.
        measure ([`Measure`]):
            The measured quantity.
        counted (`str`):
            Unit of the statistics, such as `"seeds"`.
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
        """Candidates that are significantly better than naive after Holm's correction."""
        return self._significant(sign=1)

    @property
    def worse(self) -> tuple[str, ...]:
        """Candidates that are significantly worse than naive after Holm's correction."""
        return self._significant(sign=-1)

    @property
    def better_than_controls(self) -> tuple[str, ...]:
        """Methods that are significantly better than naive and every control, corrected for the number of methods."""
        corrected = holm({name: against.p_value for name, against in self.against_controls.items()})
        return tuple(name for name, p_value in corrected.items() if p_value < ALPHA / 2)

    @property
    def without_spread(self) -> tuple[str, ...]:
        """Arms whose difference from naive is the same nonzero value for all trajectories."""
        differences = {name: result.difference for name, result in self.results.items() if result.difference}
        return tuple(name for name, d in differences.items() if d.effect_size is None and d.mean)

    @property
    def valid(self) -> bool | None:
        """Whether naive beats random initialisation and the pretrained weights, as far as they were run; `None` if
        neither was. If not, the positive control failed: the comparison shows nothing."""
        return self._all_beaten(("naive", "random"), ("naive", "pretrained"))

    @property
    def headroom(self) -> bool | None:
        """Whether the oracle beats naive; `None` if it was not run. If not, the positive control is inconclusive."""
        return self._all_beaten(("oracle", "naive"))

    def verdict(self) -> str:
        """Say whether any candidate is better than naive."""
        if self.valid is False:
            return self._sentence(
                "the positive control failed, so the comparison shows nothing. The unchanged weights (naive) are not"
                " significantly better than the weights that their training started from."
            )
        if not self.candidates:
            return self._sentence("the unchanged weights (naive) were compared with references only.")
        count, values = len(self.candidates), f"{self.num_seeds} {self.counted}"
        test = f"Paired t-test over {values}, Holm-corrected for {count} arms, level {ALPHA:g}."
        if self.better:
            verb = "is" if len(self.better) == 1 else "are"
            names = ", ".join(f"{name} ({self._gain(name)})" for name in self.better)
            return self._sentence(f"{names} {verb} significantly better than the unchanged weights (naive). {test}")
        best = max(self.candidates, key=lambda name: self.measure.gain(self.results[name].estimate.mean))
        worse = f"; significantly worse: {', '.join(self.worse)}" if self.worse else ""
        return self._sentence(
            f"no arm is significantly better than the unchanged weights (naive); the best is {best} with"
            f" {self._gain(best)}{worse}. {test}"
        )

    def verdict_on_methods(self) -> str:
        """Say whether a method is better than naive and every control; empty without methods."""
        if not self.against_controls or self.valid is False:
            return ""
        if self.better_than_controls:
            verb = "is" if len(self.better_than_controls) == 1 else "are"
            return self._sentence(
                f"{', '.join(self.better_than_controls)} {verb} better than naive and every control."
            )
        nearest = []
        for name, against in self.against_controls.items():
            difference = self.measure.difference(against.differences[against.hardest])
            nearest.append(f"{name} minus {against.hardest} {difference}")
        return self._sentence(f"no method is better than naive and every control ({'; '.join(nearest)}).")

    def validity(self) -> str:
        """Say whether the positive control passed: naive beats random, and the oracle naive."""
        gaps = self._gaps(("naive", "random"), ("naive", "pretrained"), ("oracle", "naive"))
        if not gaps:
            return "There is no positive control: neither random initialisation nor an oracle was run."
        parts = []
        for (upper, lower), gap in gaps.items():
            verb = "beats" if self._beats(gap) else "does not significantly beat"
            parts.append(f"{upper} {verb} {lower} ({self.measure.difference(gap)})")
        conclusion = "the positive control passed"
        if self.valid is None:
            conclusion = "what naive learned is unknown, because neither random nor pretrained weights were run"
        if self.headroom is False:
            conclusion = (
                "the positive control is inconclusive, because more data (oracle) does not clearly help either"
            )
        if self.valid is False:
            conclusion = "the positive control failed, so the comparison shows nothing"
        return self._sentence(f"{conclusion}: {' and '.join(parts)}.")

    @property
    def variance(self) -> VarianceComponents | None:
        """Variances of a difference from naive, means over the candidates; `None` without several draws."""
        naive = self.results["naive"].per_draw
        components = []
        for name in self.candidates:
            pairs = zip(self.results[name].per_draw, naive, strict=True)
            components.append(variance_components([np.subtract(*pair).tolist() for pair in pairs]))
        known = [component for component in components if component is not None]
        if not known:
            return None
        within, between = (float(np.mean([getattr(of, name) for of in known])) for name in ("within", "between"))
        return VarianceComponents(between, within, known[0].draws)

    def sensitivity(self) -> str:
        """Say which difference from naive the design detects, and whether draws or trajectories limit it; empty if no
        difference has a spread."""
        detectable = [d for name in self.candidates if (d := self._difference(name).minimum_detectable)]
        if not detectable:
            return ""
        ends = dict.fromkeys(self.measure.format(end) for end in (min(detectable), max(detectable)))
        size = f"{' to '.join(ends)} {self.measure.difference_unit}".rstrip()
        return self._sentence(
            f"this design detects a true difference from naive of {size}, depending on the arm, with a power of 80%"
            f" ({self.num_seeds} {self.counted}, level {ALPHA:g}/{len(self.candidates)}).{self._larger_variance()}"
        )

    def _larger_variance(self) -> str:
        variance = self.variance
        if variance is None or (share := variance.share_of_draws) is None:
            return ""
        advice = "more draws help" if share > 0.5 else "more seeds help more than more draws"
        return (
            f" Of the variance of a trajectory's mean difference over {variance.draws:.3g} draws, {share:.0%} is that"
            f" of the draws: {advice}."
        )

    def table(self, extra: Mapping[str, Mapping[str, str]] | None = None) -> str:
        """Format the results as a table of text; accuracies in percent.

        Args:
            extra (`Mapping[str, Mapping[str, str]]`, *optional*):
                More columns: from heading to arm to cell.
        """
        measure, extra = self.measure, extra or {}
        heading = f"{measure.name} {measure.unit}".rstrip()
        rows = [["arm", heading, "95% interval", "minus naive", "95% interval", "p (Holm)", *extra]]
        for name, result in self.results.items():
            row = [name, measure.format(result.estimate.mean), measure.interval(result.estimate), "", "", ""]
            if result.difference is not None:
                p = "reference" if result.corrected_p is None else f"{result.corrected_p:.3f}"
                row[3:] = measure.format(result.difference.mean, "+"), measure.interval(result.difference, "+"), p
            rows.append(row + [column.get(name, "") for column in extra.values()])
        lines = aligned(rows).splitlines()
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return `{arm: {"mean", "ci95": [low, high], "per_seed", "per_draw", "minus_naive"}}`; naive lacks the
        last."""
        return {name: result.to_dict() for name, result in self.results.items()}

    def to_record(self) -> dict[str, Any]:
        """Return what a model card shows of the comparison: `what`, `arms` ([`to_dict`]), `verdict` and `validity`."""
        return {"what": self.what, "arms": self.to_dict(), "verdict": self.verdict(), "validity": self.validity()}

    def _sentence(self, text: str) -> str:
        return f"{self.what[:1].upper()}{self.what[1:]}: {text}"

    def _gaps(self, *pairs: tuple[str, str]) -> dict[tuple[str, str], PairedDifference]:
        values = {name: result.per_seed for name, result in self.results.items()}
        run = [(upper, lower) for upper, lower in pairs if upper in values and lower in values]
        return {(upper, lower): paired_difference(values[upper], values[lower]) for upper, lower in run}

    def _all_beaten(self, *pairs: tuple[str, str]) -> bool | None:
        gaps = self._gaps(*pairs)
        return all(self._beats(gap) for gap in gaps.values()) if gaps else None

    def _beats(self, gap: PairedDifference) -> bool:
        return self.measure.gain(gap.mean) > 0 and gap.p_value < ALPHA

    def _significant(self, sign: int) -> tuple[str, ...]:
        detected = [name for name in self.candidates if (self.results[name].corrected_p or 0) < ALPHA]
        return tuple(name for name in detected if sign * self.measure.gain(self._difference(name).mean) > 0)

    def _difference(self, name: str) -> PairedDifference:
        difference = self.results[name].difference
        assert difference is not None
        return difference

    def _gain(self, name: str) -> str:
        return f"{self.measure.difference(self._difference(name))}, p = {self.results[name].corrected_p:.2g}"


def compare_with_naive(
    scores: Mapping[str, Sequence[float] | Sequence[Sequence[float]]],
    candidates: Sequence[str],
    what: str = "accuracy",
    *,
    controls: Sequence[str] = (),
    measure: Measure = ACCURACY,
    counted: str = "seeds",
) -> Comparison:
    """Compare arms with naive over the same trajectories.

    Args:
        scores (`Mapping`):
            From arm to one value per trajectory, or to one sequence per trajectory with a value per draw: the same
            trajectories and draws in the same order for every arm, `"naive"` included.
        candidates (`Sequence[str]`):
            Arms to test against naive.
        what (`str`, *optional*, defaults to `"accuracy"`):
            What was measured, for sentences.
        controls (`Sequence[str]`, *optional*):
            Candidates that learn nothing; the other candidates, the methods, are compared with each of them as well.
        measure ([`Measure`], *optional*, defaults to `ACCURACY`):
            The measured quantity.
        counted (`str`, *optional*, defaults to `"seeds"`):
            Unit of the statistics, for sentences.

    Raises:
        `ValueError`: If naive or a candidate has no scores, arms differ in their draws, or as [`paired_difference`].
    """
    if missing := [name for name in ("naive", *candidates) if name not in scores]:
        raise ValueError(f"arm {missing[0]!r} has no scores; scores has {', '.join(scores)}")
    draws = {name: [np.atleast_1d(value).tolist() for value in values] for name, values in scores.items()}
    expected = [len(values) for values in draws["naive"]]
    for name, values in draws.items():
        if (lengths := [len(of_seed) for of_seed in values]) != expected:
            raise ValueError(f"arms must have the same draws per trajectory; naive has {expected}, {name!r} {lengths}")
    means = {name: [float(np.mean(values)) for values in of_arm] for name, of_arm in draws.items()}
    differences = {
        name: paired_difference(values, means["naive"], num_tests=len(candidates) if name in candidates else 1)
        for name, values in means.items()
        if name != "naive"
    }
    corrected = holm({name: differences[name].p_value for name in candidates})
    results = {}
    for name, of_arm in draws.items():
        estimate, difference = mean_and_interval(means[name]), differences.get(name)
        per_draw = tuple(tuple(of_seed) for of_seed in of_arm)
        results[name] = ArmResult(tuple(means[name]), estimate, difference, corrected.get(name), per_draw)
    controls = [name for name in candidates if name in controls]
    methods = [name for name in candidates if name not in controls] if controls else []
    against = {name: _against(means, name, [*controls, "naive"], measure) for name in methods}
    return Comparison(what, results, tuple(candidates), against, measure, counted)


def _against(
    means: Mapping[str, Sequence[float]], method: str, controls: Sequence[str], measure: Measure
) -> AgainstControls:
    differences = {control: paired_difference(means[method], means[control]) for control in controls}
    one_sided = {
        control: d.p_value / 2 if measure.gain(d.mean) > 0 else 1 - d.p_value / 2 for control, d in differences.items()
    }
    hardest = max(one_sided, key=one_sided.__getitem__)
    return AgainstControls(differences, hardest, one_sided[hardest])


def _entry(estimate: Estimate) -> dict[str, Any]:
    entry: dict[str, Any] = {"mean": estimate.mean, "ci95": [estimate.low, estimate.high]}
    return {**entry, "p": estimate.p_value} if isinstance(estimate, PairedDifference) else entry
