"""The hyper-model KNOWN: configuration, model, kernels, and the basis of its variant "combination"."""

from .configuration_known import KNOWN_ROLES, KNOWNConfig
from .modeling_known import KNOWNModel
from .tensor_basis import TensorBasis, TensorContext, combine, tensor_basis

__all__ = [
    "KNOWN_ROLES",
    "KNOWNConfig",
    "KNOWNModel",
    "TensorBasis",
    "TensorContext",
    "combine",
    "tensor_basis",
]
