"""Forks one recording for every line of JSON on stdin, kills it if asked to, and prints how it ended.

The imports take seconds, a fork takes milliseconds: this makes many kills cheap. A line has the fields of [`Request`];
the answer is the signal or exit code of the recording and its seconds.
"""

import gc
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import make_resnet, make_trainer
from doubles.deaths import count_changes
from doubles.small_trainers import BALANCED
from torch import nn
from transformers import TrainerCallback

from know_hf import WeightTrajectory, induce_forgetting


@dataclass
class Request:
    """What to record and how it ends.

    Attributes:
        task (`str`):
            A key of `TASKS`.
        folder (`str`):
            Folder of the trajectory.
        notes (`str`):
            Another folder. `trainings` gets the index of every stage that begins, `output` what was printed, `changes`
            the number of changes to the files of the trajectory.
        kill_after (`float`, *optional*):
            Seconds after which to send `signal`.
        kill_at (`int`, *optional*):
            Number of the change to the files before which the recording kills itself.
        signal (`int`, *optional*, defaults to `SIGKILL`):
            The signal.
        trouble (`str`, *optional*):
            A key of `TROUBLES`, for the training of state 2.
    """

    task: str
    folder: str
    notes: str
    kill_after: float | None = None
    kill_at: int | None = None
    signal: int = signal.SIGKILL
    trouble: str | None = None

    def begin(self, index: int) -> None:
        with self.note("trainings").open("a") as log:
            log.write(f"{index}\n")
        if self.trouble is not None and index == 2:
            TROUBLES[self.trouble](self)

    def note(self, name: str) -> Path:
        return Path(self.notes, name)


def record_with_trainer(request: Request) -> None:
    trainer = make_trainer(request.note("trainer"), num_train_epochs=1)
    sizes = BALANCED.sizes(len(trainer.train_dataset))

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader, **kwargs):
            request.begin(sizes.index(len(train_dataloader.dataset)))

    trainer.add_callback(Begin())
    induce_forgetting(trainer, BALANCED, request.folder)


def record_in_a_loop(request: Request, model: nn.Module, sizes: tuple[int, ...]) -> None:
    if WeightTrajectory.exists(request.folder):
        trajectory = WeightTrajectory(request.folder)
        trajectory.load_into(model, trajectory.num_states - 1)
    else:
        trajectory = WeightTrajectory.create(request.folder)
    for index in range(trajectory.num_states, len(sizes)):
        request.begin(index)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        trajectory.record(model, num_examples=sizes[index], steps=1, metrics={"loss": 1 / (index + 1)})


def large_module() -> nn.Module:
    """12 MB, so that most of the time is spent writing."""
    torch.manual_seed(0)
    return nn.Linear(3000, 1000)


def limit_file_size(request: Request) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fill_disk(request: Request) -> None:
    with Path(request.folder).with_name("ballast").open("wb", buffering=0) as ballast, suppress(OSError):
        while ballast.write(bytes(2**20)):
            pass


def pause(request: Request) -> None:
    request.note("paused").touch()
    while not request.note("resume").exists():
        time.sleep(0.005)


TASKS: dict[str, Callable[[Request], None]] = {
    "trainer": record_with_trainer,
    "loop": lambda request: record_in_a_loop(request, make_resnet(), (4, 2)),
    "large": lambda request: record_in_a_loop(request, large_module(), (8, 4, 2)),
}
TROUBLES = {"limit_file_size": limit_file_size, "fill_disk": fill_disk, "pause": pause}


def child(request: Request) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = os.open(request.note("output"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    changes = count_changes(request.folder, request.kill_at, request.signal)
    TASKS[request.task](request)
    request.note("changes").write_text(str(changes()))


def run(request: Request) -> dict[str, float]:
    start = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=child, args=(request,))
    process.start()
    process.join(request.kill_after)
    if process.exitcode is None and process.pid is not None:
        os.kill(process.pid, request.signal)
    process.join()
    return {"code": process.exitcode, "seconds": time.monotonic() - start}


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(Request(**json.loads(line)))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
