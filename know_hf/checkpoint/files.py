"""Folders that appear whole or not at all, JSON files replaced in one step, hashes, and bytes handed to the disk."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """A folder to write into that takes the name `target` only when the block ends without an error.

    Args:
        target (`Path`): The final folder; where it is a link, the folder that it leads to.
        overwrite (`bool`, *optional*, defaults to `False`): Whether a folder of that name may be replaced.
        sources (iterable of `Path`, *optional*): What is read meanwhile; `target` must not hold it.

    Raises:
        `FileExistsError`: when `target` holds anything and `overwrite` is off; nothing was written then.
        `ValueError`: when `target` holds one of the sources.
        `OSError`: when `target` is a mount point, which can't be replaced.
        `BlockingIOError`: when another process writes to `target`.
    """
    target = Path(os.path.realpath(target))
    for source in sources:
        if Path(os.path.realpath(source)).is_relative_to(target):
            raise ValueError(f"{target} holds {source}, which is read: it would be replaced; name another folder")
    if os.path.ismount(target):
        raise OSError(
            errno.EBUSY, f"{target} is a mount point, which no folder can be renamed to; name one inside of it"
        )
    if not overwrite and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; name another folder or pass overwrite=True")
    old = target.with_name(f".{target.name}.old")
    with _work_folder(target.with_name(f".{target.name}.partial"), target) as work:
        try:
            yield work
            for path in sorted(work.rglob("*")):
                fsync(path)
            fsync(work)
            _remove(old)
            if target.exists():
                target.rename(old)
            try:
                work.rename(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
            fsync(target.parent)
            _remove(old)
        except BaseException:
            _remove(work)
            raise


@contextmanager
def _work_folder(work: Path, target: Path) -> Iterator[Path]:
    """A new folder that is locked while the block runs; one that nobody has locked was left by a crash."""
    with ExitStack() as stack:
        if work.is_dir() and not work.is_symlink():
            stack.enter_context(_locked(work, target))
        _remove(work)
        try:
            work.mkdir(parents=True)
        except FileExistsError:
            raise _busy(target) from None
        stack.enter_context(_locked(work, target))
        yield work


@contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(target) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _busy(target: Path) -> BlockingIOError:
    return BlockingIOError(
        f"another process is writing {target}; wait for it to end, or name another folder. Processes of one launch"
        " find each other through accelerate: on CPUs, launch with ACCELERATE_USE_CPU=1"
    )


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


def read_json(path: Path, max_bytes: int) -> Any:
    """Read a JSON file that may come from a stranger.

    Args:
        path (`Path`):
            An existing file.
        max_bytes (`int`):
            Largest size; of a larger file, no more is read.

    Raises:
        `ValueError`:
            When the file is larger, or as [`parse_json`].
    """
    with path.open("rb") as handle:
        data = handle.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it has more than {max_bytes / 1e6:.0f} MB")
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error


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
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)
