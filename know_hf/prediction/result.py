"""What a prediction returns: the folder of the checkpoint and a report on every tensor."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..batch_norm import recalibrate_batch_norm
from ..checkpoint import CheckpointReader, replace_tensors
from ..model_tensors import names_on_disk
from ..trajectory import WeightTrajectory, load_into, load_pretrained
from .residuals import ResidualReport, table
from .selection import GateResult


@dataclass
class PredictionResult:
    """An enhanced checkpoint.

    Attributes:
        path (`Path`): Its folder.
        tensors (`dict[str, ResidualReport]`): From the name of every tensor to what happened to it.
        roles (`dict[str, str]`): From the name of every tensor to its role.
        warnings (`list[str]`): Where the histories were unlike those the predictor was trained on, later states no
            worse than Θ0, residuals lost to rounding, or files with code of the model's own not in the checkpoint.
        model_class (`type`, *optional*): The model's class, where transformers has none of its name.
        url (`str`, *optional*): Address of the commit or the pull request, where it was pushed to the Hub.
        gate ([`~know_hf.prediction.GateResult`], *optional*): What the gate tried and chose, where there was one.
    """

    path: Path
    tensors: dict[str, ResidualReport]
    roles: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    model_class: type[PreTrainedModel] | None = None
    url: str | None = None
    gate: "GateResult | None" = None

    @property
    def report(self) -> dict[str, ResidualReport]:
        """From role to what happened to its tensors, all together."""
        by_role: dict[str, ResidualReport] = {}
        for name, report in self.tensors.items():
            by_role[self.roles[name]] = by_role.get(self.roles[name], ResidualReport()) + report
        return dict(sorted(by_role.items()))

    def load_model(
        self, base_model: PreTrainedModel | None = None, model_class: type[PreTrainedModel] | None = None
    ) -> PreTrainedModel:
        """The enhanced model, of the class that was recorded or the one given; an adapter on the base model given."""
        return load_pretrained(self.path, model_class or self.model_class, base_model)

    def load_into(self, model: nn.Module) -> None:
        """Copies the enhanced weights into a model of the recorded architecture, such as a plain module, which
        `load_model` can't make.

        Args:
            model (`nn.Module`): The model, without its wrappers.

        Raises:
            `TrajectoryError`: when checkpoint and model don't have the same tensors.
        """
        reader = CheckpointReader(sorted(self.path.glob("*.safetensors")))
        load_into(model, self.path, dict.fromkeys(reader.names, reader.tensor))

    def to_dict(self) -> dict[str, Any]:
        """The whole report, JSON values only."""
        return {
            "roles": {role: report.to_dict() for role, report in self.report.items()},
            "tensors": {name: {"role": self.roles[name], **r.to_dict()} for name, r in self.tensors.items()},
            "warnings": self.warnings,
            "gate": None if self.gate is None else self.gate.to_dict(),
        }

    def __str__(self) -> str:
        lines = [table(self.report, "role"), *(f"warning: {text}" for text in self.warnings)]
        return "\n".join(lines if self.gate is None else [*lines, "", str(self.gate)])


def _as_float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def recalibrate_checkpoint(
    folder: Path, batches: Any, trajectory: WeightTrajectory, model_class: type[PreTrainedModel] | None
) -> None:
    """Measures the BatchNorm statistics of a checkpoint anew, in its files."""
    # in float32, whatever the dtypes of weights and batches are; written in the dtype of the file
    model = load_pretrained(folder, model_class).float()
    recalibrate_batch_norm(model, ({name: _as_float32(value) for name, value in batch.items()} for batch in batches))
    state, on_disk = model.state_dict(), names_on_disk(model)
    statistics = [name for name in state if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    measured = {on_disk[name]: state[name] for name in statistics if on_disk.get(name) in trajectory.roles}
    for name in statistics:
        if on_disk.get(name) not in measured:
            raise ValueError(
                f"the BatchNorm statistics {name!r} of {type(model).__name__} have no place in {folder}: they can't be"
                " computed anew in the files; recalibrate the model once it is loaded"
            )
    replace_tensors(folder, measured)
