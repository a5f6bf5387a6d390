"""Hashes of the content of dataset rows, equal on every machine and in every process."""

import hashlib
import struct
from collections.abc import Callable, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import torch

_Update = Callable[[bytes], None]


class NoContentError(ValueError):
    """An object has no content that is equal on every machine."""


def content_hash(value: Any) -> bytes:
    """Hash of a value, 16 bytes, equal on every machine and in every process.

    Args:
        value (*any*):
            A row or a cell: numbers, text, bytes, dates, arrays, tensors, PIL images, and lists and mappings of them.

    Raises:
        `NoContentError`: if an object of another kind is inside. The message names its column.
    """
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest.update, value)
    return digest.digest()


_ENCODERS: tuple[tuple[Any, bytes, Callable[[Any], bytes]], ...] = (
    (bool | int, b"I", lambda value: str(int(value)).encode()),
    (float, b"F", lambda value: b"nan" if value != value else struct.pack("<d", value)),
    (str, b"S", lambda value: value.encode("utf-8", "surrogatepass")),
    (bytes | bytearray | memoryview, b"B", bytes),
    (date | time, b"D", lambda value: value.isoformat().encode()),
    (timedelta | Decimal, b"D", lambda value: str(value).encode()),
)


def _feed(update: _Update, value: Any) -> None:
    value = _without_torch(value)
    # every payload has a tag and a length: ["ab", "c"] differs from ["a", "bc"]
    for kinds, tag, encode in _ENCODERS:
        if isinstance(value, kinds):
            return _feed_bytes(update, tag, encode(value))
    if value is None:
        update(b"N")
    elif isinstance(value, Mapping):
        _feed_mapping(update, value)
    elif isinstance(value, np.ndarray) and value.dtype.kind not in "OV":
        little = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False)
        _feed_bytes(update, f"A{little.dtype.str}{value.shape}".encode(), little.tobytes())
    elif isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype.kind == "O"):
        _feed_sequence(update, value)
    elif all(hasattr(value, name) for name in ("mode", "size", "tobytes")):  # a PIL image
        _feed_bytes(update, f"P{value.mode}{value.size}".encode(), value.tobytes())
    else:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise NoContentError(f"{kind} objects cannot be hashed; set key_column to numbers or text that identify a row")


def _without_torch(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        in_numpy = not value.is_floating_point() or value.dtype in (torch.float16, torch.float32, torch.float64)
        value = (value if in_numpy else value.float()).numpy()  # NumPy has no bfloat16
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()
    return value


def _feed_mapping(update: _Update, value: Mapping[Any, Any]) -> None:
    if set(value) == {"bytes", "path"}:  # a media file: its folder differs between machines
        name = str(value["path"]).replace("\\", "/").rsplit("/", 1)[-1]
        has_name_only = value["bytes"] is None and value["path"] is not None
        value = {"path": name} if has_name_only else {"bytes": value["bytes"]}
    update(f"M{len(value)};".encode())
    for key, item in sorted(value.items()):
        _feed(update, key)
        try:
            _feed(update, item)
        except NoContentError as error:
            raise NoContentError(f"column {key!r}: {error}") from None


def _feed_sequence(update: _Update, value: list[Any] | tuple[Any, ...] | np.ndarray) -> None:
    kinds = set(map(type, value))
    if kinds == {int}:  # fast path for token ids
        _feed_bytes(update, b"i", ",".join(map(str, value)).encode())
    elif kinds == {float}:
        _feed_bytes(update, b"f", struct.pack(f"<{len(value)}d", *value))
    else:
        update(f"L{len(value)};".encode())
        for item in value:
            _feed(update, item)


def _feed_bytes(update: _Update, tag: bytes, payload: bytes) -> None:
    update(tag + str(len(payload)).encode() + b";")
    update(payload)
