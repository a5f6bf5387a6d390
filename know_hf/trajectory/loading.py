"""From the files of a state back to a model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import CheckpointReader
from ..model_tensors import converted_names, is_adapter, is_partitioned, names_in_memory
from .manifest import TrajectoryError

_REBUILDING = (
    "the model was changed after it was made, such as by another head, or its config does not keep all it was made"
    " with; make it the same way and copy the weights into it with load_into(model), of the trajectory or of the"
    " prediction's result"
)


def load_pretrained(
    folder: Path, model_class: type[PreTrainedModel] | None = None, base_model: PreTrainedModel | None = None
) -> Any:
    """Loads a checkpoint with the class its `config.json` names, or with the one given; an adapter onto its base.

    Args:
        folder (`Path`): A folder as `save_pretrained` leaves it.
        model_class (`type`, *optional*): Class of the model; it may leave weights of the checkpoint out, but have no
            others.
        base_model (`PreTrainedModel`, *optional*): The model an adapter belongs to.

    Raises:
        `TrajectoryError`: when the folder has no config, transformers no class of that name, or an adapter no base;
            when a weight of the model is not in the checkpoint, or the other way round, or of another shape.
    """
    import transformers

    if (folder / "adapter_config.json").exists():
        if base_model is None:
            raise TrajectoryError(f"{folder} holds an adapter; pass base_model=, the model that it was trained on")
        from peft import PeftModel

        try:
            return PeftModel.from_pretrained(base_model, folder)
        except RuntimeError as error:  # peft names the tensors and their shapes
            raise TrajectoryError(
                f"the adapter in {folder} does not fit on this {type(base_model).__name__}; give as base_model= the"
                f" model that it was trained on, with its head and vocabulary. {' '.join(str(error).split())}"
            ) from error
    may_leave_out = model_class is not None
    if model_class is None:
        config = folder / "config.json"
        if not config.exists():
            raise TrajectoryError(
                f"{folder} has no config.json: it is of a plain module; load it with load_into(model)"
            )
        architecture = (transformers.PreTrainedConfig.get_config_dict(folder)[0].get("architectures") or ["none"])[0]
        model_class = getattr(transformers, architecture, None)
        if model_class is None:
            raise TrajectoryError(
                f"transformers has no class {architecture!r}, the architecture of {config}; pass model_class="
            )
    # whatever is not in the checkpoint would be random, with no more than a warning
    model, found = _from_pretrained(model_class, folder)
    for name, there, here in sorted(found["mismatched_keys"]):
        raise TrajectoryError(
            f"tensor {name!r} is {tuple(there)} in {folder} and {tuple(here)} in a {model_class.__name__} made from"
            f" its config; {_REBUILDING}"
        )
    for name in sorted(found["missing_keys"]):
        raise TrajectoryError(
            f"a {model_class.__name__} made from the config in {folder} has a tensor {name!r} that is not in the"
            " checkpoint and would be random; "
            + (f"where that is meant, use {model_class.__name__}.from_pretrained" if may_leave_out else _REBUILDING)
        )
    for name in sorted(found["unexpected_keys"]):
        if not may_leave_out:
            raise TrajectoryError(
                f"{folder} has a tensor {name!r} that a {model_class.__name__} made from its config has not;"
                f" {_REBUILDING}"
            )
    return model


def load_into(model: nn.Module, folder: Path, tensors: Mapping[str, Callable[[str], torch.Tensor]]) -> None:
    """Copies the weights of a state into a model in memory.

    Args:
        model (`nn.Module`): The model, without its wrappers.
        folder (`Path`): The state's folder.
        tensors (`Mapping[str, Callable[[str], torch.Tensor]]`): From each name on disk to what reads it.

    Raises:
        `TrajectoryError`: when the model is in parts (ZeRO-3), or state and model don't have the same tensors, of the
            same shapes.
    """
    if is_partitioned(model):
        raise TrajectoryError(
            f"the weights of {folder} can't be copied into this {type(model).__name__}, as ZeRO-3 has it in parts: a"
            " recording under ZeRO-3 can't be resumed. Go on without ZeRO-3 (FSDP2 resumes), or record to another"
            " folder; a finished trajectory is opened with WeightTrajectory(path)"
        )
    own, places, converted = model.state_dict(), names_in_memory(model), converted_names(model)
    state_dict = {places[name]: read(name) for name, read in tensors.items() if name in places}
    filled = {own[name].data_ptr() for name in state_dict}  # tied tensors are on disk once
    differing = {saved for saved, name in places.items() if own[name].data_ptr() not in filled}
    further = tensors.keys() - places.keys()
    if converted:
        made, missing = _converted(type(model), folder, converted)
        differing |= (made.keys() - missing - own.keys()) | (converted & missing)
        state_dict |= {name: made[name] for name in converted - missing}
    elif is_adapter(model) and further:  # what peft makes of its weights for the file
        from peft import set_peft_model_state_dict

        adapter: Any = model
        name = next(iter(adapter.peft_config))
        content = {name: read(name) for name, read in tensors.items()}
        differing |= set(set_peft_model_state_dict(adapter, content, adapter_name=name).unexpected_keys)
    else:
        differing |= further
    if differing:
        raise TrajectoryError(
            f"tensor {min(differing)!r} is not both in {folder} and in the given {type(model).__name__}"
        )
    for name, tensor in state_dict.items():
        if tensor.shape != own[name].shape:
            raise TrajectoryError(
                f"tensor {name!r} is {tuple(tensor.shape)} in {folder} and {tuple(own[name].shape)} in the given"
                f" {type(model).__name__}; give the model that was recorded, with its head and vocabulary"
            )
    model.load_state_dict(state_dict, strict=False)


def _converted(
    model_class: type[PreTrainedModel], folder: Path, names: set[str]
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The state dict of the model that `from_pretrained` makes, as it knows the way back from what saving splits or
    merges, and the names of what is not of the file in it."""
    try:
        made, found = _from_pretrained(model_class, folder)
    except Exception as error:
        raise TrajectoryError(
            f"{min(names)!r} is split or merged in {folder}, and no {model_class.__name__} could be made to read it:"
            f" {error}"
        ) from error
    state_dict = made.state_dict()
    lost = {name for name, *_ in found["mismatched_keys"]} | {*found["missing_keys"], *(names - state_dict.keys())}
    return state_dict, lost


def _from_pretrained(model_class: type[PreTrainedModel], folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    return model_class.from_pretrained(
        folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
    )


def check_same_tensors(path: Path, state: int, reader: CheckpointReader, first: CheckpointReader) -> None:
    """Raises a `TrajectoryError` that names the first tensor in which a state differs from state 0."""
    names, expected = set(reader.names), set(first.names)
    hint = "was the head replaced between stages?"
    for name in sorted(expected - names):
        raise TrajectoryError(f"state {state} of {path} has no tensor {name!r} that state 0 has; {hint}")
    for name in sorted(names - expected):
        raise TrajectoryError(f"state {state} of {path} has a tensor {name!r} that state 0 has not; {hint}")
    for name in sorted(names):
        here = (tuple(reader.shape(name)), reader.dtype(name))
        if here != (there := (tuple(first.shape(name)), first.dtype(name))):
            raise TrajectoryError(
                f"tensor {name!r} is {here[0]} {here[1]} in state {state} of {path} and {there[0]} {there[1]} in state"
                f" 0; {hint}"
            )
