"""Doing what was planned, piece by piece: the next pieces are read and the last ones written while one is computed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from ..checkpoint import CheckpointWriter
from ..predictors import Predictor
from ..predictors.relative_depth import relative_depths
from ..trajectory import TrajectoryError, WeightTrajectory
from .plan import READ_AHEAD, WRITE_BEHIND, Piece, PredictionPlan
from .residuals import ResidualReport, is_finite

T = TypeVar("T")


def run(
    plan: PredictionPlan, writer: CheckpointWriter, pieces: Sequence[Piece], progress: bool = True
) -> dict[str, ResidualReport]:
    """Predicts or copies pieces and writes them to their places.

    Args:
        plan ([`PredictionPlan`]): What to do with each tensor.
        writer ([`CheckpointWriter`]): Its files are there already.
        pieces (`Sequence[Piece]`): The pieces of this process.
        progress (`bool`, *optional*, defaults to `True`): Whether a bar counts the parameters.

    Returns:
        `dict[str, ResidualReport]`: from the name of each tensor to what happened to it here. A tensor counts as one
        on the process that has its first piece.

    Raises:
        `TrajectoryError`: when a value of a state is not finite; names tensor and state.
        `ValueError`: when a prediction is not finite; names the tensor.
    """
    reports: dict[str, ResidualReport] = {}
    predict = _Predicting(plan)
    bar = tqdm(
        total=sum(piece.stop - piece.start for piece in pieces),
        desc=f"predicting {plan.steps} step(s)",
        unit="parameter",
        unit_scale=True,
        disable=not progress,
    )
    with bar, _InOrder(WRITE_BEHIND) as written:
        for piece, (original, history) in _ahead(pieces, predict.read):
            result, report = predict(piece, original, history)
            written.submit(partial(writer.write, piece.name, result, piece.start))
            reports[piece.name] = reports.get(piece.name, ResidualReport()) + report
            bar.update(piece.stop - piece.start)
    writer.flush()
    return reports


class _Predicting:
    """Reads and predicts pieces; knows which tensors move."""

    def __init__(self, plan: PredictionPlan) -> None:
        self.plan = plan
        self.device = getattr(plan.predictor, "device", torch.device("cpu"))
        depths = relative_depths(list(plan.tensors))
        self.predictors: dict[str, Predictor] = {
            name: plan.predictor.at_depth(depth) if hasattr(plan.predictor, "at_depth") else plan.predictor
            for name, depth in depths.items()
        }
        self._moves: dict[str, bool] = {}

    def read(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The piece of Θ0 as it is stored, `(N,)`; and its history, `(S, N)` float32, where it is predicted."""
        trajectory, tensor = self.plan.trajectory, self.plan.tensors[piece.name]
        if tensor.network:
            history = trajectory.read_history(piece.name, piece.start, piece.stop)
            if self._tensor_moves(piece, history):
                if trajectory.dtype(piece.name) == torch.float32:
                    return history[-1], history
                return trajectory.read(piece.name, piece.start, piece.stop), history
        return trajectory.read(piece.name, piece.start, piece.stop), None

    def __call__(
        self, piece: Piece, original: torch.Tensor, history: torch.Tensor | None
    ) -> tuple[torch.Tensor, ResidualReport]:
        """What is written of a piece, `(N,)` in the dtype of the tensor, and its report."""
        tensor, trajectory = self.plan.tensors[piece.name], self.plan.trajectory
        is_first = piece.start == 0
        report = ResidualReport(
            tensors=int(is_first),
            parameters=tensor.spec.shape.numel() if is_first else 0,
            unchanged=int(is_first and history is None and self._stands_still(piece.name)),
        )
        if history is None:
            if tensor.role != "copied":
                _check_finite(original[None], piece.name, trajectory)
            return self._cast(original, piece.name), report
        _check_finite(history, piece.name, trajectory)
        residual = self._residual(history, piece.name, tensor.network or "")
        if not is_finite(residual):
            raise ValueError(
                f"the prediction of tensor {piece.name!r} of {trajectory.path} is not finite after {self.plan.steps}"
                f" step(s); its largest value is {float(history.abs().max()):.3g}: use fewer steps"
            )
        used = history[-self.plan.num_states :]
        trained_on = self.plan.trained_on(tensor.network or "")
        unchanged = self._cast(original, piece.name)
        result = _plus(original, residual, unchanged)
        self._check_cast(result, piece.name)
        report += ResidualReport.of(used, residual, trained_on)
        if result.dtype != torch.float32:
            report.lost = int(((residual != 0) & (result == unchanged)).sum())
        return result, report

    def _cast(self, original: torch.Tensor, name: str) -> torch.Tensor:
        cast = original.to(self.plan.tensors[name].spec.dtype)
        if cast.dtype != original.dtype and is_finite(original):
            self._check_cast(cast, name)
        return cast

    def _check_cast(self, cast: torch.Tensor, name: str) -> None:
        if cast.is_floating_point() and not is_finite(cast):
            raise ValueError(
                f"tensor {name!r} of {self.plan.trajectory.path} has numbers that are too large for {cast.dtype};"
                " write bfloat16 or float32"
            )

    def _residual(self, history: torch.Tensor, name: str, network: str) -> torch.Tensor:
        """Sum of the residuals of all steps, `(N,)` float32 on the CPU, from a history `(S, N)`."""
        predictor, steps, states = self.predictors[name], self.plan.steps, self.plan.num_states
        # one buffer for the history and every step, so that each window is a view: rows are states, as on disk
        buffer = torch.empty(states + steps, history.shape[1], device=self.device)
        buffer[:states] = history[-states:]
        total = torch.zeros(history.shape[1], device=self.device)
        for step in range(steps):
            residual = predictor.residual(buffer[step : step + states].T, network).to(buffer)
            total += residual
            torch.add(buffer[step + states - 1], residual, out=buffer[step + states])
        return total.cpu()

    def _tensor_moves(self, piece: Piece, history: torch.Tensor) -> bool:
        """Whether any element of a tensor differs between states; only where this piece does not, others are read."""
        name = piece.name
        if name not in self._moves:
            self._moves[name] = _differs(history) or any(
                _differs(self.plan.trajectory.read_history(name, other.start, other.stop))
                for other in self.plan.pieces()  # of all tensors: not listed unless this piece stands still
                if other.name == name and other != piece
            )
        return self._moves[name]

    def _stands_still(self, name: str) -> bool:
        return self.plan.trajectory.is_unchanged(name) or self._moves.get(name) is False


class _InOrder:
    """Jobs done one after the other in a thread, at most a few of them waiting; errors come out of later calls."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="know_hf-prediction")
        self._jobs: deque[Future[Any]] = deque()

    def submit(self, job: Callable[[], Any]) -> None:
        self._jobs.append(self._pool.submit(job))
        while len(self._jobs) > self._limit:
            self._jobs.popleft().result()

    def __enter__(self) -> "_InOrder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for job in self._jobs:
                job.result()


def _ahead(pieces: Iterable[Piece], read: Callable[[Piece], T]) -> Iterator[tuple[Piece, T]]:
    """Each piece with what was read of it, the next ones being read meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="know_hf-reading") as pool:
        waiting: deque[tuple[Piece, Future[T]]] = deque()
        try:
            for piece in pieces:
                waiting.append((piece, pool.submit(read, piece)))
                if len(waiting) > READ_AHEAD:
                    first, result = waiting.popleft()
                    yield first, result.result()
            for first, result in waiting:
                yield first, result.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _differs(history: torch.Tensor) -> bool:
    return bool((history != history[-1]).any())


def _plus(tensor: torch.Tensor, residual: torch.Tensor, unchanged: torch.Tensor) -> torch.Tensor:
    total = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) + residual
    # -0.0 + 0.0 is +0.0: without the choice a zero residual would not be bit-identical
    return torch.where(residual == 0, unchanged, total.to(unchanged.dtype))


def _check_finite(history: torch.Tensor, name: str, trajectory: WeightTrajectory) -> None:
    if not is_finite(history):
        infinite = ~torch.isfinite(history)
        row = int(infinite.any(dim=1).nonzero()[0])
        state = len(history) - 1 - row
        count = int(infinite[row].sum())
        raise TrajectoryError(
            f"tensor {name!r} of state {state} of {trajectory.path} has {count} values that are NaN or infinite: its"
            " training diverged; record the trajectory again with a lower learning rate"
        )
