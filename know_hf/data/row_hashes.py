"""Hashes of what a row of a dataset holds, the same on every machine and in every process."""

import hashlib
import struct
from collections.abc import Callable, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import torch


class NoContentError(ValueError):
    """An object whose content can't be told on every machine alike."""


def content_hash(value: Any) -> bytes:
    """Hash of a value, the same on every machine and in every process. 16 bytes."""
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest.update, value)
    return digest.digest()


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        shared = not value.is_floating_point() or value.dtype in (torch.float16, torch.float32, torch.float64)
        value = (value if shared else value.float()).numpy()  # NumPy has no bfloat16
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()

    # A tag and a length before every payload, or ["ab", "c"] would be ["a", "bc"].
    if value is None:
        update(b"N")
    elif isinstance(value, bool | int):
        _feed_bytes(update, b"I", str(int(value)).encode())
    elif isinstance(value, float):
        _feed_bytes(update, b"F", b"nan" if value != value else struct.pack("<d", value))
    elif isinstance(value, str):
        _feed_bytes(update, b"S", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, bytes | bytearray | memoryview):
        _feed_bytes(update, b"B", bytes(value))
    elif isinstance(value, Mapping):
        items = sorted(_without_folder(value).items())
        update(f"M{len(items)};".encode())
        for key, item in items:
            _feed(update, key)
            try:
                _feed(update, item)
            except NoContentError as error:
                raise NoContentError(f"column {key!r}: {error}") from None
    elif isinstance(value, np.ndarray) and value.dtype.kind not in "OV":
        little = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False)
        _feed_bytes(update, f"A{little.dtype.str}{value.shape}".encode(), little.tobytes())
    elif isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype.kind == "O"):
        kinds = set(map(type, value))
        if kinds == {int}:  # token ids come in thousands
            _feed_bytes(update, b"i", ",".join(map(str, value)).encode())
        elif kinds == {float}:
            _feed_bytes(update, b"f", struct.pack(f"<{len(value)}d", *value))
        else:
            update(f"L{len(value)};".encode())
            for item in value:
                _feed(update, item)
    elif isinstance(value, date | time):
        _feed_bytes(update, b"D", value.isoformat().encode())
    elif isinstance(value, timedelta | Decimal):
        _feed_bytes(update, b"D", str(value).encode())
    elif all(hasattr(value, name) for name in ("mode", "size", "tobytes")):  # a PIL image
        _feed_bytes(update, f"P{value.mode}{value.size}".encode(), value.tobytes())
    else:
        raise NoContentError(
            f"a {type(value).__module__}.{type(value).__qualname__} has no content that is the same on every machine;"
            " give the schedule key_column, a column with numbers or text that identifies a row"
        )


def _feed_bytes(update: Callable[[bytes], None], tag: bytes, payload: bytes) -> None:
    update(tag + str(len(payload)).encode() + b";")
    update(payload)


def _without_folder(value: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Stored media files lie in another folder on every machine: their bytes count, or else the name of the file."""
    if set(value) != {"bytes", "path"}:
        return value
    if value["bytes"] is not None or value["path"] is None:
        return {"bytes": value["bytes"]}
    return {"path": str(value["path"]).replace("\\", "/").rsplit("/", 1)[-1]}
