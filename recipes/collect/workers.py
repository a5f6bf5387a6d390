"""Processes that record a collection together, on one machine or on several that share its folder.

Each process records the recipes that are neither done nor locked. A lock file marks a trajectory in progress, and the
operating system releases it when the process dies; `result.json` marks a recipe that is done. Processes do not
communicate otherwise: they may start and end at any time, and an idle one continues the trajectory of a killed one.
"""

import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from socket import gethostname
from threading import Thread

from jobs import RESULT_NAME, Job
from space import Recipe

_MAX_DEATHS = 2  # workers that may die at a trajectory before it counts as failed
_POLL_SECONDS = 1.0

# Variables with which a launcher would make a trainer wait for the other ranks.
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class _Worker:
    process: BaseProcess
    messages: Connection
    number: int
    recipe: Recipe | None = None  # in progress


def record_all(job: Job, workers: int, first_device: int, show: bool) -> None:
    """
    Start workers and wait until every recipe is finished or has failed, here or elsewhere.

    Args:
        job ([`Job`]):
            Recipes and their data.
        workers (`int`):
            Number of processes.
        first_device (`int`):
            Index of the first worker's accelerator.
        show (`bool`):
            Whether to show a progress bar.

    Raises:
        `RuntimeError`: If workers die before they start a trajectory, for example because a library is missing.
    """
    from tqdm.auto import tqdm

    left = [recipe for recipe in job.recipes if not job.result(recipe)]
    running = [_start(job, first_device + number) for number in range(min(workers, len(left)))]
    deaths: Counter[str] = Counter()
    total = len(job.recipes)
    with tqdm(total=total, initial=total - len(left), desc="trajectories", smoothing=0, disable=not show) as bar:
        while running:
            wait([end for worker in running for end in (worker.process.sentinel, worker.messages)], _POLL_SECONDS)
            for worker in list(running):
                is_alive = worker.process.is_alive()  # before the last messages are read
                for problem in _read(worker):
                    bar.write(problem, sys.stderr)
                if not is_alive:
                    running.remove(worker)
                    if worker.process.exitcode and _replace(job, worker, deaths, bar.write):
                        running.append(_start(job, worker.number))
            bar.update(len(left) - len(left := [recipe for recipe in left if not job.result(recipe)]))


def work(job: Job, messages: Connection, number: int) -> None:
    """Run a worker process."""
    # Otherwise a worker would outlive a killed main process.
    Thread(target=_end_with_parent, daemon=True).start()
    _redirect_output(job, f"{gethostname()}-{os.getpid()}.log")
    _isolate(number)
    record_rest(job, lambda recipe, problem: messages.send((recipe, problem)))


def record_rest(job: Job, send: Callable[[Recipe | None, str | None], object]) -> None:
    """Record the recipes that are neither done nor locked, until all are done; `send` recipe and problem."""
    waits = True
    while waits:
        waits = False
        for recipe in job.recipes:
            if job.result(recipe):
                continue
            with _lock(job, recipe) as is_locked:
                if not is_locked:
                    waits = True
                elif not job.result(recipe):
                    send(recipe, None)
                    send(None, _record(job, recipe))
        if waits:
            time.sleep(_POLL_SECONDS)


def _record(job: Job, recipe: Recipe) -> str | None:
    """Record one trajectory; write and return a failure."""
    print(f"{recipe.name}: recording", flush=True)
    try:
        from record_one import record_one

        record_one(job, recipe)
    except Exception as error:
        _write_failure(job, recipe, f"{type(error).__name__}: {error}")
        return f"{recipe.name} failed\n{traceback.format_exc()}"
    print(f"{recipe.name}: finished", flush=True)
    return None


@contextmanager
def _lock(job: Job, recipe: Recipe) -> Iterator[bool]:
    """Lock a trajectory while the block runs; yields `False` if another process has locked it."""
    from filelock import FileLock, Timeout

    lock = FileLock(job.output_dir / ".locks" / f"{recipe.name}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        pass
    try:
        yield lock.is_locked
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
    """Read the messages of a worker: the recipe in progress, and problems, which are yielded."""
    try:
        while worker.messages.poll():
            worker.recipe, problem = worker.messages.recv()
            if problem is not None:
                yield problem
    except EOFError:
        return


def _replace(job: Job, worker: _Worker, deaths: Counter[str], write: Callable[..., object]) -> bool:
    """Report the death of a worker; return whether to start another one."""
    name = "the start" if worker.recipe is None else worker.recipe.name
    deaths[name] += 1
    write(f"a worker died with exit code {worker.process.exitcode} at {name}", sys.stderr)
    if deaths[name] >= _MAX_DEATHS:
        if worker.recipe is None:
            raise RuntimeError(f"workers died before they recorded anything; see {job.output_dir / '.logs'}")
        with _lock(job, worker.recipe) as is_locked:
            if is_locked and not job.result(worker.recipe):
                _write_failure(job, worker.recipe, f"{_MAX_DEATHS} workers died at it (out of memory?)")
    return not all(job.result(recipe) for recipe in job.recipes)


def _write_failure(job: Job, recipe: Recipe, error: str) -> None:
    from know_hf.checkpoint import write_json

    job.folder(recipe).mkdir(exist_ok=True)
    write_json(job.folder(recipe) / RESULT_NAME, {"status": "failed", "error": error})


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # safe at any moment: a state counts only when it is complete


def _redirect_output(job: Job, name: str) -> None:
    """Redirect all output of this process to a log, so that the terminal shows one progress bar only."""
    logs = job.output_dir / ".logs"
    logs.mkdir(parents=True, exist_ok=True)
    file = os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)


def _isolate(number: int) -> None:
    """Restrict this process to one thread, one accelerator and one rank, before libraries are imported."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    for name in list(os.environ):
        if name in _LAUNCHER_VARIABLES or name.startswith("TORCHELASTIC_"):
            del os.environ[name]
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
