"""From `report.json` to tables of text and to sentences."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from .figures import ROLES, Report, options_text

_ALPHA = 0.05
_FEW = 3  # names that are listed in a cell
_AT_EDGE = 0.25  # by how much more of the draws than by chance a grid is called too short


@dataclass(frozen=True)
class ReportTable:
    """
    Attributes:
        caption (`str`): What it shows.
        head (`Sequence[str]`): Headings of the columns.
        rows (`Sequence[Sequence[str]]`): Cells; the first of a row names it.
        marked (`frozenset[str]`): Names of the rows that stand out.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[str] = frozenset()

    @property
    def kinds(self) -> list[str]:
        """`"number"` for columns of numbers, which are set to the right, else `"text"`."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.head)
        return ["number" if _are_numbers(column) else "text" for column in columns]


def verdict(report: Report) -> str:
    """What comes first: what the most important comparison says, or that it says nothing; and of methods that are
    better than naive, whether they are better than what is trivial too."""
    if not report["results"]:
        return "Nothing was compared: there is no protocol with a result of two arms."
    first = report["results"][0]
    hardest = {
        name: first["against_controls"][name]["hardest"]
        for name in first["better"]
        if name in first["against_controls"] and name not in first["better_than_controls"]
    }
    if not hardest:
        return first["verdict"]
    pairs = ", ".join(f"{name} (against {control})" for name, control in hardest.items())
    return f"{first['verdict']} Not shown to be better than every trivial control: {pairs}."


def validity(report: Report) -> tuple[str, str, str]:
    """Whether a gain could have shown, by the most important comparison: `"valid"`, `"invalid"` or `"unknown"`, the
    same in a few words, and in the sentence that says why."""
    if not report["results"]:
        return "unknown", "Whether a gain could have shown is not known", "There is no result that could tell."
    first = report["results"][0]
    if first["valid"] is False:
        status, words = "invalid", "This suite can show nothing"
    elif first["valid"] is None:
        status, words = "unknown", "Whether a gain could have shown is not known"
    elif first["headroom"] is False:
        status, words = "unknown", "There may have been nothing to gain"
    else:
        status, words = "valid", "A gain could have shown"
    return status, words, first["validity"]


def overview_table(report: Report) -> ReportTable:
    """One row a protocol and measure."""
    rows = []
    for result in report["results"]:
        measure, naive = result["measure"], result["arms"]["naive"]
        choosable = {
            name: values["minus_naive"]
            for name, values in result["arms"].items()
            if report["arms"][name]["role"] != "reference" and values.get("minus_naive")
        }
        sign = 1 if measure["higher_is_better"] else -1
        best = max(choosable, key=lambda name: sign * choosable[name]["mean"], default=None)
        row = [result["what"], {True: "yes", False: "no", None: "not known"}[result["valid"]]]
        row.append(_value(measure, naive["mean"]) + _space(measure["unit"]))
        if result["valid"] is False:
            rows.append([*row, *["shows nothing"] * 4])
            continue
        row.append("–" if best is None else f"{best}: {_difference(measure, choosable[best])}")
        rows.append(row + [_few(result[key]) for key in ("better", "worse", "better_than_controls")])
    head = ["compared by", "valid", "naive", "best of all arms", "better than naive", "worse than naive"]
    return ReportTable(
        "All comparisons. Better and worse are significant after Holm's correction.",
        [*head, "methods better than every control"],
        rows,
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if 0 < len(names) <= _FEW else f"{len(names)} arms" if names else "none"


def result_table(report: Report, number: int) -> ReportTable:
    """All arms of one entry of `results`, in the order of the forest plot."""
    result = report["results"][number]
    measure = result["measure"]
    unit, difference_unit = _space(measure["unit"]), _space(measure["difference_unit"])
    sign = -1 if measure["higher_is_better"] else 1

    def order(name: str) -> tuple[bool, bool, float]:
        difference = result["arms"][name].get("minus_naive")
        is_reference = report["arms"][name]["role"] == "reference"
        return difference is not None, is_reference, sign * (difference or {"mean": 0.0})["mean"]

    rows = []
    for name in sorted(result["arms"], key=order):
        values = result["arms"][name]
        row = [name, report["arms"][name]["role"], _value(measure, values["mean"]), _interval(measure, values["ci95"])]
        difference = values.get("minus_naive")
        if difference is None:
            rows.append([*row, *["–"] * 5])
            continue
        effect, detectable = difference["effect_size"], difference["minimum_detectable"]
        row += [_value(measure, difference["mean"], "+"), _interval(measure, difference["ci95"], "+")]
        row.append("reference" if difference["p_holm"] is None else p_value(difference["p_holm"]))
        row.append("–" if effect is None else f"{effect:+.2f}".replace("-", "−"))
        rows.append([*row, "–" if detectable is None else _value(measure, detectable)])
    head = ["arm", "role", f"{measure['name']}{unit}", "95% interval", f"minus naive{difference_unit}"]
    return ReportTable(
        f"All arms in {result['what']}: mean over {_count(report)}, difference to naive paired over them. d is Cohen's"
        " d of the paired differences; detectable is the smallest true difference found with a chance of 80%.",
        [*head, "95% interval", "p (Holm)", "d", f"detectable{difference_unit}"],
        rows,
        frozenset([*result["better"], *result["worse"]]),
    )


def controls_table(report: Report, number: int) -> ReportTable | None:
    """Each method against the control that is hardest to beat; `None` without methods or controls."""
    result = report["results"][number]
    measure = result["measure"]
    rows = []
    for name, against in result["against_controls"].items():
        difference = against["differences"][against["hardest"]]
        beaten = "yes" if name in result["better_than_controls"] else "no"
        rows.append([name, beaten, against["hardest"], _difference(measure, difference), p_value(against["p"])])
    if not rows:
        return None
    return ReportTable(
        "Methods against what is hardest to beat, a control or naive: a method that is no better than every trivial"
        " control has shown nothing of its own. Whether it is, is corrected for the number of methods.",
        ["method", "better than all of them", "hardest to beat", "method minus that", "p (one-sided)"],
        rows,
        frozenset(result["better_than_controls"]),
    )


def chosen_table(report: Report, protocol: str) -> ReportTable | None:
    """What validation data chose, and how often at an end of the grid; `None` for what was not tuned."""
    rows = []
    for name, chosen in report["chosen"].get(protocol, {}).items():
        rates = [trial["learning_rate"] for trial in chosen if trial["learning_rate"] is not None]
        if not rates:
            continue
        settings = Counter(options_text(trial["options"]) for trial in chosen if trial["options"])
        common = ", ".join(f"{text} ({count / len(chosen):.0%})" for text, count in settings.most_common(2)) or "–"
        spread = f"{_rate(min(rates))} to {_rate(max(rates))}"
        rows.append([name, _rate(median(rates)), spread, f"{_share_at_edge(report, protocol, name)[0]:.0%}", common])
    if not rows:
        return None
    head = ["arm", "median learning rate", "range", "at an end of the grid", "settings chosen most often"]
    return ReportTable(
        f"Chosen by validation data in {report['protocols'][protocol]['what']}, over all seeds and draws.", head, rows
    )


def landscape_table(report: Report) -> ReportTable:
    """The points of the landscape."""
    found = report["landscape"]
    rows = [
        [
            point["name"],
            f"{point['x']:.3g}",
            f"{point['y']:.3g}",
            f"{point['off_plane']:.3g}",
            "not finite" if point["loss"] is None else f"{point['loss']:.4g}",
        ]
        for point in found["points"]
    ]
    return ReportTable(
        "Points of the landscape: distances in weights from Θ0, and their own loss, not that of the plane.",
        ["weights", "first direction", "second direction", "distance from the plane", found["measure"]],
        [[cell.replace("-", "−") if column else cell for column, cell in enumerate(row)] for row in rows],
    )


def arms_table(report: Report) -> ReportTable:
    """What was compared."""
    rows = []
    for role in ROLES:
        for name, arm in report["arms"].items():
            if arm["role"] == role:
                settings = "; ".join(text for options in arm["settings"] if (text := options_text(options)))
                rows.append([name, role, arm["description"], settings or "–"])
    return ReportTable("Arms: the ways to initialise the task.", ["arm", "role", "what it is", "settings tried"], rows)


def environment_table(report: Report) -> ReportTable:
    """Versions."""
    rows = [[name, version] for name, version in report["created_with"].items()]
    return ReportTable("Versions that it was run with.", ["library", "version"], rows)


def limits(report: Report) -> list[str]:
    """What the numbers do not say."""
    found = [
        f"Intervals and tests are over {_count(report)}; another model, other data or another way of training are not"
        " covered.",
        "Intervals are of one arm by itself, not corrected for the number of arms; p (Holm) is.",
        "Learning rates and settings were chosen on validation data, with the same number of trials for every arm in"
        " fine-tuning and probes; the numbers are of test data.",
    ]
    sensitivity = report["results"][0]["sensitivity"] if report["results"] else ""
    found += [sensitivity] if sensitivity else []
    for protocol in report["protocols"]:
        arms = []
        for name in report["arms"]:
            share, by_chance = _share_at_edge(report, protocol, name)
            if share > by_chance + _AT_EDGE:
                arms.append(f"{name} ({share:.0%}, by chance {by_chance:.0%})")
        if arms:
            found.append(
                f"In {report['protocols'][protocol]['what']}, the best learning rate lay at an end of the grid more"
                f" often than by chance for {', '.join(arms)}: the grid was too short for them."
            )
    if not any(arm["kind"] == "oracle" for arm in report["arms"].values()):
        found.append("No oracle was run: how much could have been gained at all is not known.")
    return found


def p_value(value: float) -> str:
    """A p value, not more exact than it is."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _are_numbers(cells: Sequence[str]) -> bool:
    others = ("–", "reference", "not finite")
    return any(cell not in others for cell in cells) and all(
        cell in others or cell[:1] in "+−[<0123456789" for cell in cells
    )


def _count(report: Report) -> str:
    count = len(report["seeds"]) if len(report["seeds"]) > 1 else report["draws"]
    return f"{count} {report['counted']}"


def _share_at_edge(report: Report, protocol: str, arm: str) -> tuple[float, float]:
    """Share of the draws in which the chosen rate was the grid's smallest or largest, or beyond; and the share of all
    rates tried that are, which is how often that happens where the rate makes no difference."""
    grid = report["protocols"][protocol].get("learning_rates", [])
    tried = [
        rate
        for curve in report["curves"]
        if curve["protocol"] == protocol and curve["arm"] == arm
        for rate in curve["learning_rates"]
    ]
    chosen = [trial["learning_rate"] for trial in report["chosen"].get(protocol, {}).get(arm, [])]
    if len(grid) < 2 or not tried or not chosen:
        return 0.0, 0.0
    low, high = min(grid), max(grid)
    share, by_chance = (sum(not low < rate < high for rate in rates) / len(rates) for rates in (chosen, tried))
    return share, by_chance


def _value(measure: Mapping[str, Any], value: float, sign: str = "") -> str:
    return f"{measure['scale'] * value:{sign}.{measure['digits']}f}".replace("-", "−")


def _interval(measure: Mapping[str, Any], ends: Sequence[float], sign: str = "") -> str:
    return f"[{_value(measure, ends[0], sign)}, {_value(measure, ends[1], sign)}]"


def _difference(measure: Mapping[str, Any], difference: Mapping[str, Any]) -> str:
    return f"{_value(measure, difference['mean'], '+')} {_interval(measure, difference['ci95'], '+')}"


def _space(unit: str) -> str:
    return f", {unit}" if unit not in ("", "%") else f" {unit}" if unit else ""


def _rate(value: float) -> str:
    return f"{value:.2g}"
