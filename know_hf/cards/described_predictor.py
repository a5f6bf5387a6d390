"""The predictor of a checkpoint as JSON values, and what is known about its KNOWN weights."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import file_sha256
from ..known import KNOWNConfig, KNOWNModel
from ..prediction import SHIPPED_KNOWN
from ..predictors import Composition, Predictor
from .base import Source, source
from .suite_tables import COMPARISONS_NAME, protocols, tally


def described_predictor(
    predictor: Predictor | KNOWNModel | str, options: Mapping[str, Any] | None, known_revision: str | None
) -> dict[str, Any]:
    """Return the predictor as JSON values, see `predictor` of [`CheckpointCard`]."""
    if isinstance(predictor, str):
        options = {name: value for name, value in (options or {}).items() if value is not None}
        return {"name": predictor, "module": None, "options": options, "known": None}
    if isinstance(predictor, Composition):
        members = [described_predictor(member, None, known_revision) for member in predictor.members]
        name = "+".join(member["name"] for member in members)
        return {"name": name, "module": None, "options": {}, "known": members[0]["known"], "members": members}
    config = getattr(getattr(predictor, "model", predictor), "config", None)
    if isinstance(config, KNOWNConfig):
        return {"name": "known", "module": None, "options": {}, "known": _known(config, known_revision)}
    kind = type(predictor)
    # without the copies of models that asdict would make
    options = {f.name: getattr(predictor, f.name) for f in fields(predictor)} if is_dataclass(predictor) else {}
    options = {name: value for name, value in options.items() if isinstance(value, str | int | float)}
    return {"name": kind.__name__, "module": kind.__module__, "options": options, "known": None}


def _known(config: KNOWNConfig, revision: str | None) -> dict[str, Any]:
    path = config.name_or_path or ""
    weights = Path(path) / "model.safetensors"
    return {
        **(source(path, revision) if path else Source(name="in memory", on_hub=False, revision=None)),
        "shipped": Path(path).resolve().parent == SHIPPED_KNOWN.parent,
        "sha256": file_sha256(weights) if path and weights.is_file() else None,
        "variant": config.variant,
        "trajectories": (config.trained_on or {}).get("trajectories"),
    }


def compared_elsewhere(known: Mapping[str, Any] | None, steps: int) -> dict[str, Any] | None:
    """Return what the comparisons of the package say about the same steps of its KNOWN weights, if they do."""
    if known is None or not known["shipped"]:
        return None
    path = SHIPPED_KNOWN.with_name(Path(known["name"]).name) / COMPARISONS_NAME
    reports = json.loads(path.read_text(encoding="utf-8"))
    protocol = protocols(reports)[0]
    suites = tally(reports, protocol, f"known-step-{steps}")
    return {"what": protocol, **suites} if any(suites.values()) else None
