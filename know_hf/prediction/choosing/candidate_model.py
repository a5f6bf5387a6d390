"""[`CandidateModel`]: the model that a gate evaluates its candidates in."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...distributed import on_main_process
from ...model_tensors import names_in_memory, restored_modes
from ...trajectory import WeightTrajectory, load_pretrained
from ...trajectory.loading import without_loading_bars
from ..tensor_sources import TensorSource, cast
from ..write_checkpoint import (
    WriteOptions,
    checkpoint_specs,
    computed,
    fill_checkpoint,
    recalibrated_statistics,
)


class CandidateModel:
    """A model that is loaded from one candidate on disk and then gets the tensors of others in memory.

    Other candidates are written and loaded as well for adapters, which are small, if several processes share the work,
    if saving splits or merges tensors of the model, or if an evaluation has changed its tensors, such as their dtype.

    The folder `scratch` exists only while a candidate is loaded.
    """

    def __init__(
        self,
        trajectory: WeightTrajectory,
        scratch: Path,
        options: WriteOptions,
        base_model: PreTrainedModel | None,
        device: torch.device | str | None,
    ) -> None:
        self.trajectory, self.scratch, self.options = trajectory, scratch, options
        self.base_model, self.device = base_model, device
        self.model: Any = None  # on the main process
        self._layout: list[Any] = []

    @torch.no_grad()
    def set(self, tensors: TensorSource, recalibrates: bool, verify: bool) -> None:
        """Give the model the tensors of a candidate.

        `verify` compares the recorded files with their SHA-256; the candidate is then written.
        """
        options = self.options if recalibrates else replace(self.options, recalibrate_with=None)
        if not verify and self._layout and self._layout == _layout(self.model):
            self._fill(tensors)
            if options.recalibrate_with is not None:
                new = recalibrated_statistics(copy.deepcopy(self.model), options.recalibrate_with)
                self.model.load_state_dict(new, strict=False)
            return
        accelerator = options.accelerator
        on_main_process(accelerator, self.scratch.mkdir)
        fill_checkpoint(self.trajectory, tensors, self.scratch, options, verify=verify, show_progress=False)
        on_main_process(accelerator, self._load)

    def _load(self) -> None:
        self.close()
        with without_loading_bars():
            model = load_pretrained(self.scratch, self.options.model_class, self.base_model)
        accelerator = self.options.accelerator
        is_shared = accelerator is not None and accelerator.num_processes > 1
        # of an adapter, peft tells the names only after a look for the config of the base model, perhaps on the Hub
        if not (is_shared or self.base_model) and names_in_memory(model).keys() >= set(self.trajectory.names):
            self._layout = _layout(model)  # writing to its tensors copies their pages; the file is mapped privately
        self.model = model if self.device is None else model.to(self.device)
        shutil.rmtree(self.scratch)

    def _fill(self, tensors: TensorSource) -> None:
        in_memory, own = names_in_memory(self.model), self.model.state_dict()
        specs = checkpoint_specs(self.trajectory, self.options.dtype)
        for piece, values, _ in computed(tensors, specs):
            values = cast(values, specs[piece.name].dtype, piece.name, self.trajectory)
            own[in_memory[piece.name]].view(-1)[piece.start : piece.stop].copy_(values)

    def close(self) -> None:
        """Remove the adapter from its base model."""
        if self.model is not None and self.base_model is not None:
            # delete first: unload() alone would keep the modules that were trained beside the adapter
            self.model.delete_adapter(self.model.active_adapter)
            self.model.unload()
        self.model, self._layout = None, []


def _layout(model: Any) -> list[Any]:
    return [(name, t.shape, t.dtype, t.is_contiguous()) for name, t in model.state_dict().items()]


@contextmanager
def unchanged(model: PreTrainedModel | None) -> Iterator[None]:
    """Give a model its device, modes and `requires_grad` back after the block."""
    if model is None:
        yield
        return
    device = model.device
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with restored_modes(model):
        try:
            yield
        finally:
            model.to(device)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
