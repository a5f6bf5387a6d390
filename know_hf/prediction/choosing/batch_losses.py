"""[`batch_losses`]: what a gate compares, one value per validation batch."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..selection import CALIBRATED

LOSS, ACCURACY = "validation loss", "accuracy"
METRICS = (CALIBRATED, LOSS, ACCURACY)

_HALVINGS = 40  # of an interval from 1e-4 to 1e4


def batch_losses(
    model: Any, batches: Iterable[Mapping[str, Any]], metric: str | None = None
) -> tuple[str, list[float]]:
    """Return what is compared and its value for each batch; lower is better.

    - `"validation loss"` is the model's loss.
    - `"accuracy"` gives the error rate.
    - `"calibrated loss"` is the cross-entropy after temperature scaling (Guo et al., *On Calibration of Modern Neural
      Networks*, ICML 2017): all logits are divided by the number that minimises it. What remains is how well the
      model tells classes apart, by which checkpoints should be chosen (Berta et al., *Rethinking Early Stopping:
      Refine, Then Calibrate*, arXiv 2501.19195). Weights that only make an overconfident model less confident have a
      lower loss, but no lower calibrated loss.

    Args:
        model (`PreTrainedModel`):
            A model in evaluation mode.
        batches (iterable of mappings):
            Batches with labels.
        metric (`str`, *optional*):
            By default the calibrated loss if the model's loss is the cross-entropy of one class per example, else the
            loss.

    Raises:
        `ValueError`: if the model returns no loss, or the metric needs one class per example and there is none.
    """
    losses, logits, labels = [], [], []
    for batch in batches:
        inputs = {name: _to_model(value, name, model) for name, value in batch.items()}
        outputs = model(**inputs)
        if outputs.loss is None:
            batch_of = f"{type(model).__name__} returns no loss for batches of {', '.join(inputs)}"
            raise ValueError(f"{batch_of}; add labels to the examples or pass compute_loss")
        metric = metric or (CALIBRATED if _is_cross_entropy(outputs, inputs) else LOSS)
        if metric != LOSS:
            logits.append(_class_logits(outputs, inputs, metric).float())
            labels.append(inputs["labels"])
        losses.append(float(outputs.loss))
    if metric == CALIBRATED:
        scale = inverse_temperature(torch.cat(logits), torch.cat(labels))
        losses = [float(cross_entropy(scale * some, of)) for some, of in zip(logits, labels, strict=True)]
    elif metric == ACCURACY:
        losses = [float((some.argmax(-1) != of).double().mean()) for some, of in zip(logits, labels, strict=True)]
        return "error rate (1 - accuracy)", losses
    return metric or LOSS, losses


def inverse_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the factor of logits `(N, C)` that minimises their cross-entropy with labels `(N,)`.

    Labels are smoothed by 1 / (N + 1), so that the factor is finite if all predictions are right.
    """
    logits = logits - logits.mean(dim=-1, keepdim=True)
    unit = float(logits.square().mean().sqrt())
    if not 0 < unit < float("inf"):
        return 1.0
    count = len(labels)
    wanted = float(logits.gather(-1, labels[:, None]).mean()) * count / (count + 1)
    low, high = 1e-4 / unit, 1e4 / unit
    for _ in range(_HALVINGS):  # the slope of the loss, expected minus wanted logit, grows with the factor
        middle = (low * high) ** 0.5
        expected = float(((middle * logits).softmax(-1) * logits).sum(-1).mean())
        low, high = (low, middle) if expected > wanted else (middle, high)
    return middle


def _class_logits(outputs: Any, inputs: Mapping[str, Any], metric: str) -> Tensor:
    """Return the logits `(N, C)` of a batch with one class per example."""
    logits, labels = outputs.get("logits"), inputs["labels"]
    if logits is None or logits.ndim != 2 or labels.is_floating_point() or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"metric={metric!r} needs one class per example, not the labels of {type(outputs).__name__}; use the"
            " loss or pass compute_loss"
        )
    return logits


def _is_cross_entropy(outputs: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether the loss of a batch is the cross-entropy of its logits with one class per example."""
    try:
        logits = _class_logits(outputs, inputs, CALIBRATED)
    except (KeyError, ValueError):
        return False
    if logits.shape[-1] < 2 or not 0 <= int(inputs["labels"].min()) <= int(inputs["labels"].max()) < logits.shape[-1]:
        return False
    expected = cross_entropy(logits.float(), inputs["labels"])
    rounding = 1e-4 if logits.dtype == torch.float32 else 0.02
    return torch.allclose(outputs.loss.float(), expected, rtol=rounding, atol=rounding, equal_nan=True)


def _to_model(value: Any, name: str, model: Any) -> Any:
    """Move a tensor to the model's device, and inputs to its dtype."""
    if not isinstance(value, torch.Tensor):
        return value
    is_input = value.is_floating_point() and not name.startswith("label")
    return value.to(model.device, model.dtype) if is_input else value.to(model.device)
