"""Load pretrained models from safetensors files only. transformers would also unpickle weights."""

import posixpath
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file, has_file

from .files import read_json_object
from .reader import INDEX_NAME, WEIGHTS_NAME

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def from_safetensors(model_class: Any, source: str | Path, revision: str | None = None, **options: Any) -> Any:
    """Call `model_class.from_pretrained` on weights in safetensors files.

    Args:
        model_class (`type`):
            A model class or an `Auto` class of transformers.
        source (`str` or `Path`):
            Folder or Hub id.
        revision (`str`, *optional*):
            Branch, tag or commit of the repo.
        options:
            Other arguments of `from_pretrained`.

    Raises:
        `ValueError`: If the config, the index or an adapter names weights that are not safetensors files of `source`,
            or a file is damaged.
        `OSError`: If there are no safetensors files; names the command that converts pickled weights.
    """
    check_weight_files(source, revision)
    try:
        return model_class.from_pretrained(source, revision=revision or "main", use_safetensors=True, **options)
    except OSError as error:
        if _is_pickled(source, revision):
            raise OSError(
                f"{source} has only pickled weights, which can run code when they are read; if you trust it, convert"
                f' it: {model_class.__name__}.from_pretrained("{source}").save_pretrained("FOLDER")'
            ) from error
        raise
    except (RecursionError, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}"[:500].split())
        raise ValueError(f"{source} cannot be loaded ({reason}); restore it from a copy") from error


def load_config(source: str | Path, revision: str | None = None, **options: Any) -> PreTrainedConfig:
    """Call `AutoConfig.from_pretrained`; a `ValueError` names the source of a damaged config."""
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
        adapter, weights = (_find(source, file, revision) for file in _ADAPTER)
        if adapter is not None and weights is None:
            raise ValueError(f"{source} has an {_ADAPTER[0]} without {_ADAPTER[1]}; save the adapter as safetensors")
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


def _find(source: str | Path, name: str, revision: str | None) -> Path | None:
    path = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def _is_pickled(source: str | Path, revision: str | None) -> bool:
    with suppress(OSError):
        is_safe = any(has_file(source, name, revision=revision) for name in (WEIGHTS_NAME, INDEX_NAME))
        return not is_safe and any(has_file(source, name, revision=revision) for name in _PICKLES)
    return False
