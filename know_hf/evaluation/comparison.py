"""Scores of several arms over the same seeds, against naive: table, verdict, and whether a gain could have shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .statistics import Estimate, PairedDifference, holm, mean_and_interval, paired_difference

ALPHA = 0.05


@dataclass(frozen=True)
class ArmResult:
    """
    Attributes:
        per_seed (`tuple[float, ...]`): Accuracy in [0, 1], one value a seed.
        estimate ([`Estimate`]): Mean and 95% interval over seeds.
        difference ([`PairedDifference`], *optional*): To naive, paired over seeds; none for naive itself.
        corrected_p (`float`, *optional*): p of the difference, corrected by Holm for the number of candidates; for
            candidates only.
    """

    per_seed: tuple[float, ...]
    estimate: Estimate
    difference: PairedDifference | None = None
    corrected_p: float | None = None

    def to_dict(self) -> dict[str, Any]:
        result: dict[str, Any] = {
            "mean": self.estimate.mean,
            "ci95": [self.estimate.low, self.estimate.high],
            "per_seed": list(self.per_seed),
        }
        if self.difference is not None:
            result["minus_naive"] = {
                "mean": self.difference.mean,
                "ci95": [self.difference.low, self.difference.high],
                "p": self.difference.p_value,
                "p_holm": self.corrected_p,
            }
        return result


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        what (`str`): What was measured, as it stands in a sentence after "In".
        results (`dict[str, ArmResult]`): From arm to its result; `"naive"` is among them.
        candidates (`tuple[str, ...]`): The arms that can be better than naive; the others are points of reference.
    """

    what: str
    results: dict[str, ArmResult]
    candidates: tuple[str, ...]

    @property
    def better(self) -> tuple[str, ...]:
        """The candidates that are significantly better than naive, corrected for their number."""
        return self._significant(sign=1)

    @property
    def worse(self) -> tuple[str, ...]:
        """The candidates that are significantly worse than naive, corrected for their number."""
        return self._significant(sign=-1)

    def verdict(self) -> str:
        """One sentence: whether any candidate is better than naive."""
        if not self.candidates:
            return f"In {self.what}, no arm was run that could be chosen instead of naive."
        seeds = len(self.results["naive"].per_seed)
        test = f"paired t-test over {seeds} seeds, Holm-corrected for {len(self.candidates)} arms, level {ALPHA:g}"
        if self.better:
            are = "is" if len(self.better) == 1 else "are"
            found = ", ".join(f"{name} ({self._difference(name)})" for name in self.better)
            return f"In {self.what}, {found} {are} significantly better than naive ({test})."
        best = max(self.candidates, key=lambda name: self.results[name].estimate.mean)
        worse = f"; significantly worse: {', '.join(self.worse)}" if self.worse else ""
        return (
            f"In {self.what}, none of {', '.join(self.candidates)} is significantly better than naive; the highest is"
            f" {best} with {self._difference(best)}{worse} ({test})."
        )

    def validity(self) -> str:
        """One sentence: whether naive beat random initialisation and the oracle naive, without which a suite can show
        no gain."""
        parts, valid = [], True
        for upper, lower in (("naive", "random"), ("oracle", "naive")):
            if upper in self.results and lower in self.results:
                gap = paired_difference(self.results[upper].per_seed, self.results[lower].per_seed)
                valid &= gap.low > 0
                relation = "beats" if gap.low > 0 else "does not clearly beat"
                parts.append(f"{upper} {relation} {lower} ({_points(gap)})")
        if not parts:
            return "Neither random initialisation nor an oracle was run: nothing says whether a gain could have shown."
        end = "a gain could have shown." if valid else "a gain could hardly have shown: take the verdict as no answer."
        return f"In {self.what}, {' and '.join(parts)}: {end}"

    def table(self, extra: Mapping[str, Mapping[str, str]] | None = None) -> str:
        """A table for people, accuracies in per cent.

        Args:
            extra (`Mapping[str, Mapping[str, str]]`, *optional*): More columns: from heading to arm to cell.
        """
        extra = extra or {}
        rows = [["arm", "accuracy %", "95% interval", "minus naive", "95% interval", "p (Holm)", *extra]]
        for name, result in self.results.items():
            row = [name, f"{100 * result.estimate.mean:.1f}", _interval(result.estimate, sign="")]
            if result.difference is None:
                row += ["", "", ""]
            else:
                p = "reference" if result.corrected_p is None else f"{result.corrected_p:.3f}"
                row += [f"{100 * result.difference.mean:+.1f}", _interval(result.difference, sign="+"), p]
            rows.append(row + [column.get(name, "") for column in extra.values()])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """From arm to `{"mean", "ci95": [low, high], "per_seed"}`, and `"minus_naive"` for all but naive."""
        return {name: result.to_dict() for name, result in self.results.items()}

    def _significant(self, sign: int) -> tuple[str, ...]:
        found = []
        for name in self.candidates:
            result = self.results[name]
            assert result.difference is not None and result.corrected_p is not None
            if result.corrected_p < ALPHA and sign * result.difference.mean > 0:
                found.append(name)
        return tuple(found)

    def _difference(self, name: str) -> str:
        result = self.results[name]
        assert result.difference is not None
        return f"{_points(result.difference)}, p = {result.corrected_p:.2g}"


def compare_with_naive(
    scores: Mapping[str, Sequence[float]], candidates: Sequence[str], what: str = "accuracy"
) -> Comparison:
    """Compares arms with naive over the same seeds.

    Args:
        scores (`Mapping[str, Sequence[float]]`): From arm to one accuracy a seed, the same seeds in the same order for
            every arm; `"naive"` is among them.
        candidates (`Sequence[str]`): The arms that are tested for being better than naive.
        what (`str`, *optional*): What was measured, for sentences.

    Returns:
        [`Comparison`].

    Raises:
        `ValueError`: when there is no naive arm, or a candidate has no scores, or as [`paired_difference`].
    """
    for name in ("naive", *candidates):
        if name not in scores:
            raise ValueError(f"there are no scores of the arm {name!r}, only of {', '.join(scores)}")
    differences = {
        name: paired_difference(values, scores["naive"]) for name, values in scores.items() if name != "naive"
    }
    corrected = holm({name: differences[name].p_value for name in candidates})
    results = {
        name: ArmResult(tuple(values), mean_and_interval(values), differences.get(name), corrected.get(name))
        for name, values in scores.items()
    }
    return Comparison(what, results, tuple(candidates))


def _points(difference: Estimate) -> str:
    return f"{100 * difference.mean:+.1f} points, 95% interval {_interval(difference, sign='+')}"


def _interval(estimate: Estimate, sign: str) -> str:
    return f"[{100 * estimate.low:{sign}.1f}, {100 * estimate.high:{sign}.1f}]"
