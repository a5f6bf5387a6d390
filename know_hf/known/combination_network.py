"""The variant "combination" of KNOWN: a network that gives a tensor the coefficients of its residual.

The residual is `Σ_i c_i e_i` over the basis of the tensor, see [`~know_hf.known.tensor_basis`]. The network reads
statistics that do not change with the scale of the tensor or the order of its neurons, so the residual does as the
basis does.
"""

import torch
from torch import nn

from .configuration_known import KNOWNConfig

ELEMENTS = ("start", "tail", "branches", "theta0", "filtered")
"""Elements of the basis with an output each; each further state has one of a network that all states share."""

TENSOR_FEATURES = (
    *("role_conv", "role_fc", "role_bias", "role_norm", "depth", "is_normalised"),
    *("num_states", "has_start", "has_tail", "has_branches", "ratio", "steps"),
    *("train_loss", "has_train_loss", "eval_loss", "has_eval_loss", "loss_gap"),
    *("moved", "start_cosine", "norm_growth", "states_moved", "states_cosine"),
    *("tail_moved", "tail_cosine", "tail_noise"),
    *("branches_moved", "branches_cosine", "branches_agreement", "branches_noise", "branches_shrinkage"),
    *("is_matrix", "stable_rank", "filtered_share"),
)
"""Statistics of a tensor in the order of the inputs, see [`~know_hf.known.tensor_basis.tensor_basis`]."""

STATE_FEATURES = (
    *("position", "share", "moved", "cosine", "theta0_cosine", "step_moved", "turn"),
    *("fraction", "steps", "loss_rise", "has_loss"),
)
"""Statistics of each state but Θ0."""


class KNOWNCoefficientLinear(nn.Linear):
    """Last layer before the coefficients, with zeros as initial weights: a new model predicts a residual of zero."""


class KNOWNCombinationNetwork(nn.Module):
    """Two layers for the tensor, and two for each of its states that also read the hidden units of the tensor."""

    def __init__(self, config: KNOWNConfig):
        super().__init__()
        size = config.combination_size
        self.largest_coefficient = config.largest_coefficient
        self.tensor_layer = nn.Linear(len(TENSOR_FEATURES), size)
        self.tensor_head = KNOWNCoefficientLinear(size, len(ELEMENTS))
        self.state_layer = nn.Linear(size + len(STATE_FEATURES), size)
        self.state_head = KNOWNCoefficientLinear(size, 1)

    def forward(
        self, tensor_features: torch.Tensor, state_features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map `(..., F)` and `(..., K, Q)` to the coefficients of the elements `(..., 5)` and of K states `(..., K)`.

        Their absolute values are at most `largest_coefficient`.
        """
        hidden = torch.tanh(self.tensor_layer(tensor_features))
        repeated = hidden.unsqueeze(-2).expand(*state_features.shape[:-1], -1)
        of_states = torch.tanh(self.state_layer(torch.cat([repeated, state_features], dim=-1)))
        outputs = self.tensor_head(hidden), self.state_head(of_states).squeeze(-1)
        of_elements, of_states = (self.largest_coefficient * torch.tanh(output) for output in outputs)
        return of_elements, of_states


__all__ = ["ELEMENTS", "STATE_FEATURES", "TENSOR_FEATURES", "KNOWNCoefficientLinear", "KNOWNCombinationNetwork"]
