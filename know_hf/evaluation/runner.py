"""Runs the independent cells of a comparison, in several processes where there are cores for it."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar

from tqdm.auto import tqdm

Cell = TypeVar("Cell", contravariant=True)
Result = TypeVar("Result", covariant=True)

# One thread a process: the same sums in the same order however many processes there are.
_WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class CellFunction(Protocol[Cell, Result]):
    """Runs one cell; `advance(what)` tells that one unit of work is done and what comes next."""

    def __call__(self, cell: Cell, advance: Callable[[str], None]) -> Result: ...


def run_cells(
    function: CellFunction[Cell, Result],
    cells: Sequence[Cell],
    *,
    units: int = 1,
    num_processes: int = 1,
    description: str = "cells",
) -> Iterator[tuple[int, Result]]:
    """Runs cells and gives each result as soon as it is there, under one progress bar.

    Args:
        function ([`CellFunction`]): Runs one cell, on one thread. For more than one process it and the cells must be
            picklable, and a script that calls this needs `if __name__ == "__main__":`.
        cells (sequence): What is run, each by itself.
        units (`int`, *optional*, defaults to `1`): How often a cell calls `advance`, for the progress bar.
        num_processes (`int`, *optional*, defaults to `1`): Processes to run cells in; with 1 they run in this one.
        description (`str`, *optional*, defaults to `"cells"`): Text of the bar.

    Yields:
        `tuple[int, Result]`: The cell's index and its result, in the order in which they end.

    Raises:
        `ChildProcessError`: when a worker process ends without a result.
        `RuntimeError`: for an exception of the function in a worker, with its traceback; a `ValueError`, which says
            what is wrong by itself, is raised as one. In this process all are raised as they are.
    """
    with tqdm(total=units * len(cells), desc=description, unit="step") as bar:
        if num_processes <= 1 or len(cells) <= 1:
            for index, cell in enumerate(cells):
                with _one_thread(), _without_bars():
                    result = function(cell, lambda what: _advance(bar, what))
                yield index, result
        else:
            yield from _in_processes(function, cells, min(num_processes, len(cells)), bar)


def _in_processes(
    function: CellFunction[Cell, Result], cells: Sequence[Cell], num_processes: int, bar: Any
) -> Iterator[tuple[int, Result]]:
    # spawn: a forked child would inherit torch's threads in whatever state they are
    context = multiprocessing.get_context("spawn")
    waiting = iter(enumerate(cells))
    busy: dict[Connection, int] = {}
    processes = []
    try:
        with _environment(_WORKER_ENVIRONMENT):
            for _ in range(num_processes):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(function, theirs), daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                _hand_out(ours, waiting, busy)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                try:
                    kind, content = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise ChildProcessError(
                        f"the process that ran cell {busy[connection]} ended without a result; was it out of memory,"
                        " or does the script that started it lack `if __name__ == '__main__':`?"
                    ) from None
                if kind == "advance":
                    _advance(bar, content)
                elif kind == "error":
                    failure = RuntimeError(f"cell {busy[connection]} failed in its process:\n{content['traceback']}")
                    if content["refusal"] is None:
                        raise failure
                    raise ValueError(content["refusal"]) from failure
                else:
                    index = busy.pop(connection)
                    _hand_out(connection, waiting, busy)
                    yield index, content
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _hand_out(connection: Connection, waiting: Iterator[tuple[int, Cell]], busy: dict[Connection, int]) -> None:
    following = next(waiting, None)
    if following is None:
        connection.close()  # the worker then ends by itself
        return
    index, cell = following
    connection.send(cell)
    busy[connection] = index


def _work(function: CellFunction[Cell, Result], connection: Connection) -> None:
    """A worker: runs cells until the other end is closed."""
    import torch

    torch.set_num_threads(1)
    try:
        while True:
            cell = connection.recv()
            try:
                # Bars of several processes would run over each other; an error's traceback goes by the connection.
                with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
                    result = function(cell, lambda what: connection.send(("advance", what)))
            except Exception as error:
                refusal = str(error) if isinstance(error, ValueError) else None
                connection.send(("error", {"traceback": traceback.format_exc(), "refusal": refusal}))
                return
            connection.send(("result", result))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # there is no more to do, or nobody to do it for


def _advance(bar: Any, what: str) -> None:
    bar.set_postfix_str(what, refresh=False)
    bar.update()


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keeps transformers from showing a bar for every model that a cell loads."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables that child processes started meanwhile inherit."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
