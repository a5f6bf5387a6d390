"""Evidence on whether a checkpoint helps: comparisons and the gate as plain values, tables and a model-index."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult
from markupsafe import Markup

from ..markdown import Table, clean, code
from ..prediction.selection import GateCandidate, candidate_rows
from .suite_tables import estimate_text

_ACCURACY = {"scale": 100, "digits": 1}
_LEVEL = 0.05


def recorded_comparison(comparison: Any, arm: str | None) -> dict[str, Any]:
    """Return a comparison as plain values, with a sentence on the arm that is the checkpoint if it has it.

    The comparison has `what`, `arms` as in `Comparison.to_dict`, and optionally the sentences `verdict` and `validity`
    and the Hub id of the `dataset`; or `to_record()` returns them.

    Raises:
        `ValueError`: if `what`, `arms` or the arm naive is missing.
    """
    content = comparison if isinstance(comparison, Mapping) else comparison.to_record()
    record = {"verdict": None, "validity": None, "dataset": None, **content}
    if missing := {"what", "arms"} - record.keys():
        raise ValueError(f"the comparison lacks {' and '.join(sorted(missing))}")
    if "naive" not in record["arms"]:
        raise ValueError(f"the comparison of {record['what']} has no arm naive, only {', '.join(record['arms'])}")
    arm = arm if arm in record["arms"] else None
    seeds = len(record["arms"]["naive"]["per_seed"])
    return {**record, "arm": arm, "seeds": seeds, "sentence": None if arm is None else _sentence(record, arm)}


def recorded_gate(gate: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of a gate as plain values.

    It has `metric`, `scores` (from candidate to value), `chosen` (the candidate that is the checkpoint), `sentence`,
    and optionally the other keys of `GateResult.to_dict`.

    Raises:
        `ValueError`: if a key is missing, a value has the wrong type, or the chosen candidate has no score.
    """
    if missing := {"metric", "scores", "chosen", "sentence"} - gate.keys():
        raise ValueError(f"the result of the gate lacks {', '.join(sorted(missing))}")
    for name in ("metric", "chosen", "sentence", "rule"):
        if not isinstance(gate.get(name, ""), str):
            raise ValueError(f"the result of the gate has {name}={gate[name]!r:.60}, expected text")
    try:
        if gate["chosen"] not in gate["scores"]:
            raise ValueError(
                f"the gate chose {gate['chosen']!r:.100}, but has scores only of {', '.join(gate['scores']):.500}"
            )
        record = {**gate, "scores": {name: float(value) for name, value in gate["scores"].items()}}
        gate_table(record)
    except (AttributeError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"the result of the gate is not one of GateResult.to_dict ({error!r:.200})") from error
    return record


def comparison_table(record: Mapping[str, Any]) -> Table:
    """Return all arms of a recorded comparison, accuracies in % with 95% intervals."""
    rows = [["arm", "accuracy", "minus naive", "p (Holm)"]]
    for name, result in record["arms"].items():
        row = [_marked(name, record["arm"]), estimate_text(result, _ACCURACY), "", ""]
        if (difference := result.get("minus_naive")) is not None:
            p = difference.get("p_holm")
            row[2:] = estimate_text(difference, _ACCURACY, "+"), "reference" if p is None else f"{p:.3f}"
        rows.append(row)
    return rows


def gate_table(gate: Mapping[str, Any]) -> Table:
    """Return the candidates of the gate, with their differences from Θ0 if they are recorded, best first."""
    if not gate.get("candidates"):
        rows = [["candidate", gate["metric"]], *([name, f"{value:.4g}"] for name, value in gate["scores"].items())]
    else:
        rows = candidate_rows(gate["metric"], gate["level"], [GateCandidate(**one) for one in gate["candidates"]])
    head, *others = rows
    return [[head[0], code(head[1]), *head[2:]], *([_marked(row[0], gate["chosen"]), *row[1:]] for row in others)]


def eval_results(
    comparisons: Sequence[Mapping[str, Any]], gate: Mapping[str, Any] | None, task: str | None
) -> list[EvalResult]:
    """Return the entries of the model-index for a `task` of the Hub: measurements of this checkpoint only."""
    results = [
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
        results.append(
            EvalResult(
                task_type=task or "other",
                dataset_type="validation",
                dataset_name="validation data of the gate",
                metric_type=_slug(gate["metric"]),
                metric_value=round(float(gate["scores"][gate["chosen"]]), 4),
                metric_name=clean(gate["metric"]),
            )
        )
    return [result for result in results if math.isfinite(result.metric_value)]


def _sentence(record: Mapping[str, Any], arm: str) -> str:
    what, difference = record["what"], record["arms"][arm].get("minus_naive")
    if difference is None:
        return f"These weights are the baseline ({arm}) of the comparison in {what}."
    corrected = difference.get("p_holm")
    p, note = (difference["p"], "") if corrected is None else (corrected, ", corrected for the number of arms")
    verb = "do not differ significantly from"
    if p < _LEVEL:
        verb = f"are significantly {'better' if difference['mean'] > 0 else 'worse'} than"
    mean, _, interval = estimate_text(difference, _ACCURACY, "+").partition(" ")
    return (
        f"These weights {verb} the unchanged weights (Θ0) in {what}: {mean} points, 95% interval {interval},"
        f" p = {p:.2g}{note}."
    )


def _marked(name: str, chosen: str | None) -> str:
    return Markup(f"{code(name)} (these weights)") if name == chosen else code(name)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", clean(text).lower()).strip("-") or "unknown"
