"""Programs in a terminal: output on terminals of any encoding, and errors in one line. Imports nothing heavy."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_LONGEST_WORD = 300  # characters


def run_program(name: str, function: Callable[[], object], reword: Callable[[str], str] = str) -> int:
    """Run a program and report the errors that its input causes: `ValueError`, `OSError` and `ImportError`.

    All other exceptions are defects of the program and keep their traceback. Characters that the terminal cannot show
    are printed as escapes; a closed stream discards its output. `reword` changes the messages of errors.

    Returns:
        `int`: Exit code: the result of the function if it is a number, else 0; 1 after an error, which is printed to
            standard error with its notes; 130 after Ctrl-C.
    """
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        result = function()
        return result if isinstance(result, int) else 0
    except (ValueError, OSError, ImportError) as error:
        text = str(error).strip()
        if isinstance(error, OSError) and error.filename and error.strerror:  # without "[Errno 17]"
            text = f"{error.filename}: {error.strerror}"
        message = "\n".join([text, *getattr(error, "__notes__", ())])
        sys.stderr.write(f"{name}: {shorten_words(reword(message))}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{name}: interrupted\n")
        return 130


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide all progress bars of tqdm, those of libraries included, whatever they pass for `disable`."""
    from tqdm.std import tqdm

    create = tqdm.__init__

    def create_hidden(self: Any, *args: Any, **options: Any) -> None:
        create(self, *args, **options | {"disable": True})

    tqdm.__init__ = create_hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.__init__ = create  # type: ignore[method-assign]


def shorten_words(text: str) -> str:
    """Cut the middle of very long words, such as names that were meant to be files."""
    half = _LONGEST_WORD // 2
    return re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda match: f"{match[0][:half]}…{match[0][-half:]}", text)


def first_names(names: Sequence[str], most: int) -> str:
    """Return some names for a message, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return the lines of a table of text: the first column aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)
