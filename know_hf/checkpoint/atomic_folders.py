"""Folders that appear complete or not at all.

A folder is written beside its target, as `.NAME.partial`, and renamed. Where the file system can exchange two folders
in one step, an existing target is never missing. Elsewhere it is renamed to `.NAME.old` first: a crash between the two
renames leaves that name, and the next writer of the target restores it. The folder that is written, an existing target
and a folder that is pushed are locked; file systems without locks for folders (NFS) get none.
"""

import ctypes
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .files import fsync

_TRAJECTORY = "trajectory.json"  # its folder belongs to the trajectory, whose files are hashed
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


@contextmanager
def atomic_folder(
    target: Path, overwrite: bool = False, sources: Sequence[str | Path] = (), *, resume: bool = False
) -> Iterator[Path]:
    """Yield a new folder that is renamed to `target` when the block ends without an error.

    Its files and folders get the permissions of the umask. A target that is a link is followed, and one that is the
    working directory is entered again. `sources` lists what is read, see [`check_output`]. With `resume`, the
    unfinished folder is kept after an error or a crash, and yielded the next time.

    Raises:
        `FileExistsError`: if `target` is a file, or is not empty and `overwrite` is off, or another program changed it
            during the block.
        `ValueError`: if `target` is an input, contains one, or is inside one or a trajectory. Only checked with
            `sources`.
        `OSError`: if `target` is a mount point.
        `BlockingIOError`: if another process writes or pushes `target`.
    """
    target = Path(os.path.realpath(target))
    work = target.with_name(f".{target.name}.{'pull' if resume else 'partial'}")
    if sources:
        check_output(target, sources)
    if os.path.ismount(target):
        raise OSError(errno.EBUSY, f"{target} is a mount point and cannot be replaced; choose a folder inside it")
    hint = "choose another folder" if resume else "choose another folder or pass overwrite=True"
    if not overwrite or not target.is_dir():
        check_empty(target, hint)
    is_working_folder = target.is_dir() and target.samefile(".")
    with ExitStack() as stack:
        stack.enter_context(_work_folder(work, target, resume))
        try:
            _restore(target)
            if not overwrite:
                check_empty(target, hint)
            elif target.is_dir():
                stack.enter_context(locked_folder(target))
            before = _contents(target) if overwrite else []
            yield work
            _finish(work)
            if overwrite and _contents(target) != before:
                raise FileExistsError(f"another program changed {target} in the meantime; choose another folder")
            _publish(work, target, overwrite)
            if is_working_folder:
                os.chdir(target)  # from the folder that was there
        except BaseException:
            if not resume or (work.exists() and not any(work.iterdir())):
                _remove(work)
            raise
        _remove(work)  # the replaced folder, if there was one


def check_empty(target: Path, hint: str = "choose another folder") -> None:
    """Raise a `FileExistsError` if a path exists and is not an empty folder."""
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty folder; {hint}")


def check_output(target: str | Path, inputs: Iterable[str | Path] = (), *, replaces: bool = True) -> None:
    """Check the place of a folder before the work that fills it, links followed.

    Inputs that do not exist, such as Hub ids, are ignored. A folder that the work `replaces` must not contain inputs.

    Raises:
        `ValueError`: if `target` is an input, contains one that would be replaced, or is inside one or a trajectory.
        `FileExistsError`: if `target` is a file that the work does not replace.
    """
    target = Path(os.path.realpath(target))
    if not replaces and target.is_file():
        raise FileExistsError(f"{target} is a file; choose a folder")
    for source in filter(os.path.exists, inputs):
        resolved = Path(os.path.realpath(source))
        if replaces and resolved.is_relative_to(target):
            raise ValueError(f"{target} contains the input {source}, which would be replaced; choose another folder")
        if target.is_relative_to(resolved):
            raise ValueError(f"{target} is or is inside the input {source}; choose a folder outside of it")
    for parent in target.parents:
        if (parent / _TRAJECTORY).exists():
            raise ValueError(f"{target} is inside the trajectory {parent}; choose a folder outside of it")


def check_holds_no_trajectory(target: Path, *, below: bool = False) -> None:
    """Refuse to replace a folder with trajectories, or with those in its subfolders only (`below`)."""
    for manifest in target.rglob(_TRAJECTORY):
        if manifest.parent != target or not below:
            raise ValueError(
                f"{target} holds the trajectory {manifest.parent}; choose another folder, or delete it first"
            )


@contextmanager
def locked_folder(folder: Path, shared: bool = False) -> Iterator[None]:
    """Keep other processes from writing a folder during the block; `shared` lets them read it under the same lock.

    Raises:
        `BlockingIOError`: if another process has the lock.
    """
    with _locked(folder, folder, shared):
        yield


@contextmanager
def _work_folder(work: Path, target: Path, resume: bool) -> Iterator[None]:
    """Create a folder and lock it during the block. An existing unlocked folder is left over from a crash."""
    with ExitStack() as stack:
        if work.is_dir() and not work.is_symlink():
            stack.enter_context(_locked(work, target))
            if resume:
                yield
                return
        _remove(work)
        try:
            work.mkdir(parents=True)
        except FileExistsError:
            raise _busy(target) from None
        stack.enter_context(_locked(work, target))
        yield


@contextmanager
def _locked(folder: Path, target: Path, shared: bool = False) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(target) from None
        except OSError:  # the file system has no locks
            pass
        yield
    finally:
        os.close(descriptor)


def _busy(target: Path) -> BlockingIOError:
    return BlockingIOError(
        f"another process is writing or pushing {target}; wait for it or choose another folder. If this is one launch"
        " with several processes, accelerate did not see them: on CPUs, launch with ACCELERATE_USE_CPU=1"
    )


def _contents(folder: Path) -> list[tuple[str, int, int]]:
    """Return what changes when another program writes to a folder."""
    paths = [folder, *sorted(folder.rglob("*"))] if folder.exists() else []
    status = [(path, path.lstat()) for path in paths]
    return [(str(path), entry.st_ino, entry.st_mtime_ns) for path, entry in status]


def _finish(work: Path) -> None:
    """Give all files the permissions of the umask, which those of the folder tell, and flush them to the disk."""
    mode = work.stat().st_mode & 0o777
    for path in (*sorted(work.rglob("*")), work):
        if path.is_symlink():
            continue
        expected = mode if path.is_dir() else mode & 0o666
        is_shared = path.is_file() and path.stat().st_nlink > 1  # a hard link to an input, which keeps its permissions
        if not is_shared and path.stat().st_mode & 0o777 != expected:
            path.chmod(expected)
        fsync(path)


def _publish(work: Path, target: Path, overwrite: bool) -> None:
    if not overwrite:
        _rename_to_new(work, target)
    elif not target.is_dir() or not _exchange(work, target):
        _rename_twice(work, target)
    fsync(target.parent)


def _rename_to_new(work: Path, target: Path) -> None:
    try:
        work.rename(target)  # onto an empty folder or nothing: the system refuses to replace anything else
    except OSError as error:
        if not os.path.lexists(target):
            raise
        raise FileExistsError(f"another program created {target} in the meantime; choose another folder") from error


def _rename_twice(work: Path, target: Path) -> None:
    old = _old(target)
    try:
        if os.path.lexists(target):
            target.rename(old)
        work.rename(target)
    finally:
        if not work.exists():
            _remove(old)
        elif not os.path.lexists(target):
            _restore(target)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step, if the system and the file system can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    names = os.fsencode(first), os.fsencode(second)
    return rename is not None and not rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _restore(target: Path) -> None:
    """End a replacement that a crash interrupted, or undo it if it had not come to the new folder."""
    old = _old(target)
    if os.path.lexists(target):
        _remove(old)
    elif old.exists():
        old.rename(target)


def _remove(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)
