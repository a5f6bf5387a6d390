"""The start, the weights before the training: tensors that state 0 or the Hub holds are not stored again.

`start/` is written with all tensors before the training. When state 0 is complete, the folder is replaced by one with
the other tensors only. It counts once it is listed in `trajectory.json`, together with state 0.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import save_torch_state_dict, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError

from ..checkpoint import INDEX_NAME, WEIGHTS_NAME, ByteSource, CheckpointReader, TensorEntry, atomic_folder
from ..hub_client import RemoteRepo
from .manifest import TrajectoryError, recordable
from .records import FileRecord, HubTensors, StateRecord
from .snapshot import WORTH_SHARING, equal_bits, write_index

StartWeights = Literal["reference", "full", "none"]
"""Whether to record the start: with tensors of the Hub by reference, with a copy of them, or not at all."""

# from_pretrained does not take a part of the weights for all of them
_PART = "part{suffix}.safetensors"


def store_early(
    folder: Path, first: CheckpointReader, state: StateRecord, early: StateRecord, base: tuple[str, str, str] | None
) -> StateRecord:
    """Replace the folder of a start or tail state by one without the tensors that are elsewhere; return its record.

    `first` reads state 0 in the folder beside it, whose record `state` gives the bytes of the config. `early` is the
    record without its files. `base` has id and commit of the base model on the Hub, and the prefix of its tensors in
    models with a head.
    """
    weights = sorted(folder.glob("*.safetensors"))
    stored = CheckpointReader(weights)
    is_adapter = (folder / "adapter_config.json").exists()  # a single file, and small
    unchanged = (
        set() if is_adapter else {name for name in stored.names if equal_bits(first, name, stored.tensor(name))}
    )
    hub = None if base is None or is_adapter else _hub_reference(stored, set(stored.names) - unchanged, *base)
    elsewhere = unchanged | (hub.names.keys() if hub else set())
    sizes = {name: stored.shape(name).numel() * stored.dtype(name).itemsize for name in stored.names}
    if sum(sizes[name] for name in elsewhere) <= WORTH_SHARING * sum(sizes.values()):
        unchanged, hub, elsewhere = set(), None, set()
    with atomic_folder(folder, overwrite=True) as work:
        for record in state.files:
            if (path := folder.parent / record.path).suffix != ".safetensors" and path.name != INDEX_NAME:
                (work / Path(record.path).name).write_bytes(path.read_bytes())
        if not elsewhere:
            for path in folder.iterdir():
                if path.suffix == ".safetensors" or path.name == INDEX_NAME:
                    shutil.copy2(path, work)
        else:
            _write_part(work, {name: stored.tensor(name) for name in stored.names if name not in elsewhere}, hub)
            if hub is None:
                write_index(work, {name: Path(first.file(name)) for name in unchanged})
        files = tuple(FileRecord.of(work / name, f"{folder.name}/{name}") for name in recordable(work))
    return replace(early, files=files, unchanged=dict.fromkeys(sorted(unchanged), 0), hub=hub)


def hub_tensors(hub: HubTensors, path: Path) -> dict[str, tuple[ByteSource, TensorEntry]]:
    """Return where the tensors of a reference are in the Hub cache, after a download if they are not there.

    A `TrajectoryError` names repo and commit when a file cannot be downloaded or is not the recorded one.
    """
    files = _cached(hub.repo_id, hub.commit, [record.path for record in hub.files])
    if files is None:
        try:
            repo = RemoteRepo.open(hub.repo_id, hub.commit)
            files = [repo.fetch(record.path) for record in hub.files]
        except (OSError, HTTPError, HFValidationError) as error:
            raise TrajectoryError(
                f"the start of {path} refers to {hub.repo_id} at {hub.commit[:8]} on the Hub, which is neither in the"
                f" Hub cache nor can be downloaded ({type(error).__name__}: {error}). Connect to the Hub, or record"
                " with start_weights='full'"
            ) from error
    for record, file in zip(hub.files, files, strict=True):
        if file.stat().st_size != record.size:
            raise TrajectoryError(
                f"{file} has {file.stat().st_size} bytes instead of {record.size}, which the start of {path} refers"
                " to; delete it from the Hub cache"
            )
    reader = CheckpointReader(files)
    return {name: reader.locate(other) for name, other in hub.names.items()}


def _hub_reference(
    stored: CheckpointReader, names: set[str], repo_id: str, commit: str, prefix: str
) -> HubTensors | None:
    """Return a reference to the cached tensors of a repo that equal those of the start bit for bit."""
    files = _checkpoint_in_cache(repo_id, commit)
    if not files:
        return None
    readers = {name: CheckpointReader([file]) for name, file in files.items()}
    owners = {tensor: name for name, reader in readers.items() for tensor in reader.names}
    equal: dict[str, str] = {}
    for name in sorted(names):
        for other in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if other in owners and equal_bits(readers[owners[other]], other, stored.tensor(name)):
                equal[name] = other
                break
    used = sorted({owners[other] for other in equal.values()})
    return (
        HubTensors(repo_id, commit, tuple(FileRecord.of(files[name], name) for name in used), equal) if used else None
    )


def _checkpoint_in_cache(repo_id: str, commit: str) -> dict[str, Path]:
    """Return the safetensors files of a cached checkpoint by name, or none if one of them is not in the cache."""
    if index := _cached(repo_id, commit, [INDEX_NAME]):
        names = sorted(set(json.loads(index[0].read_text())["weight_map"].values()))
    else:
        names = [WEIGHTS_NAME]
    return dict(zip(names, _cached(repo_id, commit, names) or [], strict=False))


def _cached(repo_id: str, commit: str, names: Sequence[str]) -> list[Path] | None:
    try:
        paths = [try_to_load_from_cache(repo_id, name, revision=commit) for name in names]
    except HFValidationError:  # a folder
        return None
    cached = [Path(path) for path in paths if isinstance(path, str)]
    return cached if len(cached) == len(paths) else None


def _write_part(folder: Path, tensors: Mapping[str, torch.Tensor], hub: HubTensors | None) -> None:
    if tensors:
        pattern = "model{suffix}.safetensors" if hub is None else _PART
        save_torch_state_dict(dict(tensors), folder, filename_pattern=pattern, metadata={"format": "pt"})
