"""Load pretrained models from safetensors files only. transformers would also unpickle weights."""

import posixpath
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights
from transformers.utils import cached_file, has_file

from .files import read_json_object
from .reader import ADAPTER_NAME, INDEX_NAME, WEIGHTS_NAME, CheckpointReader

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_LOADING_OPTIONS = {"dtype", "ignore_mismatched_sizes", "output_loading_info"}  # the others belong to the config
_UNLOADABLE = (ArithmeticError, AttributeError, KeyError, MemoryError, RuntimeError, TypeError)
_MOST_NEW = 10**8  # elements of a model that are not in its files, such as those of a new head


def from_safetensors(model_class: Any, source: str | Path, revision: str | None = None, **options: Any) -> Any:
    """Call `model_class.from_pretrained` on weights in safetensors files; `model_class` may be an `Auto` class.

    Raises:
        `ValueError`: if the config, the index or an adapter names weights that are not safetensors files of `source`,
            the config describes a model that is far larger than the files, or a file is damaged.
        `OSError`: if there are no safetensors files; names the command that converts pickled weights.
    """
    check_weight_files(source, revision)
    try:
        _check_sizes(model_class, source, revision, options)
        return model_class.from_pretrained(source, revision=revision or "main", use_safetensors=True, **options)
    except OSError as error:
        if _is_pickled(source, revision):
            raise OSError(
                f"{source} has only pickled weights, which can run code when they are read; if you trust it, convert"
                f' it: {model_class.__name__}.from_pretrained("{source}").save_pretrained("FOLDER")'
            ) from error
        raise
    except (*_UNLOADABLE, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}"[:500].split())
        raise ValueError(f"{source} cannot be loaded ({reason}); restore it from a copy") from error


def load_config(source: str | Path, revision: str | None = None, **options: Any) -> PreTrainedConfig:
    """Call `AutoConfig.from_pretrained`; a `ValueError` names the source of a damaged config."""
    if Path(source).is_dir() and not (Path(source) / "config.json").exists():
        raise FileNotFoundError(f"{source} has no config.json; give the folder of a model")
    try:
        return AutoConfig.from_pretrained(source, revision=revision or "main", **options)
    except (AttributeError, KeyError, RecursionError, StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}"[:500].split())
        raise ValueError(f"config.json of {source} is not a model config ({reason})") from error


def check_weight_files(source: str | Path, revision: str | None = None) -> None:
    """Raise a `ValueError` if `from_pretrained` would read other weights than safetensors files of `source`."""
    with suppress(OSError):  # from_pretrained reports files that are missing or out of reach
        try:
            config, _ = PreTrainedConfig.get_config_dict(str(source), revision=revision)
            name = config.get("transformers_weights")
        except (AttributeError, KeyError, RecursionError, TypeError) as error:
            raise ValueError(f"config.json of {source} is not a model config ({error!r:.200})") from error
        if name is not None and not str(name).endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(f"config.json of {source} has transformers_weights={name!r:.100}, not safetensors")
        if _find(source, "adapter_config.json", revision) and not _find(source, ADAPTER_NAME, revision):
            raise ValueError(
                f"{source} has an adapter_config.json without {ADAPTER_NAME}; save the adapter as safetensors"
            )
        if name is None and _find(source, WEIGHTS_NAME, revision) is None:
            name = INDEX_NAME
        if name is not None and name.endswith(".json") and (index := _find(source, name, revision)):
            check_index(index)


def check_index(index: Path) -> None:
    """Raise a `ValueError` if an index names anything but safetensors files in its folder, or in its trajectory."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map; restore it from a copy")
    # States refer to the files of earlier states beside them.
    parent = index.parent.name if (index.parent.parent / "trajectory.json").exists() else ""
    for name in weight_map.values():
        path = posixpath.normpath(posixpath.join(parent, name)) if isinstance(name, str) else ".."
        if path.startswith(("..", "/")) or "\\" in path or not path.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r:.100}, which is not a safetensors file of its folder")


def _check_sizes(model_class: Any, source: str | Path, revision: str | None, options: Mapping[str, Any]) -> None:
    """Compare the model of a config with the weight files before its memory is allocated."""
    weights = _weight_map(source, revision)
    files = set(weights.values())
    if not files or not all(path.exists() for path in files):  # from_pretrained downloads or reports them
        return
    nbytes = sum(path.stat().st_size for path in files)
    content, _ = PreTrainedConfig.get_config_dict(str(source), revision=revision)
    for name, most in (("num_hidden_layers", len(weights)), ("num_labels", nbytes)):
        if isinstance(content.get(name), int) and content[name] > most:
            raise ValueError(f"config.json of {source} has {name}={content[name]!r:.60}, more than its weights have")
    config_class = getattr(model_class, "config_class", None) or AutoConfig
    values = {name: value for name, value in options.items() if name not in _LOADING_OPTIONS}
    config = config_class.from_pretrained(source, revision=revision or "main", **values)
    build = getattr(model_class, "from_config", model_class)
    with torch.device("meta"), no_init_weights(), meta_device_safe_creation_ops():
        count = sum(tensor.numel() for tensor in build(config).state_dict().values())
    if count > 4 * nbytes + _MOST_NEW:  # 4-bit weights, and tied ones twice
        raise ValueError(
            f"config.json of {source} describes a model of {count:,} values, its files have {nbytes:,} bytes"
        )


def _weight_map(source: str | Path, revision: str | None) -> dict[str, Path]:
    """Return the file of each tensor."""
    if weights := _find(source, WEIGHTS_NAME, revision):
        return dict.fromkeys(CheckpointReader([weights]).names, weights)
    if index := _find(source, INDEX_NAME, revision):
        return {name: index.parent / file for name, file in read_json_object(index)["weight_map"].items()}
    return {}


def _find(source: str | Path, name: str, revision: str | None) -> Path | None:
    path = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def _is_pickled(source: str | Path, revision: str | None) -> bool:
    with suppress(OSError):
        is_safe = any(has_file(source, name, revision=revision) for name in (WEIGHTS_NAME, INDEX_NAME))
        return not is_safe and any(has_file(source, name, revision=revision) for name in _PICKLES)
    return False
