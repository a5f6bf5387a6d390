"""Names of models and files that can be published: they do not tell the folders of this machine.

Hub ids and paths below the working directory are kept. Of any other path the last part is kept: `.../base`. Such a
name leads nowhere, so the base model has to be given by the user, except for a folder beside a trajectory, `../base`.
"""

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ELSEWHERE = re.compile(r"(/|\\|~|[A-Za-z]:[/\\]).+|(.*[/\\])?\.\.([/\\].*)?", re.DOTALL)
_ABSOLUTE = re.compile(r"(/|~/|[A-Za-z]:[/\\])[^\n]+")
_CACHED = re.compile(r".*/models--([^/]+)/snapshots/[0-9a-f]{40}/?")
_PATH_KEYS = re.compile(r"(.*_)?(path|file|dir|folder)")  # name_or_path, base_model_name_or_path, tokenizer_file, …


def public_name(name: str) -> str:
    """Return a Hub id or a path below the working directory as it is; of another path, `.../` and its last part.

    A folder of the Hub cache gets the id of its repo.
    """
    if not _ELSEWHERE.fullmatch(name):
        return name
    if cached := _CACHED.fullmatch(name):
        return cached[1].replace("--", "/")
    parts = [part for part in re.split(r"[/\\]+", name) if part not in ("", "~", ".")]
    return f".../{parts[-1]}" if parts and parts[-1] != ".." else f".../{Path(os.path.abspath(name)).name}"


def name_beside(folder: Path, name: str) -> str:
    """Return the name of a model to store in a trajectory's folder: `../base` for a folder beside it.

    [`resolved_name`] is the inverse.
    """
    target = os.path.realpath(name)
    if os.path.isdir(name) and os.path.dirname(target) == os.path.dirname(os.path.realpath(folder)):
        return f"../{os.path.basename(target)}"
    return explicit_path(public_name(name))


def resolved_name(folder: Path, name: str) -> str:
    """Return the Hub id or the path that a name in a trajectory's folder stands for."""
    is_beside = name.startswith("../") and (folder / name).is_dir()
    return os.path.normpath(os.path.realpath(folder) + "/" + name) if is_beside else name


def loaded_from(model: Any) -> str:
    """Return the Hub id or the path that a model was loaded from, or an empty string."""
    return getattr(getattr(model, "config", None), "name_or_path", None) or ""


def is_unknown(name: str) -> bool:
    """Whether only the last part of a path is known."""
    return name.startswith(".../")


def explicit_path(name: str) -> str:
    """Return `./models/bert` for a folder `models/bert`, which would read as a Hub id; other names are unchanged."""
    is_relative = not Path(name).is_absolute() and not name.startswith(".")
    return f"./{name}" if name and is_relative and Path(name).is_dir() else name


def public_values(content: Any) -> Any:
    """Replace all absolute paths in JSON values, as [`public_name`] does."""
    if isinstance(content, Mapping):
        return {key: public_values(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [public_values(value) for value in content]
    is_path = isinstance(content, str) and _ABSOLUTE.fullmatch(content)
    return public_name(content) if is_path else content


def public_command(command: str) -> str:
    """Replace the paths in a shell command, also those in `NAME=PATH`."""
    return shlex.join("=".join(map(public_name, word.split("=", 1))) for word in shlex.split(command))


def public_config(path: Path) -> str | None:
    """Return a `config.json`, `adapter_config.json` or `tokenizer_config.json` without paths, if it has some."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # reported by what needs the file
        return None
    public = _public_fields(content)
    return json.dumps(public, indent=2, ensure_ascii=False) + "\n" if public != content else None


def hide_paths(folder: Path) -> None:
    """Rewrite the configs in a folder that has no readers yet; see [`public_config`]."""
    for path in folder.rglob("*config.json"):
        if (text := public_config(path)) is not None:
            path.write_text(text, encoding="utf-8")


def _public_fields(content: Any, key: str = "") -> Any:
    if isinstance(content, dict):
        return {key: _public_fields(value, key) for key, value in content.items()}
    if isinstance(content, list):
        return [_public_fields(value, key) for value in content]
    return public_name(content) if isinstance(content, str) and _PATH_KEYS.fullmatch(key) else content
