"""BatchNorm statistics belong to the weights they were computed with; other weights need new ones."""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from .model_tensors import restored_modes


def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """Recompute running means and variances in place, as the average over all batches.

    Only BatchNorm layers are in training mode, because dropout would inflate the variances (arXiv 1801.05134).
    Momentum and training modes are restored afterwards. If the model has no BatchNorm, the batches are not read.

    Args:
        model (`nn.Module`):
            Any module.
        batches (iterable of mappings):
            Keyword arguments of the model, for example `{"pixel_values": (B, C, H, W)}`, on any device. Use batches of
            equal size to weight all examples equally.

    Raises:
        `ValueError`: if the model has BatchNorm layers and there is no batch. The statistics are unchanged.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None:
        raise ValueError(f"no batch for the statistics of {len(norms)} BatchNorm layers; pass at least one batch")
    momenta = [norm.momentum for norm in norms]
    with restored_modes(model):
        try:
            update_bn(chain([first], remaining), _Keywords(model, norms))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


class _Keywords(nn.Module):
    """Adapter for `update_bn`: passes a batch to the model as keyword arguments."""

    def __init__(self, model: nn.Module, norms: list[_BatchNorm]) -> None:
        super().__init__()
        self.model = model
        self.norms = norms

    def train(self, mode: bool = True) -> "_Keywords":
        self.model.eval()
        for norm in self.norms:
            norm.train(mode)
        return self

    def forward(self, batch: Mapping[str, Any]) -> Any:
        device = next(self.model.parameters()).device
        return self.model(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
