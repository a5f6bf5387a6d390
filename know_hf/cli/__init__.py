"""`know-hf`: each command covers one public function. Heavy imports wait until a command runs."""

from .parser import make_parser
from .program import main

__all__ = ["main", "make_parser"]
