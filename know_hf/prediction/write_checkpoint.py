"""[`write_checkpoint`]: the one way a checkpoint is written, in pieces, in shards and atomically."""

import json
import shutil
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..batch_norm import recalibrate_batch_norm
from ..checkpoint import (
    DEFAULT_SHARD_SIZE,
    CheckpointWriter,
    TensorSpec,
    atomic_folder,
    check_holds_no_trajectory,
    check_output,
    replace_tensors,
    write_json,
)
from ..distributed import check_shared, on_every_process, on_main_process
from ..local_paths import hide_paths, loaded_from, resolved_name
from ..model_tensors import names_on_disk
from ..trajectory import WeightTrajectory, load_pretrained
from .pieces import Piece, grouped, split_pieces
from .residuals import ResidualReport
from .tensor_sources import FunctionTensors, TensorFunction, TensorSource, cast

READ_AHEAD, WRITE_BEHIND = 2, 2  # groups of pieces
S = TypeVar("S")
T = TypeVar("T")
Reports = dict[str, ResidualReport]


@dataclass(frozen=True)
class WriteOptions:
    """How a checkpoint is written.

    Args:
        dtype (`torch.dtype`, *optional*):
            Floating-point dtype on disk; the recorded dtype of each tensor by default.
        max_shard_size (`int`, *optional*, defaults to `5_000_000_000`):
            Largest size of a safetensors file in bytes.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace an existing output folder.
        model_class (`type`, *optional*):
            Class of the model if transformers has none of its name.
        recalibrate_with (iterable of batches, *optional*):
            Batches (keyword arguments of the model) of source data. The BatchNorm statistics of the written weights
            are computed from them.
        accelerator (`Accelerator`, *optional*):
            Its processes share the work on a disk that they share. The bytes do not depend on their number.
    """

    dtype: torch.dtype | None = None
    max_shard_size: int = DEFAULT_SHARD_SIZE
    overwrite: bool = False
    model_class: type[PreTrainedModel] | None = None
    recalibrate_with: Iterable[Mapping[str, torch.Tensor]] | None = None
    accelerator: Accelerator | None = None


def write_checkpoint(
    trajectory: WeightTrajectory,
    tensors: TensorSource | TensorFunction,
    output_dir: str | Path,
    options: WriteOptions | None = None,
    *,
    finish: Callable[[Path, Reports], None] | None = None,
) -> Reports:
    """Write a checkpoint with a trajectory's model files and tensor names, but new values.

    Tensors are read, computed and written in pieces at the same time, so memory does not grow with the model. The
    recorded files are compared with their SHA-256 along the way.

    ```python
    def halved(name, start, stop):
        is_buffer = trajectory.roles[name].role == "copied"
        return None if is_buffer else 0.5 * trajectory.read(name, start, stop)

    write_checkpoint(trajectory, halved, "halved/")
    ```

    Args:
        trajectory ([`WeightTrajectory`]):
            Gives names, shapes, dtypes, config and tokenizer files.
        tensors ([`TensorSource`] or `Callable[[str, int, int], torch.Tensor | None]`):
            The values. A function maps name, start and stop to elements `start` to `stop - 1` of the tensor in
            row-major order, shape `(stop - start,)`, or to `None` to copy those of Θ0.
        output_dir (`str` or `Path`):
            Output folder. It appears complete or not at all.
        options ([`WriteOptions`], *optional*):
            How to write.
        finish (`Callable[[Path, dict[str, ResidualReport]], None]`, *optional*):
            Called on the main process with the folder before it gets its final name, for example to add a card.

    Returns:
        `dict[str, ResidualReport]`: a report per tensor.

    Raises:
        `TrajectoryError`: if a recorded file changed or a recorded value is not finite.
        `ValueError`: if `output_dir` contains or is inside the trajectory, another one or the base model, or a value
            is too large for the dtype.
        `FileExistsError`: if `output_dir` is not empty and `overwrite` is off, or another program changed it.
        `OSError`: if the disk has too little space or another process writes or pushes `output_dir`.
    """
    options = options or WriteOptions()
    source = tensors if isinstance(tensors, TensorSource) else FunctionTensors(trajectory, tensors)
    with checkpoint_folder(trajectory, output_dir, options) as folder:
        reports = fill_checkpoint(trajectory, source, folder, options)
        if finish is not None:
            on_main_process(options.accelerator, lambda: finish(folder, reports))
    return reports


@contextmanager
def checkpoint_folder(
    trajectory: WeightTrajectory, output_dir: str | Path, options: WriteOptions, models: Iterable[Any] = ()
) -> Iterator[Path]:
    """Give every process a folder to write to. It becomes `output_dir` when the block ends without an error.

    `output_dir` must not touch the folders of the trajectory, its base model, and the `models` that are used with it.
    """
    base = resolved_name(trajectory.path, trajectory.base_model or "")
    inputs: list[str | Path] = [trajectory.path, base, *map(loaded_from, models)]
    target = Path(output_dir)
    with ExitStack() as stack:

        def enter() -> Path:
            check_output(target, inputs)
            if options.overwrite:
                check_holds_no_trajectory(target)
            return stack.enter_context(atomic_folder(target, options.overwrite))

        folder = on_main_process(options.accelerator, enter)
        check_shared(options.accelerator, folder)
        yield folder
        on_main_process(options.accelerator, stack.close)


def fill_checkpoint(
    trajectory: WeightTrajectory,
    source: TensorSource,
    folder: Path,
    options: WriteOptions,
    *,
    verify: bool = True,
    show_progress: bool = True,
) -> Reports:
    """Write all files of a checkpoint into an existing folder, the same on every process; see [`write_checkpoint`].

    `verify` compares the recorded files with their SHA-256, and `show_progress` shows a bar on the main process.
    """
    accelerator = options.accelerator
    specs = checkpoint_specs(trajectory, options.dtype)
    writer = CheckpointWriter(folder, specs, options.max_shard_size, adapter=trajectory.is_adapter)
    part, parts = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)

    def write_my_part() -> tuple[Reports, int]:
        pieces = split_pieces(specs, source.cost, part, parts)
        with _verified(trajectory, part, parts, verify):
            reports = _write_pieces(trajectory, source, writer, specs, pieces, show_progress and part == 0)
        return reports, writer.bytes_written

    on_main_process(accelerator, partial(_copy_model_files, trajectory, folder, options.dtype))
    on_main_process(accelerator, writer.create)
    results = on_every_process(accelerator, write_my_part)
    on_main_process(accelerator, lambda: writer.close(sum(count for _, count in results)))
    on_main_process(accelerator, partial(_recalibrate, folder, trajectory, options))
    return _merged(reports for reports, _ in results)


def measure(trajectory: WeightTrajectory, source: TensorSource) -> Reports:
    """Return the reports that writing would give, without writing."""
    specs = checkpoint_specs(trajectory)
    return _merged({piece.name: report} for piece, _, report in computed(source, specs))


def computed(
    source: TensorSource, specs: Mapping[str, TensorSpec]
) -> Iterator[tuple[Piece, torch.Tensor, ResidualReport]]:
    """Compute all pieces of a checkpoint, with a report on each."""
    groups = _in_background(partial(_read, source), grouped(split_pieces(specs, source.cost)), READ_AHEAD)
    for piece, data in chain.from_iterable(groups):
        yield piece, *source.values(piece, data)


def checkpoint_specs(trajectory: WeightTrajectory, dtype: torch.dtype | None = None) -> dict[str, TensorSpec]:
    """Return dtype and shape of every tensor of a checkpoint; `dtype` replaces floating-point dtypes only."""
    stored = {name: trajectory.dtype(name) for name in trajectory.names}
    dtypes = {name: dtype if dtype and kind.is_floating_point else kind for name, kind in stored.items()}
    return {name: TensorSpec(kind, trajectory.shape(name)) for name, kind in dtypes.items()}


def _copy_model_files(trajectory: WeightTrajectory, folder: Path, dtype: torch.dtype | None) -> None:
    for path in trajectory.model_files:
        target = folder / path.relative_to(trajectory.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    hide_paths(folder)
    config = folder / "config.json"
    if dtype is not None and config.exists():
        content = json.loads(config.read_text(encoding="utf-8"))
        write_json(config, {**content, "dtype": str(dtype).removeprefix("torch.")})


@contextmanager
def _verified(trajectory: WeightTrajectory, part: int, parts: int, verify: bool) -> Iterator[None]:
    """Compare the files with their hashes while the block runs. A damaged file explains any other error."""
    if not verify:
        yield
        return
    with ThreadPoolExecutor(1, thread_name_prefix="know_hf-verify") as pool:
        verification = pool.submit(trajectory.verify, part, parts)
        try:
            yield
        finally:
            verification.result()


def _write_pieces(
    trajectory: WeightTrajectory,
    source: TensorSource,
    writer: CheckpointWriter,
    specs: Mapping[str, TensorSpec],
    pieces: list[Piece],
    show_progress: bool,
) -> Reports:
    reports: list[Reports] = []

    def compute_piece(piece: Piece, data: Any) -> tuple[str, torch.Tensor, int]:
        values, report = source.values(piece, data)
        reports.append({piece.name: report})
        return piece.name, cast(values, specs[piece.name].dtype, piece.name, trajectory), piece.start

    def compute() -> Iterator[list[tuple[str, torch.Tensor, int]]]:
        for group in _in_background(partial(_read, source), grouped(pieces), READ_AHEAD):
            yield [compute_piece(piece, data) for piece, data in group]

    total, disable = sum(piece.size for piece in pieces), not show_progress
    with tqdm(total=total, desc=source.description, unit="parameter", unit_scale=True, disable=disable) as bar:
        for size in _in_background(lambda group: sum(writer.write(*args) for args in group), compute(), WRITE_BEHIND):
            bar.update(size)
    writer.flush()
    return _merged(reports)


def _read(source: TensorSource, group: list[Piece]) -> list[tuple[Piece, Any]]:
    return [(piece, source.read(piece)) for piece in group]


def _in_background(function: Callable[[S], T], items: Iterable[S], limit: int) -> Iterator[T]:
    """Yield `function(item)` in order. A thread computes it, at most `limit` items ahead of the consumer."""
    with ThreadPoolExecutor(1, thread_name_prefix="know_hf") as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > limit:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _merged(parts: Iterable[Reports]) -> Reports:
    total: defaultdict[str, ResidualReport] = defaultdict(ResidualReport)
    for name, report in chain.from_iterable(reports.items() for reports in parts):
        total[name] += report
    return dict(sorted(total.items()))


def _recalibrate(folder: Path, trajectory: WeightTrajectory, options: WriteOptions) -> None:
    """Replace the BatchNorm statistics in the files if there are batches: float32 values in the dtype on disk."""
    if (batches := options.recalibrate_with) is None:
        return
    model = load_pretrained(folder, options.model_class)
    on_disk, new = names_on_disk(model), recalibrated_statistics(model, batches)
    if missing := [name for name in new if on_disk.get(name) not in trajectory.roles]:
        raise ValueError(
            f"{folder} has no tensor for the BatchNorm statistics {missing[0]!r}; load the model and call"
            " recalibrate_batch_norm(model, batches)"
        )
    replace_tensors(folder, {on_disk[name]: tensor for name, tensor in new.items()})


def recalibrated_statistics(
    model: torch.nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return the BatchNorm statistics of the weights of a model, which becomes float32, by their names in memory."""
    recalibrate_batch_norm(model.float(), ({name: _as_float32(v) for name, v in batch.items()} for batch in batches))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(statistics)}


def _as_float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
