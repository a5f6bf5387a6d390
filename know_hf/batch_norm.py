"""BatchNorm statistics belong to the weights they were measured with; here they are measured anew."""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn


def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """Computes running means and variances anew, in place, as the plain average over all batches.

    Only the BatchNorm layers are in training mode meanwhile: dropout would widen the statistics beyond those met at
    inference (arXiv 1801.05134). Momentum and training mode of every module are as they were afterwards. Models
    without BatchNorm are left alone and the batches unread.

    Args:
        model (`nn.Module`): Any module.
        batches (iterable of mappings): Keyword arguments of the model, such as `{"pixel_values": (B, C, H, W)}`; moved
            to the model's device. Batches of equal size give every example equal weight.

    Raises:
        `ValueError`: when there is BatchNorm and no batch; the statistics are then as they were.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None:
        raise ValueError(
            f"the model has {len(norms)} BatchNorm layers and there is no batch to compute their statistics from;"
            " give at least one"
        )
    training = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    try:
        update_bn(chain([first], remaining), _Keywords(model, norms))
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in training.items():
            module.training = mode


class _Keywords(nn.Module):
    """What `update_bn` takes for the model: passes a batch on as keyword arguments, which it does not."""

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
