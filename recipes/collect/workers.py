"""Processes that record a collection together, on one machine or on several that share its folder.

Each process records the recipes that are neither finished nor locked. A lock file marks a trajectory in progress, and
the operating system releases it when the process dies; `result.json` marks a finished one. Processes do not
communicate otherwise: any number may join and leave, and an idle one continues the trajectory of a killed one.
"""

import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from socket import gethostname
from threading import Thread

from jobs import RESULT_NAME, Job, result
from space import Recipe

_MOST_DEATHS = 2  # processes that may die at a trajectory before it counts as failed
_PATIENCE = 1.0  # seconds between two looks at the other processes

# Variables of a launcher that would make a trainer wait for the other ranks.
_OF_THE_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class _Worker:
    process: BaseProcess
    messages: Connection
    number: int
    at: str | None = field(default=None)  # the trajectory it records


def record_all(job: Job, workers: int, first_device: int, show: bool) -> None:
    """Start workers and wait until every recipe is finished or has failed, here or elsewhere.

    Args:
        job ([`Job`]):
            The recipes and their data.
        workers (`int`):
            Number of processes.
        first_device (`int`):
            Index of the first worker's accelerator.
        show (`bool`):
            Whether to show a progress bar.

    Raises:
        `RuntimeError`: if workers die before they start a trajectory, for example because a library is missing.
    """
    from tqdm.auto import tqdm

    (job.output_dir / ".locks").mkdir(parents=True, exist_ok=True)
    names = {recipe.name for recipe in job.recipes}
    done = {name for name in names if result(job.output_dir, name)}
    running = [_start(job, first_device + number) for number in range(min(workers, len(names - done)))]
    deaths: Counter[str | None] = Counter()
    bar = tqdm(total=len(names), initial=len(done), desc="trajectories", smoothing=0, disable=not show)
    with bar:
        while running:
            wait([worker.process.sentinel for worker in running] + [w.messages for w in running], timeout=_PATIENCE)
            for worker in list(running):
                ended = not worker.process.is_alive()  # before reading the last messages
                for problem in _read(worker):
                    bar.write(problem, sys.stderr)
                if not ended:
                    continue
                running.remove(worker)
                if worker.process.exitcode == 0:
                    continue
                deaths[worker.at] += 1
                bar.write(f"a worker died with exit code {worker.process.exitcode} at {worker.at}", sys.stderr)
                if deaths[worker.at] >= _MOST_DEATHS:
                    if worker.at is None:
                        _stop(running)
                        raise RuntimeError(
                            f"workers died before they recorded anything; see the logs in {job.output_dir / '.logs'}"
                        )
                    _give_up(job, worker.at, f"{_MOST_DEATHS} workers died at it (out of memory?)")
                if not all(result(job.output_dir, name) for name in names):
                    running.append(_start(job, worker.number))
            new = {name for name in names - done if result(job.output_dir, name)}
            done |= new
            if new:
                bar.update(len(new))


def work(job: Job, messages: Connection, number: int) -> None:
    """Main function of a worker process."""
    # otherwise a worker would outlive a killed main process
    Thread(target=_end_with_parent, daemon=True).start()
    _log_to(job.output_dir / ".logs" / f"{gethostname()}-{os.getpid()}.log")
    _be_alone(number)
    take_what_is_left(job, messages)


def take_what_is_left(job: Job, messages: Connection) -> None:
    """Record the recipes that are neither finished nor locked, until all are finished."""
    others = True
    while others:
        others = False
        for recipe in job.recipes:
            if result(job.output_dir, recipe.name):
                continue
            with _claimed(job.output_dir, recipe.name) as mine:
                if not mine:
                    others = True
                elif not result(job.output_dir, recipe.name):
                    messages.send((recipe.name, None))
                    messages.send((None, _record(job, recipe)))
        if others:
            time.sleep(_PATIENCE)


def _record(job: Job, recipe: Recipe) -> str | None:
    """Record one trajectory; write and return a failure."""
    print(f"{recipe.name}: recording", flush=True)
    try:
        source = job.sources[recipe.dataset]
        from record_one import record_one

        record_one(recipe, source, job.models, job.output_dir)
    except Exception as error:
        _write_failure(job.output_dir, recipe.name, f"{type(error).__name__}: {error}")
        return f"{recipe.name} failed\n{traceback.format_exc()}"
    print(f"{recipe.name}: finished", flush=True)
    return None


@contextmanager
def _claimed(output_dir: Path, name: str) -> Iterator[bool]:
    """Lock a trajectory while the block runs; yields whether it worked."""
    from filelock import FileLock, Timeout

    lock = FileLock(output_dir / ".locks" / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _start(job: Job, number: int) -> _Worker:
    context = get_context("spawn")
    messages, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(job, sender, number), daemon=True)
    process.start()
    sender.close()
    return _Worker(process, messages, number)


def _read(worker: _Worker) -> Iterator[str]:
    """Read a worker's messages: the trajectory it records, and problems, which are yielded."""
    try:
        while worker.messages.poll():
            worker.at, problem = worker.messages.recv()
            if problem is not None:
                yield problem
    except EOFError:
        return


def _give_up(job: Job, name: str, why: str) -> None:
    with _claimed(job.output_dir, name) as mine:
        if mine and not result(job.output_dir, name):
            _write_failure(job.output_dir, name, why)


def _write_failure(output_dir: Path, name: str, why: str) -> None:
    from know_hf.checkpoint import write_json

    (output_dir / name).mkdir(exist_ok=True)
    write_json(output_dir / name / RESULT_NAME, {"status": "failed", "error": why})


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.terminate()
        worker.process.join()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # safe at any moment: a state counts only when it is complete


def _log_to(path: Path) -> None:
    """Redirect all output of this process to a file, so that the screen shows one progress bar only."""
    path.parent.mkdir(exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)


def _be_alone(number: int) -> None:
    """Restrict this process to one thread, one accelerator and one rank, before libraries are imported."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    for name in list(os.environ):
        if name in _OF_THE_LAUNCHER or name.startswith("TORCHELASTIC_"):
            del os.environ[name]
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
