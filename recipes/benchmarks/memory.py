"""Memory of this process."""

import resource
from pathlib import Path


def peak_memory() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    # not ru_maxrss, which also counts the process that started this one
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def current_memory() -> int:
    """Return the resident set of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def reset_peak_memory() -> None:
    """Start [`peak_memory`] again from the current memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
