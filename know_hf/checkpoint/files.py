"""JSON files, hashes, free disk space, permissions and fsync."""

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 200_000_000
"""Largest file that [`read_json_object`] reads."""


def parse_json(data: bytes, parse_int: Callable[[str], Any] = int) -> Any:
    """Parse JSON from an untrusted source; `parse_int` converts the digits of integers.

    Raises:
        `ValueError`: if the data are not UTF-8 or not JSON, are nested too deeply, repeat a key, or contain NaN or
            Infinity.
    """
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_int=parse_int
        )
    except (RecursionError, MemoryError) as error:
        raise ValueError("it is nested too deeply or too large for the memory") from error


def read_json(path: Path, max_bytes: int) -> Any:
    """Read a JSON file of at most `max_bytes` from an untrusted source; errors as [`parse_json`]."""
    with path.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size  # read() allocates what it is asked for
        data = handle.read(min(size, max_bytes) + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it has more than {max_bytes / 1e6:.0f} MB")
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error


def read_json_object(path: Path, hint: str = "restore it from a copy") -> dict[str, Any]:
    """Read the object in a JSON file. A `ValueError` names the file and ends with the hint."""
    try:
        content = read_json(path, MAX_JSON_BYTES)
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; {hint}") from error
    return content


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by JSON in one step; a crash leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # never write through a link
    with partial.open("x", encoding="utf-8") as handle:
        json.dump(content, handle, indent=2, allow_nan=False, ensure_ascii=False)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)
    fsync(path.parent)


def check_free_disk(path: Path, needed: int) -> None:
    """Raise an `OSError` if the disk of `path` has fewer than `needed` free bytes. `path` need not exist."""
    if (free := free_disk(path)) < needed:
        raise OSError(
            errno.ENOSPC,
            f"{path} needs {needed / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB free; use another disk",
        )


def free_disk(path: Path) -> int:
    """Return the free bytes of the disk of a path, which need not exist."""
    absolute = Path(os.path.abspath(path))
    return shutil.disk_usage(next(folder for folder in (absolute, *absolute.parents) if folder.exists())).free


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def apply_umask(path: Path) -> None:
    """Give a file the permissions of the umask: safetensors creates files that only the owner can read."""
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def fsync(path: Path) -> None:
    """Flush a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        [(repeated, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {repeated!r:.60} appears twice in one object")
    return content


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not valid JSON")
