"""Ways to damage one file of a folder: its bytes, its values, its place or its kind."""

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

SECRET = "secret.json"  # a file outside the folder

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 1.5, 2**31, 2**63, 2**64, 10**400, -(10**30), 1e308, float("nan"), float("inf"),
    "", "x", "9", "nan", "\0", "\ud800", "é" * 300, "x" * 100_000, "../" * 8 + "etc/passwd", "/etc/passwd",
    f"../{SECRET}", "a\nb", "C:\\x", "file:///etc/passwd", "<script>", "{{ 7*7 }}", [], {}, [[]], [None], [{}],
    {"x": {}}, "!!python/object/apply:os.system ['true']", list(range(1000)),
]  # fmt: skip
KEYS = ("", "x" * 100_000, "../x", "__class__", "\0", "auto_map", "quantization_config", "é")
BOMB = "[" * 50_000


def damage(folder: Path, rng: random.Random) -> tuple[Path, str]:
    """Damage a random file; return it and what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    path = rng.choice(files)
    kinds = list(_ANY)
    if path.suffix in (".json", ".yaml"):
        kinds += [_value, _value, _value, _key, _nested] * 2
    if path.suffix == ".yaml":
        kinds += [_aliases, _python_tag]
    if path.suffix == ".safetensors":
        kinds += [_header, _header, _header_length, _not_finite, _not_finite]
    if path.suffix == ".h5":
        kinds += [_external, _huge, _not_finite]
    kind = rng.choice(kinds)
    return path, f"{kind.__name__.lstrip('_')}: {kind(path, rng, files)}"


def _flip(path: Path, rng: random.Random, files: list[Path]) -> str:
    data = bytearray(path.read_bytes())
    places = [rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 8)))] if data else []
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"bytes {places}"


def _truncate(path: Path, rng: random.Random, files: list[Path]) -> str:
    size = rng.choice((0, 1, 8, rng.randrange(path.stat().st_size + 1)))
    os.truncate(path, min(size, path.stat().st_size))
    return f"to {size} bytes"


def _append(path: Path, rng: random.Random, files: list[Path]) -> str:
    path.write_bytes(path.read_bytes() + rng.choice((b"\0", b"{}", b"x" * 5000, b"\xff\xfe")))
    return "more bytes"


def _delete(path: Path, rng: random.Random, files: list[Path]) -> str:
    path.unlink()
    return "file"


def _swap(path: Path, rng: random.Random, files: list[Path]) -> str:
    other = rng.choice(files)
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)
    return f"with {other.name}"


def _link(path: Path, rng: random.Random, files: list[Path]) -> str:
    target = rng.choice((path.name, "missing", f"{os.path.relpath(path.parents[3], path.parent)}/{SECRET}"))
    path.unlink()
    path.symlink_to(target)
    return f"to {target}"


def _folder(path: Path, rng: random.Random, files: list[Path]) -> str:
    path.unlink()
    path.mkdir()
    return "instead of the file"


def _value(path: Path, rng: random.Random, files: list[Path]) -> str:
    return _edit(path, rng, lambda parent, key: parent.__setitem__(key, rng.choice(VALUES)))


def _key(path: Path, rng: random.Random, files: list[Path]) -> str:
    def change(parent: Any, key: Any) -> None:
        value = parent.pop(key)
        if rng.random() < 0.5:
            parent.append(value) if isinstance(parent, list) else parent.update({rng.choice(KEYS): value})

    return _edit(path, rng, change)


def _nested(path: Path, rng: random.Random, files: list[Path]) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    place = rng.choice([index for index, letter in enumerate(text) if letter in ":,"] or [0])
    path.write_text(f"{text[: place + 1]} {BOMB}{text[place + 1 :]}", encoding="utf-8")
    return f"brackets at {place}"


def _aliases(path: Path, rng: random.Random, files: list[Path]) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    text = path.read_text(encoding="utf-8")
    keys = [line for line in text.splitlines() if line[:1].isalpha() and ": " in line]
    line = rng.choice(keys)
    path.write_text("\n".join(lines) + "\n" + text.replace(line, f"{line.split(':')[0]}: *a11"), encoding="utf-8")
    return f"for {line.split(':')[0]}"


def _python_tag(path: Path, rng: random.Random, files: list[Path]) -> str:
    path.write_text(path.read_text(encoding="utf-8") + "\nx: !!python/object/apply:os.system ['true']\n", "utf-8")
    return "os.system"


def _edit(path: Path, rng: random.Random, change: Callable[[Any, Any], object]) -> str:
    """Change a random value of a JSON or YAML file."""
    text = path.read_text(encoding="utf-8")
    content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    place = _change(content, rng, change)
    if path.suffix == ".yaml":
        path.write_bytes(yaml.safe_dump(content, sort_keys=False).encode("utf-8", "surrogatepass"))
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return place


def _change(content: Any, rng: random.Random, change: Callable[[Any, Any], object]) -> str:
    parent, place = content, ""
    while True:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        if not keys:
            return f"{place} (empty)"
        key = rng.choice(keys)
        place += f"/{key}"
        if not (isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.85):
            change(parent, key)
            return place
        parent = parent[key]


def _header(path: Path, rng: random.Random, files: list[Path]) -> str:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    place = _change(header, rng, lambda parent, key: parent.__setitem__(key, rng.choice(VALUES)))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return place


def _header_length(path: Path, rng: random.Random, files: list[Path]) -> str:
    length = rng.choice((0, 1, 2**20, 2**40, 2**64 - 1))
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    return str(length)


def _not_finite(path: Path, rng: random.Random, files: list[Path]) -> str:
    value, data = rng.choice((float("nan"), float("inf"), 3e38)), path.read_bytes()
    place = len(data) - 4 * rng.randrange(1, max(2, len(data) // 8))
    path.write_bytes(data[:place] + struct.pack("<f", value) + data[place + 4 :])
    return f"{value} at byte {place}"


def _external(path: Path, rng: random.Random, files: list[Path]) -> str:
    import h5py

    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        name = rng.choice(names)
        shape, target = file[name].shape, str(path.parents[3] / SECRET)
        del file[name]
        if rng.random() < 0.5:
            file.create_dataset(name, shape, "float32", external=[(target, 0, h5py.h5f.UNLIMITED)])
        else:
            file[name] = h5py.ExternalLink(str(path.with_name("other.h5")), "/x")
    return name


def _huge(path: Path, rng: random.Random, files: list[Path]) -> str:
    import h5py

    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        name = rng.choice(names)
        shape = (2**34, *file[name].shape[1:]) if rng.random() < 0.5 else (*file[name].shape[:-1], 2**34)
        del file[name]
        file.create_dataset(name, shape, "float32", chunks=tuple(min(size, 64) for size in shape))
    return name


_ANY = (_flip, _flip, _truncate, _truncate, _append, _delete, _swap, _link, _folder)
