"""What meta-training makes small."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..known.modeling_known import KNOWNModel
from .dataset import TransitionDataset
from .training_arguments import MetaTrainingArguments

# Tensors that moved a thousand times less than the mean, or not at all in the last step, weigh no more than this.
LARGEST_WEIGHT = 1000.0


class MetaObjective(nn.Module):
    """
    The l1 objective and the regularisers of meta-training, over all roles of a batch in one forward pass, as
    `DistributedDataParallel` needs it.

    Networks without a transition to learn from are frozen.

    Args:
        model ([`KNOWNModel`]): The model that is trained.
        train ([`TransitionDataset`]): Says which roles there are, and their mean no-change errors.
        args ([`MetaTrainingArguments`]): Factors of the regularisers, and the weighting of the loss.

    Raises:
        `ValueError`: when the loss is to be relative and a role has no-change errors of zero alone.
    """

    def __init__(self, model: KNOWNModel, train: TransitionDataset, args: MetaTrainingArguments) -> None:
        super().__init__()
        self.model = model
        self._args = args
        self._no_change = train.mean_no_change()
        if args.loss_weighting == "relative" and (still := [r for r, error in self._no_change.items() if not error]):
            raise ValueError(
                f"no tensor of the role {', '.join(still)} moves in a step that is to be predicted, so that its loss"
                " can't be divided by its no-change error; choose loss_weighting='none'"
            )
        for role, network in model.networks.items():
            network.requires_grad_(role in self._no_change)

    def trained_parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def forward(self, batch: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """
        Args:
            batch (`Mapping[str, Mapping[str, torch.Tensor]]`):
                Of each role `history` `(N, S)`, `labels` `(N,)` and `no_change` `(N,)`.

        Returns:
            `dict[str, torch.Tensor]` of shapes `()`: the loss of each role, in units of the weights, and `objective`,
            their sum with the regularisers.
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
