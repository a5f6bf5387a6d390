"""Kind of a folder or a repo, and the files that belong to it."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from ..checkpoint import ADAPTER_NAME, CheckpointReader
from ..local_paths import public_config
from ..terminal import first_names
from ..trajectory.manifest import MANIFEST_NAME

Kind = Literal["checkpoint", "adapter", "trajectory"]

CARD = "README.md"

# Files that save_pretrained and the cards write. Caches, optimizers and pickles are neither pushed nor pulled.
_EXPECTED = re.compile(
    r"[^/\\:]+\.(safetensors|json|jinja|txt|md|py|png|svg|model(\.v\w+)?|spm|codes|vocab|tokenizer|tiktoken|bpe)"
    r"|LICENSE|NOTICE"
)
_WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_STATE_FOLDER = re.compile(r"state-\d+/")
_SNAPSHOT_FOLDER = re.compile(r"(start|(state|tail|branch)-\d+)/")


def kind_of(names: Collection[str]) -> Kind | None:
    """Return the kind of a folder or repo from its file names, or None if it has neither weights nor a config."""
    if MANIFEST_NAME in names or any(_STATE_FOLDER.match(name) for name in names):
        return "trajectory"
    if "adapter_config.json" in names or ADAPTER_NAME in names:
        return "adapter"
    if any(name == "config.json" or is_weights(name) or name.startswith("pytorch_model") for name in names):
        return "checkpoint"
    return None


def is_expected(name: str) -> bool:
    """Return whether a file with this relative path belongs to a checkpoint or its card."""
    *folders, last = name.split("/")
    is_plain = all(re.fullmatch(r"[^\\:.][^\\:]*", part) for part in (*folders, last))
    return is_plain and _EXPECTED.fullmatch(last) is not None


def is_weights(name: str) -> bool:
    """Return whether `from_pretrained` may read this file as the weights of a checkpoint."""
    return _WEIGHTS.fullmatch(name) is not None


def is_of_snapshot(name: str) -> bool:
    """Return whether a file is in the folder of a state, the start, a tail state or a branch."""
    return _SNAPSHOT_FOLDER.match(name) is not None


def is_card_file(name: str) -> bool:
    """Return whether a file is the card or one of its pictures."""
    return re.fullmatch(r"README\.md|[^/\\:.][^/\\:]*\.(png|svg)", name) is not None


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """List all files of a checkpoint folder by relative path.

    Raises:
        `FileNotFoundError`: if the folder has no safetensors weights.
        `CheckpointError`: if a safetensors file is damaged, or a shard is missing.
        `ValueError`: if the folder has files that are not part of a checkpoint.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    weights = [name for name in names if is_weights(name) and name.endswith(".safetensors")]
    if not weights:
        raise FileNotFoundError(f"{folder} has no model.safetensors, no shards and no {ADAPTER_NAME}")
    if unexpected := [name for name in names if not is_expected(name)]:
        raise ValueError(f"{folder} contains files other than a checkpoint: {first_names(unexpected, 5)}; delete them")
    if any(name.endswith(".index.json") for name in names):
        CheckpointReader.from_folder(folder)  # detects missing shards
    CheckpointReader([folder / name for name in weights])
    return {name: folder / name for name in names}


def public_files(files: Mapping[str, Path], temporary: Path) -> dict[str, Path]:
    """Replace configs that tell local folders by copies in `temporary` that do not."""
    public = dict(files)
    for name, path in files.items():
        if name.endswith("config.json") and (text := public_config(path)) is not None:
            public[name] = temporary / name
            public[name].parent.mkdir(parents=True, exist_ok=True)
            public[name].write_text(text, encoding="utf-8")
    return public


def read_config(config: Path) -> dict[str, Any]:
    """Return the object in a `config.json`, empty without one. A `ValueError` names a file that is not JSON."""
    try:
        content = json.loads(config.read_bytes()) if config.is_file() else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def architecture_of(config: Path) -> str | None:
    """Return the model class named by a `config.json`, else its model type, else None. See [`read_config`]."""
    content = read_config(config)
    classes = content.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else content.get("model_type")
    return name if isinstance(name, str) else None
