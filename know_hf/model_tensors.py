"""Names and shapes of a model's tensors, in memory and on disk."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def is_adapter(model: nn.Module) -> bool:
    """Whether a module is a `PeftModel`, of which only the adapter is saved."""
    return type(model).__module__.startswith("peft.") and hasattr(model, "peft_config")


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """Shape of a tensor; of a parameter in parts over the processes, as ZeRO-3 leaves it, the shape of the whole."""
    return getattr(tensor, "ds_shape", tensor.shape)


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds the model's parameters in parts: they are then empty on every process."""
    return any(whole_shape(parameter) != parameter.shape for parameter in model.parameters())


def names_in_memory(model: nn.Module) -> dict[str, str]:
    """Where the tensors are that `save_pretrained` writes, of those it only renames.

    transformers keeps the names of old checkpoints on disk while modules in memory may have others (ViT, Mixtral, …).
    Of a `PeftModel` only the adapter is saved, some tensors under two names. Tensors that saving splits or merges, or
    doesn't save, are left out.

    Args:
        model (`nn.Module`): Any module; one of neither transformers nor peft keeps its names.

    Returns:
        `dict[str, str]`: from the names on disk to those of `model.state_dict()`.
    """
    markers = {
        name: torch.empty(whole_shape(tensor), dtype=tensor.dtype, device="meta")
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    if isinstance(model, PreTrainedModel):
        left_out = model._keys_to_ignore_on_save or ()
        saved = revert_weight_conversion(model, {k: marker for k, marker in markers.items() if k not in left_out})
    elif is_adapter(model):
        from peft import get_peft_model_state_dict

        adapter: Any = model
        name = next(iter(adapter.peft_config))
        saved = get_peft_model_state_dict(adapter, state_dict=dict(markers), adapter_name=name)
    else:
        return {name: name for name in markers}
    in_memory = {id(marker): name for name, marker in markers.items()}
    return {name: in_memory[id(marker)] for name, marker in saved.items() if id(marker) in in_memory}


def converted_names(model: nn.Module) -> set[str]:
    """Names in memory of the tensors of a `PreTrainedModel` that saving splits or merges, such as fused experts."""
    if not isinstance(model, PreTrainedModel):
        return set()
    return (
        set(model.state_dict(keep_vars=True))
        - set(model._keys_to_ignore_on_save or ())
        - {*names_in_memory(model).values()}
    )


def names_on_disk(model: nn.Module) -> dict[str, str]:
    """From the names of `model.state_dict()` to those on disk; [`names_in_memory`] the other way round."""
    return {name: saved for saved, name in names_in_memory(model).items()}
