"""What all states of a trajectory share: the files of the model, its base, and the versions of the libraries."""

import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ..checkpoint import fsync
from .manifest import FileRecord, recordable

_LIBRARIES = ("know_hf", "torch", "transformers", "datasets", "accelerate", "peft", "safetensors", "numpy")


def write_model_files(folder: Path, state_folder: Path, processing_class: Any) -> tuple[FileRecord, ...]:
    """Write the config of a state and its tokenizer or processor to the folder of the trajectory."""
    work = folder / ".model-files.partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for path in state_folder.iterdir():
        if path.is_file() and not path.name.endswith((".safetensors", ".index.json")):
            shutil.copy2(path, work)
    if processing_class is not None:
        processing_class.save_pretrained(work)
    names = recordable(work)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        fsync(work / name)
        (work / name).replace(folder / name)
    shutil.rmtree(work)
    return tuple(FileRecord.of(folder / name, name) for name in names)


def base_of(model: nn.Module) -> tuple[str | None, str | None]:
    """Return Hub id or path of the model that the training started from, and its commit, if known."""
    config = getattr(model, "config", None)
    name = explicit_path(getattr(config, "_name_or_path", None) or "")
    return name or None, getattr(config, "_commit_hash", None) or _cached_revision(name)


def explicit_path(name: str) -> str:
    """Return `./models/bert` for a folder `models/bert`, which would read as a Hub id; other names are unchanged."""
    is_relative = not Path(name).is_absolute() and not name.startswith(".")
    return f"./{name}" if name and is_relative and Path(name).is_dir() else name


def library_versions() -> dict[str, str]:
    """Return the versions of the installed libraries that a recording depends on."""
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def _cached_revision(repo_id: str) -> str | None:
    """Commit of a repo in the Hub cache; `None` if the cache has several, since a config does not name its own."""
    if not repo_id or Path(repo_id).exists():
        return None
    try:
        validate_repo_id(repo_id)
    except HFValidationError:  # a folder that was deleted
        return None
    snapshots = Path(HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"), "snapshots")
    commits = [path.name for path in snapshots.iterdir()] if snapshots.is_dir() else []
    return commits[0] if len(commits) == 1 else None
