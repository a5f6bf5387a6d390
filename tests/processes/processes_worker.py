"""One of several processes that record together; notes what it saw for the test to read."""

import gc
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import make_trainer
from doubles.small_trainers import BALANCED, TARGETS, adapt, make_case
from processes.sharded_recordings import (
    FSDP2,
    HALVES,
    make_sharded_trainer,
    record_in_a_loop,
    record_interrupted,
    record_sharded,
    sharding,
)
from transformers import TrainerCallback

from know_hf import ForgettingSchedule, induce_forgetting
from know_hf.cli import program

RECIPE = Path(__file__).parents[2] / "recipes/record/record.py"


class FailOnRankOne(TrainerCallback):
    """Fails on one rank in the training of state 1."""

    def on_step_end(self, args, state, control, train_dataloader, **kwargs):
        if args.process_index == 1 and len(train_dataloader.dataset) == 32:
            raise ArithmeticError("rank 1 fails")


def watch_writes(folder: Path) -> set[str]:
    """Names of the files in a folder that any thread of this process opens for writing from now on."""
    written = set()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and os.fsdecode(args[0]).startswith(f"{folder}/"):
            written.add(os.path.relpath(os.fsdecode(args[0]), folder))

    sys.addaudithook(hook)
    return written


def error_of(trainer: Any, folder: Path) -> str:
    try:
        induce_forgetting(trainer, BALANCED, folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def run_recipe(root: Path) -> int:
    """Run `recipes/record/record.py` in these processes and return its exit code."""
    paths = [f"--{name}={root / name}" for name in ("model", "dataset", "output_dir")]
    options = ["--task=text-classification", "--eval-split=test", "--epochs=1", "--num-states=2"]
    sys.argv = [str(RECIPE), *paths, *options, "--training", "disable_tqdm=true"]
    program._destroy_process_group = lambda: None  # the processes go on
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as done:
        return int(done.code or 0)
    raise AssertionError("the recipe did not exit")


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects garbage at the start of every training
    trainer = make_trainer(root / "out")
    rank = trainer.accelerator.process_index
    written = watch_writes(root / "trajectory")
    trajectory = induce_forgetting(trainer, BALANCED, root / "trajectory")
    notes = {
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type,
        "written": sorted(written),
        "num_states": trajectory.num_states,
        "weight": trainer.model.classifier[1].weight.flatten().tolist(),
        "recipe": run_recipe(root),
    }
    written.clear()
    induce_forgetting(trainer, BALANCED, root / "trajectory")
    notes["written_again"] = sorted(written)

    record_interrupted(lambda: make_trainer(root / "out"), BALANCED, root / "interrupted")

    for name in TARGETS:
        full, lora = make_case(name, root / "out"), adapt(make_case(name, root / "out"), name)
        for kind, trainer in (("full", full), ("lora", lora)):
            induce_forgetting(trainer, ForgettingSchedule(num_states=2), root / f"{name}-{kind}")

    notes["bad_folder"] = error_of(make_trainer(root / "out"), root / "file" / "trajectory")

    trainer = make_trainer(root / "out")
    if rank == 0:
        trainer.model.classifier[1].bias.data[0] = float("nan")  # DDP copies it to all
    notes["diverged"] = error_of(trainer, root / "diverged")
    with sharding():
        notes |= record_sharded(root, **FSDP2)
        record_in_a_loop(root, "sharded_loop", **FSDP2)
    induce_forgetting(make_sharded_trainer(root), HALVES, root / "branches")
    notes["loop"] = record_in_a_loop(root, "loop", bf16=True)
    try:
        record_in_a_loop(root, "evaluated_first")
    except ValueError as error:
        notes["evaluated_first"] = str(error)
    (root / f"rank-{rank}.json").write_text(json.dumps(notes))

    trainer = make_trainer(root / "out")
    trainer.add_callback(FailOnRankOne())
    induce_forgetting(trainer, BALANCED, root / "failed")


if __name__ == "__main__":
    main()
