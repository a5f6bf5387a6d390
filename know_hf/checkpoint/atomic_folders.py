"""Folders that appear complete or not at all."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .files import fsync


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a new folder that is renamed to `target` when the block ends without an error.

    Args:
        target (`Path`):
            The final folder. A link is followed.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether an existing folder may be replaced.
        sources (iterable of `Path`, *optional*):
            Paths that are read meanwhile; `target` must not contain them.

    Raises:
        `FileExistsError`:
            If `target` is not empty and `overwrite` is off. Nothing is written.
        `ValueError`:
            If `target` contains one of the sources.
        `OSError`:
            If `target` is a mount point.
        `BlockingIOError`:
            If another process writes to `target`.
    """
    target = Path(os.path.realpath(target))
    for source in sources:
        if Path(os.path.realpath(source)).is_relative_to(target):
            raise ValueError(f"{target} contains the input {source}, which would be replaced; choose another folder")
    if os.path.ismount(target):
        raise OSError(errno.EBUSY, f"{target} is a mount point and cannot be replaced; choose a folder inside it")
    if not overwrite and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; choose another folder or pass overwrite=True")
    with _work_folder(target.with_name(f".{target.name}.partial"), target) as work:
        try:
            yield work
            for path in sorted(work.rglob("*")):
                fsync(path)
            fsync(work)
            _replace(target, work)
        except BaseException:
            _remove(work)
            raise


@contextmanager
def _work_folder(work: Path, target: Path) -> Iterator[Path]:
    """Create a folder and lock it during the block. An existing unlocked folder is left over from a crash."""
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
        except OSError:  # the file system has no locks
            pass
        yield
    finally:
        os.close(descriptor)


def _busy(target: Path) -> BlockingIOError:
    return BlockingIOError(
        f"another process is writing {target}; wait for it or choose another folder. If this is one launch with"
        " several processes, accelerate did not see them: on CPUs, launch with ACCELERATE_USE_CPU=1"
    )


def _replace(target: Path, work: Path) -> None:
    old = target.with_name(f".{target.name}.old")
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


def _remove(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)
