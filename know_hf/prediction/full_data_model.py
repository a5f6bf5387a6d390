"""Θ0 as a model, for predictors that need its function."""

import copy
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..predictors import Rescaler, Rescaling
from ..trajectory import TrajectoryError, WeightTrajectory
from .snapshot_predictions import lora_partner
from .tensor_sources import check_finite


def rescaling_of(trajectory: WeightTrajectory, rescalers: Sequence[Rescaler]) -> Rescaling:
    """Return the product of the factors of several rescalers, which all depend on Θ0 alone.

    Adapters without a base model are compared by the products of their LoRA matrices instead of the model's outputs.
    The models of the rescalers are not changed.

    Raises:
        `TrajectoryError`: if a value of Θ0 is not finite.
        `ValueError`: if the trajectory records a plain module, or adapters other than LoRA, and a rescaler has no
            `model`.
    """
    total = Rescaling()
    for rescaler in rescalers:
        total *= rescaler.rescaling(_full_data_model(trajectory, rescaler.model))
    return total


def _full_data_model(trajectory: WeightTrajectory, model: Any) -> nn.Module:
    for name in trajectory.names:
        if trajectory.roles[name].role != "copied":
            check_finite(trajectory.tensor(name), name, trajectory, state=0)
    if model is not None and not isinstance(model, nn.Module):
        raise ValueError(f"model must be a module, got {type(model).__name__}")
    if trajectory.is_adapter:
        if model is not None:
            return trajectory.load_model(0, base_model=copy.deepcopy(model)).float()
        return LoraProducts({name: trajectory.tensor(name).float() for name in trajectory.names})
    if model is None:
        if not (trajectory.path / "config.json").exists():
            raise ValueError(
                f"{trajectory.path} records a plain nn.Module; pass one of its class and a batch of inputs to compare"
                " outputs: Rescale(model=..., batch=...)"
            )
        try:
            return trajectory.load_model(0).float()
        except TrajectoryError as error:
            error.add_note("To rescale, pass a model of the recorded class: Rescale(model=...)")
            raise
    model = copy.deepcopy(model).float()
    trajectory.load_into(model)
    return model


class LoraProducts(nn.Module):
    """The products B A of adapters, which are all that the model sees of A and B, from tensors by name on disk."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        firsts = [name for name in tensors if ".lora_A." in name or name.endswith("lora_embedding_A")]
        self._pairs = [(name, lora_partner(name)) for name in firsts]
        if not self._pairs:
            raise ValueError(
                f"no LoRA matrices among {sorted(tensors)[:3]} …; pass the base model to find what can be rescaled:"
                " Rescale(model=...)"
            )
        for name in (name for pair in self._pairs for name in pair):
            *path, attribute = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(attribute, nn.Parameter(tensors[name], requires_grad=False))

    def forward(self) -> list[torch.Tensor]:
        # A is used first, so that it takes the factor and B undoes it, as in the model
        firsts = [attrgetter(first)(self).flatten(1) for first, _ in self._pairs]
        return [attrgetter(b)(self).flatten(1) @ first for first, (_, b) in zip(firsts, self._pairs, strict=True)]
