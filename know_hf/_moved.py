"""Old names of 0.1: modules and functions that moved still work, with a `FutureWarning`, until 0.3."""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED_MODULES = {
    "know_hf.cards.comparisons": "know_hf.cards.suite_tables",
    "know_hf.configuration_known": "know_hf.known.configuration_known",
    "know_hf.content": "know_hf.data.row_hashes",
    "know_hf.conversion": "know_hf.known.keras_import",
    "know_hf.depth": "know_hf.predictors.relative_depth",
    "know_hf.evaluation.measuring": "know_hf.evaluation.measure",
    "know_hf.evaluation.metrics": "know_hf.metrics",
    "know_hf.evaluation.results": "know_hf.evaluation.report.comparison_report",
    "know_hf.evaluation.small_cnn": "know_hf.evaluation.suites.small_cnn",
    "know_hf.evaluation.store": "know_hf.evaluation.cells",
    "know_hf.evaluation.training": "know_hf.evaluation.fine_tuning",
    "know_hf.gate": "know_hf.prediction.choosing.gate",
    "know_hf.inspection": "know_hf.trajectory.summary",
    "know_hf.kernels": "know_hf.known.kernels",
    "know_hf.kernels.cpu": "know_hf.known.kernels.llvm_kernel",
    "know_hf.kernels.folded": "know_hf.known.kernels.folded_kernel",
    "know_hf.landscape": "know_hf.evaluation.landscape",
    "know_hf.merging": "know_hf.trajectory.merging",
    "know_hf.modeling_known": "know_hf.known.modeling_known",
    "know_hf.prediction.predict": "know_hf.predict",
    "know_hf.quickstart": "know_hf.evaluation.suites.quickstart",
    "know_hf.subsets": "know_hf.data.subsets",
    "know_hf.task_arguments": "know_hf.tasks.arguments",
    "know_hf.task_data": "know_hf.tasks.task_data",
}


class _MovedModule(Loader):
    """Load the module under its new name in place of the old one."""

    def __init__(self, new_name: str) -> None:
        self._new_name = new_name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} moved to {self._new_name}; import it from there", FutureWarning, stacklevel=2)
        module = importlib.import_module(self._new_name)
        self._new_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back; it ran under its new name."""
        module.__spec__ = self._new_spec


class _MovedModuleFinder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, last = name.rpartition(".")
        new_name = MOVED_MODULES.get(name) or (
            f"{MOVED_MODULES[package]}.{last}" if package in MOVED_MODULES else None
        )
        return None if new_name is None else ModuleSpec(name, _MovedModule(new_name))


def install() -> None:
    """Make old module names importable."""
    if not any(isinstance(finder, _MovedModuleFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MovedModuleFinder())


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
