"""[`ResidualReport`]: how large a residual is, what it consists of, and how familiar its inputs were."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

_LARGEST = {"largest_residual", "largest_weight", "largest_move"}


@dataclass
class ResidualReport:
    """Figures on the residual of one tensor or of several together. Reports of pieces add up.

    Attributes:
        tensors, parameters (`int`):
            Number of tensors and of their elements.
        unchanged (`int`):
            Tensors of a predicted role that are equal in all states and were copied bit for bit.
        predicted (`int`):
            Scalar weights that got a residual.
        outside (`int`):
            Scalar weights with a |W| or |dW| larger than any that the predictor was trained on.
        changed (`int`):
            Scalar weights whose written value differs from that of Θ0.
        lost (`int`):
            Scalar weights whose residual is smaller than the rounding of the written dtype.
        kept (`int`):
            Scalar weights that moved but have a dtype that cannot be predicted (complex, float8). They are copied.
        largest_residual (`float`):
            Largest |Θ̂ − Θ0|, in units of the weights.
        largest_weight, largest_move (`float`):
            Largest |W| and |dW| of the histories.
    """

    tensors: int = 0
    parameters: int = 0
    unchanged: int = 0
    predicted: int = 0
    outside: int = 0
    changed: int = 0
    lost: int = 0
    kept: int = 0
    largest_residual: float = 0.0
    largest_weight: float = 0.0
    largest_move: float = 0.0
    _residual_sum: float = 0.0
    _weight_sum: float = 0.0
    _move_sum: float = 0.0
    _residual_square: float = 0.0
    _weight_square: float = 0.0
    _move_square: float = 0.0
    _residual_weight: float = 0.0
    _residual_move: float = 0.0

    @classmethod
    def of(
        cls, history: torch.Tensor, residual: torch.Tensor, trained_on: Mapping[str, float] | None = None
    ) -> "ResidualReport":
        """Measure one piece.

        The history is `(S, N)`, full data last, and the residual `(N,)` was added to its last state. `trained_on` has
        `largest_weight` and `largest_displacement` of the predictor's training data for this role.
        """
        moves = history.diff(dim=0)
        vectors = torch.stack([residual, history[-1], moves[-1]])
        products = (vectors @ vectors.T).tolist()
        report = cls(predicted=residual.numel(), largest_residual=_largest(residual))
        report.largest_weight, report.largest_move = _largest(history), _largest(moves)
        report._residual_sum, report._weight_sum, report._move_sum = (float(row.abs().sum()) for row in vectors)
        report._residual_square, report._weight_square, report._move_square = (products[i][i] for i in range(3))
        _, report._residual_weight, report._residual_move = products[0]
        if trained_on is not None:
            weight_limit, move_limit = trained_on["largest_weight"], trained_on["largest_displacement"]
            if report.largest_weight > weight_limit or report.largest_move > move_limit:
                far = (history.abs() > weight_limit).any(dim=0) | (moves.abs() > move_limit).any(dim=0)
                report.outside = int(far.sum())
        return report

    def __add__(self, other: "ResidualReport") -> "ResidualReport":
        total, added = ResidualReport(**vars(self)), vars(other)
        for name, value in vars(self).items():
            setattr(total, name, max(value, added[name]) if name in _LARGEST else value + added[name])
        return total

    @property
    def mean_residual(self) -> float:
        """Mean |Θ̂ − Θ0| over the predicted weights, in units of the weights."""
        return self._residual_sum / self.predicted if self.predicted else 0.0

    @property
    def mean_ratio(self) -> float:
        """Σ|Θ̂ − Θ0| / Σ|Θ0| over the predicted weights; infinite if all of Θ0 is zero."""
        if not self._weight_sum:
            return float("inf") if self._residual_sum else 0.0
        return self._residual_sum / self._weight_sum

    @property
    def mean_move(self) -> float:
        """Mean |Θ0 − Θ1| over the predicted weights, in units of the weights."""
        return self._move_sum / self.predicted if self.predicted else 0.0

    @property
    def shrink_factor(self) -> float:
        """Factor of the part of the residual that scales the weights: 1 + ⟨R, Θ0⟩ / ‖Θ0‖²."""
        return 1 + _ratio(self._residual_weight, self._weight_square)

    @property
    def shrink_share(self) -> float:
        """Share of ‖R‖² along Θ0: cos²(R, Θ0), from 0 to 1. `shrink_factor` has the direction."""
        return _ratio(self._residual_weight**2, self._residual_square * self._weight_square)

    @property
    def extrapolation_factor(self) -> float:
        """Extrapolation along the last move, in units of it: ⟨R, Θ0 − Θ1⟩ / ‖Θ0 − Θ1‖²; negative values go back."""
        return _ratio(self._residual_move, self._move_square)

    @property
    def extrapolation_share(self) -> float:
        """Share of ‖R‖² along Θ0 − Θ1: cos²(R, Θ0 − Θ1), from 0 to 1. It can overlap with `shrink_share`."""
        return _ratio(self._residual_move**2, self._residual_square * self._move_square)

    def to_dict(self) -> dict[str, int | float | None]:
        """Return all figures as JSON values; `None` for a ratio to weights that are all zero."""
        properties = [name for name, value in vars(ResidualReport).items() if isinstance(value, property)]
        names = [field.name for field in fields(self) if not field.name.startswith("_")] + properties
        values = {name: getattr(self, name) for name in names}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. Several times faster than `torch.isfinite`, which allocates a tensor."""
    return math.isfinite(_largest(values))


def _largest(values: torch.Tensor) -> float:
    """Largest |value|; NaN if a value is NaN."""
    if not values.numel():
        return 0.0
    if values.is_complex():
        values = torch.view_as_real(values)
    elif values.dtype.itemsize == 1:  # float8, which has no aminmax
        values = values.float()
    low, high = values.aminmax()
    return max(-float(low), float(high))


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0
