"""A comparison report of simulated trials."""

import json

import numpy as np

from know_hf.evaluation.comparison import ACCURACY, LOSS
from know_hf.evaluation.report.comparison_report import ComparisonReport

RATES = (1e-3, 1e-2, 1e-1)
# name: role, kind, settings, gain in accuracy over naive
ARMS = {
    "naive": ("reference", "state", [{}], 0.0),
    "random": ("reference", "fresh", [{}], -0.08),
    "oracle": ("reference", "oracle", [{}], 0.05),
    "known-1": ("method", "predicted", [{}], 0.04),
    "shrink": ("control", "predicted", [{"factor": 0.8}, {"factor": 0.5}], 0.0),
    "average": ("control", "predicted", [{}], -0.04),
}
PROTOCOLS = {
    "few-shot": {"kind": "fine_tuning", "what": "few-shot fine-tuning", "learning_rates": list(RATES)},
    "source": {"kind": "zero_shot", "what": "the source task"},
}


def simulated_report(name="simulated", arms=ARMS, num_seeds=10, draws=1):
    """Return the content of a `report.json` of simulated trials."""
    random = np.random.default_rng(0)
    cells, seeds = [], range(num_seeds)
    of_seed = {seed: 0.7 + 0.02 * random.normal() for seed in seeds}
    for seed in seeds:
        for arm, (_, _, settings, gain) in arms.items():

            def trial(options, rate, place, seed=seed, gain=gain):
                score = of_seed[seed] + gain - 0.05 * abs(place - 1) + 0.004 * random.normal()
                both = {"accuracy": score, "loss": 1 - score}
                return {"options": options, "learning_rate": rate, "validation": both, "test": both}

            measured = {"few-shot": [], "source": [{"draw": 0, "chosen": 0, "trials": [trial(settings[0], None, 1)]}]}
            for draw in range(draws):
                tuned = [trial(options, rate, place) for options in settings for place, rate in enumerate(RATES)]
                best = int(np.argmax([t["validation"]["accuracy"] for t in tuned]))
                measured["few-shot"].append({"draw": draw, "chosen": best, "trials": tuned})
            cells.append({"seed": seed, "arm": arm, "seconds": 2.0, "measured": measured})
    states = [{"accuracy": 0.9 - 0.02 * state, "loss": 0.3 + 0.02 * state} for state in range(3)]
    recorded = {"num_examples": [64, 32, 16], "steps": [8, 4, 2], "seconds": 1.0, "states": states}
    points = [("Θ0", "state", 0, 0), ("Θ1", "state", 0.5, 0.2), ("Θ2", "state", 1, 0), ("known-1", "arm", -0.3, 0.1)]
    landscape = {"seed": 0, "measure": "loss", "num_examples": 16, "explained": [0.7, 0.2]}
    landscape |= {axis: [-1.0, 0.0, 1.0] for axis in "xy"}
    landscape["loss"] = [[3.0, 2.0, 3.0], [2.0, 1.0, None], [3.0, 2.0, 3.0]]
    landscape["points"] = [
        {"name": n, "kind": kind, "x": x, "y": y, "loss": 1.0, "off_plane": 0.1} for n, kind, x, y in points
    ]
    report = ComparisonReport(
        name=name,
        description="Simulated.",
        task={"dataset": "none"},
        seeds=tuple(seeds),
        draws=draws,
        trials_per_rate=1,
        arms={
            arm: {"role": role, "kind": kind, "settings": settings, "description": f"Arm {arm}.", "spec": {}}
            for arm, (role, kind, settings, _) in arms.items()
        },
        protocols=PROTOCOLS,
        measures=(ACCURACY, LOSS),
        cells=tuple(cells),
        trajectories=tuple({"seed": seed, **recorded} for seed in seeds),
        landscape=landscape,
    )
    return json.loads(json.dumps(report.to_dict()))
