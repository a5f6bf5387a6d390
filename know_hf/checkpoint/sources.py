"""Where the bytes of a file are: on the disk, or anywhere else that can give a range of them."""

from pathlib import Path
from typing import Protocol


class ByteSource(Protocol):
    """A file of which any range of bytes can be read.

    Attributes:
        name (`str`): Path or address, for messages.
        size (`int`): Bytes of the whole file.
    """

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills a buffer with the bytes from `offset` on.

        Args:
            buffer (`memoryview`): Writable, of bytes; all of it is filled.
            offset (`int`): First byte.

        Raises:
            `OSError`: when that many bytes can't be read; names the file.
        """


class LocalFile:
    """A file on the disk, open only while it is read: a collection has more files than a process may have open.

    Args:
        path (`Path`): The file.

    Raises:
        `OSError`: when there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size

    @property
    def name(self) -> str:
        return str(self.path)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        with self.path.open("rb", buffering=0) as handle:
            handle.seek(offset)
            filled = 0
            while filled < len(buffer):
                count = handle.readinto(buffer[filled:])  # a file system may give less than it was asked for
                if not count:
                    raise OSError(
                        f"{self.path} ended at byte {offset + filled}, {self.size} were there when it was opened:"
                        " another program wrote to it"
                    )
                filled += count
