"""BatchNorm statistics belong to the weights they were measured with; here they are measured anew."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn


def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """Computes running means and variances anew, in place, as the plain average over all batches.

    Models without BatchNorm are left alone and the batches unread. Momentum and training mode are as they were
    afterwards.

    Args:
        model (`nn.Module`): Any module.
        batches (iterable of mappings): Keyword arguments of the model, such as `{"pixel_values": (B, C, H, W)}`; moved
            to the model's device.

    Raises:
        `ValueError`: when there is BatchNorm and no batch.
    """
    if not any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules()):
        return
    wrapper = _Keywords(model)
    update_bn(batches, wrapper)
    if not wrapper.seen:
        raise ValueError("there is no batch to compute BatchNorm statistics from; give at least one")


class _Keywords(nn.Module):
    """Passes a batch on as keyword arguments, the form in which `update_bn` does not."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen = 0

    def forward(self, batch: Mapping[str, Any]) -> Any:
        self.seen += 1
        device = next(self.model.parameters()).device
        return self.model(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
