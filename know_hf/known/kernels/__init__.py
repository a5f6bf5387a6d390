"""Fast forms of KNOWN: the same function as [`KNOWNModel`], for whole checkpoints."""

from .dispatch import KERNELS, prepare, residual

__all__ = ["KERNELS", "prepare", "residual"]
