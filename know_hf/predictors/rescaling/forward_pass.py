"""Run a model once in evaluation mode, on a given or a random batch."""

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...model_tensors import restored_modes, without_adapter
from .scale_trace import floating_tensors

_SIZE, _TOKENS, _EXAMPLES = 64, 8, 2


def evaluated(
    model: nn.Module,
    batch: Any = None,
    context: AbstractContextManager[Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Return the floating-point outputs of a model in evaluation mode; its training modes are restored.

    The batch has the keyword arguments of the model, or is its only argument; [`random_batch`] by default. `tensors`
    replaces values of the model, by name in memory.
    """
    batch = random_batch(model) if batch is None else batch
    args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else ((batch,), {})
    parameter = next(iter(model.parameters()))
    args = tuple(_fitting(value, parameter) for value in args)
    kwargs = {name: _fitting(value, parameter) for name, value in kwargs.items() if name != "labels"}
    accepted = inspect.signature(without_adapter(model).forward).parameters
    kwargs |= {"use_cache": False} if "use_cache" in accepted else {}
    with restored_modes(model), torch.random.fork_rng(), torch.no_grad(), context or nullcontext():
        model.eval()
        torch.manual_seed(0)  # some models draw masks in evaluation mode too
        outputs = torch.func.functional_call(model, dict(tensors or {}), args, kwargs)
    return floating_tensors(outputs)


def random_batch(model: nn.Module) -> dict[str, torch.Tensor]:
    """Create two rows of random tokens, or two random images. A `ValueError` says that a model takes neither."""
    inner = without_adapter(model)
    accepted = inspect.signature(inner.forward).parameters
    if not accepted:
        return {}
    generator = torch.Generator().manual_seed(0)
    if isinstance(inner, PreTrainedModel):
        config, main = inner.config, inner.main_input_name
        if main == "pixel_values":
            size = getattr(config, "image_size", None) or _SIZE
            height, width = size if isinstance(size, tuple | list) else (size, size)
            shape = (_EXAMPLES, getattr(config, "num_channels", 3), height, width)
            return {"pixel_values": torch.randn(shape, generator=generator)}
        vocabulary = getattr(config.get_text_config(), "vocab_size", None)
        if main == "input_ids" and vocabulary and "pixel_values" not in accepted:
            ids = torch.randint(vocabulary // 2, vocabulary, (_EXAMPLES, _TOKENS), generator=generator)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            batch["attention_mask"][0, -1] = 0
            if "token_type_ids" in accepted:
                batch["token_type_ids"] = torch.zeros_like(ids)
            if getattr(config, "is_encoder_decoder", False):
                batch["decoder_input_ids"] = ids.flip(1)
            return batch
    raise ValueError(f"{type(inner).__name__} needs a batch of inputs; pass batch=, the arguments of its forward")


def _fitting(value: Any, parameter: torch.Tensor) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
