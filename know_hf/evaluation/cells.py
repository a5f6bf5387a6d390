"""Cells of a comparison: independent pieces of work, run in parallel processes and stored one by one."""

import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import patch_environment
from tqdm.auto import tqdm

from ..checkpoint import locked_folder, read_json_object, write_json
from ..local_paths import public_values
from ..trajectory.loading import without_loading_bars

Cell = TypeVar("Cell")
Result = TypeVar("Result")

TRAJECTORY = "trajectory"  # the cell of each seed that is no arm


class CellStore:
    """A folder of a comparison with one JSON file per finished cell.

    Args:
        path (`str` or `Path`):
            The folder; it is created if missing.
        identity (`Mapping[str, Any]`):
            Everything that the results depend on, as JSON values. `identity.json` stores it, with only the last part
            of local paths.

    Raises:
        `ValueError`: If the folder has results with another identity, names the difference; or if `identity.json` is
            damaged.
        `FileExistsError`: If the folder has other content.
        `BlockingIOError`: If another process creates the store.
    """

    IDENTITY_NAME = "identity.json"

    def __init__(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        stored_at = self.path / self.IDENTITY_NAME
        if stored_at.exists():
            self.check_same(read_json_object(stored_at, "use a new output folder"), identity)
        elif not self._is_new():
            raise FileExistsError(f"{self.path} is not empty and has no {self.IDENTITY_NAME}; use a new output folder")
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.locked():
                write_json(stored_at, public_values(identity))
        (self.path / "cells").mkdir(exist_ok=True)

    def locked(self) -> AbstractContextManager[None]:
        """Keep other comparisons from writing to the folder during a `with` block.

        Raises:
            `BlockingIOError`: If another comparison writes to it.
        """
        return locked_folder(self.path)

    def read(self, cell: str) -> dict[str, Any] | None:
        """Return the result of a cell, or `None` if it is not finished. A `ValueError` names a damaged file."""
        path = self.file(cell)
        return read_json_object(path, "delete it to run the cell again") if path.exists() else None

    def write(self, cell: str, result: Mapping[str, Any]) -> None:
        """Store the result of a cell atomically."""
        write_json(self.file(cell), result)

    def check_same(self, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        """Check that stored results depend on the same as new ones.

        Raises:
            `ValueError`: If a value differs; names its key.
        """
        expected = json.loads(json.dumps(public_values(expected)))  # as it is read back: lists instead of tuples
        stored = public_values(stored)  # of 0.2 it has paths
        for name in sorted(stored.keys() | expected.keys()):
            if stored.get(name) != expected.get(name):
                old, new = (json.dumps(values.get(name)) for values in (stored, expected))
                raise ValueError(
                    f"{self.path} has results with different {name}: {old:.1000} instead of {new:.1000}; use another"
                    " output folder, or delete this one"
                )

    def _is_new(self) -> bool:
        """Whether the folder has nothing but what a process leaves that is killed in the constructor."""
        paths = list(self.path.iterdir()) if self.path.exists() else []
        left_over = (f".{self.IDENTITY_NAME}.partial", "cells")
        return all(path.name in left_over and not (path.is_dir() and any(path.iterdir())) for path in paths)

    def file(self, cell: str) -> Path:
        """Return the file of a cell."""
        return self.path / "cells" / f"{cell}.json"


class CellTimes:
    """Seconds that cells take, by what they measure: an arm, or a trajectory."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}

    def add(self, name: str, seconds: float) -> None:
        """Note the seconds of a finished cell."""
        self._seconds.setdefault(name, []).append(seconds)

    def expected(self, name: str) -> float | None:
        """Return the mean of an arm, or of all arms if it has none; `None` if nothing is known."""
        arms = [seconds for arm, of_arm in self._seconds.items() if arm != TRAJECTORY for seconds in of_arm]
        known = self._seconds.get(name, [] if name == TRAJECTORY else arms)
        return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Order:
    """When the cells of [`run_cells`] start.

    Args:
        is_ready (`Callable`, *optional*):
            Returns whether a cell can start. If not, later cells start first, and it is asked again whenever another
            cell finishes.
        expected (`Callable`, *optional*):
            Returns the seconds that a cell takes, `None` if unknown; for the time left and the deadline.
        deadline (`float`, *optional*):
            Value of `time.monotonic()`; no cell starts that is expected to end later.
    """

    is_ready: Callable[[Any], bool] = lambda cell: True
    expected: Callable[[Any], float | None] = lambda cell: None
    deadline: float = math.inf


_ANY_ORDER = Order()
_BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"  # its own time left counts all cells as equal


def run_cells(
    function: Callable[[Cell], Result],
    cells: Sequence[Cell],
    *,
    num_processes: int = 1,
    description: str = "cells",
    label: Callable[[Cell], str] = str,
    order: Order = _ANY_ORDER,
) -> Iterator[tuple[int, Result]]:
    """Run cells in the given order, each on one thread, under a progress bar that shows the time left.

    Args:
        function (`Callable`):
            Runs one cell. For more than one process it and the cells must be picklable, and a script that calls this
            function needs `if __name__ == "__main__":`.
        cells (sequence):
            The cells.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of processes; with 1 the cells run in this one.
        description (`str`, *optional*, defaults to `"cells"`):
            Text of the progress bar.
        label (`Callable`, *optional*, defaults to `str`):
            Returns what the bar shows of a finished cell.
        order ([`Order`], *optional*):
            Which cells wait for others, and the time limit.

    Yields:
        `tuple[int, Result]`: Index and result of each cell, as soon as it is finished.

    Raises:
        `ChildProcessError`: If a worker process dies.
        `RuntimeError`: If the function raises in a worker, with the worker's traceback as cause; a `ValueError` stays
            a `ValueError`. With one process exceptions are not changed.
    """
    num_processes = max(1, min(num_processes, len(cells)))
    unfinished = dict(enumerate(cells))
    queue = _Queue(cells, order)
    if num_processes == 1:
        results = _run_here(function, queue)
    else:
        results = _run_in_pool(function, queue, num_processes)
    bar_format = None if order is _ANY_ORDER else _BAR_FORMAT
    with closing(results), tqdm(total=len(cells), desc=description, unit="cell", bar_format=bar_format) as bar:
        for index, result in results:
            yield index, result
            del unfinished[index]
            left = sum(order.expected(cell) or 0 for cell in unfinished.values()) / num_processes
            bar.set_postfix_str(label(cells[index]) + (f", {_in_words(left)} left" if left else ""), refresh=False)
            bar.update()


class _Queue:
    """Cells that have not started."""

    def __init__(self, cells: Sequence[Any], order: Order) -> None:
        self._cells, self._order = dict(enumerate(cells)), order

    def pop(self) -> tuple[int, Any] | None:
        """Return the index and the cell to start now; `None` if none is ready, or none ends in time."""
        ready = (index for index, cell in self._cells.items() if self._order.is_ready(cell))
        if (index := next(ready, None)) is None:
            return None
        if time.monotonic() + (self._order.expected(self._cells[index]) or 0) > self._order.deadline:
            self._cells.clear()
            return None
        return index, self._cells.pop(index)


def _run_here(function: Callable[[Cell], Result], queue: _Queue) -> Generator[tuple[int, Result], None, None]:
    while (entry := queue.pop()) is not None:
        index, cell = entry
        with one_thread_without_bars():
            result = function(cell)
        yield index, result


def _run_in_pool(
    function: Callable[[Cell], Result], queue: _Queue, num_processes: int
) -> Generator[tuple[int, Result], None, None]:
    context = multiprocessing.get_context("spawn")  # a forked child would inherit the state of torch's threads
    executor = ProcessPoolExecutor(num_processes, context, initializer=_start_worker)
    before = multiprocessing.active_children()
    running: dict[Future[Any], int] = {}
    try:
        while True:
            while len(running) < num_processes and (entry := queue.pop()) is not None:
                index, cell = entry
                # submitting starts a worker while there are too few; on one thread, sums have the same order for any
                # number of processes
                with patch_environment(OMP_NUM_THREADS=1, MKL_NUM_THREADS=1), _interrupts_blocked():
                    running[executor.submit(_run_in_worker, function, index, cell)] = index
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running[future], future.result()
                del running[future]
    except BrokenProcessPool as error:
        hint = "check its memory, and that the script has `if __name__ == '__main__':`"
        raise ChildProcessError(f"a worker process died without a result; {hint}") from error
    finally:
        if running:  # an error, or the caller stopped: do not wait for the rest
            for process in multiprocessing.active_children():
                if process not in before:
                    process.terminate()
        executor.shutdown(cancel_futures=True)


def _in_words(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"


def _start_worker() -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # bars of several processes would overwrite each other
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End the worker when the parent is killed: its queue never closes, as each worker holds both of its ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_in_worker(function: Callable[[Cell], Result], index: int, cell: Cell) -> Result:
    try:
        return function(cell)
    except ValueError as error:
        raise ValueError(str(error)) from error  # plain exceptions can always be sent
    except Exception as error:
        raise RuntimeError(f"cell {index} failed in its process: {type(error).__name__}: {error}") from error


@contextmanager
def one_thread_without_bars() -> Iterator[None]:
    """Run the block as a cell runs in this process: on one thread, without progress bars of loading."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with without_loading_bars():
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Deliver Ctrl-C after the `with` block, and never to processes that start in it: their parent ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
