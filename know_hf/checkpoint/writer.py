"""Write shards piece by piece, from one process or several."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .files import check_free_disk, fsync, write_json
from .header import TensorEntry, TensorSpec, make_header
from .reader import ADAPTER_NAME, INDEX_NAME, WEIGHTS_NAME

DEFAULT_SHARD_SIZE = 5 * 10**9


class CheckpointWriter:
    """Writes pieces of tensors into safetensors shards of bounded size, with the names of `save_pretrained`.

    Dtypes and shapes alone determine the layout. Only the current piece is in memory, and several processes that share
    a disk can fill the same files. A tensor larger than `max_shard_size` bytes gets its own shard. With `adapter`,
    there is one `adapter_model.safetensors` of any size.
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
        self._total_bytes = sum(spec.nbytes for spec in tensors.values())
        self._total_parameters = sum(spec.shape.numel() for spec in tensors.values())
        self._headers: dict[str, bytes] = {}
        self._entries: dict[str, tuple[str, TensorEntry]] = {}
        shards = [list(tensors)] if adapter else _shards(tensors, max_shard_size)
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) == 1:
                file = ADAPTER_NAME if adapter else WEIGHTS_NAME
            self._headers[file], entries = make_header({name: tensors[name] for name in names})
            self._entries.update((name, (file, entry)) for name, entry in entries.items())
        self._written_files: set[str] = set()

    def create(self) -> None:
        """Create the shards at their full size, in one process before any [`write`]."""
        check_free_disk(self.folder, self._total_bytes)
        ends = {file: len(header) for file, header in self._headers.items()}
        for file, entry in self._entries.values():
            ends[file] = max(ends[file], entry.stop)
        for file, header in self._headers.items():
            with (self.folder / file).open("wb") as handle:
                handle.write(header)
                handle.truncate(ends[file])

    def write(self, name: str, piece: torch.Tensor, start: int = 0) -> int:
        """Write a piece of a tensor, its elements from `start` on, counted in the flattened tensor; return their
        number.

        Raises:
            `TypeError`: if the piece has another dtype than the tensor.
        """
        file, entry = self._entries[name]
        if piece.dtype != self._tensors[name].dtype:
            raise TypeError(f"tensor {name!r} has dtype {self._tensors[name].dtype}, its piece has {piece.dtype}")
        if piece.numel():
            piece = piece.detach().cpu().contiguous().flatten()
            with (self.folder / file).open("r+b") as handle:
                handle.seek(entry.start + start * piece.element_size())
                handle.write(piece.view(torch.uint8).numpy().data)
            self.bytes_written += piece.nbytes
            self._written_files.add(file)
        return piece.numel()

    def flush(self) -> None:
        """Flush what this process wrote to the disk, so that other machines can read it."""
        for file in sorted(self._written_files):
            fsync(self.folder / file)

    def close(self, bytes_written: int | None = None) -> None:
        """Write the index of several shards. A `RuntimeError` says that not all bytes were written.

        `bytes_written` is the sum of all writers of this checkpoint; by default that of this writer.
        """
        written = self.bytes_written if bytes_written is None else bytes_written
        if written != self._total_bytes:
            raise RuntimeError(f"only {written} of {self._total_bytes} bytes of {self.folder} were written")
        if len(self._headers) > 1:
            weight_map = {name: file for name, (file, _) in sorted(self._entries.items())}
            metadata = {"total_size": self._total_bytes, "total_parameters": self._total_parameters}
            write_json(self.folder / INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})


def replace_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace values of tensors of a checkpoint. Shards without these tensors stay untouched."""
    for path in sorted(folder.glob("*.safetensors")):
        shard = load_file(path)
        new = {name: tensors[name].to(old.dtype) for name, old in shard.items() if name in tensors}
        if new:
            partial = path.with_name(f".{path.name}.partial")  # never write over a memory-mapped file
            save_file({**shard, **new}, partial, metadata={"format": "pt"})
            os.replace(partial, path)


def _shards(tensors: Mapping[str, TensorSpec], max_shard_size: int) -> list[list[str]]:
    """Names of the tensors of each shard, in order; at least one shard."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in tensors.items():
        if shards[-1] and size + spec.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards
