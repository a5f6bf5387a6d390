"""The hyper-model KNOWN: configuration, model and kernels."""

from .configuration_known import KNOWN_ROLES, KNOWNConfig
from .modeling_known import KNOWNModel

__all__ = ["KNOWN_ROLES", "KNOWNConfig", "KNOWNModel"]
