"""Tables of several comparisons side by side, one column per suite."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..markdown import Table

COMPARISONS_NAME = "comparisons.json"

Report = Mapping[str, Any]

_HEAD = ("name", "description", "seeds", "draws", "seconds")
_RESULT = ("protocol", "measure", "valid", "headroom", "better", "worse", "better_than_controls")
_PROTOCOL_LABELS = {"source": "source (zero-shot)"}


def condensed(report: Report) -> dict[str, Any]:
    """Return the part of a `report.json` that these tables need: no cells or curves."""
    results = []
    for result in report["results"]:
        arms = {name: _rounded(values) for name, values in result["arms"].items()}
        results.append({**{key: result[key] for key in _RESULT}, "arms": arms})
    return {**{key: report[key] for key in _HEAD}, "results": results}


def protocols(reports: Iterable[Report]) -> list[str]:
    """Return the protocol names of all reports, the most important first."""
    return list(dict.fromkeys(result["protocol"] for report in reports for result in report["results"]))


def side_by_side(
    reports: Sequence[Report], protocol: str, measure: str = "accuracy", arms: Sequence[str] | None = None
) -> Table:
    """Return a table of arms by suites: differences from naive with 95% intervals, in the units of the reports.

    An arrow marks a significant difference after Holm's correction, up for a gain. Numbers of a suite whose positive
    control failed are in brackets. Reports without the protocol have no column. Rows are all arms by default.
    """
    columns = {report["name"]: result for report, result in _results(reports, protocol, measure)}
    results = columns.values()
    if arms is None:
        arms = list(dict.fromkeys(arm for result in results for arm in result["arms"]))
    rows: list[Sequence[object]] = [
        [_PROTOCOL_LABELS.get(protocol, protocol), *columns],
        ["positive control", *map(positive_control, results)],
        ["naive", *(estimate_text(result["arms"]["naive"], result["measure"]) for result in results)],
    ]
    for arm in arms:
        if arm != "naive" and any(arm in result["arms"] for result in results):
            rows.append([arm, *(_difference(result, arm) for result in results)])
    return rows


def estimate_text(values: Mapping[str, Any], measure: Mapping[str, Any], sign: str = "") -> str:
    """Format `mean` and `ci95` of an entry of `report.json` in the unit of its measure: `86.2 [84.9, 87.5]`."""
    numbers = (values["mean"], *values["ci95"])
    mean, low, high = (f"{measure['scale'] * value:{sign}.{measure['digits']}f}" for value in numbers)
    return f"{mean} [{low}, {high}]"


def positive_control(result: Mapping[str, Any]) -> str:
    """Return the outcome of the positive control of one result in a word or two."""
    if result["valid"] is None:
        return "not run"
    if not result["valid"]:
        return "failed"
    return "inconclusive" if result["headroom"] is False else "passed"


def tally(reports: Iterable[Report], protocol: str, arm: str) -> dict[str, list[str]]:
    """Sort the names of the suites by what an arm did to the accuracy in them.

    Compared with naive, it is significantly `better` or `worse`, or `neither`; `unclear` if the oracle did not beat
    naive. Suites in which naive does not beat its own start are left out.
    """
    suites: dict[str, list[str]] = {"better": [], "worse": [], "neither": [], "unclear": []}
    for report, result in _results(reports, protocol, "accuracy"):
        if result["valid"] and arm in result["arms"]:
            otherwise = "unclear" if result["headroom"] is False else "neither"
            outcome = next((key for key in ("better", "worse") if arm in result[key]), otherwise)
            suites[outcome].append(report["name"])
    return suites


def better_than_controls(reports: Iterable[Report]) -> list[str]:
    """List the methods whose accuracy beats that of each control of their suite, as "method in protocol of suite"."""
    return [
        f"{method} in {result['protocol']} of {report['name']}"
        for report in reports
        for result in report["results"]
        if result["valid"] and result["measure"]["name"] == "accuracy"
        for method in result["better_than_controls"]
    ]


def _results(reports: Iterable[Report], protocol: str, measure: str) -> list[tuple[Report, Mapping[str, Any]]]:
    return [
        (report, result)
        for report in reports
        for result in report["results"]
        if (result["protocol"], result["measure"]["name"]) == (protocol, measure)
    ]


def _difference(result: Mapping[str, Any], arm: str) -> str:
    if arm not in result["arms"]:
        return ""
    text = estimate_text(result["arms"][arm]["minus_naive"], result["measure"], "+")
    text += " ↑" if arm in result["better"] else " ↓" if arm in result["worse"] else ""
    return f"({text})" if result["valid"] is False else text


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    estimate: dict[str, Any] = {"mean": round(values["mean"], 6), "ci95": [round(end, 6) for end in values["ci95"]]}
    if "per_seed" in values:
        estimate["per_seed"] = [round(value, 6) for value in values["per_seed"]]
    return {**estimate, "minus_naive": _rounded(values["minus_naive"])} if "minus_naive" in values else estimate
