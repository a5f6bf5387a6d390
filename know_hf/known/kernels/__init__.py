"""Inference kernels of KNOWN: the function of [`KNOWNModel`], for all weights of a checkpoint."""

from .dispatch import KERNELS, prepare, residual

__all__ = ["KERNELS", "prepare", "residual"]
