"""The hyper-model KNOWN as a predictor, of single weights or of complete tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..known import TensorBasis, combine, tensor_basis
from .protocol import register_predictor
from .snapshot_predictor import SnapshotPredictor, TensorSnapshots

if TYPE_CHECKING:
    from ..known.modeling_known import KNOWNModel


class PreparedKNOWN:
    """A [`KNOWNPredictor`] that does not notice when the weights of its model change."""

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

    def __post_init__(self) -> None:
        if self.model.config.variant != "reference":
            raise ValueError("this KNOWN reads complete tensors; use know_hf.predictors.KNOWNCombination(model)")

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


@dataclass
class KNOWNCombination(SnapshotPredictor):
    """The variant `"combination"` of a [`KNOWNModel`]: a combination of the displacements of each tensor.

    It reads every recorded snapshot: states, start, tail and branches. Missing ones are left out.

    Args:
        model ([`KNOWNModel`]):
            The hyper-model.
    """

    model: "KNOWNModel"

    def __post_init__(self) -> None:
        if self.model.config.variant != "combination":
            raise ValueError("this KNOWN reads single weights; use know_hf.predictors.KNOWNPredictor(model)")

    @property
    def trained_on(self) -> dict[str, Any] | None:
        """Data that the model was meta-trained on, see [`KNOWNConfig`]."""
        return self.model.config.trained_on

    def reads(self) -> Mapping[str, int]:
        return dict.fromkeys(("branches", "origin", "start", "tail", "states"), 0)

    def basis(self, snapshots: TensorSnapshots) -> TensorBasis:
        """Return the basis and the statistics of a tensor, which do not depend on the model."""
        return tensor_basis(**{name: value for name, value in vars(snapshots).items() if name != "fraction"})

    def tensor(self, snapshots: TensorSnapshots) -> torch.Tensor:
        basis = self.basis(snapshots)
        coefficients = self.model.coefficients(basis.tensor_features, basis.state_features)
        return snapshots.theta0 + combine(basis.elements, coefficients)


def known_predictor(model: "KNOWNModel", kernel: str = "auto") -> KNOWNPredictor | KNOWNCombination:
    """Return the predictor of a model of either variant.

    Raises:
        `ValueError`:
            If a kernel is given for the variant `"combination"`.
    """
    if model.config.variant == "reference":
        return KNOWNPredictor(model, kernel)
    if kernel != "auto":
        raise ValueError(f"kernel={kernel!r} applies to single weights, but this KNOWN has variant='combination'")
    return KNOWNCombination(model)
