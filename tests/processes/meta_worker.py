"""One of several processes that meta-train together, launched by `torchrun`; writes notes for the test.

meta_worker.py ROOT    trajectories a0, a1 and a2 are in ROOT
"""

import gc
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from know_hf.meta_learning import (
    MetaTrainingArguments,
    MetaTrainingResult,
    TransitionDataset,
    meta_train,
    start_processes,
)

ARGUMENTS = MetaTrainingArguments(
    steps=60, batch_size=128, learning_rate=3e-3, warmup_steps=10, log_every=20, save_every=20
)


class NotedDataset(TransitionDataset):
    """Dataset that notes the items of every batch, and can kill its process before one is read."""

    def __init__(self, *args: Any, kill_at: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.noted: list[list[int]] = []
        self.kill_at = kill_at

    def __getitems__(self, indices: Any) -> dict[str, dict[str, torch.Tensor]]:
        if len(self.noted) + 1 == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.noted.append([int(index) for index in indices])
        return super().__getitems__(indices)


@dataclass
class Trained:
    result: MetaTrainingResult
    items: list[list[int]]

    @property
    def weights(self) -> dict[str, list[float]]:
        return {name: tensor.flatten().tolist() for name, tensor in self.result.model.state_dict().items()}


def train(root: Path, args: MetaTrainingArguments, kill_at: int | None = None) -> Trained:
    options = {"cache_dir": root / "cache", "progress": False}
    dataset = NotedDataset([root / "a0", root / "a1"], kill_at=kill_at, **options)
    held_out = TransitionDataset([root / "a2"], max_per_tensor=None, **options)
    result = meta_train(None, dataset, {"other": held_out}, args=args, progress=False)
    return Trained(result, dataset.noted)


def write_notes(root: Path, trained: Trained) -> None:
    rank = os.environ["RANK"]
    notes = {
        "num_processes": trained.result.num_processes,
        "items": trained.items,
        "losses": trained.result.losses,
        "weights": trained.weights,
        "skill": {role: asdict(skill) for role, skill in trained.result.held_out_skill["other"].items()},
    }
    (root / f"rank-{rank}.json").write_text(json.dumps(notes))


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()
    processes = start_processes()
    root = Path(sys.argv[1])
    write_notes(root, train(root, ARGUMENTS))
    processes.destroy_process_group()


if __name__ == "__main__":
    main()
