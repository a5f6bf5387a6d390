"""The result of a comparison: [`ComparisonReport`] and its file `report.json`.

report.json, schema version 1. Accuracies are in [0, 1], times in seconds. Lists with one value per seed follow the
order of `seeds`. Unknown values are null; no value is NaN or infinite. Readers ignore unknown keys.

    schema_version    1
    name, description of the suite, str
    created_with      {library: version}
    command           str or null, the command that reproduces the comparison
    task              {}: the suite as in its YAML, or the description that the user's task gives
    seeds             [int], the trajectory seeds
    planned_seeds     [int], more than `seeds` if a time limit ended the comparison
    draws             int, downstream draws per trajectory
    counted           "trajectory seeds", or "draws of one trajectory" if there is only one. Then a draw takes the
                      place of a seed: `per_seed` has one value per draw, and nothing covers other trajectories
    trials_per_rate   int, K: tuning trials per arm at each learning rate of the protocol's grid
    warnings          [str], to be shown before any number
    arms              {arm: {
        role          "method", "control" (trivial, but a candidate) or "reference" (naive, random, pretrained, oracle,
                      shuffled: not a candidate)
        description   str
        kind          "state", "fresh", "pretrained", "oracle", "shuffled", "trained_on", "predicted",
                      "matched_shrink", "task_singular_vectors", "gate" or "cross_fit"
        settings      [{option: value}], the settings evaluated, [{}] without options
        spec          {…}, the arm as `make_arm` takes it}}
    protocols         {protocol: {kind, measures: [str], … its own settings}}
    results           [one per protocol and measure, the most important first: {
        protocol      key of `protocols`
        measure       {name: "accuracy" or "loss", scale, unit, difference_unit, digits, higher_is_better}; tables show
                      scale * value
        what          str, what was measured, such as "few-shot fine-tuning, accuracy"
        valid         bool or null: whether naive beats random initialisation (and the pretrained weights). If false,
                      the result shows nothing, and a page must say so before any number
        headroom      bool or null: whether the oracle beats naive
        validity, verdict, verdict_on_methods, sensitivity     sentences, possibly ""
        better, worse, better_than_controls                    [arm], significant ones
        variance      null or {between, within, draws}: of a difference from naive, between trajectories and between
                      draws of one trajectory, means over the candidates; null without several draws
        num_tests     int, number of arms in Holm's correction
        arms          {arm: {
            mean, ci95: [low, high], per_seed: [float], per_draw: [[float] per seed]
            minus_naive (all but naive): {
                mean, ci95: [low, high], p
                p_holm               null for references
                effect_size          Cohen's d_z, null if all differences are equal
                minimum_detectable   difference found with a power of 80% at level 0.05 / num_tests, in the units of
                                     the values; for references at level 0.05}}}
        relative_gains    {arm: gain over naive as a share of that of the oracle}; {} unless headroom is true
        against_controls  {method: {differences: {control: {mean, ci95, p}}, hardest: control, p}}; p is one-sided,
                          `better_than_controls` is corrected by Holm for the number of methods; naive is one of the
                          controls here}]
    curves            [one per tuned protocol, arm and setting, averaged over seeds and draws: {
        protocol, arm, options: {…}, chosen: share of the draws that selected a trial of this setting,
        learning_rates: [float], measures: {name: {validation: [float], test: [float], test_ci95: [[low, high]]}}}];
                      if the head has a grid, at its rate that is best on validation data on average
    budgets           [one per tuned protocol, from its first measure: {
        protocol, measure: str, sentence: str
        trials        [int], numbers of tuning trials b: 1, 2, 4, … and all
        arms          {arm: {mean: [float], ci95: [[low, high]]: expected test score of the best of b random trials;
                      naive_trials: [int or null], the trials that naive needs for the same, null if all are too few;
                      minus_naive (all but naive): [{mean, ci95, p} or null], at the same number of trials}}}]
    chosen            {protocol: {arm: [{seed, draw, options, learning_rate}]}}, selected on validation data
    states            null or {num_examples: [int or null], steps: [int], full data first,
                      measures: {name: {mean: [float], per_seed: [[float] per seed]}}}: the forgetting curve on unseen
                      source data, of the states that all trajectories have
    landscape         null or {seed, measure: str, num_examples: int, explained: [share, share] of the states'
                      variance, x: [float], y: [float], loss: [[float or null] per y], points: [{name, kind: "state" or
                      "arm", x, y, loss, off_plane}]}: the plane through Θ0 along the first two principal components of
                      the states; coordinates are distances in weights, `off_plane` is the distance of a point from
                      the plane, its `loss` is that of the weights, not of their projection
    cells             [{seed, arm, seconds,
                      training_cost: optimizer steps behind the weights relative to those of Θ0, or null,
                      choice: null or {chosen: str, kept: bool, num_candidates: int, forward_passes: int} of a gate,
                      weights: hash of the initial weights of an arm without settings, or null; where two arms of a
                      seed have the same, the second has the results of the first,
                      measured: {protocol: [{draw, chosen: index, trials: [{options,
                      learning_rate: float or null, head_learning_rate: float, if it has a grid, validation: {measure:
                      float}, test: {measure: float}}]}]}}], all measurements. Values of a trial that diverged are
                      null, and so are the means over it in `curves`
    trajectories      [{seed, num_examples, steps, seconds, states: [{measure: float}]}]
    seconds           sum over all cells, each on one process
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoint import write_json
from ...markdown import quantity
from ..comparison import ENOUGH_SEEDS, Comparison, Measure, compare_with_naive
from ..statistics import mean_and_interval
from .budget_curves import budget_curves, budget_sentence

SCHEMA_VERSION = 1
REPORT_NAME = "report.json"
_LIBRARIES = ("know_hf", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class ComparisonReport:
    """A finished comparison of arms. `str` gives tables and verdicts.

    The fields are those of `report.json`, the most important protocol first. The first measure selects the trials. By
    default as many seeds were planned as there are.
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
    planned_seeds: tuple[int, ...] = ()

    @property
    def counted(self) -> str:
        """What one value of the statistics stands for."""
        return "trajectory seeds" if len(self.seeds) > 1 else "draws of one trajectory"

    @cached_property
    def comparisons(self) -> dict[tuple[str, str], Comparison]:
        """From protocol and measure name to the comparison of the arms."""
        comparisons = {}
        for protocol, settings in self.protocols.items():
            for measure in self.measures:
                scores = {arm: self._scores(protocol, arm, measure) for arm in self.arms}
                if len(self.seeds) == 1 and len(next(iter(scores.values()))[0]) < 2:
                    continue  # one value has no interval
                comparisons[protocol, measure.name] = compare_with_naive(
                    {arm: values if len(self.seeds) > 1 else values[0] for arm, values in scores.items()},
                    [arm for arm, spec in self.arms.items() if spec["role"] != "reference"],
                    f"{settings['what']}, {measure.name}",
                    controls=[arm for arm, spec in self.arms.items() if spec["role"] == "control"],
                    measure=measure,
                    counted=self.counted,
                )
        return comparisons

    @cached_property
    def warnings(self) -> list[str]:
        """Sentences to show before any number."""
        sentences = []
        if (planned := len(self.planned_seeds or self.seeds)) > len(self.seeds):
            sentences.append(
                f"A time limit ended the comparison with {len(self.seeds)} of {planned} planned seeds; the same"
                " command continues it."
            )
        if len(self.seeds) == 1:
            sentences.append(
                "There is only one trajectory. Intervals and tests are over its downstream draws and do not cover"
                " another training run of the same model."
            )
        count = len(self.seeds) if len(self.seeds) > 1 else self.draws
        if count < ENOUGH_SEEDS:
            sentences.append(f"Only {count} {self.counted} were run; use at least {ENOUGH_SEEDS}.")
        for comparison in self.comparisons.values():
            if comparison.valid is False:
                sentences.append(comparison.validity())
            if comparison.without_spread:
                sentences.append(
                    f"No test of {', '.join(comparison.without_spread)} is possible in {comparison.what}: the"
                    f" difference from naive is the same for all {self.counted}. Check that seeds and draws differ."
                )
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `report.json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "description": self.description,
            "created_with": {library: version(library) for library in _LIBRARIES},
            "command": self.command,
            "task": dict(self.task),
            "seeds": list(self.seeds),
            "planned_seeds": list(self.planned_seeds or self.seeds),
            "draws": self.draws,
            "counted": self.counted,
            "trials_per_rate": self.trials_per_rate,
            "warnings": self.warnings,
            "arms": dict(self.arms),
            "protocols": dict(self.protocols),
            "results": [_result(protocol, comparison) for (protocol, _), comparison in self.comparisons.items()],
            "curves": self._curves(),
            "budgets": self._budgets(),
            "chosen": {protocol: self._chosen(protocol) for protocol in self.protocols},
            "states": self._states(),
            "landscape": self.landscape,
            "cells": list(self.cells),
            "trajectories": list(self.trajectories),
            "seconds": round(sum(part["seconds"] for part in (*self.cells, *self.trajectories)), 1),
        }

    def write(self, output_dir: str | Path) -> Path:
        """Write `report.json` into a folder, atomically, and return its path."""
        path = Path(output_dir) / REPORT_NAME
        write_json(path, self.to_dict())
        return path

    def __str__(self) -> str:
        trajectories = quantity(len(self.seeds), "trajectory", "trajectories")
        draws = quantity(self.draws, "downstream draw")
        parts = [f"{self.name}: {trajectories}, {draws} each", *self.warnings]
        for comparison in self.comparisons.values():
            parts += ["\n".join(filter(None, _sentences(comparison).values())), comparison.table()]
        return "\n\n".join(part for part in parts if part)

    @cached_property
    def _measured(self) -> dict[tuple[int, str], Mapping[str, Any]]:
        return {(cell["seed"], cell["arm"]): cell["measured"] for cell in self.cells}

    def _draws(self, protocol: str, arm: str) -> list[list[Mapping[str, Any]]]:
        """Return the draws of every seed."""
        return [self._measured[seed, arm][protocol] for seed in self.seeds]

    def _scores(self, protocol: str, arm: str, measure: Measure) -> list[list[float]]:
        return [
            [draw["trials"][draw["chosen"]]["test"][measure.name] for draw in draws]
            for draws in self._draws(protocol, arm)
        ]

    def _chosen(self, protocol: str) -> dict[str, list[dict[str, Any]]]:
        chosen: dict[str, list[dict[str, Any]]] = {arm: [] for arm in self.arms}
        keys = ("options", "learning_rate", "head_learning_rate")
        for arm, of_arm in chosen.items():
            for seed, draws in zip(self.seeds, self._draws(protocol, arm), strict=True):
                for draw in draws:
                    trial = draw["trials"][draw["chosen"]]
                    settings = {key: trial[key] for key in keys if key in trial}
                    of_arm.append({"seed": seed, "draw": draw["draw"], **settings})
        return chosen

    def _curves(self) -> list[dict[str, Any]]:
        return [
            self._curve(protocol, arm, options, draws)
            for protocol in self.protocols
            for arm, spec in self.arms.items()
            if (draws := self._draws(protocol, arm))[0][0]["trials"][0]["learning_rate"] is not None
            for options in spec["settings"]
            if any(trial["options"] == options for trial in draws[0][0]["trials"])  # one trial has one setting
        ]

    def _budgets(self) -> list[dict[str, Any]]:
        methods = [arm for arm, spec in self.arms.items() if spec["role"] == "method"]
        budgets = []
        for protocol, settings in self.protocols.items():
            curves = budget_curves({arm: self._draws(protocol, arm) for arm in self.arms}, self.measures)
            if curves is not None:
                sentence = budget_sentence(curves, settings["what"], self.measures[0], methods, self.counted)
                budgets.append({"protocol": protocol, **curves, "sentence": sentence})
        return budgets

    def _curve(
        self, protocol: str, arm: str, options: Mapping[str, Any], draws: Sequence[Sequence[Mapping[str, Any]]]
    ) -> dict[str, Any]:
        trials = draws[0][0]["trials"]
        of_setting = [index for index, trial in enumerate(trials) if trial["options"] == options]
        indices = self._best_heads(draws, of_setting)
        measures = {}
        for measure in self.measures:
            validation, test = (_values(draws, indices, part, measure) for part in ("validation", "test"))
            measures[measure.name] = {
                "validation": _mean(validation),
                "test": _mean(test),
                "test_ci95": [_interval(column) for column in test.T] if len(test) > 1 else [],
            }
        return {
            "protocol": protocol,
            "arm": arm,
            "options": dict(options),
            "chosen": float(np.mean([draw["chosen"] in of_setting for of_seed in draws for draw in of_seed])),
            "learning_rates": [trials[index]["learning_rate"] for index in indices],
            "measures": measures,
        }

    def _best_heads(self, draws: Sequence[Sequence[Mapping[str, Any]]], indices: list[int]) -> list[int]:
        """Return for each learning rate the trial whose rate of the head is best on validation data, on average."""
        trials, measure = draws[0][0]["trials"], self.measures[0]
        means = _mean(_values(draws, indices, "validation", measure))
        gains = [-np.inf if mean is None else measure.gain(mean) for mean in means]
        best: dict[float, int] = {}
        for position, index in enumerate(indices):
            rate = trials[index]["learning_rate"]
            if rate not in best or gains[position] > gains[best[rate]]:
                best[rate] = position
        return [indices[position] for position in best.values()]

    def _states(self) -> dict[str, Any] | None:
        if not self.trajectories or not all(trajectory["states"] for trajectory in self.trajectories):
            return None
        shared = min(len(trajectory["states"]) for trajectory in self.trajectories)
        measures = {}
        for measure in self.measures:
            values = [[state[measure.name] for state in run["states"][:shared]] for run in self.trajectories]
            measures[measure.name] = {"mean": np.mean(values, axis=0).tolist(), "per_seed": values}
        sizes = {key: self.trajectories[0][key][:shared] for key in ("num_examples", "steps")}
        return {**sizes, "measures": measures}


def _result(protocol: str, comparison: Comparison) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "measure": asdict(comparison.measure),
        "what": comparison.what,
        "valid": comparison.valid,
        "headroom": comparison.headroom,
        **_sentences(comparison),
        "better": list(comparison.better),
        "worse": list(comparison.worse),
        "better_than_controls": list(comparison.better_than_controls),
        "variance": None if (variance := comparison.variance) is None else asdict(variance),
        "num_tests": len(comparison.candidates),
        "arms": comparison.to_dict(),
        "relative_gains": _relative_gains(comparison),
        "against_controls": {name: against.to_dict() for name, against in comparison.against_controls.items()},
    }


def _relative_gains(comparison: Comparison) -> dict[str, float]:
    if not comparison.headroom:
        return {}
    from ...metrics import KnowledgeGain  # importing evaluate takes a second

    metric, gain = KnowledgeGain(), comparison.measure.gain
    values = {name: [gain(value) for value in result.per_seed] for name, result in comparison.results.items()}
    references = {"references": values["naive"], "oracle": values["oracle"]}
    return {
        name: metric.compute(predictions=values[name], **references)["relative_knowledge_gain"]
        for name in comparison.candidates
    }


def _sentences(comparison: Comparison) -> dict[str, str]:
    names = ("verdict", "validity", "verdict_on_methods", "sensitivity")
    return {name: getattr(comparison, name)() for name in names}


def _values(
    draws: Sequence[Sequence[Mapping[str, Any]]], indices: Sequence[int], part: str, measure: Measure
) -> np.ndarray:
    """Return values `(seeds, rates)`, means over draws; for one trajectory `(draws, rates)`."""
    rows = [
        [[draw["trials"][index][part][measure.name] for index in indices] for draw in of_seed] for of_seed in draws
    ]
    values = np.array(rows, dtype=np.float64)  # None becomes NaN
    return values[0] if len(rows) == 1 else values.mean(axis=1)


def _mean(values: np.ndarray) -> list[float | None]:
    return [float(mean) if np.isfinite(mean) else None for mean in values.mean(axis=0)]


def _interval(column: np.ndarray) -> list[float] | None:
    estimate = mean_and_interval(column.tolist()) if np.isfinite(column).all() else None
    return None if estimate is None else [estimate.low, estimate.high]
