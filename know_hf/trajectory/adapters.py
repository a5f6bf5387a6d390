"""Checks before a training: whether a state holds what trains, and whether an adapter loads as it was recorded."""

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..checkpoint import ADAPTER_NAME, CheckpointReader
from ..model_tensors import computed_names, is_adapter, memory_key, names_on_disk, recorded_adapter, unwrapped

logger = logging.get_logger(__name__)

# Initialisations of LoRA that leave the base model as it is, and those that change it to the same values when peft
# loads the adapter. Others draw at random, or need data or gradients.
_KEEP_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_CHANGE_BASE = ("pissa", "olora")
# of peft's task types
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
_USUAL_RANK = 1024  # LoKr stores smaller layers without factors of this rank
_VALUES = 64  # of each weight of a base in its fingerprint, at least


def check_recordable(model: nn.Module) -> None:
    """Raise a `ValueError` when states could not hold the weights that train, or an adapter would not load again.

    These are adapters that learn a prompt or change their rank, weights that train but that `save_pretrained` leaves
    out or replaces, two trainable adapters, base models that peft changes at random, and weights that share memory in
    part.
    """
    model = unwrapped(model)
    if is_adapter(model):
        _check_adapter(model)
    else:
        _check_memory(model)


def check_initialisation(config: Any) -> None:
    """Raise a `ValueError` when peft changed the base of an adapter in a way that it does not repeat on loading."""
    method = getattr(config, "init_lora_weights", None)
    if isinstance(method, str):
        method = method.lower()
    if method not in (*_KEEP_BASE, *_CHANGE_BASE):
        raise ValueError(
            f"init_lora_weights={method!r} changes the base model, and peft does not change it in the same way when it"
            " loads the adapter; save the changed base model and adapt it with init_lora_weights=True, or use"
            " init_lora_weights='pissa'"
        )


def read_adapter_config(folder: Path) -> Any:
    """Read the `adapter_config.json` of a folder as a `PeftConfig`; a `ValueError` names a damaged file.

    If the folder holds the adapter, a rank that none of its tensors has is one: peft would allocate the memory for it.
    """
    from peft import PeftConfig

    path = folder / "adapter_config.json"
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the config of an adapter ({error!r:.200}); restore it from a copy") from error
    weights = folder / ADAPTER_NAME
    if weights.exists():
        reader = CheckpointReader([weights])
        largest = max((size for name in reader.names for size in reader.shape(name)), default=0)
        for rank in (getattr(config, "r", 0), *(getattr(config, "rank_pattern", None) or {}).values()):
            if isinstance(rank, int) and rank > max(largest, _USUAL_RANK):
                raise ValueError(f"{path} has the rank {rank!r:.60}, which no tensor of {weights.name} has")
    return config


def base_fingerprint(model: nn.Module) -> str | None:
    """Return a hash of values from all weights below an adapter, in bfloat16 and so the same for most dtypes.

    `None` without an adapter, and when peft changes the base or the weights are sharded.
    """
    model = unwrapped(model)
    if not is_adapter(model):
        return None
    adapters: Any = model.peft_config
    config = adapters[recorded_adapter(model)]
    if not _keeps_base(config):
        return None
    on_disk, parts = names_on_disk(model), {*adapters, "original_module"}
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name in on_disk or not parts.isdisjoint(name.split(".")):
            continue
        if not parameter.data_ptr():
            return None
        values = parameter.detach().flatten()
        values = values[:: max(1, len(values) // _VALUES)].bfloat16().cpu()
        digest.update(name.encode() + values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _keeps_base(config: Any) -> bool:
    method = getattr(config, "init_lora_weights", None)
    return method not in _CHANGE_BASE and getattr(config, "kasa_config", None) is None


def _check_adapter(model: nn.Module) -> None:
    from peft import PeftModel, PeftType

    if not isinstance(model, PeftModel):
        raise ValueError(f"peft cannot save a {type(model).__name__}; use get_peft_model(…, mixed=False)")
    adapter = recorded_adapter(model)
    config: Any = model.peft_config[adapter]
    if config.is_prompt_learning:
        raise ValueError(f"{config.peft_type.value} learns a prompt, not weights; use an adapter such as LoRA")
    if config.peft_type == PeftType.ADALORA:
        raise ValueError(
            "ADALORA changes the ranks of its matrices, so states would differ in shape; use LORA with a rank_pattern"
        )
    if others := [name for name in model.active_adapters if name != adapter]:
        raise ValueError(
            f"the adapter {adapter!r} trains on top of the active adapter {others[0]!r}, which a state does not hold;"
            " merge that one into the base model first"
        )
    check_initialisation(config)
    if not _keeps_base(config):
        option = "kasa_config" if getattr(config, "kasa_config", None) else "init_lora_weights"
        logger.warning_once(
            f"{option}={getattr(config, option)!r} changes the base model. peft changes it again whenever it"
            " loads the adapter, and resuming changes it too: do both with the same base model in the same dtype"
        )
    if computed := computed_names(model):
        raise ValueError(
            f"peft saves {min(computed)!r}, computed from the weights of this {config.peft_type.value} adapter, and"
            " not the weights, so a recording could not be resumed; turn off the option that selects what is saved,"
            " such as save_only_topk_weights"
        )
    on_disk, state = names_on_disk(model), model.state_dict(keep_vars=True)
    saved = {memory_key(tensor) for name, tensor in state.items() if name in on_disk}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and memory_key(parameter) not in saved:
            raise ValueError(
                f"{name!r} trains, but peft does not save it with the adapter {adapter!r}; freeze it, or add its"
                " module to modules_to_save of the adapter config"
            )


def _check_memory(model: nn.Module) -> None:
    """Raise a `ValueError` for tensors that share a part of their memory, or whose own elements share it."""
    state = [(name, tensor) for name, tensor in model.state_dict(keep_vars=True).items() if tensor.data_ptr()]
    for name, tensor in state:
        if any(size > 1 and not step for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(
                f"elements of {name!r} share memory, so a state could not be loaded; clone() it after expand()"
            )
    state.sort(key=lambda item: (str(item[1].device), item[1].data_ptr()))
    for (name, tensor), (other, view) in pairwise(state):
        overlap = tensor.device == view.device and view.data_ptr() < tensor.data_ptr() + _extent(tensor)
        trains = tensor.requires_grad or view.requires_grad
        if overlap and trains and memory_key(tensor) != memory_key(view):
            raise ValueError(
                f"{name!r} and {other!r} share a part of their memory, but a state stores each of them; tie them"
                " completely, or give each its own memory with clone()"
            )


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last element of a tensor in memory."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()
