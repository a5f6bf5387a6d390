"""Names, shapes and ties of the tensors of a model, in memory and on disk."""

import sys
from collections.abc import Collection, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from accelerate.utils.other import has_compiled_regions
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def unwrapped(model: nn.Module) -> nn.Module:
    """Return a model without the wrappers of torch.compile, `DistributedDataParallel` and the like.

    Where only parts of the model are compiled, the result is another module with the same weights.
    """
    attributes = dict(vars(model))
    # compile_regions keeps the original module, which lacks the adapters that were added since
    if attributes.pop("_orig_mod", None) is None:
        inner = extract_model_from_parallel(model, keep_torch_compile=False)
        if inner is not model:
            return unwrapped(inner)
    if not has_compiled_regions(model):
        return model
    children = attributes["_modules"].items()
    attributes["_modules"] = {name: None if child is None else unwrapped(child) for name, child in children}
    plain = object.__new__(type(model))
    vars(plain).update(attributes)
    return plain


@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its training mode back after the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training


def is_adapter(model: nn.Module) -> bool:
    """Whether a module is a `PeftModel`, of which `save_pretrained` writes the adapter only."""
    peft: Any = sys.modules.get("peft")  # a PeftModel cannot exist before peft is imported
    return peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel)


def without_adapter(model: Any) -> Any:
    """Return the base model of a `PeftModel`; any other model is returned unchanged."""
    return model.get_base_model() if is_adapter(model) else model


def recorded_adapter(model: nn.Module) -> str:
    """Return the adapter of a `PeftModel` that is recorded: the one that trains, else the active one."""
    peft_model: Any = model
    adapters = list(peft_model.peft_config)
    if len(adapters) == 1:
        return adapters[0]
    trained = {part for name, tensor in model.named_parameters() if tensor.requires_grad for part in name.split(".")}
    training = [name for name in adapters if name in trained]
    if len(training) > 1:
        raise ValueError(
            f"the adapters {', '.join(training)} train, but a trajectory records one; freeze the others with"
            " model.set_requires_grad(name, False)"
        )
    return training[0] if training else peft_model.active_adapters[0]


def unsharded_shape(tensor: torch.Tensor) -> torch.Size:
    """Shape of a tensor before ZeRO-3 partitions it."""
    return getattr(tensor, "ds_shape", tensor.shape)


def is_partitioned(model: nn.Module) -> bool:
    """Whether each process holds a part of the weights, as under FSDP2 and ZeRO-3."""
    # state_dict() shards weights again that FSDP2 has gathered
    state = model.state_dict(keep_vars=True).values()
    return any(isinstance(tensor, DTensor) or hasattr(tensor, "ds_shape") for tensor in state)


def memory_key(tensor: torch.Tensor) -> Hashable:
    """Return a value that two tensors share only if they are the same memory, read in the same way."""
    if not (pointer := tensor.data_ptr()):  # empty, on the meta device or sharded
        return id(tensor)
    return tensor.device, pointer, tensor.dtype, tensor.shape, tensor.stride()


def tied_names(model: nn.Module) -> dict[str, str]:
    """Map the names of tied tensors in `model.state_dict()`, but for the first of each, to the first name."""
    first: dict[Hashable, str] = {}
    state = model.state_dict(keep_vars=True).items()
    firsts = {name: first.setdefault(memory_key(tensor), name) for name, tensor in state}
    return {name: other for name, other in firsts.items() if name != other}


def names_in_memory(model: nn.Module) -> dict[str, str]:
    """Map names on disk to names of `model.state_dict()`, for all tensors that `save_pretrained` at most renames.

    transformers keeps the names of old checkpoints on disk, while modules in memory may have new ones (ViT, Mixtral,
    …). Of a `PeftModel` only the adapter is saved, some tensors under two names. Tensors that saving splits, merges or
    ignores are left out. Modules of other libraries keep their names.
    """
    markers = _markers(model)
    if isinstance(model, PreTrainedModel):
        ignored = _ignored_on_save(model)
        saved = revert_weight_conversion(model, {name: m for name, m in markers.items() if name not in ignored})
    elif is_adapter(model):
        saved = _saved_with_adapter(model, markers)
    else:
        return {name: name for name in markers}
    in_memory = {id(marker): name for name, marker in markers.items()}
    return {name: in_memory[id(marker)] for name, marker in saved.items() if id(marker) in in_memory}


def computed_names(model: nn.Module) -> set[str]:
    """Names on disk of the tensors that saving a `PeftModel` computes from its weights."""
    markers = _markers(model)
    saved, known = _saved_with_adapter(model, markers), {id(marker) for marker in markers.values()}
    return {name for name, tensor in saved.items() if tensor.is_meta and id(tensor) not in known}


def names_on_disk(model: nn.Module) -> dict[str, str]:
    """Map names of `model.state_dict()` to names on disk, the inverse of [`names_in_memory`]."""
    return {name: saved for saved, name in names_in_memory(model).items()}


def converted_names(model: nn.Module) -> set[str]:
    """Names in memory of the tensors of a `PreTrainedModel` that saving splits or merges, such as fused experts."""
    if not isinstance(model, PreTrainedModel):
        return set()
    saved = set(model.state_dict(keep_vars=True)) - set(_ignored_on_save(model))
    return saved - set(names_in_memory(model).values())


def _markers(model: nn.Module) -> dict[str, torch.Tensor]:
    """A tensor without memory for each name of `model.state_dict()`, to find again in what saving makes of them."""
    return {
        name: torch.empty(unsharded_shape(tensor), dtype=tensor.dtype, device="meta")
        for name, tensor in model.state_dict(keep_vars=True).items()
    }


def _saved_with_adapter(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, state_dict=dict(state_dict), adapter_name=recorded_adapter(model))


def _ignored_on_save(model: PreTrainedModel) -> Collection[str]:
    return model._keys_to_ignore_on_save or ()  # noqa: SLF001 - transformers has no public name for it
