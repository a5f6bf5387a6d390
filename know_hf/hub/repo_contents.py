"""What a folder or a repo holds, told from the names of its files, and which files belong there."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from ..checkpoint import CheckpointReader, read_json
from ..trajectory.manifest import MANIFEST_NAME

Kind = Literal["checkpoint", "adapter", "trajectory"]

CARD = "README.md"
MAX_CONFIG_BYTES = 10_000_000

# What save_pretrained and the cards write. All else in a folder was not meant for others: caches, optimizers, pickles.
_EXPECTED = re.compile(
    r"[^/\\:]+\.(safetensors|json|jinja|txt|md|py|png|svg|model(\.v\w+)?|spm|codes|vocab|tokenizer|tiktoken|bpe)"
    r"|LICENSE|NOTICE"
)
_WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_STATE_FILE = re.compile(r"state-\d+/.*")
_CARD_FILE = re.compile(r"README\.md|[^/\\:.][^/\\:]*\.(png|svg)")


def kind_of(names: Collection[str]) -> Kind | None:
    """What a folder or repo with these files holds; nothing for one without weights and config."""
    if MANIFEST_NAME in names or any(_STATE_FILE.fullmatch(name) for name in names):
        return "trajectory"
    if "adapter_config.json" in names or "adapter_model.safetensors" in names:
        return "adapter"
    if any(name == "config.json" or is_weights(name) or name.startswith("pytorch_model") for name in names):
        return "checkpoint"
    return None


def is_expected(name: str) -> bool:
    """Whether a file of this relative path belongs to a checkpoint and its card."""
    *folders, last = name.split("/")
    plain = all(re.fullmatch(r"[^\\:.][^\\:]*", part) for part in (*folders, last))
    return plain and _EXPECTED.fullmatch(last) is not None


def is_weights(name: str) -> bool:
    """Whether `from_pretrained` may take this file for the weights of a checkpoint."""
    return _WEIGHTS.fullmatch(name) is not None


def is_state_file(name: str) -> bool:
    return _STATE_FILE.fullmatch(name) is not None


def is_card_file(name: str) -> bool:
    """Whether it is a card or a picture beside it."""
    return _CARD_FILE.fullmatch(name) is not None


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """All files of a checkpoint's folder, from their relative path.

    Raises:
        `FileNotFoundError`: when it holds no safetensors weights.
        `CheckpointError`: when a safetensors file is damaged, or a shard is missing.
        `ValueError`: when it holds a file that is not part of a checkpoint.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    if not any(is_weights(name) and name.endswith(".safetensors") for name in names):
        raise FileNotFoundError(f"{folder} holds no model.safetensors, shards of one or adapter_model.safetensors")
    if odd := [name for name in names if not is_expected(name)]:
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise ValueError(
            f"{folder} holds {', '.join(odd[:5])}{more}, which is not part of a checkpoint: only safetensors, JSON,"
            " text and pictures are pushed; delete it, or push a folder of save_pretrained or of know_hf"
        )
    if any(name.endswith(".index.json") for name in names):
        CheckpointReader.from_folder(folder)  # finds a shard that is missing
    CheckpointReader([folder / name for name in names if is_weights(name) and name.endswith(".safetensors")])
    return {name: folder / name for name in names}


def architecture_of(config: Path) -> str | None:
    """Class of the model that a `config.json` is of, or else its model type; nothing where it doesn't say.

    Raises:
        `ValueError`: when the file is no JSON object, or too large for a config.
    """
    if not config.is_file():
        return None
    try:
        content = read_json(config, MAX_CONFIG_BYTES)
    except ValueError as error:
        raise ValueError(f"{config} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{config} is no JSON object")
    named = content.get("architectures")
    found = named[0] if isinstance(named, list) and named else content.get("model_type")
    return found if isinstance(found, str) else None
