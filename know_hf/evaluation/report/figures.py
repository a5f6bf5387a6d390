"""From `report.json` to figures, each with what it shows in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ...plotting import (
    ForestRow,
    LandscapePoint,
    RateCurve,
    RatePanel,
    figure_svg,
    plot_forest,
    plot_forgetting,
    plot_landscape,
    plot_learning_rates,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Report = Mapping[str, Any]

ROLES = ("method", "control", "reference")


@dataclass(frozen=True)
class ReportFigure:
    """
    Attributes:
        name (`str`): Of its file, without suffix.
        figure (`matplotlib.figure.Figure`): The picture.
        alternative (`str`): What stands for it where it can't be seen.
        caption (`str`): How to read it.
    """

    name: str
    figure: "Figure"
    alternative: str
    caption: str

    @cached_property
    def svg(self) -> str:
        """One `<svg>` element."""
        return figure_svg(self.figure)


def forest_figure(report: Report, number: int) -> ReportFigure | None:
    """The differences to naive of one entry of `results`; `None` when there is no other arm."""
    result = report["results"][number]
    measure, arms = result["measure"], result["arms"]
    scale = measure["scale"]
    marked = {*result["better"], *result["worse"]}
    rows = []
    for name, values in arms.items():
        difference = values.get("minus_naive")
        if difference is None:
            continue
        low, high = difference["ci95"]
        detectable = difference["minimum_detectable"]
        rows.append(
            ForestRow(
                name,
                report["arms"][name]["role"],
                scale * difference["mean"],
                scale * low,
                scale * high,
                name in marked,
                None if detectable is None else scale * detectable,
            )
        )
    if not rows:
        return None
    unit = measure["difference_unit"] or measure["name"]
    better = measure["higher_is_better"]
    figure = plot_forest(rows, unit, higher_is_better=better, digits=measure["digits"])
    shown = ", ".join(marked) or "none"
    return ReportFigure(
        f"difference-{number + 1}",
        figure,
        f"Forest plot: difference to naive of {len(rows)} arms in {result['what']}, with 95% intervals. Significant"
        f" after correction: {shown}. All numbers are in the table that follows.",
        "Difference of each arm to naive, paired; best first, references below the line. Bars are 95% intervals of one"
        " arm by itself; filled markers are significant after Holm's correction. A true difference inside of the grey"
        " band is found in fewer than 4 of 5 such comparisons.",
    )


def rates_figure(report: Report, protocol: str) -> ReportFigure | None:
    """The first measure against the learning rate, for a tuned protocol; `None` for others."""
    curves = [curve for curve in report["curves"] if curve["protocol"] == protocol]
    measure = _measure(report, protocol)
    if not curves or measure is None:
        return None
    by_arm: dict[str, list[RateCurve]] = {}
    for curve in curves:
        values = curve["measures"][measure["name"]]
        scale = measure["scale"]
        by_arm.setdefault(curve["arm"], []).append(
            RateCurve(
                curve["learning_rates"],
                [_scaled(scale, value) for value in values["test"]],
                [[_scaled(scale, end) for end in ends or (None, None)] for ends in values["test_ci95"]],
                options_text(curve["options"]),
            )
        )
    naive = by_arm.pop("naive", None)
    if naive is None or not by_arm:
        return None
    panels = [
        RatePanel(name, role, by_arm[name])
        for role in ROLES
        for name in report["arms"]
        if report["arms"][name]["role"] == role and name in by_arm
    ]
    unit = f", {measure['unit']}" if measure["unit"] else ""
    figure = plot_learning_rates(panels, naive[0], f"{measure['name']} on test data{unit}")
    return ReportFigure(
        f"learning-rates-{list(report['protocols']).index(protocol) + 1}",
        figure,
        f"{measure['name']} against learning rate in {report['protocols'][protocol]['what']}: {len(panels)} panels,"
        " one an arm, naive in grey in each.",
        "Mean on test data at every learning rate that was tried. An arm whose curve has the same peak as naive's at"
        " another rate is not better, but moved. A control with several settings shares its trials among them. Where a"
        " training diverged the curve has a gap.",
    )


def forgetting_figure(report: Report) -> ReportFigure | None:
    """The states' own scores; `None` where they were not measured."""
    states = report["states"]
    if not states:
        return None
    measure = next((m for m in _measures(report) if m["name"] in states["measures"]), None)
    if measure is None:
        return None
    scores = [[measure["scale"] * value for value in run] for run in states["measures"][measure["name"]]["per_seed"]]
    means = [sum(column) / len(column) for column in zip(*scores, strict=True)]
    unit = f", {measure['unit']}" if measure["unit"] else ""
    figure = plot_forgetting(
        states["num_examples"],
        scores,
        score_name=f"{measure['name']} on unseen source data{unit}",
        title="",
        digits=measure["digits"],
    )
    listed = ", ".join(f"Θ{state} {value:.{measure['digits']}f}" for state, value in enumerate(means))
    return ReportFigure(
        "forgetting",
        figure,
        f"Forgetting curve: mean {measure['name']}{unit} of the states on unseen source data: {listed}.",
        "Each state was trained from the one before on a smaller part of its data. Where the curve does not fall,"
        " nothing was forgotten, and later states are merely trained longer.",
    )


def landscape_figure(report: Report) -> ReportFigure | None:
    """The loss around Θ0; `None` where it was not measured."""
    found = report["landscape"]
    if not found:
        return None
    points = [LandscapePoint(**{key: point[key] for key in _POINT_KEYS}) for point in found["points"]]
    figure = plot_landscape(found["x"], found["y"], found["loss"], points, found["measure"], found["explained"])
    return ReportFigure(
        "landscape",
        figure,
        f"Map of the {found['measure']} in the plane of the states, with {len(points)} points on it; their places and"
        " values are in the table that follows.",
        f"The {found['measure']} of one trajectory (seed {found['seed']}) on {found['num_examples']} examples, in the"
        " plane through Θ0 along the two first principal directions of the states. Points are projected on the plane:"
        " what the colours say under a point is only true of it where it is not far from the plane.",
    )


def options_text(options: Mapping[str, Any]) -> str:
    """A setting in words: `factor 0.5`."""
    return ", ".join(f"{name} {value}" for name, value in options.items())


_POINT_KEYS = ("name", "kind", "x", "y", "loss", "off_plane")


def _scaled(scale: float, value: float | None) -> float:
    """NaN, which leaves a gap in a curve, where a training diverged."""
    return float("nan") if value is None else scale * value


def _measure(report: Report, protocol: str) -> Mapping[str, Any] | None:
    """The first measure of a protocol."""
    return next((result["measure"] for result in report["results"] if result["protocol"] == protocol), None)


def _measures(report: Report) -> Sequence[Mapping[str, Any]]:
    return [result["measure"] for result in report["results"]]
