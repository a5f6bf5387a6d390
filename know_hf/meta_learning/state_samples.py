"""Samples of trajectories: a bounded number of scalar weights of every tensor, in all states.

A sample is drawn once, reading no more of large tensors than is drawn, and may be kept in a folder: as one file of
numbers that every process maps into its memory, and one of JSON that says what they are.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from hashlib import sha256
from io import BufferedWriter, BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from filelock import FileLock

from ..checkpoint import fsync, write_json
from .transition_sources import Source, SourceTensor

FORMAT_VERSION = 1

# Tensors of up to this many scalars (1 MB a state) are read whole, and scalars are drawn one by one. Of larger ones
# runs of neighbours are drawn and only those are read: one by one would take a system call a scalar and state.
WHOLE_SCALARS = 2**18
RUN_SCALARS = 16
PIECE_SCALARS = 2**22


@dataclass(frozen=True)
class SampledTensor:
    """
    The sample of one tensor.

    Args:
        name (`str`): Its name.
        role (`str`): `"conv"`, `"fc"` or `"bias"`.
        size (`int`): Scalars of the whole tensor.
        rows (`int`): Scalars of the sample.
        largest (`float`): Largest magnitude of a weight in any state.
        mean_steps (`list[float]` of length T - 1): Mean `|difference|` between neighbouring states, most forgotten
            first.
        largest_steps (`list[float]` of length T - 1): The largest such differences.
    """

    name: str
    role: str
    size: int
    rows: int
    largest: float
    mean_steps: list[float]
    largest_steps: list[float]


class StateSample:
    """
    The sample of one trajectory.

    Args:
        path (`str`): Path of the trajectory.
        key (`str`): Says which scalars of which weights these are.
        num_states (`int`): States T of the trajectory.
        tensors (`list[SampledTensor]`): What was sampled, in the order of the rows.
        values (`np.ndarray` of shape `(rows, T)` or `Path`): The numbers, most forgotten state first, or the file
            with them; it is mapped into memory when it is first needed, in each process on its own.
    """

    def __init__(
        self, path: str, key: str, num_states: int, tensors: list[SampledTensor], values: np.ndarray | Path
    ) -> None:
        self.path = path
        self.key = key
        self.num_states = num_states
        self.tensors = tensors
        self._origin = values
        self._values = None if isinstance(values, Path) else values

    @property
    def values(self) -> np.ndarray:
        if self._values is None:
            mapped = np.memmap(cast(Path, self._origin), np.float32, mode="r").view(np.ndarray)
            expected = sum(tensor.rows for tensor in self.tensors) * self.num_states
            if len(mapped) != expected:
                raise ValueError(f"{self._origin} has {len(mapped)} numbers, expected {expected}; delete it")
            self._values = mapped.reshape(-1, self.num_states)
        return self._values

    def __getstate__(self) -> dict[str, Any]:
        # A map would be sent to another process as the numbers themselves.
        return {**self.__dict__, "_values": None} if isinstance(self._origin, Path) else self.__dict__


def sample_states(
    source: Source, max_per_tensor: int | None, seed: int, cache_dir: Path | None = None, wait: bool = True
) -> StateSample:
    """
    Draws from every tensor of a trajectory, or takes what was drawn before.

    Every scalar of a tensor is as likely to be drawn as any other. Of tensors with more than 262,144 scalars runs of
    16 neighbours are drawn: their scalars mostly share a row (an output unit, a token), so such a sample says less
    than as many scalars drawn one by one.

    Args:
        source ([`Source`]):
            The trajectory; it is closed at the end.
        max_per_tensor (`int`, *optional*):
            Scalars drawn from a tensor that has more; `None` takes all of them.
        seed (`int`):
            Seed of the draw, together with the names of trajectory and tensor.
        cache_dir (`Path`, *optional*):
            Folder to keep samples in; by default they stay in memory.
        wait (`bool`, *optional*, defaults to `True`):
            Whether to wait for another process that draws the same sample.

    Returns:
        [`StateSample`]; tensors equal in all states are left out.

    Raises:
        `ValueError`: when a sampled value is not finite; names trajectory, tensor and state.
        `filelock.Timeout`: when another process draws the same sample and `wait` is off.
    """
    try:
        content = (FORMAT_VERSION, source.fingerprint, source.path.name, max_per_tensor, seed)
        key = sha256(repr(content).encode()).hexdigest()[:32]
        if cache_dir is None:
            file = BytesIO()
            tensors = _draw_all(source, max_per_tensor, seed, file)
            values = np.frombuffer(file.getbuffer(), np.float32).reshape(-1, source.num_states)
            return StateSample(str(source.path), key, source.num_states, tensors, values)
        cache_dir.mkdir(parents=True, exist_ok=True)
        description, numbers, lock = (
            cache_dir / f"{source.path.name}-{key}.{kind}" for kind in ("json", "float32", "lock")
        )
        with nullcontext() if description.exists() else FileLock(lock, timeout=-1 if wait else 0):
            if not description.exists():
                partial = numbers.with_name(f".{numbers.name}.partial")
                with partial.open("wb") as handle:
                    tensors = _draw_all(source, max_per_tensor, seed, handle)
                fsync(partial)
                partial.replace(numbers)
                write_json(description, {"tensors": [asdict(tensor) for tensor in tensors]})
        entries = json.loads(description.read_text(encoding="utf-8"))["tensors"]
        sampled = [SampledTensor(**entry) for entry in entries]
        # an empty file can't be mapped
        found = numbers if sampled else np.empty((0, source.num_states), np.float32)
        return StateSample(str(source.path), key, source.num_states, sampled, found)
    finally:
        source.close()


def _draw_all(
    source: Source, max_per_tensor: int | None, seed: int, file: BufferedWriter | BytesIO
) -> list[SampledTensor]:
    """Writes the samples of all tensors one after the other; one tensor's is in memory at a time."""
    sampled = []
    for tensor in source.tensors:
        if not tensor.size:
            continue
        digest = sha256(f"{seed}/{source.path.name}/{tensor.name}".encode()).digest()
        states = _draw(source, tensor, max_per_tensor, np.random.default_rng(list(digest)))
        _check_finite(states, source, tensor)
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


def _draw(source: Source, tensor: SourceTensor, count: int | None, rng: np.random.Generator) -> torch.Tensor:
    """Sampled scalars of one tensor, `(T, rows)`, in the order in which they stand in it."""

    def read(start: int, stop: int) -> torch.Tensor:
        return source.read(tensor.name, start, stop)

    size = tensor.size
    if count is None or size <= count:
        return _in_pieces(read, size)
    if size <= WHOLE_SCALARS:
        chosen = np.sort(rng.choice(size, count, replace=False, shuffle=False))
        return read(0, size)[:, torch.from_numpy(chosen)]
    # The tensor is cut into runs from its first scalar on; each is as likely as any other, and so is each scalar.
    run = min(RUN_SCALARS, count)
    starts = np.sort(rng.choice(-(-size // run), count // run, replace=False, shuffle=False)) * run
    return torch.cat([read(start, min(start + run, size)) for start in starts.tolist()], dim=1)


def _in_pieces(read: Callable[[int, int], torch.Tensor], size: int) -> torch.Tensor:
    starts = range(0, size, PIECE_SCALARS)
    return torch.cat([read(start, min(start + PIECE_SCALARS, size)) for start in starts], dim=1)


def _check_finite(states: torch.Tensor, source: Source, tensor: SourceTensor) -> None:
    finite = states.isfinite().all(dim=1)
    if not finite.all():
        state = source.num_states - 1 - int(finite.logical_not().nonzero()[0])
        raise ValueError(
            f"tensor {tensor.name!r} of state {state} of {source.path} has values that are not finite; "
            "leave this trajectory out, its training diverged"
        )
