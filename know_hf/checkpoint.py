"""Checkpoints on disk: safetensors read one tensor at a time, and written shard by shard so that they survive a crash.

Nothing is computed here and nothing is unpickled. A folder appears under its name whole or not at all
([`atomic_folder`]), and a JSON file is replaced in one step ([`write_json`]).
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

WEIGHTS_NAME = "model.safetensors"
ADAPTER_NAME = "adapter_model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DEFAULT_SHARD_SIZE = 5 * 10**9

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointError(ValueError):
    """A checkpoint on disk is damaged, incomplete or not of a kind that can be read."""


class CheckpointReader:
    """The tensors of one checkpoint, read lazily from one or more safetensors files.

    Args:
        files (`Sequence[Path]`): The safetensors files; each tensor stands in exactly one of them.
        elsewhere (`Mapping[str, CheckpointReader]`, *optional*): Tensors that another checkpoint holds for this one.

    Raises:
        `CheckpointError`: when a file is missing, truncated or not safetensors, or a tensor stands in two files.
    """

    def __init__(self, files: Sequence[Path], elsewhere: "Mapping[str, CheckpointReader] | None" = None) -> None:
        self._file_of: dict[str, Any] = {name: reader._file_of[name] for name, reader in (elsewhere or {}).items()}
        self._path_of: dict[str, Path] = {name: reader._path_of[name] for name, reader in (elsewhere or {}).items()}
        for path in files:
            try:
                handle = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{path} can't be read as safetensors ({error}); it is missing, truncated or damaged: restore it"
                    " from a copy, or delete its checkpoint and write it again"
                ) from error
            for name in handle.keys():
                if name in self._file_of:
                    raise CheckpointError(f"tensor {name!r} of {path} stands in a second file of the same checkpoint")
                self._file_of[name] = handle
                self._path_of[name] = path

    @classmethod
    def from_folder(cls, folder: Path) -> "CheckpointReader":
        """Reads `model.safetensors`, or the shards its index names, of a folder as `save_pretrained` leaves it."""
        index = folder / INDEX_NAME
        if not index.exists():
            return cls([folder / WEIGHTS_NAME])
        weight_map = json.loads(index.read_text())["weight_map"]
        return cls([folder / name for name in sorted(set(weight_map.values()))])

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._file_of)

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._path_of[name]

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor, from the header alone."""
        return torch.Size(self._file_of[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype a tensor is stored in, from the header alone; a `CheckpointError` for one that torch does not read."""
        dtype = self._file_of[name].get_slice(name).get_dtype()
        if dtype not in _DTYPES:
            raise CheckpointError(f"tensor {name!r} is stored as {dtype}, which know_hf does not read")
        return _DTYPES[dtype]

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor on the CPU, in the dtype it is stored in."""
        return self._file_of[name].get_tensor(name)


class CheckpointWriter:
    """Writes tensors, one at a time, to safetensors shards of bounded size; the index comes last.

    Only one shard is held in memory. Names and layout are those of `save_pretrained`: one `model.safetensors`, or
    `model-00001-of-0000N.safetensors` with `model.safetensors.index.json`.

    Args:
        folder (`Path`): An existing folder, best one of [`atomic_folder`].
        max_shard_size (`int`, *optional*, defaults to `5_000_000_000`): Bytes; a larger tensor gets its own shard.
        adapter (`bool`, *optional*, defaults to `False`): Whether it is an adapter, one `adapter_model.safetensors`
            whatever its size.
    """

    def __init__(self, folder: Path, max_shard_size: int = DEFAULT_SHARD_SIZE, adapter: bool = False) -> None:
        self.folder = folder
        self.max_shard_size = max_shard_size
        self.adapter = adapter
        self._shard: dict[str, torch.Tensor] = {}
        self._shard_bytes = 0
        self._shard_names: list[list[str]] = []
        self._total_bytes = 0
        self._total_parameters = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Adds one tensor; it must not be changed before the writer is closed."""
        size = tensor.numel() * tensor.element_size()
        if self._shard and not self.adapter and self._shard_bytes + size > self.max_shard_size:
            self._flush()
        self._shard[name] = tensor.detach().cpu().contiguous()
        self._shard_bytes += size
        self._total_bytes += size
        self._total_parameters += tensor.numel()

    def close(self) -> None:
        """Writes what is left, gives the shards their final names and writes the index."""
        self._flush()
        count = len(self._shard_names)
        if count == 1:
            self._shard_path(0).rename(self.folder / (ADAPTER_NAME if self.adapter else WEIGHTS_NAME))
            return
        weight_map = {}
        for number, names in enumerate(self._shard_names):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._shard_path(number).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        metadata = {"total_size": self._total_bytes, "total_parameters": self._total_parameters}
        write_json(self.folder / INDEX_NAME, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})

    def _flush(self) -> None:
        if not self._shard and self._shard_names:
            return
        save_file(self._shard, self._shard_path(len(self._shard_names)), metadata={"format": "pt"})
        self._shard_names.append(list(self._shard))
        self._shard = {}
        self._shard_bytes = 0

    def _shard_path(self, number: int) -> Path:
        return self.folder / f"model-{number + 1:05d}.safetensors.partial"


def replace_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives tensors of a checkpoint new values of the same shape; the shards that hold none stay as they are."""
    for path in sorted(folder.glob("*.safetensors")):
        shard = load_file(path)
        new = {name: tensors[name].to(old.dtype) for name, old in shard.items() if name in tensors}
        if new:
            partial = path.with_name(f".{path.name}.partial")  # never over a file that is memory-mapped
            save_file({**shard, **new}, partial, metadata={"format": "pt"})
            partial.replace(path)


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


def write_json(path: Path, content: Any) -> None:
    """Replaces `path` by `content` as JSON in one step: a crash leaves the old file or the new one, never half."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as handle:
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


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)
