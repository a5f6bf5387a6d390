"""Figures of a report, from the content of `report.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ...plotting import (
    ForestRow,
    ForgettingPanel,
    LandscapePoint,
    RateCurve,
    RatePanel,
    figure_svg,
    plot_forest,
    plot_forgetting_panels,
    plot_landscape,
    plot_learning_rates,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Report = Mapping[str, Any]

ROLES = ("method", "control", "reference")


@dataclass(frozen=True)
class ReportFigure:
    """A figure with its file name (without suffix), alternative text and caption."""

    name: str
    figure: "Figure"
    alternative: str
    caption: str

    @cached_property
    def svg(self) -> str:
        """The figure as one `<svg>` element."""
        return figure_svg(self.figure)


def forest_figure(report: Report, number: int) -> ReportFigure | None:
    """Draw the differences from naive of one result; `None` without another arm."""
    result = report["results"][number]
    measure, scale = result["measure"], result["measure"]["scale"]
    significant = [*result["better"], *result["worse"]]
    rows = []
    for name, values in result["arms"].items():
        if (difference := values.get("minus_naive")) is not None:
            role, detectable = report["arms"][name]["role"], difference["minimum_detectable"]
            mean, low, high = (scale * value for value in (difference["mean"], *difference["ci95"]))
            detectable = None if detectable is None else scale * detectable
            rows.append(ForestRow(name, role, mean, low, high, name in significant, detectable))
    if not rows:
        return None
    unit, options = measure["difference_unit"] or measure["name"], ("higher_is_better", "digits")
    return ReportFigure(
        f"difference-{number + 1}",
        plot_forest(rows, unit, **{key: measure[key] for key in options}),
        f"Forest plot: difference from naive of {len(rows)} arms in {result['what']}, with 95% intervals. Significant"
        f" after correction: {', '.join(significant) or 'none'}. The table below lists all numbers.",
        "Paired difference of each arm to naive, best first, references below the line. Bars are 95% intervals of one"
        " arm; filled markers are significant after Holm's correction. Within the grey band, differences are below"
        " the minimum detectable difference (power 80%).",
    )


def rates_figure(report: Report, protocol: str) -> ReportFigure | None:
    """Draw the first measure against the learning rate; `None` for a protocol without tuning."""
    measure = measure_of(report, protocol)
    curves: dict[str, list[RateCurve]] = {}
    for curve in report["curves"]:
        if curve["protocol"] == protocol and measure is not None:
            values, label = curve["measures"][measure["name"]], options_text(curve["options"])
            drawn = _rate_curve(curve["learning_rates"], values["test"], values["test_ci95"], measure["scale"], label)
            curves.setdefault(curve["arm"], []).append(drawn)
    naive = curves.pop("naive", None)
    if measure is None or naive is None or not curves:
        return None
    panels = _panels(report, curves)
    return ReportFigure(
        f"learning-rates-{list(report['protocols']).index(protocol) + 1}",
        plot_learning_rates(panels, naive[0], f"{measure['name']} on test data{_unit(measure)}"),
        f"{measure['name']} against learning rate in {report['protocols'][protocol]['what']}: {len(panels)} panels,"
        " one per arm, with naive in grey.",
        "Mean on test data at every learning rate evaluated. An arm that has the same maximum as naive at another rate"
        " is not better. A control with several settings divides its tuning trials among them. A gap marks a"
        " training that diverged.",
    )


def budget_figure(report: Report, protocol: str) -> ReportFigure | None:
    """Draw the first measure against the number of trials; `None` without budget curves."""
    budgets = budgets_of(report, protocol)
    if budgets is None or len(budgets["arms"]) < 2:
        return None
    measure, trials = measure_of(report, protocol), budgets["trials"]
    assert measure is not None
    curves = {
        name: [_rate_curve(trials, arm["mean"], arm["ci95"], measure["scale"])]
        for name, arm in budgets["arms"].items()
    }
    (naive,) = curves.pop("naive")
    panels = _panels(report, curves)
    score = f"{measure['name']} on test data{_unit(measure)}"
    return ReportFigure(
        f"budget-{list(report['protocols']).index(protocol) + 1}",
        plot_learning_rates(panels, naive, score, x_name="tuning trials", ticks=trials),
        f"{measure['name']} against the number of tuning trials in {report['protocols'][protocol]['what']}:"
        f" {len(panels)} panels, one per arm, with naive in grey. The table below lists all numbers.",
        "Expected score of the best of b random trials by validation. An arm that is above naive only on the left"
        " saves tuning trials; one that is above it everywhere has better weights.",
    )


def measure_of(report: Report, protocol: str) -> Mapping[str, Any] | None:
    """Return the first measure of a protocol; `None` if no result is of it."""
    return next((result["measure"] for result in report["results"] if result["protocol"] == protocol), None)


def budgets_of(report: Report, protocol: str) -> Mapping[str, Any] | None:
    """Return the budget curves of a protocol; reports of older versions have none."""
    return next((entry for entry in report.get("budgets", []) if entry["protocol"] == protocol), None)


def forgetting_figure(report: Report) -> ReportFigure | None:
    """Draw the scores of every state; `None` if they were not measured."""
    states = report["states"]
    measures = {result["measure"]["name"]: result["measure"] for result in report["results"]}
    shown = [measure for name, measure in measures.items() if states and name in states["measures"]]
    if not shown:
        return None
    panels, listed = [], []
    for measure in shown:
        scale, values = measure["scale"], states["measures"][measure["name"]]
        label = f"{measure['name']} on unseen source data{_unit(measure)}"
        runs = [[scale * value for value in run] for run in values["per_seed"]]
        num_classes = _num_source_classes(report) if measure["name"] == "accuracy" else 0
        chance = scale / num_classes if num_classes else None
        panels.append(ForgettingPanel(runs, label, chance, measure["digits"], min_span=0.1 * scale))
        means = (f"Θ{state} {scale * value:.{measure['digits']}f}" for state, value in enumerate(values["mean"]))
        listed.append(f"mean {label}, by state: {', '.join(means)}")
    return ReportFigure(
        "forgetting",
        plot_forgetting_panels(states["num_examples"], panels, title=""),
        f"Forgetting curve: {'; '.join(listed)}.",
        "Each state continues from the previous one on a smaller subset. Where the curve does not fall, the model"
        " forgot nothing: the later states are only trained for longer.",
    )


def landscape_figure(report: Report) -> ReportFigure | None:
    """Draw the loss around Θ0; `None` if it was not measured."""
    landscape = report["landscape"]
    if not landscape:
        return None
    keys = [field.name for field in fields(LandscapePoint)]
    points = [LandscapePoint(**{key: point[key] for key in keys}) for point in landscape["points"]]
    x, y, loss, name = (landscape[key] for key in ("x", "y", "loss", "measure"))
    return ReportFigure(
        "landscape",
        plot_landscape(x, y, loss, points, name, landscape["explained"]),
        f"Map of the {name} in the plane of the states with {len(points)} points. The table below"
        " lists their coordinates and values.",
        f"The {name} of one trajectory (seed {landscape['seed']}) on {landscape['num_examples']}"
        " examples, in the plane through Θ0 along the first two principal components of the states. The points are"
        " projected: the colour under a point applies to it only if it lies near the plane.",
    )


def options_text(options: Mapping[str, Any]) -> str:
    """Format a setting, such as `factor 0.5`."""
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _num_source_classes(report: Report) -> int:
    """Return the number of classes of a suite's source task, or 0 if its file does not list them."""
    source = report["task"].get("source")
    return len(source.get("classes") or ()) if isinstance(source, Mapping) else 0


def _rate_curve(x: Any, values: Any, intervals: Any, scale: float, label: str = "") -> RateCurve:
    """Scale a curve; it has a gap, NaN, where a training diverged."""

    def scaled(value: float | None) -> float:
        return float("nan") if value is None else scale * value

    ends = [list(map(scaled, interval or (None, None))) for interval in intervals]
    return RateCurve(x[: len(values)], list(map(scaled, values)), ends, label)


def _panels(report: Report, curves: Mapping[str, Sequence[RateCurve]]) -> list[RatePanel]:
    """Return a panel for each arm with curves, in the order of the roles."""
    roles = {name: report["arms"][name]["role"] for name in curves}
    return [RatePanel(name, role, curves[name]) for role in ROLES for name in curves if roles[name] == role]


def _unit(measure: Mapping[str, Any]) -> str:
    return f", {measure['unit']}" if measure["unit"] else ""
