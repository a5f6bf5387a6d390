"""What a prediction will do, from the files' headers alone: which tensors, how they are cut, memory, disk and time."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..checkpoint import TensorSpec, parse_json
from ..known.modeling_known import KNOWNModel
from ..predictors import DepthPredictor, Predictor, get_predictor
from ..roles import PREDICTED_ROLES
from ..trajectory import TrajectoryError, WeightTrajectory

SHIPPED_KNOWN = Path(__file__).parent.parent / "known" / "weights" / "known-base"
PIECE_SIZE = 2**19  # elements: large enough that reading and writing cost nothing beside computing
READ_AHEAD, WRITE_BEHIND = 2, 2  # pieces
_RANGE = {"largest_weight", "largest_displacement", "mean_displacement"}
TRIAL_SIZE = 2**16  # rows of the trial that the estimated time comes from
COPIED_COST = 0.02  # of a piece that is copied, relative to one that is predicted for one step


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the checkpoint.

    Attributes:
        spec ([`TensorSpec`]): Its dtype and shape in the checkpoint.
        role (`str`): Its role.
        network (`str`, *optional*): The role whose network predicts it; `None` when it is copied.
    """

    spec: TensorSpec
    role: str
    network: str | None


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop - 1` of a tensor, counted row by row."""

    name: str
    start: int
    stop: int


@dataclass
class PredictionPlan:
    """What [`predict_overflowed_weights`] will do; printable with `str`.

    Attributes:
        trajectory ([`WeightTrajectory`]): The recorded states.
        predictor ([`Predictor`]): What predicts.
        steps (`int`): Number of recursive predictions.
        tensors (`dict[str, PlannedTensor]`): From the name of every tensor of the checkpoint, sorted.
        seconds (`float`, *optional*): Estimated time of the predicting alone, on this process, from a trial of the
            predictor on random rows.
    """

    trajectory: WeightTrajectory
    predictor: Predictor
    steps: int
    tensors: dict[str, PlannedTensor]
    seconds: float | None = None

    @property
    def num_states(self) -> int:
        """Number of states the histories have."""
        return self.predictor.num_states or self.trajectory.num_states

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: tensor.spec for name, tensor in self.tensors.items()}

    @property
    def disk(self) -> int:
        """Bytes of the checkpoint's tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def predicted(self) -> int:
        """Scalar weights that are predicted."""
        return sum(t.spec.shape.numel() for t in self.tensors.values() if t.network)

    @property
    def memory(self) -> int:
        """Bytes that pieces in reading, computing and writing take at most at the same time; no model of any size
        takes more than `PIECE_SIZE` elements of each."""
        largest = max((t.spec.shape.numel() for t in self.tensors.values()), default=0)
        states = self.trajectory.num_states
        # histories read ahead, and while computing the window with every step, differences, products and the result
        read = (READ_AHEAD + 1) * states
        computed = 2 * (self.num_states + self.steps) + 12
        return 4 * min(largest, PIECE_SIZE) * (read + computed + WRITE_BEHIND + 1)

    def trained_on(self, network: str) -> Mapping[str, float] | None:
        """The range of inputs that the predictor was trained on for a role, where it says so."""
        covered = getattr(self.predictor, "trained_on", None) or {}
        found = covered.get("roles", {}).get(network, {})
        return found if found.keys() >= _RANGE else None  # weights of others may say less of themselves

    def pieces(self, part: int = 0, parts: int = 1) -> list[Piece]:
        """The pieces of one of several processes: neighbours in the order of names, of about the same cost for each.

        How tensors are cut does not depend on the number of processes, so neither does what is written.

        Args:
            part, parts (`int`, *optional*): The process's rank, and the number of processes.
        """
        pieces, costs = [], []
        for name, tensor in self.tensors.items():
            size = tensor.spec.shape.numel()
            for start in range(0, max(size, 1), PIECE_SIZE):
                piece = Piece(name, start, min(start + PIECE_SIZE, size))
                pieces.append(piece)
                costs.append((piece.stop - piece.start) * (self.steps if tensor.network else COPIED_COST))
        total, before, chosen = sum(costs) or 1, 0.0, []
        for piece, cost in zip(pieces, costs, strict=True):
            if part == min(int((before + cost / 2) / total * parts), parts - 1):
                chosen.append(piece)
            before += cost
        return chosen

    def __str__(self) -> str:
        lines = [f"{'role':8}{'tensors':>9}{'parameters':>15}  what happens"]
        groups: dict[tuple[str, str], list[PlannedTensor]] = {}
        for tensor in self.tensors.values():
            what = f"predicted as {tensor.network}" if tensor.network else "copied"
            groups.setdefault((tensor.role, what), []).append(tensor)
        for (role, what), tensors in sorted(groups.items()):
            parameters = sum(tensor.spec.shape.numel() for tensor in tensors)
            lines.append(f"{role:8}{len(tensors):9,}{parameters:15,}  {what}")
        states, used = self.trajectory.num_states, self.num_states
        lines += [
            "",
            f"states    {states}{'' if used == states else f', of which the last {used} are read as history'}",
            f"steps     {self.steps}",
            f"memory    {self.memory / 1e6:,.0f} MB at most for the pieces at work",
            f"disk      {self.disk / 1e9:.3f} GB",
        ]
        if self.seconds is not None:
            each = self.seconds / max(self.predicted * self.steps, 1)
            lines.append(f"time      about {_duration(self.seconds)} on one process ({each:.2g} s a weight and step)")
        return "\n".join(lines)


def plan_prediction(
    trajectory: WeightTrajectory | str | Path,
    known: KNOWNModel | str | Path | None = None,
    steps: int = 1,
    *,
    predictor: Predictor | str | None = None,
    predictor_options: Mapping[str, Any] | None = None,
    norm: Literal["keep", "predict"] = "keep",
    dtype: torch.dtype | None = None,
    kernel: str = "auto",
    device: torch.device | str | None = None,
    estimate_time: bool = True,
) -> PredictionPlan:
    """What [`predict_overflowed_weights`] would do with the same arguments; only the files' headers are read.

    Args:
        trajectory, known, steps, predictor, predictor_options, norm, dtype, kernel: As of
            [`predict_overflowed_weights`].
        device (`torch.device` or `str`, *optional*): Where KNOWN is put; by default it stays where it is.
        estimate_time (`bool`, *optional*, defaults to `True`): Whether to try the predictor on random rows.

    Returns:
        [`PredictionPlan`]: printable with `str`.

    Raises:
        `TrajectoryError`, `ValueError`: as [`predict_overflowed_weights`] does before it starts.
    """
    if int(steps) != steps or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps}")
    if norm not in ("keep", "predict"):
        raise ValueError(f"norm must be 'keep' or 'predict', got {norm!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be one of floating point, such as torch.bfloat16, got {dtype}")
    if not isinstance(trajectory, WeightTrajectory):
        trajectory = WeightTrajectory(trajectory)
    chosen = _predictor(known, predictor, predictor_options, kernel, device)
    needed = chosen.num_states or 2
    if trajectory.num_states < needed:
        raise ValueError(
            f"{trajectory.path} has {trajectory.num_states} states, {type(chosen).__name__} needs {needed}; record"
            f" with ForgettingSchedule(num_states={needed})"
        )
    _refuse_quantised(trajectory)
    tensors = {}
    for name in trajectory.names:
        stored = trajectory.dtype(name)
        spec = TensorSpec(dtype if dtype and stored.is_floating_point else stored, trajectory.shape(name))
        role = trajectory.roles[name].role
        network: str | None = "bias" if role == "norm" and norm == "predict" else role
        if network not in PREDICTED_ROLES or not spec.dtype.is_floating_point or trajectory.is_unchanged(name):
            network = None
        tensors[name] = PlannedTensor(spec, role, network)
    plan = PredictionPlan(trajectory, chosen, int(steps), tensors)
    if estimate_time:
        plan.seconds = _seconds(plan)
    return plan


def _predictor(
    known: KNOWNModel | str | Path | None,
    predictor: Predictor | str | None,
    options: Mapping[str, Any] | None,
    kernel: str,
    device: torch.device | str | None,
) -> Predictor:
    if predictor is not None and known is not None:
        raise ValueError("give either known or predictor, not both: a predictor is used instead of KNOWN")
    if options and not isinstance(predictor, str):
        raise ValueError(f"predictor_options={dict(options)} are for a predictor given by its name, got {predictor!r}")
    if predictor not in (None, "known") and kernel != "auto":
        raise ValueError(f"kernel={kernel!r} is a form of KNOWN, and {predictor!r} is used instead; leave kernel out")
    if predictor is not None and not isinstance(predictor, str):
        return predictor
    fields = dict(options or {})
    if predictor in (None, "known"):
        if fields:
            raise ValueError(f"predictor_options={fields} are not for KNOWN; give known= and kernel=")
        model = known if isinstance(known, KNOWNModel) else _load_known(known or SHIPPED_KNOWN)
        fields = {"model": model if device is None else model.to(device), "kernel": kernel}
    try:
        return get_predictor(predictor or "known", **fields)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _load_known(place: str | Path) -> KNOWNModel:
    model, info = KNOWNModel.from_pretrained(place, output_loading_info=True)
    if lacking := sorted(info["missing_keys"]):
        raise ValueError(
            f"{place} holds no KNOWN weights: there is no {lacking[0]!r}; give a folder or Hub id that does"
        )
    return model


def _refuse_quantised(trajectory: WeightTrajectory) -> None:
    config = trajectory.path / "config.json"
    content = parse_json(config.read_bytes()) if config.exists() else {}
    if not isinstance(content, dict):
        raise TrajectoryError(f"{config} is no JSON object; restore it from a copy")
    if content.get("quantization_config"):
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


def _seconds(plan: PredictionPlan) -> float:
    networks = {tensor.network for tensor in plan.tensors.values() if tensor.network}
    if not networks:
        return 0.0
    rows = 0.05 * torch.randn(TRIAL_SIZE, plan.num_states, generator=torch.Generator().manual_seed(0))
    predictor = plan.predictor.at_depth(0.5) if isinstance(plan.predictor, DepthPredictor) else plan.predictor
    times: list[float] = []
    for _ in range(3):  # the first one compiles
        start = time.perf_counter()
        predictor.residual(rows, sorted(networks)[0])
        times.append(time.perf_counter() - start)
    return min(times) / TRIAL_SIZE * plan.predicted * plan.steps


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
