"""The hyper-model KNOWN as a predictor."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .protocol import register_predictor

if TYPE_CHECKING:
    from ..known.modeling_known import KNOWNModel


@register_predictor("known")
@dataclass
class KNOWNPredictor:
    """Residual of a [`KNOWNModel`] (arXiv 2508.05059).

    Args:
        model ([`KNOWNModel`]):
            The hyper-model, with one network per role.
        kernel (`str`, *optional*, defaults to `"auto"`):
            Implementation of the networks, see [`~know_hf.known.kernels.residual`].
    """

    model: "KNOWNModel"
    kernel: str = "auto"

    @property
    def num_states(self) -> int:
        return self.model.config.num_states

    @property
    def device(self) -> torch.device:
        """Device of the model. Histories on it need no copy."""
        return self.model.device

    @property
    def trained_on(self) -> dict[str, Any] | None:
        """Data that the model was meta-trained on, see [`KNOWNConfig`]."""
        return self.model.config.trained_on

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        from ..known import kernels

        return kernels.residual(self.model, history, role, self.kernel)
