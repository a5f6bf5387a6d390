"""Predict the tensors of a checkpoint from their histories."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from ..distributed import on_main_process
from ..markdown import quantity
from ..predictors import DepthPredictor, KNOWNPredictor, Predictor, SnapshotPredictor, relative_depths
from ..trajectory.summary import loss_names
from .pieces import Piece, pieces_of
from .plan import COPIED_COST, PredictionPlan, model_json
from .residuals import ResidualReport, is_finite
from .result import PredictionResult
from .snapshot_predictions import CompleteTensors, MissingSnapshotsError
from .tensor_sources import TensorSource, cast, check_finite, check_history, count_differences, count_piece
from .warnings import (
    code_warnings,
    dtype_warnings,
    forgetting_warnings,
    range_warnings,
    rounding_warnings,
    unchanged_warnings,
)
from .write_checkpoint import Reports, WriteOptions, checkpoint_folder, fill_checkpoint


def write_prediction(
    plan: PredictionPlan,
    output_dir: str | Path,
    options: WriteOptions,
    finish: Callable[[Path, PredictionResult], None] | None = None,
) -> PredictionResult:
    """Predict and write the checkpoint of a plan. The main process calls `finish` before the folder gets its name.

    Raises:
        `MissingSnapshotsError`: if there is nothing but Θ0 to predict from.
    """
    if len(plan.snapshots) < 2 and plan.rescaling is None:
        tail = "" if plan.trajectory.tail else " and no tail"
        raise MissingSnapshotsError(
            f"{type(plan.predictor).__name__} has nothing to predict from but Θ0: {plan.trajectory.path} has one"
            f" state{tail}. Record with ForgettingSchedule(num_states=5) or tail_states=4, or choose a predictor of"
            " the tail, the start or branches"
        )
    models = [getattr(plan.predictor, "model", None)]
    with checkpoint_folder(plan.trajectory, output_dir, options, models) as folder:
        reports = fill_checkpoint(plan.trajectory, PredictedTensors(plan), folder, options)
        result = prediction_result(plan, reports, output_dir, options)
        if finish is not None:
            on_main_process(options.accelerator, lambda: finish(folder, result))
    return result


def prediction_result(
    plan: PredictionPlan, reports: Reports, output_dir: str | Path, options: WriteOptions, is_prediction: bool = True
) -> PredictionResult:
    """Join the reports of a written checkpoint with the warnings that follow from them.

    `is_prediction` is false for a state that a gate chose.
    """
    trajectory, roles = plan.trajectory, {name: tensor.role for name, tensor in plan.tensors.items()}
    configs = [model_json(path) for path in trajectory.model_files if path.name.endswith("config.json")]
    warnings = [*_warnings(plan, reports), *code_warnings(configs, trajectory.base_model)]
    is_alone = len(plan.snapshots) < 2  # nothing to compare with
    may_equal = is_prediction or not (is_alone or any(tensor.network for tensor in plan.tensors.values()))
    if may_equal and plan.rescaling is None:
        warnings += unchanged_warnings(reports, Counter(roles.values()))
    result = PredictionResult(
        Path(output_dir), reports, roles, warnings, options.model_class, rescaling=plan.rescaling
    )
    result.predictor, result.name = plan.predictor if is_prediction else None, plan.name
    return result


class PredictedTensors(TensorSource):
    """The tensors that a plan predicts; see [`write_checkpoint`]."""

    def __init__(self, plan: PredictionPlan) -> None:
        self.plan = plan
        self.trajectory = plan.trajectory
        self.description = f"Predicting {quantity(plan.steps, 'step')}"
        self._device = getattr(plan.predictor, "device", torch.device("cpu"))
        predictor = plan.predictor.prepared() if isinstance(plan.predictor, KNOWNPredictor) else plan.predictor
        self._predictors: dict[str, Predictor] = dict.fromkeys(plan.tensors, predictor)
        if isinstance(plan.predictor, DepthPredictor):
            depths = relative_depths(list(plan.tensors))
            self._predictors = {name: plan.predictor.at_depth(depth) for name, depth in depths.items()}
        self._complete: CompleteTensors | None = None
        if isinstance(plan.predictor, SnapshotPredictor):
            self._complete = CompleteTensors(plan.trajectory, plan.snapshots, self._predictors)
        self._factors = {} if plan.rescaling is None else plan.rescaling.factors
        self._theta0 = plan.snapshots[-1]
        self._changes: dict[str, bool] = {}

    def cost(self, name: str) -> float:
        return self.plan.steps if self.plan.tensors[name].network else COPIED_COST

    def read(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """Read Θ0 as stored, `(N,)`, and the history, `(S, N)` float32, of a piece that is predicted.

        The last item is the number of elements that moved but have a dtype that cannot be predicted.
        """
        read = partial(self.trajectory.read, piece.name, piece.start, piece.stop, self._theta0)
        tensor = self.plan.tensors[piece.name]
        if not tensor.network:
            is_kept = tensor.is_kept_by_dtype
            kept = count_differences(self.trajectory, piece, self.plan.snapshots) if is_kept else 0
            return read(), None, kept
        history = self._history(piece)
        if not self._tensor_changes(piece, history):
            return read(), None, 0
        return history[-1] if self.trajectory.dtype(piece.name) == torch.float32 else read(), history, 0

    def values(
        self, piece: Piece, data: tuple[torch.Tensor, torch.Tensor | None, int]
    ) -> tuple[torch.Tensor, ResidualReport]:
        original, history, kept = data
        tensor, trajectory = self.plan.tensors[piece.name], self.trajectory
        unchanged = tensor.is_unchanged or self._changes.get(piece.name) is False
        report = count_piece(trajectory, piece, unchanged=history is None and unchanged)
        if history is None:
            report.kept = kept
            if tensor.role != "copied":
                check_finite(original, piece.name, trajectory, self._theta0)
            return self._rescaled(original, piece), report
        check_history(history, piece, trajectory, self.plan.snapshots)
        residual = self._residual(history, piece, tensor.network or "")
        if not is_finite(residual):
            raise ValueError(
                f"the prediction of tensor {piece.name!r} of {trajectory.path} is not finite after {self.plan.steps}"
                f" step(s) from values up to {float(history.abs().max()):.3g}; use fewer steps"
            )
        copied = cast(self._rescaled(original, piece), tensor.spec.dtype, piece.name, trajectory)
        total = original.to(torch.promote_types(original.dtype, torch.float32)) + residual
        total = self._rescaled(total, piece)
        result = cast(total, tensor.spec.dtype, piece.name, trajectory)
        # -0.0 + 0.0 is +0.0: only a copy is bit-identical where the residual is zero
        result = torch.where(residual == 0, copied, result)
        used = history[-self.plan.num_states :]
        report += ResidualReport.of(used, residual, self.plan.trained_on(tensor.network or ""))
        same = result == copied
        report.changed = result.numel() - int(same.sum())
        if result.dtype != torch.float32:
            report.lost = int(((residual != 0) & same).sum())
        return result, report

    def _rescaled(self, values: torch.Tensor, piece: Piece) -> torch.Tensor:
        """Multiply a piece by the factor of its tensor, if it has one."""
        if (factor := self._factors.get(piece.name)) is None:
            return values
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        return factor.scale_piece(wide, self.plan.tensors[piece.name].spec.shape, piece.start)

    def _history(self, piece: Piece) -> torch.Tensor:
        """Read a piece of all snapshots of the plan, `(S, N)` float32, Θ0 last."""
        rows = [self.trajectory.read(piece.name, piece.start, piece.stop, name) for name in self.plan.snapshots]
        return torch.stack([row.float() for row in rows])

    def _residual(self, history: torch.Tensor, piece: Piece, network: str) -> torch.Tensor:
        """Sum the residuals of all steps, `(N,)` float32 on the CPU, from a history `(S, N)`."""
        name = piece.name
        if self._complete is not None:
            return self._complete.residual(name)[piece.start : piece.stop]
        predictor, steps, states = self._predictors[name], self.plan.steps, self.plan.num_states
        # rows are states: one buffer holds the history and every step, and each window is a view of it
        buffer = torch.empty(states + steps, history.shape[1], device=self._device)
        buffer[:states] = history[-states:]
        total = torch.zeros(history.shape[1], device=self._device)
        for step in range(steps):
            residual = predictor.residual(buffer[step : step + states].T, network).to(buffer)
            if residual.shape != total.shape:
                raise ValueError(
                    f"{type(predictor).__name__} returned a residual of shape {tuple(residual.shape)} for"
                    f" {len(total)} histories of tensor {name!r}; return one number per history, ({len(total)},)"
                )
            total += residual
            torch.add(buffer[step + states - 1], residual, out=buffer[step + states])
        return total.cpu()

    def _tensor_changes(self, piece: Piece, history: torch.Tensor) -> bool:
        """Whether any element of the tensor differs between states. Reads other pieces only if this one is equal."""
        name = piece.name
        if name not in self._changes:
            group = (name,) if self._complete is None else self._complete.group(name)
            pieces = (other for one in group for other in pieces_of(one, self.plan.tensors[one].spec))
            self._changes[name] = self._differs(piece, history) or any(
                self._differs(other, self._history(other)) for other in pieces if other != piece
            )
        return self._changes[name]

    def _differs(self, piece: Piece, history: torch.Tensor) -> bool:
        if self.trajectory.dtype(piece.name) == torch.float64:  # float32 hides small moves and very large values
            return count_differences(self.trajectory, piece, self.plan.snapshots) > 0
        return bool((history != history[-1]).any())


def _warnings(plan: PredictionPlan, reports: Mapping[str, ResidualReport]) -> list[str]:
    warnings = []
    if isinstance(plan.predictor, KNOWNPredictor):  # the others do not claim to run the forgetting backwards
        states = plan.trajectory.states
        for name in loss_names(states[0].metrics):
            warnings += forgetting_warnings([state.metrics.get(name) for state in states], name)
    for network in sorted({tensor.network for tensor in plan.tensors.values() if tensor.network}):
        trained_on = plan.trained_on(network)
        if trained_on is not None:
            of_network = {name: reports[name] for name, t in plan.tensors.items() if t.network == network}
            warnings += range_warnings(network, of_network, trained_on)
    return warnings + rounding_warnings(reports) + dtype_warnings(reports, plan.trajectory.dtype)
