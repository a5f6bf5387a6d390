"""Writing: shards laid out before the first tensor is there, then filled piece by piece, by one process or several."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .files import check_free_disk, fsync, write_json
from .header import TensorEntry, TensorSpec, make_header
from .reader import INDEX_NAME, WEIGHTS_NAME

ADAPTER_NAME = "adapter_model.safetensors"
DEFAULT_SHARD_SIZE = 5 * 10**9


class CheckpointWriter:
    """Writes the pieces of tensors to their places in safetensors shards of bounded size; the index comes last.

    The layout follows from the tensors' dtypes and shapes alone: nothing but the piece in hand is in memory, and
    several processes that share a disk can fill the same files. Names and layout are those of `save_pretrained`: one
    `model.safetensors`, or `model-00001-of-0000N.safetensors` with `model.safetensors.index.json`.

    Args:
        folder (`Path`): An existing folder, best one of [`atomic_folder`].
        tensors (`Mapping[str, TensorSpec]`): All tensors of the checkpoint.
        max_shard_size (`int`, *optional*, defaults to `5_000_000_000`): Bytes; a larger tensor gets its own shard.
        adapter (`bool`, *optional*, defaults to `False`): Whether it is an adapter, one `adapter_model.safetensors`
            whatever its size.

    Attributes:
        bytes_written (`int`): By this writer, of the tensors' bytes.
        total_bytes (`int`): Bytes of all tensors.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, TensorSpec],
        max_shard_size: int = DEFAULT_SHARD_SIZE,
        adapter: bool = False,
    ) -> None:
        self.folder = folder
        self._tensors = tensors
        self.bytes_written = 0
        self.total_bytes = sum(spec.nbytes for spec in tensors.values())
        self._total_parameters = sum(spec.shape.numel() for spec in tensors.values())
        self._headers: dict[str, bytes] = {}
        self._places: dict[str, tuple[str, TensorEntry]] = {}
        shards = [list(tensors)] if adapter else _shards(tensors, max_shard_size)
        for number, names in enumerate(shards, start=1):
            if len(shards) == 1:
                file = ADAPTER_NAME if adapter else WEIGHTS_NAME
            else:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._headers[file], entries = make_header({name: tensors[name] for name in names})
            self._places.update({name: (file, entry) for name, entry in entries.items()})
        self._touched: set[str] = set()

    def create(self) -> None:
        """Makes the shards at their full size, without the tensors' bytes; by one process, before any [`write`].

        Raises:
            `OSError`: when the disk has too little room for them.
        """
        check_free_disk(self.folder, self.total_bytes)
        ends = {file: len(header) for file, header in self._headers.items()}
        for file, entry in self._places.values():
            ends[file] = max(ends[file], entry.stop)
        for file, header in self._headers.items():
            with (self.folder / file).open("wb") as handle:
                handle.write(header)
                handle.truncate(ends[file])

    def write(self, name: str, piece: torch.Tensor, start: int = 0) -> None:
        """Writes a tensor or a piece of it.

        Args:
            name (`str`): Name of the tensor.
            piece (`torch.Tensor`): Its elements from `start` on, in the tensor's dtype and of any shape.
            start (`int`, *optional*, defaults to `0`): First element, counted through the tensor row by row.

        Raises:
            `TypeError`: when the piece is not of the tensor's dtype.
        """
        file, entry = self._places[name]
        if piece.dtype != self._tensors[name].dtype:
            raise TypeError(f"tensor {name!r} is laid out as {self._tensors[name].dtype}, its piece is {piece.dtype}")
        if not piece.numel():
            return
        piece = piece.detach().cpu().contiguous().flatten()
        with (self.folder / file).open("r+b", buffering=0) as handle:
            handle.seek(entry.start + start * piece.element_size())
            remaining = piece.view(torch.uint8).numpy().data
            while remaining:
                remaining = remaining[handle.write(remaining) :]
        self.bytes_written += piece.nbytes
        self._touched.add(file)

    def flush(self) -> None:
        """Hands what this process wrote to the disk, so that processes on other machines find it."""
        for file in sorted(self._touched):
            fsync(self.folder / file)

    def close(self, bytes_written: int | None = None) -> None:
        """Writes the index, where there are several shards.

        Args:
            bytes_written (`int`, *optional*): By all writers of this checkpoint together; by default by this one.

        Raises:
            `RuntimeError`: when not every byte was written.
        """
        written = self.bytes_written if bytes_written is None else bytes_written
        if written != self.total_bytes:
            raise RuntimeError(f"{written} of the {self.total_bytes} bytes of {self.folder} were written")
        if len(self._headers) > 1:
            weight_map = {name: file for name, (file, _) in sorted(self._places.items())}
            metadata = {"total_size": self.total_bytes, "total_parameters": self._total_parameters}
            write_json(self.folder / INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})


def replace_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives tensors of a checkpoint new values of the same shape; the shards that hold none stay as they are."""
    for path in sorted(folder.glob("*.safetensors")):
        shard = load_file(path)
        new = {name: tensors[name].to(old.dtype) for name, old in shard.items() if name in tensors}
        if new:
            partial = path.with_name(f".{path.name}.partial")  # never over a file that is memory-mapped
            save_file({**shard, **new}, partial, metadata={"format": "pt"})
            os.replace(partial, path)


def _shards(tensors: Mapping[str, TensorSpec], max_shard_size: int) -> list[list[str]]:
    """The names of each shard, in their order; at least one shard."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in tensors.items():
        if shards[-1] and size + spec.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards
