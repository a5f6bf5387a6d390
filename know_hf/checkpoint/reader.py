"""Reading: one tensor, or a piece of one, from the files of a checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .files import parse_json
from .header import DTYPES, CheckpointError, TensorEntry, read_header
from .sources import ByteSource, LocalFile

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


class CheckpointReader:
    """The tensors of one checkpoint, read piece by piece from one or more safetensors files.

    Args:
        files (`Sequence[Path | ByteSource]`): The safetensors files; each tensor stands in exactly one of them.
        elsewhere (`Mapping[str, CheckpointReader]`, *optional*): Tensors that another checkpoint holds for this one.

    Raises:
        `CheckpointError`: when a file is missing, truncated or not safetensors, or a tensor stands in two files.
    """

    def __init__(
        self, files: Sequence[Path | ByteSource], elsewhere: "Mapping[str, CheckpointReader] | None" = None
    ) -> None:
        self._places: dict[str, tuple[ByteSource, TensorEntry]] = {
            name: reader._places[name] for name, reader in (elsewhere or {}).items()
        }
        for file in files:
            try:
                source = LocalFile(file) if isinstance(file, Path) else file
                entries = read_header(source)
            except OSError as error:
                if not isinstance(file, Path):
                    raise  # it says itself what to do
                raise CheckpointError(f"{file} can't be read ({error}); restore it from a copy") from error
            for name, entry in entries.items():
                if name in self._places:
                    raise CheckpointError(
                        f"tensor {name!r} of {source.name} stands in a second file of the same checkpoint"
                    )
                self._places[name] = (source, entry)

    @classmethod
    def from_folder(cls, folder: Path) -> "CheckpointReader":
        """Reads `model.safetensors`, or the shards its index names, of a folder as `save_pretrained` leaves it."""
        index = folder / INDEX_NAME
        if not index.exists():
            return cls([folder / WEIGHTS_NAME])
        try:
            files = {str(name) for name in parse_json(index.read_bytes())["weight_map"].values()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is no index of shards ({error!r}); restore it from a copy") from error
        if any(Path(name).name != name for name in files):
            raise CheckpointError(f"{index} names {min(files)!r}, which is not in its folder; restore it from a copy")
        return cls([folder / name for name in sorted(files)])

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._places)

    def file(self, name: str) -> str:
        """Path or address of the file that holds a tensor."""
        return self._places[name][0].name

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor, from the header alone."""
        return self._places[name][1].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype a tensor is stored in, from the header alone; a `CheckpointError` for one that torch does not read."""
        dtype = self._places[name][1].dtype
        if dtype not in DTYPES:
            raise CheckpointError(f"tensor {name!r} is stored as {dtype}, which know_hf does not read")
        return DTYPES[dtype]

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor on the CPU, in the dtype it is stored in."""
        return self.read(name).reshape(self.shape(name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """A piece of a tensor; nothing else of its file is read.

        Args:
            name (`str`): Name of the tensor.
            start (`int`, *optional*, defaults to `0`): First element, counted through the tensor row by row.
            stop (`int`, *optional*): One after the last element; by default the tensor's end.

        Returns:
            `torch.Tensor` of shape `(stop - start,)` on the CPU, in the dtype it is stored in.

        Raises:
            `OSError`: when the file can't be read.
        """
        source, entry = self._places[name]
        dtype = self.dtype(name)
        piece = torch.empty((entry.shape.numel() if stop is None else stop) - start, dtype=dtype)
        if piece.numel():
            source.read_into(piece.view(torch.uint8).numpy().data, entry.start + start * dtype.itemsize)
        return piece
