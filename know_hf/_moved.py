"""Old names of 0.1: modules and functions that moved still work, with a `FutureWarning`, until 0.3."""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED_MODULES: dict[str, str] = {}


class _MovedModule(Loader):
    """Load the module under its new name in place of the old one."""

    def __init__(self, new_name: str) -> None:
        self._new_name = new_name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} moved to {self._new_name}; import it from there", FutureWarning, stacklevel=6)
        return importlib.import_module(self._new_name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module ran under its new name."""


class _MovedModuleFinder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        new_name = MOVED_MODULES.get(name)
        return None if new_name is None else ModuleSpec(name, _MovedModule(new_name))


def install() -> None:
    """Make old module names importable."""
    if not any(isinstance(finder, _MovedModuleFinder) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModuleFinder())


def forward(module: str, **moved: str) -> Callable[[str], Any]:
    """Return a module's `__getattr__` that finds moved names.

    Args:
        module (`str`):
            Name of the module that the names moved from.
        moved (`str`):
            New module of each name.
    """

    def __getattr__(name: str) -> Any:
        if name not in moved:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} moved to {moved[name]}.{name}; import it from there", FutureWarning, stacklevel=2
        )
        return getattr(importlib.import_module(moved[name]), name)

    return __getattr__
