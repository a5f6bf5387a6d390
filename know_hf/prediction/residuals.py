"""What a prediction did, in numbers: how large the residual is, what it is made of, how familiar its inputs were."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

# Mean move of a weight, relative to the mean that KNOWN was trained on, below which it is said to be far smaller.
FAR_SMALLER = 0.01


@dataclass
class ResidualReport:
    """What happened to a tensor, or to all tensors of a role together: sums, so that reports can be added.

    Attributes:
        tensors, parameters (`int`): How many there are.
        unchanged (`int`): Tensors of a predicted role that are equal in all states and were copied bit for bit.
        predicted (`int`): Scalar weights that a residual was added to.
        largest_residual (`float`): Largest |Θ̂ − Θ0|, in units of the weights.
        largest_weight, largest_move (`float`): Largest |W| and |dW| of the histories that were predicted from.
        outside (`int`): Scalar weights with a |W| or |dW| larger than any that the predictor was trained on.
        lost (`int`): Scalar weights whose residual is smaller than the rounding of the dtype that is written.
    """

    tensors: int = 0
    parameters: int = 0
    unchanged: int = 0
    predicted: int = 0
    outside: int = 0
    lost: int = 0
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
        """Measures one piece.

        Args:
            history (`torch.Tensor` of shape `(S, N)`): Most forgotten state first, full data last.
            residual (`torch.Tensor` of shape `(N,)`): What was added to the last.
            trained_on (`Mapping`, *optional*): `largest_weight` and `largest_displacement` of what the predictor was
                trained on for this role.
        """
        weight, moves = history[-1], history.diff(dim=0)
        report = cls(
            predicted=residual.numel(),
            largest_residual=_largest(residual),
            largest_weight=_largest(history),
            largest_move=_largest(moves),
            _residual_sum=float(residual.abs().sum()),
            _weight_sum=float(weight.abs().sum()),
            _move_sum=float(moves[-1].abs().sum()),
        )
        products = torch.stack([residual, weight, moves[-1]])
        gram = (products @ products.T).tolist()
        report._residual_square, report._weight_square, report._move_square = (gram[i][i] for i in range(3))
        report._residual_weight, report._residual_move = gram[0][1], gram[0][2]
        if trained_on is not None:
            weight_limit, move_limit = trained_on["largest_weight"], trained_on["largest_displacement"]
            if report.largest_weight > weight_limit or report.largest_move > move_limit:
                far = (history.abs() > weight_limit).any(dim=0) | (moves.abs() > move_limit).any(dim=0)
                report.outside = int(far.sum())
        return report

    def __add__(self, other: "ResidualReport") -> "ResidualReport":
        merged = {}
        for field in fields(self):
            here, there = getattr(self, field.name), getattr(other, field.name)
            merged[field.name] = max(here, there) if field.name.startswith("largest") else here + there
        return ResidualReport(**merged)

    @property
    def mean_residual(self) -> float:
        """Mean |Θ̂ − Θ0| over the predicted weights, in units of the weights."""
        return self._residual_sum / self.predicted if self.predicted else 0.0

    @property
    def mean_ratio(self) -> float:
        """Σ|Θ̂ − Θ0| / Σ|Θ0| over the predicted weights; infinite where all of Θ0 is zero."""
        if not self._weight_sum:
            return float("inf") if self._residual_sum else 0.0
        return self._residual_sum / self._weight_sum

    @property
    def mean_move(self) -> float:
        """Mean |Θ0 − Θ1| over the predicted weights, in units of the weights."""
        return self._move_sum / self.predicted if self.predicted else 0.0

    @property
    def shrink_factor(self) -> float:
        """What the weights are multiplied by as far as the residual is a multiple of them: 1 + ⟨R, Θ0⟩ / ‖Θ0‖²."""
        return 1 + _ratio(self._residual_weight, self._weight_square)

    @property
    def shrink_share(self) -> float:
        """Share of ‖R‖² that lies along Θ0: cos²(R, Θ0), from 0 to 1. Whether it shrinks or grows, `shrink_factor`
        says."""
        return _ratio(self._residual_weight**2, self._residual_square * self._weight_square)

    @property
    def extrapolation_factor(self) -> float:
        """How far the residual goes on along Θ0 − Θ1, in lengths of it: ⟨R, Θ0 − Θ1⟩ / ‖Θ0 − Θ1‖²; below 0 it goes
        back."""
        return _ratio(self._residual_move, self._move_square)

    @property
    def extrapolation_share(self) -> float:
        """Share of ‖R‖² that lies along Θ0 − Θ1: cos²(R, Θ0 − Θ1), from 0 to 1. It can overlap with `shrink_share`."""
        return _ratio(self._residual_move**2, self._residual_square * self._move_square)

    def to_dict(self) -> dict[str, int | float | None]:
        """All figures, JSON values only: `None` for a ratio to weights that are all zero."""
        properties = [name for name, value in vars(ResidualReport).items() if isinstance(value, property)]
        names = [field.name for field in fields(self) if not field.name.startswith("_")] + properties
        values = {name: getattr(self, name) for name in names}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def table(reports: Mapping[str, ResidualReport], heading: str) -> str:
    """A table for people, one row a report.

    Args:
        reports (`Mapping[str, ResidualReport]`): From the name of a row to its report.
        heading (`str`): Of the names.
    """
    width = max(len(name) for name in (heading, *reports))
    columns = ("tensors", "parameters", "unchanged", "mean |R|", "max |R|", "ΣR/ΣΘ0", "along Θ0", "along Θ0−Θ1")
    lines = [f"{heading:{width}}" + "".join(f"{column:>13}" for column in columns)]
    for name, r in reports.items():
        cells = [f"{r.tensors:,}", f"{r.parameters:,}", f"{r.unchanged:,}"]
        if r.predicted:
            ratio = "-" if math.isinf(r.mean_ratio) else f"{r.mean_ratio:.2%}"
            cells += [f"{r.mean_residual:.3g}", f"{r.largest_residual:.3g}", ratio]
            cells += [f"{r.shrink_share:.0%}", f"{r.extrapolation_share:.0%}"]
        else:
            cells += ["-"] * 5
        lines.append(f"{name:{width}}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def range_warnings(role: str, tensors: Mapping[str, ResidualReport], trained_on: Mapping[str, float]) -> list[str]:
    """Sentences on inputs unlike those that a predictor was trained on.

    Args:
        role (`str`): Whose network.
        tensors (`Mapping[str, ResidualReport]`): Reports of the role's tensors, by name.
        trained_on (`Mapping`): What the predictor was trained on for this role, see [`KNOWNConfig`].
    """
    warnings = []
    total = sum(tensors.values(), ResidualReport())
    if total.outside:
        worst = max(tensors, key=lambda name: tensors[name].outside)
        report = tensors[worst]
        warnings.append(
            f"{role}: {total.outside / total.predicted:.2%} of the weights lie outside of what the network was trained"
            f" on (weights up to {trained_on['largest_weight']:.3g}, moves up to"
            f" {trained_on['largest_displacement']:.3g}); most of them in {worst!r}, with weights up to"
            f" {report.largest_weight:.3g} and moves up to {report.largest_move:.3g}"
        )
    mean = trained_on["mean_displacement"]
    if total.predicted and total.mean_move < FAR_SMALLER * mean:
        warnings.append(
            f"{role}: weights moved by {total.mean_move:.2g} on average between the last two states, the network was"
            f" trained on moves of {mean:.2g}: what it adds says more about the size of a weight than about its way"
        )
    return warnings


def forgetting_warnings(losses: Sequence[float | None]) -> list[str]:
    """Sentences on later states that are no worse than Θ0, so that there was no forgetting to run backwards.

    Args:
        losses (`Sequence[float | None]`): Evaluation loss of every state, full data first; `None` where there is none.
    """
    full_data = losses[0]
    if full_data is None:
        return []
    no_worse = [(state, loss) for state, loss in enumerate(losses) if state and loss is not None and loss <= full_data]
    if not no_worse:
        return []
    named = ", ".join(f"Θ{state} ({loss:.4g})" for state, loss in no_worse)
    return [
        f"by evaluation loss {named} {'is' if len(no_worse) == 1 else 'are'} no worse than Θ0 ({full_data:.4g}): what"
        " was to make the model forget trained it on, and to run that backwards may undo training; train Θ0 longer"
    ]


def code_warnings(configs: Sequence[Any], base_model: str | None) -> list[str]:
    """Sentences on code that configs lead to (`auto_map`) and that a checkpoint lacks, as trajectories hold none.

    Args:
        configs (sequence): Content of the JSON files of model, tokenizer and processor, whoever wrote them.
        base_model (`str`, *optional*): Name of the model that has the code.
    """
    maps = [config.get("auto_map") for config in configs if isinstance(config, dict)]
    values = [value for found in maps if isinstance(found, dict) for value in found.values()]
    references = [name for value in values for name in (value if isinstance(value, list) else [value])]
    # repo--module.Class is fetched from that repo
    modules = {name.rpartition(".")[0] for name in references if isinstance(name, str) and "--" not in name}
    if not modules:
        return []
    return [
        f"the model has code of its own, in {', '.join(f'{module}.py' for module in sorted(modules))}, which"
        " trajectories don't hold: before the checkpoint is loaded with trust_remote_code=True, copy these files, and"
        f" those that they import, into it from {base_model or 'where the model was loaded from'}; with the class"
        " itself, load_model(model_class=) loads it as it is"
    ]


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; several times faster than `torch.isfinite`, which makes a tensor."""
    return math.isfinite(_largest(values))


def _largest(values: torch.Tensor) -> float:
    """Largest |value|, NaN where one is."""
    if not values.numel():
        return 0.0
    low, high = values.aminmax()
    return max(-float(low), float(high))


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0
