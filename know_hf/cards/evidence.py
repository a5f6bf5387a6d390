"""Whether an enhanced checkpoint helped: comparisons and the gate as plain values, sentences and a model-index."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult
from markupsafe import Markup

from ..markdown import Table, clean, code

if TYPE_CHECKING:
    from ..evaluation import Comparison

_LEVEL = 0.05


def recorded_comparison(comparison: "Comparison | Mapping[str, Any]", arm: str | None) -> dict[str, Any]:
    """A comparison as plain values, with what it says of one arm.

    Args:
        comparison ([`Comparison`] or `Mapping`): A mapping has `what`, `arms` as `Comparison.to_dict` gives them, and
            if they are known the sentences `verdict` and `validity` and the Hub id of the `dataset` it was made on.
        arm (`str`, *optional*): The arm that the checkpoint is, if it is one of them.

    Returns:
        `dict`: `what`, `arms`, `verdict`, `validity`, `dataset`, `arm`, `seeds`, `sentence`.

    Raises:
        `ValueError`: when a mapping has no `what` or `arms`, or naive is not among the arms.
    """
    if isinstance(comparison, Mapping):
        record = {"verdict": None, "validity": None, "dataset": None, **comparison}
    else:
        record = {
            "what": comparison.what,
            "arms": comparison.to_dict(),
            "verdict": comparison.verdict(),
            "validity": comparison.validity(),
            "dataset": None,
        }
    if missing := {"what", "arms"} - record.keys():
        raise ValueError(f"a recorded comparison needs what and arms, this one has no {' and no '.join(missing)}")
    if "naive" not in record["arms"]:
        raise ValueError(f"the comparison of {record['what']} has no arm naive, only {', '.join(record['arms'])}")
    arm = arm if arm in record["arms"] else None
    seeds = len(record["arms"]["naive"]["per_seed"])
    return {**record, "arm": arm, "seeds": seeds, "sentence": None if arm is None else _sentence(record, arm)}


def recorded_gate(gate: Mapping[str, Any]) -> dict[str, Any]:
    """What a validation gate found, as plain values.

    Args:
        gate (`Mapping`): `metric` (its name), `scores` (from candidate to value), `chosen` (the candidate that these
            weights are) and `sentence` (what was chosen, and by how much).

    Raises:
        `ValueError`: when one of them is missing, or what was chosen has no score.
    """
    if missing := {"metric", "scores", "chosen", "sentence"} - gate.keys():
        raise ValueError(f"a gate's result needs metric, scores, chosen and sentence, not found: {', '.join(missing)}")
    if gate["chosen"] not in gate["scores"]:
        raise ValueError(f"the gate chose {gate['chosen']!r}, which is not among {', '.join(gate['scores'])}")
    return {**gate, "scores": dict(gate["scores"])}


def comparison_table(record: Mapping[str, Any]) -> Table:
    """All arms of a recorded comparison, accuracies in per cent."""
    rows: list[Sequence[object]] = [["arm", "accuracy", "95% interval", "minus naive", "95% interval", "p (Holm)"]]
    for name, result in record["arms"].items():
        difference = result.get("minus_naive")
        row = [_marked(name, record["arm"]), f"{100 * result['mean']:.1f}", _interval(result["ci95"], "")]
        if difference is None:
            row += ["", "", ""]
        else:
            p = difference.get("p_holm")
            p = "reference" if p is None else f"{p:.3f}"
            row += [f"{100 * difference['mean']:+.1f}", _interval(difference["ci95"], "+"), p]
        rows.append(row)
    return rows


def gate_table(gate: Mapping[str, Any]) -> Table:
    """What the gate tried; with differences to Θ0 where it has them."""
    head: list[object] = ["candidate", code(gate["metric"])]
    if not gate.get("candidates"):
        return [head] + [[_marked(name, gate["chosen"]), f"{value:.4g}"] for name, value in gate["scores"].items()]
    rows: list[Sequence[object]] = [[*head, "minus Θ0", f"{1 - gate['level']:.0%} interval", "p (corrected)"]]
    for candidate in gate["candidates"]:
        row = [_marked(candidate["name"], gate["chosen"])]
        row.append("not finite" if candidate["loss"] is None else f"{candidate['loss']:.4g}")
        row.append("" if candidate["difference"] is None else f"{candidate['difference']:+.4g}")
        ends = candidate["low"], candidate["high"]
        row.append("" if None in ends else f"[{ends[0]:+.4g}, {ends[1]:+.4g}]")
        rows.append([*row, "" if candidate["p_value"] is None else f"{candidate['p_value']:.2g}"])
    return rows


def eval_results(
    comparisons: Sequence[Mapping[str, Any]], gate: Mapping[str, Any] | None, task: str | None
) -> list[EvalResult]:
    """Entries of the model-index: what was measured of these weights, and nothing else.

    Args:
        comparisons (sequence of mappings): As [`recorded_comparison`] gives them.
        gate (`Mapping`, *optional*): As [`recorded_gate`] gives it.
        task (`str`, *optional*): Task on the Hub.
    """
    found = [
        EvalResult(
            task_type=task or "other",
            dataset_type=clean(record["dataset"] or "") or _slug(record["what"]),
            dataset_name=clean(record["what"]),
            metric_type="accuracy",
            metric_value=round(record["arms"][record["arm"]]["mean"], 4),
            metric_name=f"Accuracy, mean over {record['seeds']} seeds",
        )
        for record in comparisons
        if record["arm"] is not None
    ]
    if gate is not None:
        found.append(
            EvalResult(
                task_type=task or "other",
                dataset_type="validation",
                dataset_name="the data that the gate chose by",
                metric_type=_slug(gate["metric"]),
                metric_value=round(float(gate["scores"][gate["chosen"]]), 4),
                metric_name=clean(gate["metric"]),
            )
        )
    return [result for result in found if math.isfinite(result.metric_value)]


def _sentence(record: Mapping[str, Any], arm: str) -> str:
    what, result = record["what"], record["arms"][arm]
    difference = result.get("minus_naive")
    if difference is None:
        return f"In {what}, these weights are the arm {arm}, which the others are compared with."
    points = f"{100 * difference['mean']:+.1f} points, 95% interval {_interval(difference['ci95'], '+')}"
    corrected = difference.get("p_holm")
    p = difference["p"] if corrected is None else corrected
    test = f"p = {p:.2g}{'' if corrected is None else ', corrected for the number of arms'}"
    found = "not shown to differ from" if not p < _LEVEL else "better than" if difference["mean"] > 0 else "worse than"
    return f"In {what}, these weights (arm {arm}) are {found} Θ0: {points}, {test}."


def _marked(name: str, these: str | None) -> str:
    return Markup(f"{code(name)} (these weights)") if name == these else code(name)


def _interval(ends: Sequence[float], sign: str) -> str:
    low, high = ends
    return f"[{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", clean(text).lower()).strip("-") or "unknown"
