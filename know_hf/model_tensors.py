"""Names and shapes of the tensors of a model, in memory and on disk."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def is_adapter(model: nn.Module) -> bool:
    """Whether a module is a `PeftModel`, of which `save_pretrained` writes the adapter only."""
    return type(model).__module__.startswith("peft.") and hasattr(model, "peft_config")


def unsharded_shape(tensor: torch.Tensor) -> torch.Size:
    """Shape of a tensor before ZeRO-3 partitions it."""
    return getattr(tensor, "ds_shape", tensor.shape)


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 partitions the parameters, which are then empty on every process."""
    return any(unsharded_shape(parameter) != parameter.shape for parameter in model.parameters())


def names_in_memory(model: nn.Module) -> dict[str, str]:
    """Map names on disk to names of `model.state_dict()`, for all tensors that `save_pretrained` at most renames.

    transformers keeps the names of old checkpoints on disk, while modules in memory may have new ones (ViT, Mixtral,
    …). Of a `PeftModel` only the adapter is saved, some tensors under two names. Tensors that saving splits, merges or
    ignores are left out. Modules of other libraries keep their names.
    """
    markers = {
        name: torch.empty(unsharded_shape(tensor), dtype=tensor.dtype, device="meta")
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    if isinstance(model, PreTrainedModel):
        ignored = _ignored_on_save(model)
        saved = revert_weight_conversion(model, {name: m for name, m in markers.items() if name not in ignored})
    elif is_adapter(model):
        from peft import get_peft_model_state_dict

        adapter: Any = model
        adapter_name = next(iter(adapter.peft_config))
        saved = get_peft_model_state_dict(adapter, state_dict=dict(markers), adapter_name=adapter_name)
    else:
        return {name: name for name in markers}
    in_memory = {id(marker): name for name, marker in markers.items()}
    return {name: in_memory[id(marker)] for name, marker in saved.items() if id(marker) in in_memory}


def names_on_disk(model: nn.Module) -> dict[str, str]:
    """Map names of `model.state_dict()` to names on disk, the inverse of [`names_in_memory`]."""
    return {name: saved for saved, name in names_in_memory(model).items()}


def converted_names(model: nn.Module) -> set[str]:
    """Names in memory of the tensors of a `PreTrainedModel` that saving splits or merges, such as fused experts."""
    if not isinstance(model, PreTrainedModel):
        return set()
    saved = set(model.state_dict(keep_vars=True)) - set(_ignored_on_save(model))
    return saved - set(names_in_memory(model).values())


def _ignored_on_save(model: PreTrainedModel) -> Collection[str]:
    return model._keys_to_ignore_on_save or ()  # noqa: SLF001 - transformers has no public name for it
