"""Checkpoints of a meta-training. They are written atomically, and only the same training resumes from them.

checkpoint_dir/
  step-00001000/
    run.json                   settings that must match to resume, and progress; contains no code
    best.safetensors           weights with the best validation skill, if evaluated
    model.safetensors, optimizer.bin, scheduler.bin, random_states_0.pkl …    from `accelerator.save_state`
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError  # what torch raises for a damaged optimizer.bin
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..checkpoint import CheckpointReader, atomic_folder, read_json_object, write_json
from ..distributed import on_main_process

RUN_NAME = "run.json"
BEST_NAME = "best.safetensors"


@dataclass
class Progress:
    """Progress of a training; the fields up to `looks_since_best` are stored in `run.json` under their names."""

    step: int = 0  # completed optimizer steps
    losses: list[dict[str, float]] = field(default_factory=list)  # as reported
    validation: list[dict[str, float | None]] = field(default_factory=list)  # skill by role; None if not finite
    seconds: float = 0.0  # wall-clock time
    best: float | None = None  # mean validation skill
    best_step: int | None = None
    looks_since_best: int = 0  # evaluations
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)


class CheckpointFolder:
    """Checkpoints of one training, of which the newest `keep` are kept.

    The prepared objects of the accelerator are saved; all its processes call the same methods. `run` has the settings
    that identify the training, JSON values only.
    """

    def __init__(self, folder: Path, keep: int, accelerator: Accelerator, run: Mapping[str, Any]) -> None:
        self.folder = folder
        self._keep = keep
        self._accelerator = accelerator
        self._run = json.loads(json.dumps(run))

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, then delete the oldest ones. They are kept if it cannot be written (`OSError`)."""
        target = self.folder / f"step-{progress.step:08d}"
        # Random states of the other processes are not saved: nothing is drawn from them.
        on_main_process(self._accelerator, lambda: self._write(target, progress))

    def resume(self) -> Progress:
        """Load the newest checkpoint, if any. A `ValueError` names a damaged one, or the setting that differs."""
        newest = on_main_process(self._accelerator, lambda: self._checkpoints()[-1:])
        if not newest:
            return Progress()
        path = newest[0] / RUN_NAME
        hint = f"delete {newest[0]} to resume from an earlier checkpoint"
        content = read_json_object(path, hint)
        try:
            run, progress = dict(content["run"]), Progress(**content["progress"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not describe a training ({error!r}); {hint}") from error
        for key, value in self._run.items():
            if key in run and run[key] != value:
                raise ValueError(
                    f"{newest[0]} was saved by a training with {key}={run[key]!r}, this one has {value!r};"
                    " train with the same value, or choose another checkpoint_dir"
                )
        try:
            self._accelerator.load_state(str(newest[0]))
        except (EOFError, KeyError, RuntimeError, SafetensorError, UnpicklingError) as error:
            raise ValueError(f"{newest[0]} cannot be loaded ({error}); {hint}") from error
        best = newest[0] / BEST_NAME
        if best.exists():
            reader = CheckpointReader([best])
            progress.best_weights = {name: reader.tensor(name) for name in reader.names}
        return progress

    def _write(self, target: Path, progress: Progress) -> None:
        content = asdict(progress)
        del content["best_weights"]
        try:
            # A folder of that name is from another training, or the checkpoint that this one resumed from.
            with atomic_folder(target, overwrite=True) as work:
                self._accelerator.save_state(str(work))
                if progress.best_weights:
                    save_file(progress.best_weights, work / BEST_NAME, metadata={"format": "pt"})
                write_json(work / RUN_NAME, {"run": self._run, "progress": content})
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises the last if the disk is full
            raise OSError(
                f"{target} could not be written ({error}). Free disk space and train again: training resumes from the"
                " last checkpoint."
            ) from error
        for old in self._checkpoints()[: -self._keep]:
            shutil.rmtree(old)

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob(f"step-{8 * '[0-9]'}"))
