"""Tables and sentences of a report, from the content of `report.json`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, median
from typing import Any

from markupsafe import Markup

from ...cards.suite_tables import estimate_text, positive_control
from ...markdown import markdown, table
from ..comparison import Measure
from .figures import ROLES, Report, budgets_of, options_text

_MAX_LISTED = 3  # names in a cell
_EDGE_TOLERANCE = 0.25  # of the draws, beyond chance


@dataclass(frozen=True)
class ReportTable:
    """A table of text. The first cell names its row; the rows in `marked` are bold."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[str] = frozenset()

    def markdown(self) -> str:
        """Return the caption and the table, numbers aligned to the right."""
        bold = Markup("**%s**")
        rows = [[bold % markdown(row[0]) if row[0] in self.marked else row[0], *row[1:]] for row in self.rows]
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.head)
        numeric = [number > 0 and _is_numeric(column) for number, column in enumerate(columns)]
        return f"{markdown(self.caption)}\n\n{table([self.head, *rows], numeric)}"


def verdict(report: Report) -> str:
    """Return the verdict of the first result, and which methods are not better than every trivial control."""
    if not report["results"]:
        return "Nothing was compared: no protocol has enough values for a test."
    first = report["results"][0]
    not_shown = [
        f"{name} (against {first['against_controls'][name]['hardest']})"
        for name in first["better"]
        if name in first["against_controls"] and name not in first["better_than_controls"]
    ]
    addition = f" Not shown to be better than every trivial control: {', '.join(not_shown)}." if not_shown else ""
    return first["verdict"] + addition


def validity(report: Report) -> tuple[str, str]:
    """Return the positive control of the first result: `"valid"`, `"invalid"` or `"unknown"`, and a sentence."""
    if not report["results"]:
        return "unknown", "No positive control was run."
    first = report["results"][0]
    return {"failed": "invalid", "passed": "valid"}.get(positive_control(first), "unknown"), first["validity"]


def overview_table(report: Report) -> ReportTable:
    """Return one row per protocol and measure."""
    rows = []
    for result in report["results"]:
        measure, differences = _measure(result), _differences(result)
        naive = f"{measure.format(result['arms']['naive']['mean'])} {measure.unit}".replace(" %", "%").rstrip()
        row = [result["what"], positive_control(result), naive, *["shows nothing"] * 4]
        if result["valid"] is not False:
            candidates = [name for name in differences if report["arms"][name]["role"] != "reference"]
            best = max(candidates, key=lambda name: measure.gain(differences[name]["mean"]), default=None)
            row[3] = "–" if best is None else f"{best}: {estimate_text(differences[best], result['measure'], '+')}"
            row[4:] = (_listed(result[key]) for key in ("better", "worse", "better_than_controls"))
        rows.append(row)
    head = ["comparison", "positive control", "naive", "best candidate", "better than naive", "worse than naive"]
    return ReportTable(
        '"Better" and "worse" are significant after Holm\'s correction.',
        [*head, "methods better than every control"],
        rows,
    )


def result_table(report: Report, number: int) -> ReportTable:
    """Return all arms of one result, in the order of the forest plot."""
    result = report["results"][number]
    measure, differences = _measure(result), _differences(result)

    def order(name: str) -> tuple[bool, bool, float]:
        gain = measure.gain(differences[name]["mean"]) if name in differences else 0.0
        return name in differences, report["arms"][name]["role"] == "reference", -gain

    rows = []
    for name in sorted(result["arms"], key=order):
        row = [name, report["arms"][name]["role"], estimate_text(result["arms"][name], result["measure"]), *["–"] * 4]
        if (difference := differences.get(name)) is not None:
            p, effect, detectable = (difference[key] for key in ("p_holm", "effect_size", "minimum_detectable"))
            row[3:5] = estimate_text(difference, result["measure"], "+"), "reference" if p is None else _p_value(p)
            row[5] = "–" if effect is None else f"{effect:+.2f}"
            row[6] = "–" if detectable is None else measure.format(detectable)
        rows.append(row)
    unit = _with_comma(measure.difference_unit)
    head = ["arm", "role", f"{measure.name}{_with_comma(measure.unit)}", f"minus naive{unit}"]
    return ReportTable(
        f"All arms in {result['what']}: mean over {_count(report)} and paired difference from naive, with 95%"
        ' intervals. d is Cohen\'s d of the paired differences; "detectable" is the minimum detectable difference at a'
        " power of 80%.",
        [*head, "p (Holm)", "d", f"detectable{unit}"],
        rows,
        frozenset([*result["better"], *result["worse"]]),
    )


def controls_table(report: Report, number: int) -> ReportTable | None:
    """Return each method against its hardest control, or `None` without methods or controls."""
    result = report["results"][number]
    rows = []
    for name, against in result["against_controls"].items():
        difference = estimate_text(against["differences"][against["hardest"]], result["measure"], "+")
        is_better = "yes" if name in result["better_than_controls"] else "no"
        rows.append([name, is_better, against["hardest"], difference, _p_value(against["p"])])
    if not rows:
        return None
    return ReportTable(
        "Each method against its hardest control (naive counts as one). A method that does not beat every trivial"
        " control has shown no effect of its own. Corrected for the number of methods.",
        ["method", "better than every control", "hardest control", "difference from it", "p (one-sided)"],
        rows,
        frozenset(result["better_than_controls"]),
    )


def chosen_table(report: Report, protocol: str) -> ReportTable | None:
    """Return the selected learning rates and settings, or `None` for a protocol without tuning."""
    rows = []
    for name, chosen in report["chosen"].get(protocol, {}).items():
        rates = [trial["learning_rate"] for trial in chosen if trial["learning_rate"] is not None]
        if not rates:
            continue
        settings = Counter(options_text(trial["options"]) for trial in chosen if trial["options"])
        common = ", ".join(f"{text} ({count / len(chosen):.0%})" for text, count in settings.most_common(2)) or "–"
        spread = f"{min(rates):.2g} to {max(rates):.2g}"
        rows.append([name, f"{median(rates):.2g}", spread, f"{_share_at_edge(report, protocol, name)[0]:.0%}", common])
    if not rows:
        return None
    return ReportTable(
        f"Selected on validation data in {report['protocols'][protocol]['what']}, over all seeds and draws.",
        ["arm", "median learning rate", "range", "at an edge of the grid", "most frequent settings"],
        rows,
    )


def budget_table(report: Report, protocol: str) -> ReportTable | None:
    """Return the expected score of every arm by number of trials, or `None` without budget curves."""
    budgets = budgets_of(report, protocol)
    if budgets is None:
        return None
    measure = _measure(next(result for result in report["results"] if result["protocol"] == protocol))
    most, rows = budgets["trials"][len(budgets["arms"]["naive"]["mean"]) - 1], []
    for name, arm in budgets["arms"].items():
        scores = ["–" if mean is None else measure.format(mean) for mean in arm["mean"]]
        missing = ["–"] * (len(budgets["trials"]) - len(scores))
        needed = arm["naive_trials"][0]
        more = "–" if arm["mean"][0] is None else f"more than {most}"
        rows.append([name, *scores, *missing, more if needed is None else str(needed)])
    heads = [f"{count} trial{'s' if count > 1 else ''}" for count in budgets["trials"]]
    return ReportTable(
        f"Expected {measure.name}{_with_comma(measure.unit)} on test data of the best of b random tuning trials by"
        " validation. The last column has the trials with which naive reaches what the arm reaches with one.",
        ["arm", *heads, "naive needs"],
        rows,
    )


def landscape_table(report: Report) -> ReportTable | None:
    """Return the points of the loss landscape, or `None` if it was not measured."""
    landscape, rows = report["landscape"], []
    if not landscape:
        return None
    for point in landscape["points"]:
        loss = "not finite" if point["loss"] is None else f"{point['loss']:.4g}"
        rows.append([point["name"], *(f"{point[key]:.3g}" for key in ("x", "y", "off_plane")), loss])
    return ReportTable(
        "Points of the landscape: distances in weights from Θ0, and the loss of the weights themselves, not of their"
        " projection.",
        ["weights", "first component", "second component", "distance from the plane", landscape["measure"]],
        rows,
    )


def arms_table(report: Report) -> ReportTable:
    """Return the description of every arm."""
    rows = []
    for name, arm in sorted(report["arms"].items(), key=lambda item: ROLES.index(item[1]["role"])):
        settings = "; ".join(filter(None, map(options_text, arm["settings"])))
        rows.append([name, arm["role"], arm["description"], settings or "–"])
    head = ["arm", "role", "description", "settings evaluated"]
    return ReportTable("Arms: the initial weights that were compared.", head, rows)


def costs_table(report: Report) -> ReportTable | None:
    """Return what the weights of every arm cost; `None` for a report of an older version."""
    rows = []
    for name in report["arms"]:
        cells = [cell for cell in report.get("cells", []) if cell["arm"] == name]
        costs = [cell["training_cost"] for cell in cells if cell.get("training_cost") is not None]
        passes = [cell["choice"]["forward_passes"] for cell in cells if cell.get("choice")]
        if costs:
            rows.append([name, f"{fmean(costs):.3g}", f"{fmean(passes):,.0f}" if passes else "–"])
    if not rows:
        return None
    return ReportTable(
        "Cost of the weights of every arm: optimizer steps of the source trainings behind them, relative to those of"
        " Θ0, and forward passes over validation examples that a gate chose by. Tuning on the target task comes on"
        " top, equally for every arm.",
        ["arm", "training, Θ0 = 1", "forward passes"],
        rows,
    )


def choices_table(report: Report) -> ReportTable | None:
    """Return what the gates chose, or `None` without a gate."""
    chosen: dict[str, Counter[str]] = {}
    for cell in report.get("cells", []):
        if choice := cell.get("choice"):
            chosen.setdefault(cell["arm"], Counter())[choice["chosen"]] += 1
    if not chosen:
        return None
    rows = [[arm, ", ".join(f"{name} ({n})" for name, n in names.most_common())] for arm, names in chosen.items()]
    return ReportTable("What the gates chose, with the number of trajectories.", ["arm", "chosen"], rows)


def environment_table(report: Report) -> ReportTable:
    """Return the library versions."""
    return ReportTable("Versions.", ["library", "version"], [list(item) for item in report["created_with"].items()])


def limits(report: Report) -> list[str]:
    """Return what the numbers do not show."""
    sentences = [
        f"Intervals and tests are over {_count(report)}. They do not cover other models, data or training setups.",
        "Each interval is for one arm, without correction for the number of arms. p (Holm) is corrected.",
        "Learning rates and settings were selected on validation data, with the same number of tuning trials per arm."
        " All numbers are from test data.",
    ]
    if {result["measure"]["name"] for result in report["results"]} >= {"accuracy", "loss"}:
        sentences.append(
            "A loss also depends on the confidence of a model: weights that only make it less confident, such as"
            " shrunken ones, can have a lower loss without telling classes apart any better."
        )
    if report["results"] and report["results"][0]["sensitivity"]:
        sentences.append(report["results"][0]["sensitivity"])
    for protocol, settings in report["protocols"].items():
        arms = []
        for name in report["arms"]:
            share, by_chance = _share_at_edge(report, protocol, name)
            if share > by_chance + _EDGE_TOLERANCE:
                arms.append(f"{name} ({share:.0%}, by chance {by_chance:.0%})")
        if arms:
            sentences.append(
                f"The grid of learning rates of {settings['what']} may be too narrow: the best rate lies at its edge"
                f" more often than by chance for {', '.join(arms)}."
            )
    if not any(arm["kind"] == "oracle" for arm in report["arms"].values()):
        sentences.append("No oracle was run, so the possible gain is unknown.")
    return sentences


def _share_at_edge(report: Report, protocol: str, arm: str) -> tuple[float, float]:
    """Return the share of selected learning rates at or beyond the edges of the grid, and the same share of all rates
    evaluated, which is the expected value if the rate has no effect."""
    grid = report["protocols"][protocol].get("learning_rates", [])
    evaluated = [
        rate
        for curve in report["curves"]
        if curve["protocol"] == protocol and curve["arm"] == arm
        for rate in curve["learning_rates"]
    ]
    selected = [trial["learning_rate"] for trial in report["chosen"].get(protocol, {}).get(arm, [])]
    if len(grid) < 2 or not evaluated or not selected:
        return 0.0, 0.0
    low, high = min(grid), max(grid)
    share, by_chance = (sum(not low < rate < high for rate in rates) / len(rates) for rates in (selected, evaluated))
    return share, by_chance


def _measure(result: Mapping[str, Any]) -> Measure:
    return Measure(**{field.name: result["measure"][field.name] for field in fields(Measure)})


def _differences(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: values["minus_naive"] for name, values in result["arms"].items() if "minus_naive" in values}


def _is_numeric(cells: Sequence[str]) -> bool:
    words = ("–", "reference", "not finite")
    numbers = [cell for cell in cells if cell not in words]
    return bool(numbers) and all(cell[:1] in "+-[<0123456789" for cell in numbers)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if 0 < len(names) <= _MAX_LISTED else f"{len(names)} arms" if names else "none"


def _count(report: Report) -> str:
    count = len(report["seeds"]) if len(report["seeds"]) > 1 else report["draws"]
    return f"{count} {report['counted']}"


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _with_comma(unit: str) -> str:
    return f" {unit}" if unit == "%" else f", {unit}" if unit else ""
