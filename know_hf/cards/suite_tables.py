"""Reports of several comparisons side by side: what was measured of some KNOWN weights, one column a suite."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..markdown import Table

COMPARISONS_NAME = "comparisons.json"

Report = Mapping[str, Any]

_HEAD = ("name", "description", "seeds", "draws", "seconds")
_RESULT = ("protocol", "measure", "valid", "headroom", "better", "worse", "better_than_controls")
_DIGITS = 6


def condensed(report: Report) -> dict[str, Any]:
    """What these tables need of a `report.json`, in its own form: no cells, curves or values of single seeds."""
    results = []
    for result in report["results"]:
        arms = {}
        for name, values in result["arms"].items():
            arms[name] = {key: _rounded(values[key]) for key in ("mean", "ci95")}
            if "minus_naive" in values:
                difference = values["minus_naive"]
                arms[name]["minus_naive"] = {key: _rounded(difference[key]) for key in ("mean", "ci95")}
        results.append({**{key: result[key] for key in _RESULT}, "arms": arms})
    return {**{key: report[key] for key in _HEAD}, "results": results}


def protocols(reports: Iterable[Report]) -> list[str]:
    """Names of all protocols of some reports, the most important first."""
    return list(dict.fromkeys(result["protocol"] for report in reports for result in report["results"]))


def side_by_side(
    reports: Sequence[Report], protocol: str, measure: str = "accuracy", arms: Sequence[str] | None = None
) -> Table:
    """Arms by suites: differences to naive with their 95% intervals, in the units of the reports' own tables.

    An arrow stands where a difference is significant after Holm's correction, up where it is a gain. Numbers of a
    suite that could show nothing, by its own controls, are in brackets.

    Args:
        reports (sequence of mappings): Contents of `report.json`, or [`condensed`].
        protocol (`str`): What of them.
        measure (`str`, *optional*, defaults to `"accuracy"`): By what.
        arms (`Sequence[str]`, *optional*): Rows after naive; by default all arms, in the order of the reports.

    Returns:
        Rows, the first of them the head; no column for a report without the protocol and measure.
    """
    found = [(report["name"], _result(report, protocol, measure)) for report in reports]
    columns = [(name, result) for name, result in found if result is not None]
    if arms is None:
        arms = list(dict.fromkeys(arm for _, result in columns for arm in result["arms"]))
    rows: list[Sequence[object]] = [
        [protocol, *(name for name, _ in columns)],
        ["could show a gain", *(_validity(result) for _, result in columns)],
        ["naive", *(_interval(result, result["arms"]["naive"], sign="") for _, result in columns)],
    ]
    for arm in arms:
        if arm != "naive" and any(arm in result["arms"] for _, result in columns):
            rows.append([arm, *(_difference(result, arm) for _, result in columns)])
    return rows


def tally(reports: Iterable[Report], protocol: str, arm: str, measure: str = "accuracy") -> dict[str, list[str]]:
    """Names of the suites in which an arm was `better` or `worse` than naive, or `neither`; those in which more data
    did not clearly help either, so that a missing difference is no answer, are `unclear`. Left out are suites that
    show nothing, where naive does not beat what it started from."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "neither": [], "unclear": []}
    for report in reports:
        result = _result(report, protocol, measure)
        if result is not None and result["valid"] and arm in result["arms"]:
            otherwise = "unclear" if result["headroom"] is False else "neither"
            which = next((key for key in ("better", "worse") if arm in result[key]), otherwise)
            found[which].append(report["name"])
    return found


def better_than_controls(reports: Iterable[Report], measure: str = "accuracy") -> list[str]:
    """Every method that was better than each control of its suite, as "method in protocol of suite"."""
    return [
        f"{method} in {result['protocol']} of {report['name']}"
        for report in reports
        for result in report["results"]
        if result["valid"] and result["measure"]["name"] == measure
        for method in result["better_than_controls"]
    ]


def _result(report: Report, protocol: str, measure: str) -> Mapping[str, Any] | None:
    matching = (r for r in report["results"] if r["protocol"] == protocol and r["measure"]["name"] == measure)
    return next(matching, None)


def _validity(result: Mapping[str, Any]) -> str:
    if result["valid"] is None:
        return "not known"
    if not result["valid"]:
        return "no"
    return "oracle not clearly better" if result["headroom"] is False else "yes"


def _difference(result: Mapping[str, Any], arm: str) -> str:
    if arm not in result["arms"]:
        return ""
    text = _interval(result, result["arms"][arm]["minus_naive"], sign="+")
    up, down = (result[key] for key in ("better", "worse"))
    text += " ↑" if arm in up else " ↓" if arm in down else ""
    return f"({text})" if result["valid"] is False else text


def _interval(result: Mapping[str, Any], values: Mapping[str, Any], sign: str) -> str:
    scale, digits = result["measure"]["scale"], result["measure"]["digits"]
    mean, low, high = (f"{scale * value:{sign}.{digits}f}" for value in (values["mean"], *values["ci95"]))
    return f"{mean} [{low}, {high}]"


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value if value is None else round(value, _DIGITS)
