"""Read tensors, or pieces of tensors, from the files of a checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .byte_sources import ByteSource, LocalFile
from .files import parse_json
from .header import DTYPES, CheckpointError, TensorEntry, read_header

WEIGHTS_NAME = "model.safetensors"
ADAPTER_NAME = "adapter_model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


class CheckpointReader:
    """Reads the tensors of a checkpoint piece by piece.

    Each tensor is in one of the files, or `elsewhere`: where other checkpoints store it for this one, see [`locate`].

    Raises:
        `CheckpointError`: if a file is missing, truncated or not safetensors, or two files contain the same tensor.
    """

    def __init__(
        self, files: Sequence[Path | ByteSource], elsewhere: Mapping[str, tuple[ByteSource, TensorEntry]] | None = None
    ) -> None:
        self._entries: dict[str, tuple[ByteSource, TensorEntry]] = dict(elsewhere or {})
        for file in files:
            try:
                source = LocalFile(file) if isinstance(file, Path) else file
                entries = read_header(source)
            except OSError as error:
                if not isinstance(file, Path):
                    raise  # the source names itself
                raise CheckpointError(f"{file} cannot be read ({error}); restore it from a copy") from error
            for name, entry in entries.items():
                if name in self._entries:
                    raise CheckpointError(f"tensor {name!r} is in two files of a checkpoint, one is {source.name}")
                self._entries[name] = (source, entry)

    @classmethod
    def from_folder(cls, folder: Path) -> "CheckpointReader":
        """Read `model.safetensors`, or the shards of its index, from a folder written by `save_pretrained`."""
        index = folder / INDEX_NAME
        if not index.exists():
            return cls([folder / WEIGHTS_NAME])
        try:
            files = set(parse_json(index.read_bytes())["weight_map"].values())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is not an index of shards ({error!r}); restore it from a copy") from error
        for name in files:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                problem = f"names {name!r:.100}, which is not a safetensors file of its folder"
                raise CheckpointError(f"{index} {problem}; restore it from a copy")
        return cls([folder / name for name in sorted(files)])

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def names(self) -> list[str]:
        """Sorted names of all tensors."""
        return sorted(self._entries)

    def locate(self, name: str) -> tuple[ByteSource, TensorEntry]:
        """Return the file that contains a tensor, and the tensor's position in it."""
        return self._entries[name]

    def file(self, name: str) -> str:
        """Path or address of the file that contains a tensor."""
        return self._entries[name][0].name

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor, read from the header."""
        return self._entries[name][1].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, read from the header. Raises a `CheckpointError` if torch lacks it."""
        dtype = self._entries[name][1].dtype
        if dtype not in DTYPES:
            raise CheckpointError(f"tensor {name!r} has dtype {dtype}, which torch does not support")
        return DTYPES[dtype]

    def describe(self, name: str) -> str:
        """Return shape and dtype of a tensor for messages, or `missing`."""
        return f"{tuple(self.shape(name))} {self.dtype(name)}" if name in self else "missing"

    def tensor(self, name: str) -> torch.Tensor:
        """Read a complete tensor to the CPU, in its stored dtype."""
        return self.read(name).reshape(self.shape(name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read elements `start` to `stop - 1` of the flattened tensor as stored, and no other bytes of its file."""
        source, entry = self._entries[name]
        dtype = self.dtype(name)
        piece = torch.empty((entry.shape.numel() if stop is None else stop) - start, dtype=dtype)
        if piece.numel():
            source.read_into(piece.view(torch.uint8).numpy().data, entry.start + start * dtype.itemsize)
        return piece
