"""Load a state as a model, or into a model in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checkpoint import CheckpointReader
from ..checkpoint.safe_loading import check_weight_files, from_safetensors
from ..distributed import set_values
from ..model_tensors import (
    converted_names,
    is_adapter,
    is_partitioned,
    names_in_memory,
    recorded_adapter,
    unsharded_shape,
    unwrapped,
)
from .adapters import check_initialisation, read_adapter_config
from .manifest import TrajectoryError

_REBUILD = "build the model as for the training, and copy the weights with load_into(model)"


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Hide the bar that transformers shows for each model it loads."""
    is_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if is_enabled:
            logging.enable_progress_bar()


def load_pretrained(
    folder: Path, model_class: type[PreTrainedModel] | None = None, base_model: PreTrainedModel | None = None
) -> Any:
    """Load a checkpoint with the class in its `config.json` or a given class, or an adapter onto its base model.

    A given class may lack weights of the checkpoint but must not have others.

    Raises:
        `TrajectoryError`: when the class or the base model is unknown, model and checkpoint differ in tensors or
            shapes, the base model has an adapter in training, or peft changed the base of the adapter at random.
    """
    if (folder / "adapter_config.json").exists():
        return _load_adapter(folder, base_model)
    may_lack = model_class is not None
    model_class = model_class or architecture(folder)
    model, loading = _from_pretrained(model_class, folder)
    name = model_class.__name__
    # transformers would only warn, and initialise the weights at random
    for tensor, on_disk, in_model in sorted(loading["mismatched_keys"]):
        raise TrajectoryError(
            f"tensor {tensor!r} is {tuple(on_disk)} in {folder} and {tuple(in_model)} in {name}; {_REBUILD}"
        )
    for tensor in sorted(loading["missing_keys"]):
        hint = f"to initialise it at random, use {name}.from_pretrained" if may_lack else _REBUILD
        raise TrajectoryError(f"tensor {tensor!r} of {name} is not in {folder}; {hint}")
    for tensor in () if may_lack else sorted(loading["unexpected_keys"]):
        raise TrajectoryError(f"tensor {tensor!r} in {folder} is not in {name}; {_REBUILD}")
    return model


def load_into(model: nn.Module, folder: Path, reader: CheckpointReader) -> None:
    """Copy the weights of a state, which a reader gives, into a model in memory. If the weights of the model are
    sharded, every process must call this.

    Raises:
        `TrajectoryError`: when state and model differ in tensors or shapes.
    """
    model = unwrapped(model)
    kind = type(model).__name__
    own, in_memory, converted = model.state_dict(keep_vars=True), names_in_memory(model), converted_names(model)
    saved = {in_memory[name]: name for name in reader.names if name in in_memory}
    filled = {own[name].data_ptr() or id(own[name]) for name in saved}  # tied tensors are on disk once
    differing = {other for other, name in in_memory.items() if (own[name].data_ptr() or id(own[name])) not in filled}
    others = set(reader.names) - in_memory.keys()
    loaded: dict[str, torch.Tensor] = {}
    if converted:
        loaded, missing = _load_converted(type(model), folder, converted)
        differing |= (loaded.keys() - missing - own.keys()) | (converted & missing)
        loaded = {name: loaded[name] for name in converted - missing}
    elif is_adapter(model) and others:  # tensors that peft computes for the file
        from peft import set_peft_model_state_dict

        adapter: Any = model
        content = {name: reader.tensor(name) for name in reader.names}
        result = set_peft_model_state_dict(adapter, content, adapter_name=recorded_adapter(adapter))
        differing.update(result.unexpected_keys)
    else:
        differing |= others
    if differing:
        raise TrajectoryError(f"{min(differing)!r} is not in both {folder} and this {kind}; pass the recorded model")
    shapes = {name: reader.shape(other) for name, other in saved.items()}
    shapes |= {name: tensor.shape for name, tensor in loaded.items()}
    for name, shape in shapes.items():
        if shape != unsharded_shape(own[name]):
            raise TrajectoryError(
                f"tensor {name!r} is {tuple(shape)} in {folder} and {tuple(unsharded_shape(own[name]))} in the given"
                f" {kind}; pass a model with the recorded head and vocabulary"
            )
    if is_partitioned(model):
        for name in sorted(shapes):  # every process in this order
            set_values(own[name], loaded[name] if name in loaded else reader.tensor(saved[name]))
    else:
        model.load_state_dict(loaded | {name: reader.tensor(other) for name, other in saved.items()}, strict=False)


def _load_adapter(folder: Path, base_model: PreTrainedModel | None) -> Any:
    if base_model is None:
        raise TrajectoryError(f"{folder} has an adapter; pass base_model=, the model it was trained on")
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    # peft replaces the adapter of its base model, also one that is trained, and ignores this one if given a PeftModel
    layers = [module for module in base_model.modules() if isinstance(module, BaseTunerLayer)]
    if isinstance(base_model, PeftModel) or any(p.requires_grad for layer in layers for p in layer.parameters()):
        raise TrajectoryError(
            f"the base model, a {type(base_model).__name__}, has an adapter, as get_peft_model leaves it; load the"
            " base model again and pass it as base_model=, or pass what unload() of the adapted model returns"
        )
    check_weight_files(folder)
    try:
        check_initialisation(read_adapter_config(folder))
    except ValueError as error:
        raise TrajectoryError(f"the adapter in {folder} cannot be loaded as it was recorded: {error}") from error
    try:
        return PeftModel.from_pretrained(unwrapped(base_model), folder)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # peft names tensors and shapes
        raise TrajectoryError(
            f"the adapter in {folder} does not fit this {type(base_model).__name__}; pass base_model=, the model it"
            f" was trained on. {' '.join(str(error).split())}"
        ) from error


def architecture(folder: Path) -> type[PreTrainedModel]:
    """Return the class that a `config.json` names; a `TrajectoryError` if there is none."""
    import transformers

    config = folder / "config.json"
    if not config.exists():
        raise TrajectoryError(f"{folder} has no config.json and records a plain nn.Module; use load_into(model)")
    name = (transformers.PreTrainedConfig.get_config_dict(folder)[0].get("architectures") or ["none"])[0]
    model_class: type[PreTrainedModel] | None = getattr(transformers, name, None)
    if model_class is None:
        raise TrajectoryError(f"transformers has no class {name!r}, the architecture in {config}; pass model_class=")
    return model_class


def _load_converted(
    model_class: type[PreTrainedModel], folder: Path, names: set[str]
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Load tensors that saving splits or merges, which only `from_pretrained` can undo.

    Returns the state dict of a new model, and the names in it that are not from the checkpoint.
    """
    try:
        model, loading = _from_pretrained(model_class, folder)
    except Exception as error:
        raise TrajectoryError(
            f"{min(names)!r} is split or merged in {folder}, and {model_class.__name__}.from_pretrained, which undoes"
            f" this, failed: {error}"
        ) from error
    state_dict = model.state_dict()
    missing = {name for name, *_ in loading["mismatched_keys"]} | {*loading["missing_keys"]}
    return state_dict, missing | (names - state_dict.keys())


def _from_pretrained(model_class: type[PreTrainedModel], folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    return from_safetensors(model_class, folder, output_loading_info=True, ignore_mismatched_sizes=True)
