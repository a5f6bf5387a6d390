"""Processes that die at a change on disk."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def count_changes(folder: str | Path, kill_at: int | None = None, number: int = signal.SIGKILL) -> Callable[[], int]:
    """Count the changes to files in a folder from now on, by all threads, and die before one of them."""
    changes = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal changes
        is_change = bool(args[2] & WRITING) if event == "open" else event in CHANGES
        path = os.fsdecode(args[0]) if is_change else ""
        if path.startswith(f"{folder}/") and not path.endswith(".lock"):
            changes += 1
            if changes == kill_at:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)
    return lambda: changes
