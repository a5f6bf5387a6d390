"""Where the bytes of a file come from: the local disk, or any source that serves byte ranges."""

from pathlib import Path
from typing import Protocol


class ByteSource(Protocol):
    """A file that can be read by byte ranges; `name` is its path or address, `size` its bytes."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from `offset` on; an `OSError` that names the file if it is shorter."""


class LocalFile:
    """A file on the local disk. It is open only while it is read, so that many files fit the limit of a process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.size = path.stat().st_size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        with self.path.open("rb") as handle:
            handle.seek(offset)
            if (count := handle.readinto(buffer)) < len(buffer):
                raise OSError(f"{self.path} ended at byte {offset + count} of {self.size}; another process changed it")
