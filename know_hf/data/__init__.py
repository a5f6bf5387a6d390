"""Subsets of any dataset, and hashes of its rows."""

from .row_hashes import NoContentError, content_hash
from .subsets import Subset, divide

__all__ = ["NoContentError", "Subset", "content_hash", "divide"]
