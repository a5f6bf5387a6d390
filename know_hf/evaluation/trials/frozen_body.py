"""Outputs of a frozen body, computed once, for the trainings of its head."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...model_tensors import restored_modes
from ..fine_tuning import Examples, inputs_of, trimmed

_PREFIX = "body."  # of the outputs of the body among the examples
_LARGEST = 2**28  # bytes of cached outputs of one model and split
_BATCH_SIZE = 64


class HeadOnFeatures(nn.Module):
    """A model whose body returns stored outputs, of a given class, instead of running; the model is not copied.

    What follows the body is the model's own code: pooling, dropout, classifier and loss.
    """

    def __init__(self, model: PreTrainedModel, output_class: type) -> None:
        super().__init__()
        self.model = model
        self.output_class = output_class

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, **inputs: Any) -> Any:
        """Call the model on examples of [`with_features`]."""
        stored = {name.removeprefix(_PREFIX): inputs.pop(name) for name in list(inputs) if name.startswith(_PREFIX)}
        body = self.model.base_model
        body.forward = lambda *_, **__: self._output(stored)
        try:
            return self.model(**inputs)
        finally:
            del body.forward

    def _output(self, stored: dict[str, Tensor]) -> Any:
        if self.output_class in (tuple, Tensor):
            values = tuple(stored.values())
            return values if self.output_class is tuple else values[0]
        return self.output_class(**stored)


@torch.no_grad()
def with_features(model: PreTrainedModel, examples: Examples) -> tuple[HeadOnFeatures, Examples] | None:
    """Run the body of a model with a head once on all examples, in evaluation mode.

    Returns:
        The head, and the examples with the outputs of the body; `None` if the head does not compute the same from
        them, or they need more than 256 MiB.
    """
    outputs: list[Any] = []
    examples = trimmed(dict(examples))
    inputs = inputs_of(examples)
    length, parts, size, logits = len(next(iter(inputs.values()))), [], 0, None
    hook = model.base_model.register_forward_hook(lambda *arguments: outputs.append(arguments[-1]))
    with restored_modes(model), hook:
        model.eval()
        for start in range(0, length, _BATCH_SIZE):  # all outputs have the same shape
            batch = {key: value[start : start + _BATCH_SIZE].to(model.device) for key, value in inputs.items()}
            outputs.clear()
            logits = getattr(model(**batch), "logits", None)
            tensors = _tensors(outputs[0], len(next(iter(batch.values())))) if len(outputs) == 1 else {}
            size += sum(tensor.nbytes for tensor in tensors.values())
            if not tensors or logits is None or size > _LARGEST:
                return None
            parts.append(tensors)
        head = HeadOnFeatures(model, type(outputs[0]))
        if logits is None or not _computes(head, {**batch, **parts[-1]}, logits):
            return None
    return head, {**examples, **{name: torch.cat([part[name] for part in parts]) for name in parts[0]}}


def _tensors(output: Any, length: int) -> dict[str, Tensor]:
    """Return the outputs with a row per example; others, such as a cache of keys, are left out."""
    if isinstance(output, Tensor):
        output = (output,)
    values = output.items() if hasattr(output, "items") else enumerate(output)
    rows = {name: value for name, value in values if isinstance(value, Tensor) and value.ndim and len(value) == length}
    return {f"{_PREFIX}{name}": value.detach() for name, value in rows.items()}


def _computes(head: HeadOnFeatures, batch: Examples, logits: Tensor) -> bool:
    """Whether the head computes the same logits as the model."""
    try:
        return torch.allclose(head(**batch).logits, logits, rtol=1e-4, atol=1e-5)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):  # it reads another output
        return False
