"""[`plan_prediction`]: what a prediction will do, from the headers of the recorded files alone."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from transformers.utils import logging

from ..checkpoint import TensorSpec, parse_json
from ..checkpoint.header import make_header
from ..known import KNOWNConfig, KNOWNModel
from ..known.kernels import KERNELS
from ..markdown import quantity, size
from ..predictors import (
    Composition,
    KNOWNCombination,
    KNOWNPredictor,
    Predictor,
    Rescaling,
    SnapshotPredictor,
    get_predictor,
    known_predictor,
)
from ..roles import PREDICTED_DTYPES, PREDICTED_ROLES
from ..trajectory import TrajectoryError, WeightTrajectory
from . import pieces
from .estimated_time import duration, seconds_per_weight
from .full_data_model import rescaling_of
from .snapshot_predictions import MissingSnapshotsError, lora_pairs, snapshots_read
from .write_checkpoint import READ_AHEAD, WRITE_BEHIND, checkpoint_specs

logger = logging.get_logger(__name__)

SHIPPED_KNOWN = Path(__file__).parents[1] / "known" / "weights" / "known-base"
MAX_STEPS = 1000
COPIED_COST = 0.02  # cost of a copied element relative to one step of prediction
_RANGE = {"largest_weight", "largest_displacement", "mean_displacement"}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the checkpoint."""

    spec: TensorSpec  # dtype and shape in the checkpoint
    role: str
    network: str | None  # role whose network predicts it; None if it is copied
    is_kept_by_dtype: bool = False  # copied because its dtype cannot be predicted (complex, float8)
    is_unchanged: bool = False  # the manifest lists it as equal in all snapshots that the predictor reads


@dataclass
class PredictionPlan:
    """What [`predict_overflowed_weights`] will do; `str(plan)` is a table.

    Attributes:
        trajectory ([`WeightTrajectory`]):
            The recorded states.
        predictor ([`Predictor`]):
            The predictor.
        steps (`int`):
            Number of recursive predictions.
        tensors (`dict[str, PlannedTensor]`):
            Every tensor of the checkpoint, by name, sorted.
        snapshots (`list[int | str]`):
            What the predictor reads: indices of states and names of other snapshots, Θ0 last.
        norm (`str`):
            `"keep"` or `"predict"`, what happens to normalisation layers.
        members (`list[Predictor]`):
            The predictor and the rescalers that follow it.
        rescaling ([`Rescaling`], *optional*):
            What the predicted tensors are multiplied by.
        seconds (`float`, *optional*):
            Estimated time of the prediction on this process, from a trial on random rows. Reading and writing are not
            included. `None` for a [`SnapshotPredictor`].
        process_memory (`int`, *optional*):
            Memory of this process in bytes, with libraries and predictor, after the trial.
        evaluates (`bool`):
            Whether a gate loads the checkpoint.
    """

    trajectory: WeightTrajectory
    predictor: Predictor
    steps: int
    tensors: dict[str, PlannedTensor]
    snapshots: list[int | str]
    norm: Literal["keep", "predict"] = "keep"
    members: list[Predictor] = field(default_factory=list)
    rescaling: Rescaling | None = None
    seconds: float | None = None
    process_memory: int | None = None
    evaluates: bool = False

    @property
    def num_states(self) -> int:
        """Number of snapshots in a history."""
        given = None if isinstance(self.predictor, SnapshotPredictor) else self.predictor.num_states
        return given or len(self.snapshots)

    @property
    def name(self) -> str:
        """What is predicted, such as `KNOWN, 2 steps` or `Average`."""
        name = " + ".join(map(_short_name, (self.predictor, *self.members[1:])))
        if self.steps == 1 and not isinstance(self.predictor, KNOWNPredictor | KNOWNCombination):
            return name
        return f"{name}, {quantity(self.steps, 'step')}"

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: tensor.spec for name, tensor in self.tensors.items()}

    @property
    def disk(self) -> int:
        """Size of the checkpoint in bytes, without its card. Also with a gate."""
        files = sum(path.stat().st_size for path in self.trajectory.model_files)
        return files + len(make_header(self.specs)[0]) + self.tensor_bytes

    @property
    def tensor_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def predicted(self) -> int:
        """Number of predicted scalar weights."""
        return sum(t.spec.shape.numel() for t in self.tensors.values() if t.network)

    @property
    def memory(self) -> int:
        """Largest size in bytes of all pieces in memory at the same time. It does not grow with the model.

        A [`SnapshotPredictor`] adds the largest tensor in all snapshots that it reads.
        """
        sizes = [tensor.spec.shape.numel() for tensor in self.tensors.values()]
        # histories read ahead; and in computing the window with every step, differences, products and the result
        read = (READ_AHEAD + 1) * len(self.snapshots)
        computed = 2 * (self.num_states + self.steps) + 12
        of_pieces = min(sum(sizes), pieces.PIECE_SIZE) * (read + computed + WRITE_BEHIND + 1)
        is_complete = isinstance(self.predictor, SnapshotPredictor)
        complete = 3 * len(self.snapshots) * max(sizes, default=0) if is_complete else 0
        return 4 * (of_pieces + complete)

    @property
    def peak_memory(self) -> int | None:
        """Estimated memory of the process that predicts, in bytes; a gate holds a model as well."""
        if self.process_memory is None:
            return None
        return self.process_memory + self.memory + (self.tensor_bytes if self.evaluates else 0)

    def with_predictor(self, predictor: Predictor) -> "PredictionPlan":
        """Return the plan of one step of another predictor, without rescaling.

        Raises:
            `MissingSnapshotsError`: if the trajectory lacks what the predictor needs.
        """
        snapshots = check_snapshots(self.trajectory, predictor)
        tensors = _planned_tensors(self.trajectory, predictor, self.specs, snapshots, self.norm)
        return PredictionPlan(self.trajectory, predictor, 1, tensors, snapshots, self.norm, [predictor])

    def trained_on(self, network: str) -> Mapping[str, float] | None:
        """Return the range of inputs that the predictor was trained on for a role, if it states one."""
        stated = getattr(self.predictor, "trained_on", None) or {}
        of_role = stated.get("roles", {}).get(network, {})
        return of_role if of_role.keys() >= _RANGE else None

    def in_place_of_theta0(self, snapshot: str) -> "PredictionPlan":
        """Return the plan of the same prediction from a snapshot instead of Θ0, which no other one it reads may be."""
        snapshots = [*self.snapshots[:-1], snapshot]
        tensors = _planned_tensors(self.trajectory, self.predictor, self.specs, snapshots, self.norm)
        return replace(self, tensors=tensors, snapshots=snapshots)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values: sizes in bytes, and by tensor its role and the role that predicts it."""
        keys = ("name", "steps", "snapshots", "norm", "predicted", "memory", "peak_memory", "disk", "seconds")
        tensors = {name: {"role": tensor.role, "network": tensor.network} for name, tensor in self.tensors.items()}
        rescaling = None if self.rescaling is None else self.rescaling.to_dict()
        return {**{key: getattr(self, key) for key in keys}, "rescaling": rescaling, "tensors": tensors}

    def __str__(self) -> str:
        lines = [f"{'role':8}{'tensors':>9}{'parameters':>15}  action"]
        groups: dict[tuple[str, str], list[PlannedTensor]] = {}
        for tensor in self.tensors.values():
            action = f"predicted as {tensor.network}" if tensor.network else "copied"
            groups.setdefault((tensor.role, action), []).append(tensor)
        for (role, action), tensors in sorted(groups.items()):
            parameters = sum(tensor.spec.shape.numel() for tensor in tensors)
            lines.append(f"{role:8}{len(tensors):9,}{parameters:15,}  {action}")
        states, used = self.trajectory.num_states, self.num_states
        others = [name for name in self.snapshots if isinstance(name, str)]
        read = f" (read: {', '.join(others)} and Θ0)" if others else f" (the last {used} form the history)"
        lines += [
            "",
            f"states    {states}{'' if used == states and not others else read}",
            f"steps     {self.steps}",
            f"memory    {self._memory_text()}",
            f"disk      {size(self.disk)}",
        ]
        if self.rescaling is not None:
            lines.append(f"rescaled  {self.rescaling}")
        if self.seconds is not None:
            each = self.seconds / max(self.predicted * self.steps, 1)
            time = f"{duration(self.seconds)} on one process ({each:.2g} s per weight and step)"
            lines.append(f"time      about {time}, without reading and writing")
        return "\n".join(lines)

    def _memory_text(self) -> str:
        pieces = f"{size(self.memory)} for the pieces at work"
        if self.process_memory is None or self.peak_memory is None:
            return f"at most {pieces}"
        model = f", {size(self.tensor_bytes)} for the model of the gate" if self.evaluates else ""
        return f"about {size(self.peak_memory)}: {size(self.process_memory)} for the process, {pieces}{model}"


def plan_prediction(
    trajectory: WeightTrajectory | str | Path,
    known: KNOWNModel | str | Path | None = None,
    steps: int = 1,
    *,
    predictor: Predictor | str | Sequence[Predictor | str] | None = None,
    predictor_options: Mapping[str, Any] | None = None,
    norm: Literal["keep", "predict"] = "keep",
    dtype: torch.dtype | None = None,
    kernel: str = "auto",
    device: torch.device | str | None = None,
    estimate_time: bool = True,
) -> PredictionPlan:
    """Plan what [`predict_overflowed_weights`] would do with the same arguments.

    Reads only the headers of the files, except that rescaling loads Θ0 and runs it on a batch.

    Args:
        trajectory, known, steps, predictor, predictor_options, norm, dtype, kernel:
            See [`predict_overflowed_weights`].
        device (`torch.device` or `str`, *optional*):
            Device to move KNOWN to; by default, it is not moved.
        estimate_time (`bool`, *optional*, defaults to `True`):
            Whether to time the predictor on random rows, and to measure the memory of this process afterwards.

    Raises:
        `TrajectoryError`, `ValueError`: as [`predict_overflowed_weights`] does before it starts.
    """
    if int(steps) != steps or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be an integer from 1 to {MAX_STEPS}, got {steps!r:.60}")
    if norm not in ("keep", "predict"):
        raise ValueError(f"norm must be 'keep' or 'predict', got {norm!r}")
    if dtype is not None and dtype not in PREDICTED_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, PREDICTED_DTYPES))}, got {dtype!r}")
    if not isinstance(trajectory, WeightTrajectory):
        trajectory = WeightTrajectory(trajectory)
    members = _members(known, predictor, predictor_options, kernel, device)
    resolved, rescalers = members[0], Composition(members).rescalers
    snapshots = check_snapshots(trajectory, resolved)
    if isinstance(resolved, SnapshotPredictor) and steps != 1:
        raise ValueError(f"{type(resolved).__name__} predicts in one step, got steps={steps}")
    _refuse_quantised(trajectory)
    tensors = _planned_tensors(trajectory, resolved, checkpoint_specs(trajectory, dtype), snapshots, norm)
    rescaling = rescaling_of(trajectory, rescalers) if rescalers else None
    plan = PredictionPlan(trajectory, resolved, int(steps), tensors, snapshots, norm, members, rescaling)
    if estimate_time:
        if not isinstance(resolved, SnapshotPredictor):
            networks = {tensor.network for tensor in tensors.values() if tensor.network}
            plan.seconds = plan.predicted * plan.steps * seconds_per_weight(resolved, networks, plan.num_states)
        plan.process_memory = psutil.Process().memory_info().rss
    return plan


def without_known(
    trajectory: WeightTrajectory | str | Path,
    known: KNOWNModel | str | Path | None,
    predictor: Predictor | str | Sequence[Predictor | str] | None,
) -> Predictor | str | Sequence[Predictor | str] | None:
    """Return the predictor to request of a gate: `"average"` by default if the states are too few for KNOWN."""
    if known is not None or predictor is not None:
        return predictor
    trajectory = trajectory if isinstance(trajectory, WeightTrajectory) else WeightTrajectory(trajectory)
    needed = KNOWNConfig.from_pretrained(SHIPPED_KNOWN).num_states
    if trajectory.num_states >= needed:
        return None
    logger.warning(
        f"{trajectory.path} has fewer than {needed} states, so KNOWN is not among the candidates of the gate"
    )
    return "average"


def check_snapshots(trajectory: WeightTrajectory, predictor: Predictor) -> list[int | str]:
    """Return what a predictor reads, see [`snapshots_read`].

    Raises:
        `MissingSnapshotsError`:
            If the trajectory has fewer states than the predictor needs, or lacks another snapshot.
    """
    snapshots = snapshots_read(trajectory, predictor)
    needed = predictor.num_states or (1 if trajectory.tail or trajectory.branches else 2)
    if len(snapshots) < needed:
        raise MissingSnapshotsError(
            f"{trajectory.path} has {quantity(len(snapshots), 'state')}, {_short_name(predictor)} needs {needed}"
            f" states; record with ForgettingSchedule(num_states={needed}), or choose another predictor= or candidates"
            " of a gate with validation data (gate=, --validation)"
        )
    return snapshots


def _short_name(predictor: Any) -> str:
    return "KNOWN" if isinstance(predictor, KNOWNPredictor | KNOWNCombination) else type(predictor).__name__


def model_json(path: Path) -> Any:
    """Parse a JSON file of a recorded model. A `TrajectoryError` names a damaged file."""
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise TrajectoryError(f"{path} cannot be read ({error}); restore it from a copy") from error


def _planned_tensors(
    trajectory: WeightTrajectory,
    predictor: Predictor,
    specs: Mapping[str, TensorSpec],
    snapshots: Sequence[int | str],
    norm: str,
) -> dict[str, PlannedTensor]:
    is_complete = isinstance(predictor, SnapshotPredictor)
    records = [trajectory.snapshot(name).unchanged for name in snapshots if name != 0]
    in_pairs = lora_pairs(trajectory) if is_complete else {}
    tensors = {}
    for name, spec in specs.items():
        role, kind = trajectory.roles[name].role, trajectory.dtype(name)
        network: str | None = "bias" if role == "norm" and (norm == "predict" or is_complete) else role
        is_unchanged = name not in in_pairs and all(name in unchanged for unchanged in records)
        if network not in PREDICTED_ROLES or kind not in PREDICTED_DTYPES or is_unchanged:
            network = None
        is_number = kind.is_floating_point or kind.is_complex
        is_kept_by_dtype = is_number and kind not in PREDICTED_DTYPES and role != "copied"
        tensors[name] = PlannedTensor(spec, role, network, is_kept_by_dtype, is_unchanged)
    return tensors


def _members(
    known: KNOWNModel | str | Path | None,
    predictor: Predictor | str | Sequence[Predictor | str] | None,
    options: Mapping[str, Any] | None,
    kernel: str,
    device: torch.device | str | None,
) -> list[Predictor]:
    """Create the predictor and the rescalers that follow it."""
    fields = dict(options or {})
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"unknown kernel {kernel!r}; choose one of auto, {', '.join(KERNELS)}")
    if isinstance(predictor, Composition):
        predictor = predictor.members
    given: list[Any] = list(predictor) if isinstance(predictor, list | tuple) else [predictor]
    items = [item for value in given for item in (value.split("+") if isinstance(value, str) else [value])]
    has_known = bool({None, "known"} & {item for item in items if isinstance(item, str | None)})
    if known is not None and not has_known:
        raise ValueError(
            f"predictor={predictor!r:.60} does not use KNOWN, so known= has no effect; remove one of them"
        )
    if kernel != "auto" and not has_known:
        raise ValueError(f"kernel={kernel!r} applies to KNOWN only, and predictor={predictor!r} replaces it")
    names = [item for item in items if isinstance(item, str) and item != "known"]
    by_name = {items[0]: fields} if len(items) == 1 and names else fields
    if unknown := by_name.keys() - set(names):
        raise ValueError(
            f"predictor_options={fields} apply only to a predictor given by name (predictor=), and for several names"
            f" to each by its name; KNOWN takes none, got {min(unknown)!r} with predictor={predictor!r}"
        )

    def member(item: Any) -> Any:
        if item is not None and not isinstance(item, str):
            return _checked(item)
        try:
            if item in (None, "known"):
                model = (
                    known if isinstance(known, KNOWNModel) else _load_known(SHIPPED_KNOWN if known is None else known)
                )
                model = model if device is None else model.to(device)
                return known_predictor(model, kernel)
            return get_predictor(item, **by_name.get(item, {}))
        except TypeError as error:
            raise ValueError(str(error)) from error

    return [member(item) for item in items]


def _checked(predictor: Any) -> Predictor:
    if isinstance(predictor, type):
        raise ValueError(f"predictor must be an object, got the class; pass {predictor.__name__}()")
    if not isinstance(predictor, Predictor):
        raise ValueError(f"predictor must have num_states and residual(history, role), got {predictor!r:.200}")
    return predictor


def _load_known(source: str | Path) -> KNOWNModel:
    if not isinstance(source, str | Path):
        raise ValueError(f"known must be a KNOWNModel, a folder or a Hub id, got {source!r}")
    if not Path(source).exists() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(source)):
        raise FileNotFoundError(f"known={str(source)!r} is neither a folder nor a Hub id")
    model = KNOWNModel.from_pretrained(source)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"tensor {name!r} of {source} contains non-finite values; restore it from a copy")
    return model


def _refuse_quantised(trajectory: WeightTrajectory) -> None:
    config = trajectory.path / "config.json"
    content = model_json(config) if config.exists() else {}
    if not isinstance(content, dict):
        raise TrajectoryError(f"{config} is not a JSON object; restore it from a copy")
    if content.get("quantization_config"):
        raise TrajectoryError(f"{config} has a quantization_config; record the dequantised model, model.dequantize()")
