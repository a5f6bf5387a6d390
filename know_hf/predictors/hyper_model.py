"""The hyper-model KNOWN as a predictor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .protocol import register_predictor

if TYPE_CHECKING:
    from ..known.modeling_known import KNOWNModel


class PreparedKNOWN:
    """A [`KNOWNPredictor`] that does not notice when the weights of its model change.

    Args:
        predictor ([`KNOWNPredictor`]):
            The predictor.
    """

    def __init__(self, predictor: "KNOWNPredictor") -> None:
        self.num_states = predictor.num_states
        self._predictor = predictor
        self._kernels: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        if role not in self._kernels:
            from ..known import kernels

            self._kernels[role] = kernels.prepare(self._predictor.model, role, self._predictor.kernel)
        return self._kernels[role](history)


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

    def prepared(self) -> "PreparedKNOWN":
        """Return a predictor with the current weights. It is faster for many small tensors."""
        return PreparedKNOWN(self)

    def residual(self, history: torch.Tensor, role: str) -> torch.Tensor:
        from ..known import kernels

        return kernels.residual(self.model, history, role, self.kernel)
