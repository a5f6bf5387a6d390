"""What a comparison found: [`ComparisonReport`], and the file `report.json` that holds all of it.

report.json, schema version 1. Accuracies are in [0, 1], times in seconds. "Trajectory seed" is what is counted: every
list with one value a seed is in the order of `seeds`. No value is NaN or infinite; what is not known is null. Readers
pass over keys that they do not know.

    schema_version    1
    name, description of the suite, str
    created_with      {library: version}
    command           str or null, what makes the comparison again
    task              what was compared on: the suite as its YAML gives it, or what the user's task says of itself; {}
    seeds             [int], the trajectory seeds
    draws             int, downstream draws of each trajectory
    counted           "trajectory seeds", or "draws of one trajectory" where there is only one trajectory. In the
                      second case each draw stands where a seed stands otherwise: `per_seed` has one value a draw, and
                      nothing is said about other trajectories
    trials_per_rate   int, K: every arm has K trials at each learning rate of the protocol's grid
    warnings          [str], sentences: too few seeds, and the like; to be shown first
    arms              {arm: {
        role          "method" (a predictor that claims something), "control" (trivial, but may be chosen), or
                      "reference" (naive, random, pretrained, oracle, shuffled: no one would choose them instead)
        description   str
        kind          "state", "fresh", "pretrained", "oracle", "shuffled", "trained_on", "predicted", "matched_shrink"
                      or "task_singular_vectors"
        settings      [{option: value}], the values of its own options that were tried, [{}] where it has none
        spec          {…}, the arm as `make_arm` takes it}}
    protocols         {protocol: {kind, measures: [str], … its own settings}}
    results           [one of each protocol and measure, the most important first: {
        protocol      key of `protocols`
        measure       {name: "accuracy" or "loss", scale, unit, difference_unit, digits, higher_is_better}; tables show
                      scale * value with so many digits
        what          str, what was measured as in "In {what}, …"
        valid         bool or null: whether naive beats random initialisation (and the pretrained weights); where it is
                      false the comparison shows nothing, and the page must say so before any number
        headroom      bool or null: whether the oracle beats naive
        validity, verdict, verdict_on_methods, sensitivity     sentences, perhaps ""
        better, worse, better_than_controls                    [arm], significant ones
        num_tests     int, number of arms that Holm's correction is for
        arms          {arm: {
            mean, ci95: [low, high], per_seed: [float], per_draw: [[float] for each seed]
            minus_naive (not of naive itself): {
                mean, ci95: [low, high], p
                p_holm               null for references
                effect_size          Cohen's d_z, null where all differences are equal
                minimum_detectable   smallest true difference found with 80 % power at level 0.05 / num_tests, in the
                                     units of the values; for references at level 0.05}}}
        against_controls  {method: {differences: {control: {mean, ci95, p}}, hardest: control, p}}, p is one-sided,
                          `better_than_controls` is corrected by Holm for the number of methods; naive stands among
                          the controls here: a method has to beat it too}]
    curves            [one of each tuned protocol, arm and setting, averaged over seeds and draws: {
        protocol, arm, options: {…}, chosen: share of the draws in which a trial of this setting was chosen,
        learning_rates: [float], measures: {name: {validation: [float], test: [float], test_ci95: [[low, high]]}}}];
                      a control with several settings has one curve for each, on fewer rates
    chosen            {protocol: {arm: [{seed, draw, options, learning_rate}]}}, what validation data chose
    states            null or {num_examples: [int or null], steps: [int], full data first,
                      measures: {name: {mean: [float], per_seed: [[float] for each seed]}}}: the forgetting curve, of
                      the states as they are on unseen source data; where trajectories have different numbers of them,
                      of those that all have
    landscape         null or {seed, measure: str, num_examples: int, explained: [share, share] of the states'
                      variance, x: [float], y: [float], loss: [[float or null] for each y], points: [{name, kind:
                      "state" or "arm", x, y, loss, off_plane}]}: the plane through Θ0 along the two first principal
                      components of the states; coordinates are distances in weights with Θ0 at (0, 0), `off_plane` is
                      the distance of a point from the plane, `loss` of a point its own, not that of its projection
    cells             [{seed, arm, seconds, measured: {protocol: [{draw, chosen: index, trials: [{options,
                      learning_rate: float or null, validation: {measure: float}, test: {measure: float}}]}]}}],
                      everything that was measured; values of a trial that diverged are null, so are then the means
                      over it in `curves`
    trajectories      [{seed, num_examples, steps, seconds, states: [{measure: float}]}]
    seconds           sum of all cells' times, on one process each
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoint import write_json
from ..comparison import ENOUGH_SEEDS, Comparison, Measure, compare_with_naive
from ..statistics import mean_and_interval

SCHEMA_VERSION = 1
REPORT_NAME = "report.json"
_LIBRARIES = ("know_hf", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class ComparisonReport:
    """A finished comparison of arms; printable.

    Attributes:
        name, description (`str`): Of the suite.
        task (`Mapping`): What was compared on, JSON values only.
        seeds (`tuple[int, ...]`): The trajectory seeds.
        draws (`int`): Downstream draws of each trajectory.
        trials_per_rate (`int`): Trials of every arm at each learning rate of a grid.
        arms (`Mapping[str, Mapping]`): From arm to its entry in `report.json`.
        protocols (`Mapping[str, Mapping]`): From protocol to its entry in `report.json`; the most important first.
        measures (`tuple[Measure, ...]`): What is measured; trials are chosen by the first.
        cells (`tuple[Mapping, ...]`): One a seed and arm, as in `report.json`.
        trajectories (`tuple[Mapping, ...]`): One a seed, as in `report.json`.
        landscape (`Mapping`, *optional*): As in `report.json`.
        command (`str`, *optional*): What makes it again.
    """

    name: str
    description: str
    task: Mapping[str, Any]
    seeds: tuple[int, ...]
    draws: int
    trials_per_rate: int
    arms: Mapping[str, Mapping[str, Any]]
    protocols: Mapping[str, Mapping[str, Any]]
    measures: tuple[Measure, ...]
    cells: tuple[Mapping[str, Any], ...]
    trajectories: tuple[Mapping[str, Any], ...] = ()
    landscape: Mapping[str, Any] | None = None
    command: str | None = None

    @property
    def counted(self) -> str:
        """What one value of the statistics is of."""
        return "trajectory seeds" if len(self.seeds) > 1 else "draws of one trajectory"

    @cached_property
    def comparisons(self) -> dict[tuple[str, str], Comparison]:
        """From protocol and name of the measure to the arms' comparison."""
        found = {}
        for protocol, facts in self.protocols.items():
            for measure in self.measures:
                scores = {arm: self._scores(protocol, arm, measure) for arm in self.arms}
                if len(self.seeds) == 1 and len(next(iter(scores.values()))[0]) < 2:
                    continue  # one value has no interval: the weights of one trajectory as they are
                found[protocol, measure.name] = compare_with_naive(
                    {arm: values if len(self.seeds) > 1 else values[0] for arm, values in scores.items()},
                    [arm for arm, spec in self.arms.items() if spec["role"] != "reference"],
                    f"{facts['what']}, {measure.name}",
                    controls=[arm for arm, spec in self.arms.items() if spec["role"] == "control"],
                    measure=measure,
                    counted=self.counted,
                )
        return found

    @cached_property
    def warnings(self) -> list[str]:
        """Sentences that a reader needs before any number."""
        found = []
        if len(self.seeds) == 1:
            found.append(
                "There is one trajectory: intervals and tests are over downstream draws of it, and say nothing about"
                " another training of the same model."
            )
        count = len(self.seeds) if len(self.seeds) > 1 else self.draws
        if count < ENOUGH_SEEDS:
            found.append(f"{count} {self.counted} are few: at least {ENOUGH_SEEDS} are asked for.")
        for comparison in self.comparisons.values():
            if comparison.valid is False:
                found.append(comparison.validity())
            if comparison.without_spread:
                found.append(
                    f"In {comparison.what}, the difference to naive of {', '.join(comparison.without_spread)} is the"
                    f" same for all {self.counted}: nothing says how sure it is, and it is not significant. Are the"
                    " seeds and draws of the task really different?"
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        """What stands in `report.json`; the module's docstring describes it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "description": self.description,
            "created_with": {library: version(library) for library in _LIBRARIES},
            "command": self.command,
            "task": dict(self.task),
            "seeds": list(self.seeds),
            "draws": self.draws,
            "counted": self.counted,
            "trials_per_rate": self.trials_per_rate,
            "warnings": self.warnings,
            "arms": {name: dict(arm) for name, arm in self.arms.items()},
            "protocols": {name: dict(protocol) for name, protocol in self.protocols.items()},
            "results": [_result(protocol, comparison) for (protocol, _), comparison in self.comparisons.items()],
            "curves": self._curves(),
            "chosen": {protocol: self._chosen(protocol) for protocol in self.protocols},
            "states": self._states(),
            "landscape": self.landscape,
            "cells": [dict(cell) for cell in self.cells],
            "trajectories": [dict(trajectory) for trajectory in self.trajectories],
            "seconds": round(sum(part["seconds"] for part in (*self.cells, *self.trajectories)), 1),
        }

    def write(self, output_dir: str | Path) -> Path:
        """Writes `report.json` into a folder, whole or not at all; returns its path."""
        path = Path(output_dir) / REPORT_NAME
        write_json(path, self.to_dict())
        return path

    def __str__(self) -> str:
        parts = [f"{self.name}: {len(self.seeds)} trajectories, {self.draws} downstream draws each", *self.warnings]
        for comparison in self.comparisons.values():
            parts += [f"{comparison.what}\n\n{comparison.table()}", "\n".join(_sentences(comparison))]
        return "\n\n".join(part for part in parts if part)

    @cached_property
    def _by_place(self) -> dict[tuple[int, str], Mapping[str, Any]]:
        return {(cell["seed"], cell["arm"]): cell for cell in self.cells}

    def _draws(self, protocol: str, arm: str) -> list[list[Mapping[str, Any]]]:
        """The draws of every seed."""
        return [self._by_place[seed, arm]["measured"][protocol] for seed in self.seeds]

    def _scores(self, protocol: str, arm: str, measure: Measure) -> list[list[float]]:
        return [
            [draw["trials"][draw["chosen"]]["test"][measure.name] for draw in draws]
            for draws in self._draws(protocol, arm)
        ]

    def _chosen(self, protocol: str) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for arm in self.arms:
            found[arm] = []
            for seed, draws in zip(self.seeds, self._draws(protocol, arm), strict=True):
                for draw in draws:
                    trial = draw["trials"][draw["chosen"]]
                    place = {"seed": seed, "draw": draw["draw"]}
                    found[arm].append({**place, **{key: trial[key] for key in ("options", "learning_rate")}})
        return found

    def _curves(self) -> list[dict[str, Any]]:
        curves = []
        for protocol in self.protocols:
            for arm in self.arms:
                draws = self._draws(protocol, arm)
                first = draws[0][0]["trials"]
                if first[0]["learning_rate"] is None:
                    continue
                for options in self.arms[arm]["settings"]:
                    curves.append(self._curve(protocol, arm, options, draws))
        return curves

    def _curve(
        self, protocol: str, arm: str, options: Mapping[str, Any], draws: Sequence[Sequence[Mapping[str, Any]]]
    ) -> dict[str, Any]:
        trials = draws[0][0]["trials"]
        places = [index for index, trial in enumerate(trials) if trial["options"] == options]
        curve: dict[str, Any] = {"protocol": protocol, "arm": arm, "options": dict(options)}
        curve["chosen"] = float(np.mean([draw["chosen"] in places for of_seed in draws for draw in of_seed]))
        curve["learning_rates"] = [trials[index]["learning_rate"] for index in places]
        curve["measures"] = {}
        for measure in self.measures:
            validation, test = (self._by_rate(draws, places, part, measure) for part in ("validation", "test"))
            curve["measures"][measure.name] = {
                "validation": _mean(validation),
                "test": _mean(test),
                "test_ci95": [_interval(column) for column in test.T] if len(test) > 1 else [],
            }
        return curve

    def _by_rate(
        self, draws: Sequence[Sequence[Mapping[str, Any]]], places: Sequence[int], part: str, measure: Measure
    ) -> np.ndarray:
        """Values `(counted, rates)`: of a seed the mean over its draws, of one trajectory each draw by itself."""
        rows = [
            [[draw["trials"][index][part][measure.name] for index in places] for draw in of_seed] for of_seed in draws
        ]
        values = np.array(rows, dtype=np.float64)  # None becomes NaN
        return values[0] if len(rows) == 1 else values.mean(axis=1)

    def _states(self) -> dict[str, Any] | None:
        if not self.trajectories or not all(trajectory["states"] for trajectory in self.trajectories):
            return None
        first, measures = self.trajectories[0], {}
        shared = min(len(trajectory["states"]) for trajectory in self.trajectories)
        for measure in self.measures:
            values = [[state[measure.name] for state in run["states"][:shared]] for run in self.trajectories]
            measures[measure.name] = {"mean": np.mean(values, axis=0).tolist(), "per_seed": values}
        return {**{key: first[key][:shared] for key in ("num_examples", "steps")}, "measures": measures}


def _result(protocol: str, comparison: Comparison) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "measure": asdict(comparison.measure),
        "what": comparison.what,
        "valid": comparison.valid,
        "headroom": comparison.headroom,
        "validity": comparison.validity(),
        "verdict": comparison.verdict(),
        "verdict_on_methods": comparison.verdict_on_methods(),
        "sensitivity": comparison.sensitivity(),
        "better": list(comparison.better),
        "worse": list(comparison.worse),
        "better_than_controls": list(comparison.better_than_controls),
        "num_tests": len(comparison.candidates),
        "arms": comparison.to_dict(),
        "against_controls": {name: against.to_dict() for name, against in comparison.against_controls.items()},
    }


def _sentences(comparison: Comparison) -> list[str]:
    sentences = (
        comparison.validity(),
        comparison.verdict(),
        comparison.verdict_on_methods(),
        comparison.sensitivity(),
    )
    return [sentence for sentence in sentences if sentence]


def _mean(values: np.ndarray) -> list[float | None]:
    return [float(mean) if np.isfinite(mean) else None for mean in values.mean(axis=0)]


def _interval(column: np.ndarray) -> list[float] | None:
    if not np.isfinite(column).all():
        return None
    estimate = mean_and_interval(column.tolist())
    return [estimate.low, estimate.high]
