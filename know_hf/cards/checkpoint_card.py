"""The card of an enhanced checkpoint: what was done to which weights, at what cost, and whether it helped."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump

from ..checkpoint import file_sha256
from ..known.configuration_known import KNOWNConfig
from ..markdown import Table, clean, code
from .code_snippets import loading_code, prediction_code, prediction_command, record_command
from .evidence import comparison_table, eval_results, gate_table, recorded_comparison, recorded_gate
from .provenance import About, RecordedCard, Source, recorded_fields, source
from .suite_tables import COMPARISONS_NAME, protocols, tally

if TYPE_CHECKING:
    from ..evaluation import Comparison
    from ..known.modeling_known import KNOWNModel
    from ..prediction import PredictionResult
    from ..predictors import Predictor
    from ..trajectory import WeightTrajectory

_SHIPPED = Path(__file__).resolve().parents[1] / "known" / "weights"
# What of a `ResidualReport` stands in the card.
_FIGURES = (
    "tensors",
    "parameters",
    "unchanged",
    "predicted",
    "mean_residual",
    "largest_residual",
    "mean_ratio",
    "shrink_share",
    "shrink_factor",
    "extrapolation_share",
    "extrapolation_factor",
)


@dataclass(kw_only=True)
class CheckpointCard(RecordedCard):
    """All that is known of an enhanced checkpoint; JSON values only, so that it can be kept and filled later:
    `CheckpointCard(**json.loads(json.dumps(dataclasses.asdict(card))))` is the same card.

    Args:
        trajectory ([`Source`], *optional*): The trajectory, where it is on the Hub.
        steps (`int`): Recursive predictions.
        predictor (`dict`): `name`, `module` (of a class that can be imported), `options`, and of KNOWN `known`: a
            [`Source`] with `shipped`, `sha256` and `trajectories`.
        norm (`str`): `"keep"` or `"predict"`.
        dtype (`str`, *optional*): Floating-point dtype that was asked for.
        recalibrated (`bool`): Whether BatchNorm statistics were computed anew.
        has_batch_norm (`bool`): Whether there are any.
        roles (`list[dict]`): The figures of each role.
        warnings (`list[str]`): Of the prediction.
        predicted_with (`dict[str, str]`): From library to version.
        comparisons (`list[dict]`): As [`~know_hf.cards.evidence.recorded_comparison`] gives them.
        gate (`dict`, *optional*): As [`~know_hf.cards.evidence.recorded_gate`] gives it.
        elsewhere (`dict`, *optional*): In which of the suites that the shipped KNOWN weights were compared on so many
            steps were `better` than Θ0, `worse`, `neither` or `unclear`; and `what` was measured.
    """

    template: ClassVar[str] = "checkpoint.md"

    trajectory: Source | None
    steps: int
    predictor: dict[str, Any]
    norm: str
    dtype: str | None
    recalibrated: bool
    has_batch_norm: bool
    roles: list[dict[str, Any]]
    warnings: list[str]
    predicted_with: dict[str, str]
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    gate: dict[str, Any] | None = None
    elsewhere: dict[str, Any] | None = None

    @classmethod
    def of(
        cls,
        trajectory: "WeightTrajectory",
        result: "PredictionResult",
        predictor: "Predictor | KNOWNModel | str",
        steps: int,
        *,
        norm: str = "keep",
        dtype: str | None = None,
        recalibrated: bool = False,
        predictor_options: Mapping[str, Any] | None = None,
        known_revision: str | None = None,
        **about: Unpack[About],
    ) -> "CheckpointCard":
        """What a prediction says of itself; see [`checkpoint_card`]."""
        recorded = recorded_fields(trajectory, about, "Enhanced checkpoint")
        described = _described(predictor, predictor_options, known_revision)
        return cls(
            **recorded,
            trajectory=_trajectory(trajectory, about),
            steps=steps,
            predictor=described,
            norm=norm,
            dtype=dtype,
            recalibrated=recalibrated,
            has_batch_norm=any(role.is_batch_norm for role in trajectory.roles.values()),
            roles=[
                {"role": role} | {name: getattr(report, name) for name in _FIGURES}
                for role, report in result.report.items()
            ],
            warnings=list(result.warnings),
            predicted_with=_versions(recorded["recorded_with"]),
            elsewhere=_elsewhere(described["known"], steps),
        )

    def compare(self, comparison: "Comparison | Mapping[str, Any]", arm: str | None) -> None:
        """Adds a comparison, in which these weights are the arm named, or none of them."""
        self.comparisons.append(recorded_comparison(comparison, arm))

    @property
    def known(self) -> dict[str, Any] | None:
        return self.predictor["known"]

    @property
    def data_factor(self) -> float | None:
        """How many times the data KNOWN's steps stand for, r^(-steps)."""
        return None if self.ratio is None or self.known is None else self.ratio**-self.steps

    @property
    def roles_table(self) -> Table:
        head = ["role", "tensors", "parameters", "unchanged", "mean abs. R", "largest", "relative to Θ0"]
        rows: list[Sequence[object]] = [[*head, "along Θ0", "along Θ0 − Θ1"]]
        for row in self.roles:
            counts = [f"{row[name]:,}" for name in ("tensors", "parameters", "unchanged")]
            if not row["predicted"]:
                rows.append([row["role"], *counts, *["–"] * 5])
                continue
            ratio = "–" if math.isinf(row["mean_ratio"]) else f"{row['mean_ratio']:.2%}"
            sizes = [f"{row['mean_residual']:.3g}", f"{row['largest_residual']:.3g}", ratio]
            shrinkage = f"{row['shrink_share']:.0%} (× {row['shrink_factor']:.4g})"
            extrapolation = f"{row['extrapolation_share']:.0%} ({row['extrapolation_factor']:+.2f})"
            rows.append([row["role"], *counts, *sizes, shrinkage, extrapolation])
        return rows

    @property
    def comparison_tables(self) -> list[Table]:
        return [comparison_table(record) for record in self.comparisons]

    @property
    def chosen_state(self) -> int | None:
        """The state that the gate chose, 0 for Θ0; `None` where it chose a prediction or there was no gate."""
        return ((self.gate or {}).get("recipe") or {}).get("state")

    @property
    def gate_table(self) -> Table:
        assert self.gate is not None
        return gate_table(self.gate)

    @property
    def environment_table(self) -> Table:
        now = self.predicted_with
        versions = [[code(name), found, now.get(name, "–")] for name, found in self.recorded_with.items()]
        return [["library", "recorded with", "predicted with"], *versions]

    @property
    def loading_code(self) -> str:
        return loading_code(self, self.repo_id or "enhanced/")

    @property
    def prediction_code(self) -> str:
        return prediction_code(self)

    @property
    def prediction_command(self) -> str | None:
        return prediction_command(self)

    @property
    def record_yaml(self) -> str:
        """What `know-hf record` was told."""
        return yaml_dump(self.record_arguments, sort_keys=False)

    @property
    def record_command(self) -> str:
        return record_command()

    def data(self) -> ModelCardData:
        found = eval_results(self.comparisons, self.gate, self.pipeline_tag)
        results = {"model_name": self.repo_id or clean(self.title), "eval_results": found} if found else {}
        library = (
            "peft" if self.adapter_type is not None else "transformers" if self.architecture is not None else None
        )
        return self.front_matter(["weight-prediction"], library, pipeline_tag=self.pipeline_tag, **results)


def checkpoint_card(
    trajectory: "WeightTrajectory",
    result: "PredictionResult",
    predictor: "Predictor | KNOWNModel | str",
    steps: int,
    *,
    predictor_options: Mapping[str, Any] | None = None,
    norm: str = "keep",
    dtype: str | None = None,
    recalibrated: bool = False,
    known_revision: str | None = None,
    comparisons: Sequence["Comparison | Mapping[str, Any]"] = (),
    arm: str | None = None,
    gate: Mapping[str, Any] | None = None,
    **about: Unpack[About],
) -> ModelCard:
    """Card of an enhanced checkpoint. Reads the trajectory's JSON files; asks no network and writes nothing.

    Args:
        trajectory ([`WeightTrajectory`]): The recorded states.
        result ([`PredictionResult`]): What the prediction did.
        predictor ([`Predictor`], [`KNOWNModel`] or `str`): What predicted: an object, or the name of a predictor.
        steps (`int`): Recursive predictions.
        predictor_options (`Mapping`, *optional*): Fields of a predictor given by its name.
        norm (`str`, *optional*, defaults to `"keep"`): As of [`predict_overflowed_weights`].
        dtype (`str`, *optional*): Name of the dtype that was asked for, such as `"bfloat16"`.
        recalibrated (`bool`, *optional*, defaults to `False`): Whether BatchNorm statistics were computed anew.
        known_revision (`str`, *optional*): Revision of KNOWN weights that came from the Hub.
        comparisons (sequence of [`Comparison`] or `Mapping`, *optional*): What was measured, see
            [`~know_hf.cards.evidence.recorded_comparison`]. Without any, the card says that nothing was.
        arm (`str`, *optional*): The arm of the comparisons that these weights are.
        gate (`Mapping`, *optional*): What a validation gate found, see [`~know_hf.cards.evidence.recorded_gate`].
        about: See [`~know_hf.cards.provenance.About`].

    Returns:
        `ModelCard`: `str(card)` is the README.md, `card.data` its front matter.

    Raises:
        `ValueError`: for a comparison or a gate that lacks what the card needs, or an id that the Hub does not take.
    """
    card = CheckpointCard.of(
        trajectory,
        result,
        predictor,
        steps,
        predictor_options=predictor_options,
        norm=norm,
        dtype=dtype,
        recalibrated=recalibrated,
        known_revision=known_revision,
        **about,
    )
    for comparison in comparisons:
        card.compare(comparison, arm)
    card.gate = None if gate is None else recorded_gate(gate)
    return card.render()


def _described(
    predictor: "Predictor | KNOWNModel | str", options: Mapping[str, Any] | None, known_revision: str | None
) -> dict[str, Any]:
    if isinstance(predictor, str):
        return {"name": predictor, "module": None, "options": _given(options or {}), "known": None}
    model: Any = getattr(predictor, "model", predictor)
    if isinstance(getattr(model, "config", None), KNOWNConfig):
        return {"name": "known", "module": None, "options": {}, "known": _known(model.config, known_revision)}
    kind = type(predictor)
    values = {key.name: getattr(predictor, key.name) for key in fields(predictor)} if is_dataclass(predictor) else {}
    plain = {name: value for name, value in values.items() if isinstance(value, str | int | float)}
    return {"name": kind.__name__, "module": kind.__module__, "options": plain, "known": None}


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _trajectory(trajectory: "WeightTrajectory", about: About) -> Source | None:
    repo = getattr(trajectory, "repo", None)
    name = about.get("trajectory_id") or getattr(repo, "repo_id", None)
    revision = about.get("trajectory_revision") or getattr(repo, "commit", None)
    return None if name is None else Source(name=name, on_hub=True, revision=revision)


def _known(config: KNOWNConfig, revision: str | None) -> dict[str, Any]:
    place = str(getattr(config, "_name_or_path", "") or "")
    weights = Path(place) / "model.safetensors"
    found = source(place, revision) if place else Source(name="in memory", on_hub=False, revision=None)
    return {
        **found,
        "shipped": Path(place).resolve().parent == _SHIPPED,
        "sha256": file_sha256(weights) if place and weights.is_file() else None,
        "trajectories": (config.trained_on or {}).get("trajectories"),
    }


def _elsewhere(known: Mapping[str, Any] | None, steps: int) -> dict[str, Any] | None:
    if known is None or not known["shipped"]:
        return None
    path = _SHIPPED / Path(known["name"]).name / COMPARISONS_NAME
    reports = json.loads(path.read_text(encoding="utf-8"))
    protocol = protocols(reports)[0]
    found = tally(reports, protocol, f"known-step-{steps}")
    return {"what": protocol, **found} if any(found.values()) else None


def _versions(libraries: Mapping[str, str]) -> dict[str, str]:
    versions = {}
    for library in libraries:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions
