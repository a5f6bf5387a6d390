"""From the files of a state back to a model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import CheckpointReader
from ..roles import is_adapter, is_partitioned
from .manifest import TrajectoryError


def load_pretrained(
    folder: Path, model_class: type[PreTrainedModel] | None = None, base_model: PreTrainedModel | None = None
) -> Any:
    """Loads a checkpoint with the class its `config.json` names, or with the one given; an adapter onto its base.

    Args:
        folder (`Path`): A folder as `save_pretrained` leaves it.
        model_class (`type`, *optional*): Class of the model.
        base_model (`PreTrainedModel`, *optional*): The model an adapter belongs to.

    Raises:
        `TrajectoryError`: when the folder has no config, transformers no class of that name, or an adapter no base.
    """
    import transformers

    if (folder / "adapter_config.json").exists():
        if base_model is None:
            raise TrajectoryError(f"{folder} holds an adapter; pass base_model=, the model that it was trained on")
        from peft import PeftModel

        return PeftModel.from_pretrained(base_model, folder)
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
    return model_class.from_pretrained(folder, use_safetensors=True)


def load_into(model: nn.Module, folder: Path, tensors: Mapping[str, Callable[[str], torch.Tensor]]) -> None:
    """Copies the weights of a state into a model in memory.

    Args:
        model (`nn.Module`): The model, without its wrappers.
        folder (`Path`): The state's folder.
        tensors (`Mapping[str, Callable[[str], torch.Tensor]]`): From each name on disk to what reads it.

    Raises:
        `TrajectoryError`: when the model is in parts (ZeRO-3), or state and model don't have the same tensors.
    """
    if is_partitioned(model):
        raise TrajectoryError(
            f"the weights of {folder} can't be copied into this {type(model).__name__}, as ZeRO-3 has it in parts: a"
            " recording under ZeRO-3 can't be resumed. Go on without ZeRO-3 (FSDP2 resumes), or record to another"
            " folder; a finished trajectory is opened with WeightTrajectory(path)"
        )
    if isinstance(model, PreTrainedModel):
        # from_pretrained knows the way from the names on disk to those in memory
        model.load_state_dict(type(model).from_pretrained(folder, use_safetensors=True).state_dict())
        return
    state_dict = {name: read(name) for name, read in tensors.items()}
    if is_adapter(model):
        from peft import set_peft_model_state_dict

        adapter: Any = model
        unexpected = set_peft_model_state_dict(
            adapter, state_dict, adapter_name=next(iter(adapter.peft_config))
        ).unexpected_keys
    else:
        own = model.state_dict()
        places = {own[name].data_ptr() for name in state_dict if name in own}
        missing, unexpected = model.load_state_dict(state_dict, strict=False)
        unexpected += [name for name in missing if own[name].data_ptr() not in places]
    if unexpected:
        raise TrajectoryError(
            f"tensor {unexpected[0]!r} is not both in {folder} and in the given {type(model).__name__}"
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
