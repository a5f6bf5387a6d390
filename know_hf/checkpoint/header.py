"""The header of a safetensors file: name, dtype, shape and position of every tensor.

A file consists of 8 bytes with the length N of the header (little endian), N bytes of JSON, and the bytes of all
tensors without gaps (https://huggingface.co/docs/safetensors, "Format"). The library reads and writes complete
tensors; with their positions any piece of a tensor can be. Every header that the library rejects is rejected here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .byte_sources import ByteSource
from .files import parse_json

MAX_HEADER_SIZE = 100_000_000  # limit of the library
_LONGEST_NAME = 1000  # characters; messages show names

# In the order of the library, which sorts the tensors of a file by dtype, last first, and then by name.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "C64": torch.complex64, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
# Bits of an element, including dtypes that torch lacks or packs several of into one.
_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}
_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
_RANKS = {dtype: (rank, name) for rank, (name, dtype) in enumerate(DTYPES.items())}


class CheckpointError(ValueError):
    """A checkpoint on disk is damaged, incomplete or of an unsupported kind."""


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file: its dtype as the header names it, its shape, and its bytes `start` to `stop - 1`."""

    dtype: str
    shape: torch.Size
    start: int
    stop: int


def read_header(source: ByteSource) -> dict[str, TensorEntry]:
    """Read the positions of all tensors of a safetensors file, in the order of the header.

    Raises:
        `CheckpointError`: if the file is not safetensors, is truncated, or its header contradicts itself.
    """
    try:
        return _parse(source)
    except ValueError as error:
        reason = f"{source.name} cannot be read as safetensors ({error}); it is truncated or damaged"
        raise CheckpointError(f"{reason}. Restore it from a copy or write the checkpoint again.") from error


def make_header(tensors: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, TensorEntry]]:
    """Return the bytes before the first tensor, as the library writes them, and the position of each tensor."""
    for name, spec in tensors.items():
        if spec.dtype not in _RANKS:
            raise CheckpointError(f"tensor {name!r} has dtype {spec.dtype}, which safetensors does not support")
    content: dict[str, Any] = {}
    offset = 0
    for name, spec in sorted(tensors.items(), key=lambda item: (-_RANKS[item[1].dtype][0], item[0].encode())):
        offsets = [offset, offset + spec.nbytes]
        content[name] = {"dtype": _RANKS[spec.dtype][1], "shape": list(spec.shape), "data_offsets": offsets}
        offset += spec.nbytes
    with_metadata = {"__metadata__": {"format": "pt"}, **content}
    text = json.dumps(with_metadata, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: _entry(name, entry, base) for name, entry in content.items()}


def _parse(source: ByteSource) -> dict[str, TensorEntry]:
    if source.size < 8:
        raise ValueError(f"it has only {source.size} bytes")
    length = int.from_bytes(_bytes(source, 0, 8), "little")
    if length > min(MAX_HEADER_SIZE, source.size - 8):
        raise ValueError(f"its header has {length} bytes, the file {source.size}")
    text = _bytes(source, 8, length)
    if not text.startswith(b"{"):
        raise ValueError("its header is not a JSON object")
    content = parse_json(text, parse_int=_natural)
    metadata = content.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ does not map strings to strings")
    for string in (*content, *metadata.keys(), *metadata.values()):
        string.encode()  # fails for unpaired surrogates, which escapes can contain
    if longest := max((name for name in content if len(name) > _LONGEST_NAME), default=None):
        raise ValueError(f"the name of tensor {longest!r:.60} has {len(longest):,} characters, over {_LONGEST_NAME:,}")
    end = 8 + length
    entries = {name: _entry(name, entry, end) for name, entry in content.items()}
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise ValueError(f"tensor {name!r} starts at byte {entry.start}, the previous one ends at {end}")
        end = entry.stop
    if end != source.size:
        raise ValueError(f"its tensors end at byte {end}, the file has {source.size} bytes")
    return entries


def _entry(name: str, entry: Any, base: int) -> TensorEntry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has dtype {dtype!r:.50}, shape {shape!r:.50}, data_offsets {offsets!r:.50}")
    start, stop = offsets
    if start > stop:
        raise ValueError(f"tensor {name!r} ends at byte {stop}, before its start {start}")
    if dtype not in _BITS:
        raise ValueError(f"tensor {name!r} has dtype {dtype!r:.50}, which safetensors does not support")
    count = 1
    for size in shape:
        count *= size
        if count >= 2**64:  # an error even if a 0 follows, as in the library; bounds the time for long shapes
            break
    if count * _BITS[dtype] != 8 * (stop - start):
        raise ValueError(f"tensor {name!r} of shape {shape!r:.50} and dtype {dtype} has {stop - start} bytes")
    return TensorEntry(dtype, torch.Size(shape), base + start, base + stop)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _natural(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError(f"its header contains the negative number {digits:.50}")
    return int(digits)


def _bytes(source: ByteSource, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    source.read_into(memoryview(buffer), offset)
    return bytes(buffer)
