"""Folders that appear whole or not at all, JSON files replaced in one step, hashes, and bytes handed to the disk."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that takes the name `target` only when the block ends without an error.

    Args:
        target (`Path`): The final folder.
        overwrite (`bool`, *optional*, defaults to `False`): Whether a folder of that name may be replaced.

    Raises:
        `FileExistsError`: when `target` holds anything and `overwrite` is off; nothing was written then.
    """
    target = Path(os.path.abspath(target))
    if not overwrite and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; name another folder or pass overwrite=True")
    work = target.with_name(f".{target.name}.partial")
    old = target.with_name(f".{target.name}.old")
    _remove(work)
    work.mkdir(parents=True)
    try:
        yield work
        for path in sorted(work.rglob("*")):
            fsync(path)
        fsync(work)
        _remove(old)
        if target.exists():
            target.rename(old)
        work.rename(target)
        fsync(target.parent)
        _remove(old)
    except BaseException:
        _remove(work)
        raise


def check_free_disk(path: Path, needed: int) -> None:
    """Raises an `OSError` that says how many bytes are needed and free, when the disk of `path` has too few."""
    place = next(
        folder for folder in (Path(os.path.abspath(path)), *Path(os.path.abspath(path)).parents) if folder.exists()
    )
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{path} needs {needed / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB free; make room, record to another"
            " disk, or store a smaller dtype",
        )


def parse_json(data: bytes, parse_int: Callable[[str], Any] = int) -> Any:
    """The content of JSON that a stranger may have written.

    Args:
        data (`bytes`): All of it.
        parse_int (`Callable[[str], Any]`, *optional*): What makes a number of digits.

    Raises:
        `ValueError`: when it is not UTF-8, not JSON, nested too deeply, has a key twice, or holds NaN or Infinity,
            which are no JSON.
    """
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=parse_int
        )
    except (RecursionError, MemoryError) as error:
        raise ValueError("it is nested too deeply, or does not fit into memory") from error


def write_json(path: Path, content: Any) -> None:
    """Replaces `path` by `content` as JSON in one step: a crash leaves the old file or the new one, never half."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # a link that a stranger put there would lead elsewhere
    with partial.open("x", encoding="utf-8") as handle:
        json.dump(content, handle, indent=2, allow_nan=False, ensure_ascii=False)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)
    fsync(path.parent)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Hands a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(name for name, following in pairwise(names) if name == following)
        raise ValueError(f"the key {twice!r:.60} stands twice in one object")
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)
