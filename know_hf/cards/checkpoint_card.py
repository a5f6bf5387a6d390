"""Card of an enhanced checkpoint."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, ClassVar, Unpack

from huggingface_hub import ModelCard, ModelCardData

from ..config_files import check_keys
from ..known import KNOWNModel
from ..markdown import Table, clean, percent, python, python_call
from ..prediction import PredictionResult
from ..predictors import Predictor
from ..trajectory import WeightTrajectory
from ..trajectory.recorder import library_versions
from .base import Source, shown_folder
from .described_predictor import compared_elsewhere, described_predictor
from .evidence import comparison_table, eval_results, gate_table, recorded_comparison, recorded_gate
from .model_loading import adapter_loading_code, loading_code
from .recorded_card import About, RecordedCard, recorded_fields

_IMPORTABLE = (  # from know_hf, by the code in the card
    *("ForgettingSchedule", "KNOWNModel", "WeightTrajectory"),
    *("induce_forgetting", "predict_overflowed_weights", "recalibrate_batch_norm"),
)
_FIGURES = (  # of a ResidualReport
    *("tensors", "parameters", "unchanged", "predicted", "mean_residual", "largest_residual", "mean_ratio"),
    *("shrink_share", "shrink_factor", "extrapolation_share", "extrapolation_factor"),
)
_BATCHES_COMMENT = "# batches: keyword arguments of the model, from the source data"


class PredictionAbout(About, total=False):
    """[`About`], and how the weights were predicted. All keys are optional."""

    predictor_options: Mapping[str, Any] | None  # fields of a predictor given by name
    norm: str  # keep or predict, as in [`predict_overflowed_weights`]
    dtype: str | None  # requested dtype, such as bfloat16
    recalibrated: bool  # whether the BatchNorm statistics were recomputed
    known_revision: str | None  # of KNOWN weights from the Hub


@dataclass(kw_only=True)
class CheckpointCard(RecordedCard):
    """Card of an enhanced checkpoint, JSON values only, so that it can be stored and completed later.

    `predictor` has `name`, `module` of its class, `options` and, for KNOWN, `known`: a [`Source`] with `shipped`,
    `sha256`, `variant` and `trajectories`. Of a [`Composition`], `members` has one such dict each. For the KNOWN
    weights of the package, `elsewhere` has the suites in which the same number of steps was `better` than Θ0, `worse`,
    `neither` or `unclear`, and `what` was measured. The other fields are those of [`checkpoint_card`].
    """

    template: ClassVar[str] = "checkpoint.md"

    trajectory: Source | None  # if it is on the Hub
    steps: int
    predictor: dict[str, Any]
    norm: str
    dtype: str | None
    recalibrated: bool
    has_batch_norm: bool
    roles: list[dict[str, Any]]  # figures of each role, from [`ResidualReport`]
    warnings: list[str]
    predicted_with: dict[str, str]  # library versions
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    gate: dict[str, Any] | None = None
    elsewhere: dict[str, Any] | None = None
    rescaled: str | None = None  # what was multiplied by a factor, and how well the function was kept
    folder: str = "enhanced/"  # of the checkpoint

    @classmethod
    def of(
        cls,
        trajectory: WeightTrajectory,
        result: PredictionResult,
        predictor: Predictor | KNOWNModel | str,
        steps: int,
        gate: Mapping[str, Any] | None = None,
        **about: Unpack[PredictionAbout],
    ) -> "CheckpointCard":
        """Collect the fields; see [`checkpoint_card`]."""
        check_keys(about, tuple(PredictionAbout.__annotations__), "the card")
        gate = None if gate is None else recorded_gate(gate)
        state = _chosen_state(gate)
        kind = "Enhanced checkpoint" if state is None else f"Recorded state {_state_name(state)}"
        recorded = recorded_fields(trajectory, about, kind)
        described = described_predictor(predictor, about.get("predictor_options"), about.get("known_revision"))
        name = about.get("trajectory_id") or getattr(trajectory.repo, "repo_id", None)
        revision = about.get("trajectory_revision") or getattr(trajectory.repo, "commit", None)
        return cls(
            **recorded,
            trajectory=None if name is None else Source(name=name, on_hub=True, revision=revision),
            steps=steps,
            predictor=described,
            norm=about.get("norm", "keep"),
            dtype=about.get("dtype"),
            recalibrated=about.get("recalibrated", False),
            has_batch_norm=any(role.is_batch_norm for role in trajectory.roles.values()),
            roles=[
                {"role": role} | {name: getattr(report, name) for name in _FIGURES}
                for role, report in result.report.items()
            ],
            warnings=list(result.warnings),
            predicted_with=library_versions(),
            elsewhere=compared_elsewhere(described["known"], steps),
            rescaled=None if result.rescaling is None else str(result.rescaling),
            gate=gate,
            folder=shown_folder(result.path),
        )

    def compare(self, comparison: Any, arm: str | None) -> None:
        """Add a comparison; `arm` is the arm that is this checkpoint."""
        self.comparisons.append(recorded_comparison(comparison, arm))

    @property
    def chosen_state(self) -> int | str | None:
        """The recorded state or snapshot that the gate chose, or `None` for a prediction."""
        return _chosen_state(self.gate)

    @property
    def chosen_label(self) -> str:
        """Name of [`chosen_state`] in a sentence."""
        return f"{_state_name(self.chosen_state)}, a recorded state"

    @property
    def is_average(self) -> bool:
        """Whether these weights are an average of the states, requested or chosen by the gate."""
        return self.chosen_state is None and self.predictor["name"] in ("average", "Average")

    @property
    def known(self) -> dict[str, Any] | None:
        """The KNOWN weights that predicted this checkpoint."""
        return self.predictor["known"] if self.chosen_state is None else None

    @property
    def is_retrodiction(self) -> bool:
        """Whether the reference variant of KNOWN, which runs the forgetting backwards, predicted this checkpoint."""
        return self.known is not None and self.known.get("variant", "reference") == "reference"

    @property
    def not_forgotten(self) -> list[str]:
        return [] if self.is_retrodiction else super().not_forgotten  # the prediction warns about it

    @property
    def data_factor(self) -> float | None:
        """How many times the data the steps of a retrodiction stand for, r^(-steps)."""
        return self.ratio**-self.steps if self.is_retrodiction and self.ratio is not None else None

    @property
    def verdict(self) -> str:
        """The first sentence of the card."""
        evidence = [*self.comparisons, *([] if self.gate is None else [self.gate])]
        sentences = [record["sentence"] for record in evidence if record["sentence"]]
        if sentences:
            return " ".join(sentences)
        start = "The comparisons below do not include these weights" if self.comparisons else "Not evaluated"
        what = "average" if self.is_average else "prediction"
        return f"{start}: it is unknown whether the {what} is better than the unchanged weights (Θ0)."

    @property
    def roles_table(self) -> Table:
        head = ["role", "tensors", "parameters", "unchanged", "mean abs. R", "largest", "relative to Θ0"]
        rows = [[*head, "along Θ0", "along Θ0 − Θ1"]]
        for row in self.roles:
            cells = ["–"] * 5
            if row["predicted"]:
                cells = [
                    f"{row['mean_residual']:.3g}",
                    f"{row['largest_residual']:.3g}",
                    "–" if math.isinf(row["mean_ratio"]) else percent(row["mean_ratio"]),
                    f"{percent(row['shrink_share'])} (× {row['shrink_factor']:.4g})",
                    f"{percent(row['extrapolation_share'])} ({row['extrapolation_factor']:+.2f})",
                ]
            rows.append([row["role"], *(f"{row[name]:,}" for name in head[1:4]), *cells])
        return rows

    @property
    def comparison_tables(self) -> list[Table]:
        return [comparison_table(record) for record in self.comparisons]

    @property
    def gate_table(self) -> Table:
        assert self.gate is not None
        return gate_table(self.gate)

    @property
    def versions(self) -> dict[str, Mapping[str, str]]:
        return super().versions | {"predicted with": self.predicted_with}

    @property
    def loading_code(self) -> str:
        path = self.repo_id or self.folder
        if self.adapter_type is not None:
            return adapter_loading_code(path, self.load_with, self.base_model)
        return loading_code(path, self.load_with, self.architecture, on_hub=self.repo_id is not None)

    @property
    def recording_folder(self) -> str:
        """Output folder of `know-hf record`."""
        return str(PurePosixPath(self.trajectory_folder).parent)

    @property
    def prediction_code(self) -> str:
        return self._predicting_code if self.chosen_state is None else self._saving_code

    @property
    def prediction_command(self) -> str | None:
        """Return the command that predicts the checkpoint from the recorded folder, if one does."""
        predictor, known = self.predictor, self.known
        is_local = self.trajectory is None and predictor["module"] is None and "members" not in predictor
        if self.chosen_state is not None or self.recalibrated or not is_local:
            return None
        words = ["know-hf", "predict", self.trajectory_folder, "--steps", str(self.steps)]
        if known is None:
            words += ["--predictor", predictor["name"]]
            words += ["--predictor-options", json.dumps(predictor["options"])] if predictor["options"] else []
        elif known["revision"] is not None:
            return None
        else:
            words += ["--predictor", "known"] if known["shipped"] else ["--known", known["name"]]
        for flag, value in (("--norm", self._norm), ("--dtype", self.dtype)):
            words += [flag, value] if value else []
        return shlex.join([*words, "--output-dir", self.folder])

    @property
    def _opening(self) -> list[str]:
        """Return the code that opens or records the trajectory; empty if its path is enough."""
        if self.trajectory is not None:
            revision = f", revision={python(self.trajectory['revision'])}" if self.trajectory["revision"] else ""
            return [f"trajectory = WeightTrajectory.from_hub({python(self.trajectory['name'])}{revision})"]
        if self.schedule_call is not None and not self.record_arguments:
            call = f"induce_forgetting(trainer, schedule, {python(self.trajectory_folder)})"
            return [
                f"schedule = {self.schedule_call}",
                f"trajectory = {call}  # trainer: the Trainer of the fine-tuning",
            ]
        return []

    @property
    def _predicting_code(self) -> str:
        lines, (before, chosen) = self._opening, self._predictor_code
        arguments = ["trajectory" if lines else python(self.trajectory_folder), *chosen]
        lines += before
        arguments += _keywords({"steps": self.steps, "norm": self._norm})
        arguments += [] if self.dtype is None else [f"dtype=torch.{self.dtype}"]
        if self.recalibrated:
            lines.append(_BATCHES_COMMENT)
            arguments.append("recalibrate_with=batches")
        arguments.append(f"output_dir={python(self.folder)}")
        members = self.predictor.get("members", [self.predictor])
        imports = [f"from {one['module']} import {one['name']}" for one in members if one["module"] is not None]
        return _with_imports([*lines, f"predict_overflowed_weights({', '.join(arguments)})"], imports)

    @property
    def _predictor_code(self) -> tuple[list[str], list[str]]:
        """Return the lines that load the predictor, and the arguments that name it; none for the shipped weights."""
        predictor, known = self.predictor, self.known
        lines: list[str] = []
        arguments: list[str] = []
        if known is not None and known["revision"] is not None:
            revision = python(known["revision"])
            lines.append(f"known = KNOWNModel.from_pretrained({python(known['name'])}, revision={revision})")
            arguments.append("known")
        elif known is not None and not known["shipped"]:
            arguments.append(python(known["name"]))
        if "members" in predictor:
            arguments.append(f"predictor=[{', '.join(map(_predictor_call, predictor['members']))}]")
        elif predictor["module"] is not None:
            arguments.append(f"predictor={_predictor_call(predictor)}")
        elif known is None:
            arguments += _keywords({"predictor": predictor["name"], "predictor_options": predictor["options"]})
        return lines, arguments

    @property
    def _saving_code(self) -> str:
        """Return the code that saves the chosen state as a checkpoint."""
        lines = self._opening or [f"trajectory = WeightTrajectory({python(self.trajectory_folder)})"]
        base = "" if self.adapter_type is None else ", base_model=base_model"
        lines.append(f"model = trajectory.load_model({python(self.chosen_state)}{base})")
        lines += [_BATCHES_COMMENT, "recalibrate_batch_norm(model, batches)"] if self.recalibrated else []
        lines += [] if self.dtype is None else [f"model.to(torch.{self.dtype})"]
        return _with_imports([*lines, f"model.save_pretrained({python(self.folder)})"])

    @property
    def _norm(self) -> str | None:
        return None if self.norm == "keep" else self.norm

    def data(self) -> ModelCardData:
        results = eval_results(self.comparisons, self.gate, self.pipeline_tag)
        index = {"model_name": self.repo_id or clean(self.title), "eval_results": results} if results else {}
        library = None if self.architecture is None else "transformers"
        library = library if self.adapter_type is None else "peft"
        tag = "weight-prediction" if self.chosen_state is None else "recorded-state"
        tag = "weight-averaging" if self.is_average else tag
        return self.front_matter([tag], library, pipeline_tag=self.pipeline_tag, **index)


def checkpoint_card(
    trajectory: WeightTrajectory,
    result: PredictionResult,
    predictor: Predictor | KNOWNModel | str,
    steps: int,
    *,
    comparisons: Sequence[Any] = (),
    arm: str | None = None,
    gate: Mapping[str, Any] | None = None,
    **about: Unpack[PredictionAbout],
) -> ModelCard:
    """Create the card of an enhanced checkpoint from the trajectory's JSON files, without network access.

    Args:
        trajectory, result, predictor, steps, gate:
            What was predicted, with the predictor or its name; for the gate, see
                [`~know_hf.cards.evidence.recorded_gate`].
        comparisons (sequence of [`Comparison`] or `Mapping`, *optional*):
            Measurements, see [`~know_hf.cards.evidence.recorded_comparison`]. Without any, the card says so.
        arm (`str`, *optional*):
            Arm of the comparisons that is this checkpoint.
        about:
            See [`~know_hf.cards.checkpoint_card.PredictionAbout`].

    Returns:
        `ModelCard`: `str(card)` is the README.md, `card.data` its front matter.

    Raises:
        `ValueError`: for an incomplete comparison or gate, an unknown key, or an invalid Hub id.
    """
    card = CheckpointCard.of(trajectory, result, predictor, steps, gate, **about)
    for comparison in comparisons:
        card.compare(comparison, arm)
    return card.render()


def _chosen_state(gate: Mapping[str, Any] | None) -> int | str | None:
    return ((gate or {}).get("recipe") or {}).get("state")


def _state_name(state: Any) -> str:
    return f"Θ{state}" if isinstance(state, int) else f"`{state}`"


def _keywords(values: Mapping[str, Any]) -> list[str]:
    """Return keyword arguments, without those that are empty."""
    return [f"{key}={python(value)}" for key, value in values.items() if value]


def _predictor_call(predictor: Mapping[str, Any]) -> str:
    """Return the code of a predictor: its name, or the call of its class."""
    name = predictor["name"]
    return python(name) if predictor["module"] is None else python_call(name, predictor["options"])


def _with_imports(lines: Sequence[str], imports: Sequence[str] = ()) -> str:
    text = "\n".join(lines)
    names = [name for name in _IMPORTABLE if f"{name}(" in text or f"{name}." in text]
    torch = ["import torch"] if "torch." in text else []
    return "\n".join([f"from know_hf import {', '.join(names)}", *imports, *torch, "", text])
