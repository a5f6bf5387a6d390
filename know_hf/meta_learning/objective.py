"""Meta-training loss."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..known.modeling_known import KNOWNModel
from .dataset import TransitionDataset
from .training_arguments import MetaTrainingArguments

LARGEST_WEIGHT = 1000.0
"""Limit of the relative weight of a tensor that moved little, or not at all in the last step."""


class MetaObjective(nn.Module):
    """L1 loss and regularizers of meta-training, over all roles of a batch in one forward pass, for
    `DistributedDataParallel`.

    The training transitions define the roles and their mean no-change errors. Networks without transitions are frozen.

    Raises:
        `ValueError`: if the loss is relative and all no-change errors of a role are zero.
    """

    def __init__(self, model: KNOWNModel, train: TransitionDataset, args: MetaTrainingArguments) -> None:
        super().__init__()
        self.model = model
        self._args = args
        self._no_change = train.mean_no_change()
        if args.loss_weighting == "relative" and (still := [r for r, error in self._no_change.items() if not error]):
            raise ValueError(
                f"loss_weighting='relative' divides by the no-change error, which is 0 for role {', '.join(still)}; "
                "choose loss_weighting='none'"
            )
        for role, network in model.networks.items():
            network.requires_grad_(role in self._no_change)

    def trained_parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def forward(self, batch: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Compute the loss of each role, in units of the weights, and `objective`, the sum of losses and regularizers.

        The batch has for each role `history` `(N, S)`, `labels` `(N,)` and `no_change` `(N,)`.
        """
        losses = {}
        regularization = []
        for role, transitions in batch.items():
            error = (self.model(transitions["history"], role).prediction - transitions["labels"]).abs()
            if self._args.loss_weighting == "relative":
                smallest = self._no_change[role] / LARGEST_WEIGHT
                error = error * (self._no_change[role] / transitions["no_change"].clamp(min=smallest))
            losses[role] = error.mean()
            regularization.append(self.model.regularization(role, self._args.kernel_l1, self._args.bias_l1))
        return {**losses, "objective": sum(losses.values()) + sum(regularization)}
