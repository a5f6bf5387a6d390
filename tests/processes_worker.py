"""One of several processes that record together, started by `torchrun`; notes what it saw for the test to read."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import make_trainer
from transformers import TrainerCallback

from know_hf import ForgettingSchedule, induce_forgetting

SCHEDULE = ForgettingSchedule(num_states=3, stratify_by="labels")


class Fail(TrainerCallback):
    """Fails on one rank in the training of state 1."""

    def __init__(self, rank: int):
        self.rank = rank

    def on_step_end(self, args, state, control, train_dataloader, **kwargs):
        if args.process_index == self.rank and len(train_dataloader.dataset) == 32:
            raise ArithmeticError(f"rank {self.rank} fails on purpose")


def watch_writes(folder: Path) -> set[str]:
    """Names of the files that this process opens for writing below a folder from now on, those of all threads."""
    written = set()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and os.fsdecode(args[0]).startswith(f"{folder}/"):
            written.add(os.path.relpath(os.fsdecode(args[0]), folder))

    sys.addaudithook(hook)
    return written


def error_of(trainer: Any, folder: Path) -> str:
    try:
        induce_forgetting(trainer, SCHEDULE, folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    trainer = make_trainer(root / "out")
    rank = trainer.accelerator.process_index
    written = watch_writes(root / "trajectory")
    trajectory = induce_forgetting(trainer, SCHEDULE, root / "trajectory")
    notes = {
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type,
        "written": sorted(written),
        "num_states": trajectory.num_states,
        "weight": trainer.model.classifier[1].weight.flatten().tolist(),
    }
    written.clear()
    induce_forgetting(trainer, SCHEDULE, root / "trajectory")
    notes["written_again"] = sorted(written)

    notes["bad_folder"] = error_of(make_trainer(root / "out"), root / "file" / "trajectory")

    trainer = make_trainer(root / "out")
    if rank == 0:
        trainer.model.classifier[1].bias.data[0] = float("nan")  # DDP gives it to all
    notes["diverged"] = error_of(trainer, root / "diverged")
    (root / f"rank-{rank}.json").write_text(json.dumps(notes))

    trainer = make_trainer(root / "out")
    trainer.add_callback(Fail(rank=1))
    induce_forgetting(trainer, SCHEDULE, root / "failed")


if __name__ == "__main__":
    main()
