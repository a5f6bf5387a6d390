"""From a trajectory and a predictor to the enhanced checkpoint, one tensor at a time.

This is where files and mathematics meet: `trajectory` reads, `predictors` compute, `checkpoint` writes.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .batch_norm import recalibrate_batch_norm
from .checkpoint import DEFAULT_SHARD_SIZE, CheckpointWriter, TensorSpec, atomic_folder, replace_tensors
from .modeling_known import KNOWNModel
from .predictors import KNOWNPredictor, Predictor, get_predictor
from .roles import PREDICTED_ROLES
from .trajectory import TrajectoryError, WeightTrajectory, load_pretrained

SHIPPED_KNOWN = Path(__file__).parent / "weights" / "known-base"


@dataclass
class RoleReport:
    """What happened to the tensors of one role.

    Attributes:
        tensors, parameters (`int`): How many there are.
        unchanged (`int`): Tensors that are equal in all states and were copied bit for bit.
        mean_residual, largest_residual (`float`): Of |Θ̂ − Θ0| over the predicted tensors, in units of the weights.
        mean_ratio (`float`): Σ|Θ̂ − Θ0| / Σ|Θ0| over the predicted tensors.
    """

    tensors: int = 0
    parameters: int = 0
    unchanged: int = 0
    mean_residual: float = 0.0
    largest_residual: float = 0.0
    mean_ratio: float = 0.0
    _predicted: int = field(default=0, repr=False)
    _sum_residual: float = field(default=0.0, repr=False)
    _sum_weight: float = field(default=0.0, repr=False)

    def add(self, weight: torch.Tensor, residual: torch.Tensor | None) -> None:
        self.tensors += 1
        self.parameters += weight.numel()
        if residual is None or not weight.numel():
            return
        self._predicted += weight.numel()
        self._sum_residual += float(residual.abs().sum(dtype=torch.float64))
        self._sum_weight += float(weight.abs().sum(dtype=torch.float64))
        self.mean_residual = self._sum_residual / self._predicted
        self.largest_residual = max(self.largest_residual, float(residual.abs().max()))
        self.mean_ratio = self._sum_residual / self._sum_weight if self._sum_weight else float("inf")


@dataclass
class PredictionResult:
    """An enhanced checkpoint.

    Attributes:
        path (`Path`): Its folder.
        report (`dict[str, RoleReport]`): From role to what happened to its tensors.
    """

    path: Path
    report: dict[str, RoleReport]
    model_class: type[PreTrainedModel] | None = None

    def load_model(self, base_model: PreTrainedModel | None = None) -> PreTrainedModel:
        """The enhanced model, of the class that was recorded; an adapter on the base model given."""
        return load_pretrained(self.path, self.model_class, base_model)

    def __str__(self) -> str:
        lines = [f"{'role':8}{'tensors':>9}{'parameters':>13}{'unchanged':>11}{'mean |res|':>13}{'max |res|':>13}"]
        for role, r in self.report.items():
            residual = f"{r.mean_residual:13.3g}{r.largest_residual:13.3g}" if r._predicted else f"{'-':>13}{'-':>13}"
            lines.append(f"{role:8}{r.tensors:9}{r.parameters:13,}{r.unchanged:11}{residual}")
        return "\n".join(lines)


def predict_overflowed_weights(
    trajectory: WeightTrajectory | str | Path,
    known: KNOWNModel | str | Path | None = None,
    steps: int = 1,
    *,
    output_dir: str | Path,
    predictor: Predictor | str | None = None,
    norm: Literal["keep", "predict"] = "keep",
    recalibrate_with: Iterable[Mapping[str, torch.Tensor]] | None = None,
    model_class: type[PreTrainedModel] | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> PredictionResult:
    """Runs the forgetting of a trajectory backwards and writes the retrodicted weights as an ordinary checkpoint.

    Each step predicts Θ̂(-1) = Θ0 + residual(W) for each scalar weight from its history W (KNOW paper, §3); the next
    step appends the prediction to the history and drops its most forgotten state. With ratio r, `steps` stand for
    r^(-steps) times the data. Convolution kernels, matrices and biases are predicted; normalisation layers, buffers
    and other parameters are those of Θ0; tensors that are equal in all states are copied bit for bit.

    Args:
        trajectory ([`WeightTrajectory`], `str` or `Path`): The recorded states.
        known ([`KNOWNModel`], `str` or `Path`, *optional*): The hyper-model, or where it is; by default the one that
            know_hf ships. It is used on the device that it is on.
        steps (`int`, *optional*, defaults to `1`): Number of recursive predictions.
        output_dir (`str` or `Path`): Where the checkpoint goes; it appears whole or not at all.
        predictor ([`Predictor`] or `str`, *optional*): Used instead of KNOWN, by name or as an object.
        norm (`"keep"` or `"predict"`, *optional*, defaults to `"keep"`): Whether weights and biases of normalisation
            layers are those of Θ0 or are predicted as biases are.
        recalibrate_with (iterable of batches, *optional*): Batches (keyword arguments of the model) of the source data
            from which BatchNorm statistics are computed anew for the predicted weights; by default they are Θ0's.
        model_class (`type`, *optional*): The model's class, where transformers has none of its name.
        max_shard_size (`int`, *optional*, defaults to `5_000_000_000`): Bytes of one safetensors file.
        overwrite (`bool`, *optional*, defaults to `False`): Whether an existing `output_dir` may be replaced.

    Returns:
        [`PredictionResult`]: with the path, `load_model()` and a report for each role.

    Raises:
        `TrajectoryError`: when a file is not the one recorded, states are out of order or differ in their tensors, a
            value is not finite, or weights are quantised; names tensor and state.
        `ValueError`: when the trajectory has fewer states than the predictor needs, or an argument is off.
        `FileExistsError`: when `output_dir` is not empty and `overwrite` is off.
    """
    if int(steps) != steps or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps}")
    if norm not in ("keep", "predict"):
        raise ValueError(f"norm must be 'keep' or 'predict', got {norm!r}")
    if not isinstance(trajectory, WeightTrajectory):
        trajectory = WeightTrajectory(trajectory)
    chosen = _predictor(known, predictor)
    needed = chosen.num_states or 2
    if trajectory.num_states < needed:
        raise ValueError(
            f"{trajectory.path} has {trajectory.num_states} states, {type(chosen).__name__} needs {needed}; record"
            f" with ForgettingSchedule(num_states={needed})"
        )
    if recalibrate_with is not None and trajectory.is_adapter:
        raise ValueError(
            f"{trajectory.path} is one of adapters, which hold no BatchNorm statistics: recalibrate the model they are"
            " loaded on with recalibrate_batch_norm(model, batches)"
        )
    _refuse_quantised(trajectory)
    trajectory.verify()

    report: dict[str, RoleReport] = {}
    with atomic_folder(Path(output_dir), overwrite) as work:
        for path in trajectory.model_files:
            target = work / path.relative_to(trajectory.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        specs = {name: TensorSpec(trajectory.dtype(name), trajectory.shape(name)) for name in trajectory.names}
        writer = CheckpointWriter(work, specs, max_shard_size, adapter=trajectory.is_adapter)
        writer.create()
        for name in tqdm(trajectory.names, desc=f"predicting {steps} step(s)", unit="tensor"):
            original = trajectory.tensor(name)
            role = trajectory.roles[name].role
            network = "bias" if role == "norm" and norm == "predict" else role
            residual, unchanged = None, trajectory.is_unchanged(name)
            if network in PREDICTED_ROLES and original.is_floating_point() and not unchanged:
                history = trajectory.history(name)
                _check_finite(history, name, trajectory)
                unchanged = bool((history == history[-1]).all())
                if not unchanged:
                    residual = _residual(chosen, history, network, steps)
                    if not torch.isfinite(residual).all():
                        raise ValueError(
                            f"the prediction of tensor {name!r} of {trajectory.path} is not finite after {steps}"
                            f" step(s); its largest value is {float(history.abs().max()):.3g}: use fewer steps"
                        )
            elif role != "copied":
                _check_finite(original[None], name, trajectory)
            writer.write(name, original if residual is None else _plus(original, residual))
            entry = report.setdefault(role, RoleReport())
            entry.add(original, residual)
            entry.unchanged += unchanged
        writer.close()
        if recalibrate_with is not None:
            _recalibrate(work, recalibrate_with, trajectory, model_class)
    return PredictionResult(Path(output_dir), dict(sorted(report.items())), model_class)


def _predictor(known: KNOWNModel | str | Path | None, predictor: Predictor | str | None) -> Predictor:
    if predictor is not None:
        if known is not None:
            raise ValueError("give either known or predictor, not both: a predictor is used instead of KNOWN")
        return get_predictor(predictor) if isinstance(predictor, str) else predictor
    model = known if isinstance(known, KNOWNModel) else KNOWNModel.from_pretrained(known or SHIPPED_KNOWN)
    return KNOWNPredictor(model)


def _residual(predictor: Predictor, history: torch.Tensor, role: str, steps: int) -> torch.Tensor:
    """Sum of the residuals of all steps, `(*shape)` float32, from a history `(S, *shape)`."""
    window = history.reshape(len(history), -1).T[:, -(predictor.num_states or len(history)) :].contiguous()
    total = torch.zeros(len(window))
    for _ in range(steps):
        residual = predictor.residual(window, role).to(window)
        total += residual
        window = torch.cat([window[:, 1:], (window[:, -1] + residual)[:, None]], dim=1)
    return total.reshape(history.shape[1:])


def _plus(tensor: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    total = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) + residual
    # -0.0 + 0.0 is +0.0: without the choice a zero residual would not be bit-identical
    return torch.where(residual == 0, tensor, total.to(tensor.dtype))


def _check_finite(history: torch.Tensor, name: str, trajectory: WeightTrajectory) -> None:
    finite = torch.isfinite(history).flatten(1).all(dim=1)
    if not finite.all():
        state = len(history) - 1 - int((~finite).nonzero()[0])
        count = int((~torch.isfinite(history[len(history) - 1 - state])).sum())
        raise TrajectoryError(
            f"tensor {name!r} of state {state} of {trajectory.path} has {count} values that are NaN or infinite: its"
            " training diverged; record the trajectory again with a lower learning rate"
        )


def _refuse_quantised(trajectory: WeightTrajectory) -> None:
    config = trajectory.path / "config.json"
    if config.exists() and json.loads(config.read_text()).get("quantization_config"):
        raise TrajectoryError(
            f"{config} says that the weights are quantised; their scalars are no weights that can be extrapolated."
            " Record the model dequantised (model.dequantize())"
        )
    for name in trajectory.names:
        if trajectory.dtype(name) in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise TrajectoryError(
                f"tensor {name!r} of state 0 of {trajectory.path} is quantised to {trajectory.dtype(name)}; record the"
                " model in bfloat16, float16 or float32"
            )


def _recalibrate(
    folder: Path, batches: Any, trajectory: WeightTrajectory, model_class: type[PreTrainedModel] | None
) -> None:
    model = load_pretrained(folder, model_class)
    recalibrate_batch_norm(model, batches)
    state = model.state_dict()
    replace_tensors(
        folder,
        {name: state[name] for name, role in trajectory.roles.items() if role.role == "copied" and name in state},
    )
