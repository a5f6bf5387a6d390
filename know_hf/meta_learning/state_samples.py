"""Samples of trajectories: a bounded number of scalar weights per tensor, in all states.

A sample is drawn once, reading no more of a large tensor than is drawn. It can be cached in a folder, as one file of
numbers that each process maps into memory and one JSON file that describes them.
"""

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from io import BufferedWriter, BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from ..checkpoint import fsync, read_json_object, write_json
from ..roles import PREDICTED_ROLES
from .state_readers import StateReader, TensorInfo

FORMAT_VERSION = 1

# Tensors of up to this many scalars (1 MB per state) are read completely and single scalars are drawn. Of larger ones,
# runs of neighbors are drawn and only those are read: single scalars would take a system call per scalar and state.
COMPLETE_SCALARS = 2**18
RUN_SCALARS = 16
PIECE_SCALARS = 2**22

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class SampledTensor:
    """Sample of one tensor; the fields are stored in the cache under their names."""

    name: str
    role: str
    size: int  # scalars of the tensor
    rows: int  # scalars of the sample
    largest: float  # largest magnitude of a sampled weight in any state
    mean_steps: list[float]  # mean |difference| between consecutive states, most forgotten first, T - 1 values
    largest_steps: list[float]  # largest such differences

    def __post_init__(self) -> None:
        numbers = (self.largest, *self.mean_steps, *self.largest_steps)
        if self.role not in PREDICTED_ROLES or not 1 <= self.rows <= self.size:
            raise ValueError(f"role {self.role!r:.60}, {self.rows} of {self.size} scalars")
        if len(self.mean_steps) != len(self.largest_steps) or not all(0 <= n <= _LARGEST for n in numbers):
            raise ValueError("magnitudes that are negative, beyond float32 or not one per step")


@dataclass(frozen=True)
class StateSample:
    """Sample of one trajectory."""

    path: str  # of the trajectory
    key: str  # hash of the weights and the draw
    num_states: int
    tensors: list[SampledTensor]  # in the order of the rows
    source: np.ndarray | Path  # (rows, T), most forgotten state first, or their file

    @cached_property
    def values(self) -> np.ndarray:
        """Sampled values `(rows, T)`. Each process maps the file into memory on first use."""
        if not isinstance(self.source, Path):
            return self.source
        size, expected = self.source.stat().st_size, 4 * sum(tensor.rows for tensor in self.tensors) * self.num_states
        if size != expected:
            description = self.source.with_suffix(".json").name
            raise ValueError(
                f"{self.source} has {size} bytes, expected {expected}; delete it and its {description} to draw again"
            )
        return np.memmap(self.source, np.float32, mode="r").view(np.ndarray).reshape(-1, self.num_states)

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a map would copy its numbers.
        return {name: value for name, value in vars(self).items() if name != "values"}


def sample_states(
    reader: StateReader, max_per_tensor: int | None, seed: int, cache_dir: Path | None = None, wait: bool = True
) -> StateSample:
    """Draw at most `max_per_tensor` scalars from each tensor of a trajectory, or load an earlier draw.

    Every scalar of a tensor is equally likely. Of tensors with more than 262,144 scalars, runs of 16 neighbors are
    drawn. Most of them share a row (an output unit, a token), so such a sample is less informative than as many single
    scalars. The seed is combined with the names of trajectory and tensor. Without `cache_dir`, samples stay in memory.
    Tensors that are equal in all states are left out. The reader is closed.

    Raises:
        `ValueError`: if a sampled value is not finite, or a file of the cache is damaged.
        `filelock.Timeout`: if another process draws the same sample and `wait` is `False`.
    """
    try:
        content = (FORMAT_VERSION, reader.fingerprint, reader.path.name, max_per_tensor, seed)
        key = sha256(repr(content).encode()).hexdigest()[:32]
        if cache_dir is None:
            file = BytesIO()
            tensors = _draw_all(reader, max_per_tensor, seed, file)
            values = np.frombuffer(file.getbuffer(), np.float32).reshape(-1, reader.num_states)
            return StateSample(str(reader.path), key, reader.num_states, tensors, values)
        cache_dir.mkdir(parents=True, exist_ok=True)
        description, numbers, lock = (
            cache_dir / f"{reader.path.name}-{key}.{kind}" for kind in ("json", "float32", "lock")
        )
        with nullcontext() if description.exists() else FileLock(lock, timeout=-1 if wait else 0):
            if not description.exists():
                partial = numbers.with_name(f".{numbers.name}.partial")
                with partial.open("wb") as handle:
                    tensors = _draw_all(reader, max_per_tensor, seed, handle)
                fsync(partial)
                partial.replace(numbers)
                write_json(description, {"tensors": [asdict(tensor) for tensor in tensors]})
        tensors = _read_description(description, reader.num_states)
        # An empty file cannot be mapped.
        source = numbers if tensors else np.empty((0, reader.num_states), np.float32)
        return StateSample(str(reader.path), key, reader.num_states, tensors, source)
    finally:
        reader.close()


def _read_description(path: Path, num_states: int) -> list[SampledTensor]:
    """Read the description of a cached sample. A `ValueError` names a damaged file."""
    hint = f"delete it and its {path.with_suffix('.float32').name}"
    content = read_json_object(path, hint).get("tensors")
    try:
        tensors = TypeAdapter(list[SampledTensor]).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("tensors", *first["loc"])))
        raise ValueError(f"{path} does not describe a sample: {key}: {first['msg']}; {hint}") from None
    if any(len(tensor.mean_steps) != num_states - 1 for tensor in tensors):
        raise ValueError(f"{path} does not describe a sample of {num_states} states; {hint}")
    return tensors


def _draw_all(
    reader: StateReader, max_per_tensor: int | None, seed: int, file: BufferedWriter | BytesIO
) -> list[SampledTensor]:
    """Write the samples of all tensors to a file, holding one of them in memory at a time."""
    sampled = []
    for tensor in reader.tensors:
        if not tensor.size:
            continue
        digest = sha256(f"{seed}/{reader.path.name}/{tensor.name}".encode()).digest()
        states = _draw(reader, tensor, max_per_tensor, np.random.default_rng(list(digest)))
        _check_finite(states, reader, tensor)
        steps = states.diff(dim=0).abs()
        if not steps.any():
            continue
        file.write(states.T.contiguous().numpy().data)
        sampled.append(
            SampledTensor(
                name=tensor.name,
                role=tensor.role,
                size=tensor.size,
                rows=states.shape[1],
                largest=states.abs().max().item(),
                mean_steps=steps.mean(dim=1, dtype=torch.float64).tolist(),
                largest_steps=steps.amax(dim=1).tolist(),
            )
        )
    return sampled


def _draw(reader: StateReader, tensor: TensorInfo, count: int | None, rng: np.random.Generator) -> torch.Tensor:
    """Return sampled scalars of one tensor, `(T, rows)`, in the order of the tensor."""
    size = tensor.size
    if count is not None and count < size <= COMPLETE_SCALARS:
        scalars = np.sort(rng.choice(size, count, replace=False, shuffle=False))
        return reader.read(tensor.name, 0, size)[:, torch.from_numpy(scalars)]
    if count is None or size <= count:
        length, starts = PIECE_SCALARS, range(0, size, PIECE_SCALARS)
    else:  # The tensor is cut into runs from its first scalar on; each run, and so each scalar, is equally likely.
        length = min(RUN_SCALARS, count)
        runs = np.sort(rng.choice(-(-size // length), count // length, replace=False, shuffle=False))
        starts = (runs * length).tolist()
    return torch.cat([reader.read(tensor.name, start, min(start + length, size)) for start in starts], dim=1)


def _check_finite(states: torch.Tensor, reader: StateReader, tensor: TensorInfo) -> None:
    finite = states.isfinite().all(dim=1)
    if not finite.all():
        state = reader.num_states - 1 - int(finite.logical_not().nonzero()[0])
        raise ValueError(
            f"tensor {tensor.name!r} of state {state} of {reader.path} contains non-finite values: its training "
            "diverged; leave this trajectory out"
        )
