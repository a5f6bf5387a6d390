"""Make a trajectory of existing checkpoints: of one training, of several trainings, or in a given order."""

import math
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import snapshot_download

from ..checkpoint import ADAPTER_NAME, INDEX_NAME, WEIGHTS_NAME, CheckpointReader, atomic_folder, read_json_object
from ..hub_client import call_hub
from ..local_paths import hide_paths, name_beside
from ..model_tensors import names_on_disk
from ..roles import TensorRole, role_by_shape, tensor_roles
from .loading import architecture
from .manifest import Manifest, TrajectoryError, recordable
from .recorder import library_versions
from .records import FileRecord, StateRecord
from .snapshot import Snapshot, roles_on_disk

ImportKind = Literal["tail", "branches", "ordered"]
Checkpoints = str | Path | Sequence[str | Path]

_CONFIGS = ("config.json", "generation_config.json", "adapter_config.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_NOT_OF_THE_MODEL = re.compile(
    r"trainer_state\.json|README\.md|.*results\.json|.*\.safetensors|.*\.index\.json"
    r"|(optimizer|scheduler|scaler|training_args|rng_state\w*)\.(pt|pth|bin)"
)
_OF_THE_RUN = ("inference_mode", "base_model_name_or_path", "revision", "auto_mapping")  # of an adapter's config


def import_checkpoints(
    checkpoints: Checkpoints,
    output_dir: str | Path,
    kind: ImportKind = "tail",
    *,
    num_examples: Sequence[int] | None = None,
    start: str | Path | None = None,
    copy: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a trajectory of existing checkpoints; see [`WeightTrajectory.from_checkpoints`]."""
    if kind not in get_args(ImportKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(ImportKind))}, got {kind!r}")
    sources = [_Checkpoint.open(checkpoint) for checkpoint in _listed(checkpoints, kind)]
    if len(sources) < 2:
        raise ValueError(f"got {len(sources)} checkpoint; a trajectory needs at least two")
    if (kind == "ordered") != (num_examples is not None) or (num_examples and len(num_examples) != len(sources)):
        raise ValueError(
            f"kind='ordered' needs num_examples=, the size of the training set of each of the {len(sources)}"
            f" checkpoints, and other kinds take none; got num_examples={num_examples!r} for kind={kind!r}"
        )
    first = sources[-1] if kind == "tail" else sources[0]
    before = [] if start is None else [_Checkpoint.open(start)]
    for source in (*sources, *before):
        _check_fit(first, source)
    with atomic_folder(Path(output_dir), overwrite, [source.folder for source in (*sources, *before)]) as work:
        writer = _Writer(work, first, copy)
        states = sources if kind == "ordered" else [first]
        sizes: Sequence[int | None] = num_examples or [None]
        manifest = Manifest(
            tuple(writer.add(source, "state", k, sizes[k]) for k, source in enumerate(states)),
            tail=tuple(writer.add(s, "tail", k) for k, s in enumerate(sources[:-1])) if kind == "tail" else (),
            start=writer.add(before[0], "start", 0) if before else None,
            branches=tuple(writer.add(s, "branch", k) for k, s in enumerate(sources)) if kind == "branches" else (),
            files=writer.add_model_files(),
            library_versions=library_versions(),
            base_model=_base_model(first, Path(output_dir)),
            **_roles(work / "state-0", first.reader),
        )
        manifest.write(work)


@dataclass(frozen=True)
class _Checkpoint:
    """A folder with safetensors weights, under the name that the user gave."""

    name: str
    folder: Path
    weights: tuple[Path, ...]
    reader: CheckpointReader

    @classmethod
    def open(cls, name: str | Path) -> "_Checkpoint":
        folder = local_folder(name)
        if (folder / ADAPTER_NAME).exists():
            return cls(str(name), folder, (folder / ADAPTER_NAME,), CheckpointReader([folder / ADAPTER_NAME]))
        if not (folder / INDEX_NAME).exists() and not (folder / WEIGHTS_NAME).exists():
            for pickle in _PICKLES:
                if (folder / pickle).exists():
                    raise ValueError(
                        f"{name} has its weights in {pickle}, which is never unpickled; load the model and save it"
                        " with save_pretrained"
                    )
            inside = sorted(path.parent.name for path in folder.glob("*/*.safetensors"))
            hint = f"; give a checkpoint in it, such as {Path(name) / inside[-1]}" if inside else ""
            raise FileNotFoundError(f"{name} has no {WEIGHTS_NAME}, {INDEX_NAME} or {ADAPTER_NAME}{hint}")
        reader = CheckpointReader.from_folder(folder)
        files = {Path(reader.file(tensor)) for tensor in reader.names}
        return cls(str(name), folder, tuple(sorted(files)), reader)

    def json(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file, empty without one."""
        path = self.folder / name
        return read_json_object(path) if path.exists() else {}

    @property
    def progress(self) -> tuple[int, dict[str, float]]:
        """Steps and metrics that a `Trainer` left beside the checkpoint."""
        state = self.json("trainer_state.json")
        steps = state.get("global_step")
        metrics: dict[str, float] = {}
        for entry in state.get("log_history") or []:
            if isinstance(entry, dict) and entry.get("step") == steps:
                metrics |= {name: value for name, value in entry.items() if _is_metric(name, value)}
        return (steps if isinstance(steps, int) and steps >= 0 else 0), metrics


class _Writer:
    """Adds checkpoints to the folder of a trajectory, with the configs of the first one."""

    def __init__(self, work: Path, first: _Checkpoint, copy: bool) -> None:
        self._work, self._first, self._copy = work, first, copy

    def add(
        self,
        source: _Checkpoint,
        kind: Literal["state", "start", "tail", "branch"],
        index: int,
        size: int | None = None,
    ) -> StateRecord:
        steps, metrics = source.progress
        record = StateRecord(index, size, steps, (), metrics=metrics, kind=kind)
        folder = self._work / record.name
        folder.mkdir()
        for path in source.weights:
            self._place(path, folder / path.name)
        if len(source.weights) > 1 or source.weights[0].name not in (WEIGHTS_NAME, ADAPTER_NAME):
            shutil.copyfile(source.folder / INDEX_NAME, folder / INDEX_NAME)
        for name in _CONFIGS:
            if (self._first.folder / name).exists():
                shutil.copyfile(self._first.folder / name, folder / name)
        hide_paths(folder)
        files = tuple(FileRecord.of(folder / name, f"{record.name}/{name}") for name in recordable(folder))
        return replace(record, files=files)

    def add_model_files(self) -> tuple[FileRecord, ...]:
        """Copy config, tokenizer and processor files."""
        names = []
        for path in sorted(self._first.folder.iterdir()):
            if path.is_file() and not path.name.startswith(".") and not _NOT_OF_THE_MODEL.fullmatch(path.name):
                shutil.copyfile(path, self._work / path.name)
                names.append(path.name)
        for path in self._work.glob("*config.json"):
            if (self._work / "state-0" / path.name).exists():
                shutil.copyfile(self._work / "state-0" / path.name, path)
        hide_paths(self._work)
        listed = {name for name in recordable(self._work) if "/" not in name}
        for name in set(names) - listed:  # pickles of the training, code
            (self._work / name).unlink()
        return tuple(FileRecord.of(self._work / name, name) for name in sorted(listed))

    def _place(self, source: Path, target: Path) -> None:
        source = source.resolve()  # the Hub cache has links
        if not self._copy:
            with suppress(OSError):  # another file system, or one without links
                os.link(source, target)
                return
        shutil.copyfile(source, target)


def _listed(checkpoints: Checkpoints, kind: ImportKind) -> list[str | Path]:
    """Replace an output folder of a `Trainer` by its checkpoints, and sort checkpoints of one folder by step."""

    def step(item: str | Path) -> int:
        match = re.fullmatch(r"checkpoint-(\d+)", Path(item).name)
        return int(match[1]) if match else -1  # checkpoint-best

    items = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    if len(items) == 1 and (inside := [path for path in Path(items[0]).glob("checkpoint-*") if step(path) >= 0]):
        return [*sorted(inside, key=step)]
    is_of_one_folder = len({Path(item).parent for item in items}) == 1
    if kind == "tail" and is_of_one_folder and all(step(item) >= 0 for item in items):
        return sorted(items, key=step)
    return items


def local_folder(name: str | Path) -> Path:
    """Return the folder of a checkpoint; one of the Hub, such as `"me/model@revision"`, is downloaded to its cache."""
    if Path(name).is_dir():
        return Path(name)
    match = _HUB_ID.fullmatch(str(name))
    if match is None or isinstance(name, Path):
        raise FileNotFoundError(f"{name} is neither a folder nor a Hub id such as 'me/model@revision'")
    repo_id, revision = match.groups()

    def download() -> str:
        return snapshot_download(repo_id, revision=revision, allow_patterns=list(_DOWNLOADED), ignore_patterns="*/*")

    return Path(call_hub(download, f"Could not download {name}"))


def _check_fit(first: _Checkpoint, other: _Checkpoint) -> None:
    """Raise a `TrajectoryError` that names what differs between two checkpoints, and both of them."""
    both = f"in {other.name} and {{}} in {first.name}"
    for name in sorted({*first.reader.names, *other.reader.names}):
        kind, expected = other.reader.describe(name), first.reader.describe(name)
        if kind != expected:
            raise TrajectoryError(
                f"tensor {name!r} is {kind} {both.format(expected)}; use checkpoints with the same tensors, head and"
                " vocabulary"
            )
    configs = [checkpoint.json("adapter_config.json") for checkpoint in (other, first)]
    for field in sorted({*configs[0], *configs[1]} - {*_OF_THE_RUN}):
        value, wanted = (_unordered(config.get(field)) for config in configs)
        if value != wanted:
            raise TrajectoryError(f"{field} of the adapter is {value!r} {both.format(repr(wanted))}; use one setting")
    vocabularies = [_vocabulary(checkpoint) for checkpoint in (other, first)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise TrajectoryError(
            f"the tokenizers in {other.name} and {first.name} have other vocabularies; use those of one tokenizer"
        )


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


def _vocabulary(checkpoint: _Checkpoint) -> Any:
    model = checkpoint.json("tokenizer.json").get("model")
    return model.get("vocab") if isinstance(model, dict) else None


def _base_model(first: _Checkpoint, output_dir: Path) -> str | None:
    name = first.json("adapter_config.json").get("base_model_name_or_path")
    name = name or first.json("config.json").get("_name_or_path")
    return name_beside(output_dir, name) if isinstance(name, str) and name else None


def _roles(folder: Path, reader: CheckpointReader) -> dict[str, Any]:
    """Roles and ties from the model of a config; by names and shapes without one, as for adapters."""
    try:
        model_class = architecture(folder)
    except TrajectoryError:
        roles: dict[str, TensorRole] = {
            name: role_by_shape(name, reader.shape(name), reader.dtype(name).is_floating_point)
            for name in reader.names
        }
        return {"roles": roles}
    with torch.device("meta"):
        model: Any = model_class(model_class.config_class.from_pretrained(folder))
    by_name, tied = roles_on_disk(Snapshot(model, {}, names_on_disk(model), tensor_roles(model)), reader)
    return {"roles": by_name, "tied_weights": tied}


def _is_metric(name: str, value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return name.startswith("eval_") and is_number and not name.endswith(("_runtime", "_per_second"))
