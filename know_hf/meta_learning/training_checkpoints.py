"""Checkpoints of a meta-training: written whole or not at all, and gone on from only by the same training.

checkpoint_dir/
  step-00001000/
    run.json                   what must be the same to go on, and how far it had come; nothing that runs
    best.safetensors           weights of the best validation skill, where there was a look
    model.safetensors, optimizer.bin, scheduler.bin, random_states_0.pkl …    of accelerate's save_state
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from ..checkpoint import atomic_folder, write_json
from ..distributed import on_main_process

RUN_NAME = "run.json"
BEST_NAME = "best.safetensors"
_STEP = re.compile(r"step-(\d+)")


@dataclass
class Progress:
    """
    How far a training has come.

    Args:
        step (`int`): Optimizer steps done.
        losses (`list[dict[str, float]]`): What was reported.
        validation (`list[dict[str, float | None]]`): Validation skill by role of every look; `None` where not finite.
        seconds (`float`): Wall-clock time of the training.
        best (`float`, *optional*): Best mean validation skill.
        best_step (`int`, *optional*): The step it was found at.
        looks_since_best (`int`): Looks since then.
        best_weights (`dict[str, torch.Tensor]`): The weights it was found with.
    """

    step: int = 0
    losses: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float | None]] = field(default_factory=list)
    seconds: float = 0.0
    best: float | None = None
    best_step: int | None = None
    looks_since_best: int = 0
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)


class CheckpointFolder:
    """
    The checkpoints of one training.

    Args:
        folder (`Path`): Where they are.
        keep (`int`): How many are kept, the newest.
        accelerator (`Accelerator`): Whose prepared objects are saved; all its processes call the same methods.
        run (`Mapping[str, Any]`): What makes this training what it is, JSON values only.
    """

    def __init__(self, folder: Path, keep: int, accelerator: Accelerator, run: Mapping[str, Any]) -> None:
        self.folder = folder
        self._keep = keep
        self._accelerator = accelerator
        self._run = json.loads(json.dumps(run))

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint, then deletes the oldest ones.

        Raises:
            `OSError`: when it can't be written; those before it are kept.
        """
        target = self.folder / f"step-{progress.step:08d}"
        # Random states of the other processes are left out: nothing is drawn from them.
        on_main_process(self._accelerator, lambda: self._write(target, progress))

    def resume(self) -> Progress:
        """Loads the newest checkpoint, if there is one.

        Returns:
            [`Progress`]: how far it had come; at the beginning without a checkpoint.

        Raises:
            `ValueError`: when it is one of another training; names what differs.
        """
        newest = on_main_process(self._accelerator, lambda: self._steps()[-1:])
        if not newest:
            return Progress()
        content = json.loads((newest[0] / RUN_NAME).read_text(encoding="utf-8"))
        for key, value in self._run.items():
            if key in content["run"] and content["run"][key] != value:
                raise ValueError(
                    f"{newest[0]} is a checkpoint of a training with {key}={content['run'].get(key)!r}, this one has"
                    f" {value!r}; train with the same, or choose another checkpoint_dir"
                )
        self._accelerator.load_state(str(newest[0]))
        best = newest[0] / BEST_NAME
        return Progress(**content["progress"], best_weights=load_file(best) if best.exists() else {})

    def _write(self, target: Path, progress: Progress) -> None:
        # overwrite: a folder of that name is one that another training left, or the step that was resumed from
        with atomic_folder(target, overwrite=True) as work:
            self._accelerator.save_state(str(work))
            if progress.best_weights:
                save_file(progress.best_weights, work / BEST_NAME, metadata={"format": "pt"})
            content = asdict(progress)
            del content["best_weights"]
            write_json(work / RUN_NAME, {"run": self._run, "progress": content})
        for old in self._steps()[: -self._keep]:
            shutil.rmtree(old)

    def _steps(self) -> list[Path]:
        found = [path for path in self.folder.glob("step-*") if _STEP.fullmatch(path.name)]
        return sorted(found, key=lambda path: path.name)
