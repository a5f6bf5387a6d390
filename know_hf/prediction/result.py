"""[`PredictionResult`]: the written checkpoint and what happened to its tensors."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import CheckpointReader
from ..markdown import quantity
from ..predictors import Predictor, Rescaling
from ..trajectory import load_into, load_pretrained
from .residuals import ResidualReport
from .selection import GateResult, with_article


@dataclass
class PredictionResult:
    """An enhanced checkpoint; `str(result)` is the verdict, the candidates of the gate and how to load it.

    Attributes:
        path (`Path`):
            Its folder.
        tensors (`dict[str, ResidualReport]`):
            Report on each tensor, by name.
        roles (`dict[str, str]`):
            Role of each tensor, by name.
        warnings (`list[str]`):
            Reasons to doubt the prediction: histories unlike those the predictor was trained on, no forgetting,
            residuals lost to rounding, dtypes that cannot be predicted, code that the checkpoint lacks, no difference
            from Θ0.
        model_class (`type`, *optional*):
            Class of the model if transformers has none of its name.
        url (`str`, *optional*):
            Address of the commit or pull request if it was pushed.
        gate ([`GateResult`], *optional*):
            The candidates that the gate evaluated and its choice.
        rescaling ([`Rescaling`], *optional*):
            Factors that the predicted tensors were multiplied by. The reports are on the prediction before it.
        predictor ([`Predictor`], *optional*):
            The predictor, which a gate may have chosen; `None` for a recorded state.
        name (`str`):
            What was written, such as `KNOWN, 2 steps`.
        next_step (`str`):
            Code that loads the checkpoint.
    """

    path: Path
    tensors: dict[str, ResidualReport]
    roles: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    model_class: type[PreTrainedModel] | None = None
    url: str | None = None
    gate: GateResult | None = None
    rescaling: Rescaling | None = None
    predictor: Predictor | None = None
    name: str = "the prediction"
    next_step: str = ""

    @property
    def sentence(self) -> str:
        """The verdict: what was written, and whether it is better than Θ0."""
        if self.gate is not None and self.gate.is_reference:
            return f"Kept Θ0, written to {self.path}/: {self.gate.reason}"
        name = with_article(self.name if self.gate is None else self.gate.chosen)
        start = f"Wrote {name}{',' if ',' in name else ''} to {self.path}/"
        if self.gate is not None:
            return f"{start}: {self.gate.reason}"
        return f"{start}; nothing checks whether it is better than Θ0: add validation data (gate=, --validation)."

    @property
    def report(self) -> dict[str, ResidualReport]:
        """Report on all tensors of each role together."""
        by_role: defaultdict[str, ResidualReport] = defaultdict(ResidualReport)
        for name, report in self.tensors.items():
            by_role[self.roles[name]] += report
        return dict(sorted(by_role.items()))

    def load_model(
        self, base_model: PreTrainedModel | None = None, model_class: type[PreTrainedModel] | None = None
    ) -> PreTrainedModel:
        """Load the enhanced model, of the recorded class by default; an adapter needs its base model."""
        return load_pretrained(self.path, model_class or self.model_class, base_model)

    def load_into(self, model: nn.Module) -> None:
        """Copy the enhanced weights into a model of the recorded architecture, such as a plain or wrapped `nn.Module`.

        Raises:
            `TrajectoryError`: if checkpoint and model do not have the same tensors.
        """
        reader = CheckpointReader(sorted(self.path.glob("*.safetensors")))
        load_into(model, self.path, reader)

    def to_dict(self) -> dict[str, Any]:
        """Return the full report as JSON values."""
        return {
            "roles": {role: report.to_dict() for role, report in self.report.items()},
            "tensors": {name: {"role": self.roles[name], **r.to_dict()} for name, r in self.tensors.items()},
            "warnings": self.warnings,
            "gate": None if self.gate is None else self.gate.to_dict(),
            "rescaling": None if self.rescaling is None else self.rescaling.to_dict(),
        }

    def __str__(self) -> str:
        parts = [self.sentence]
        if self.gate is not None:
            screened = len(self.gate.screened)
            others = f"\n{quantity(screened, 'more candidate')} screened out" if screened else ""
            parts.append(f"{self.gate.table}{others}\n{self.gate.short_rule}")
        if self.rescaling is not None:
            parts.append(f"rescaled: {self.rescaling}")
        if self.url is not None:
            parts.append(f"pushed to {self.url}")
        if self.next_step:
            parts.append(f"next: {self.next_step}")
        return "\n\n".join(parts)
