"""[`batch_losses`]: what a gate compares, one value per validation batch."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..selection import CALIBRATED

LOSS, ACCURACY = "validation loss", "accuracy"
METRICS = (CALIBRATED, LOSS, ACCURACY)

_LARGEST, _HALVINGS = 1e30, 40  # factors from 1e-30 to 1e30


def batch_losses(
    model: Any, batches: Iterable[Mapping[str, Any]], metric: str | None = None
) -> tuple[str, list[float]]:
    """Return what is compared and its value for each labelled batch, with a model in evaluation mode; lower is better.

    - `"validation loss"` is the model's loss.
    - `"accuracy"` gives the error rate.
    - `"calibrated loss"` is the cross-entropy after temperature scaling (Guo et al., *On Calibration of Modern Neural
      Networks*, ICML 2017): all logits are divided by the number that minimises it. What remains is how well the
      model tells classes apart, by which checkpoints should be chosen (Berta et al., *Rethinking Early Stopping:
      Refine, Then Calibrate*, arXiv 2501.19195). Weights that only make an overconfident model less confident have a
      lower loss, but no lower calibrated loss.

    By default, it is the calibrated loss if the model's loss is the cross-entropy of one class per example in every
    batch, else the loss.

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
        scores = _class_scores(outputs, inputs)
        if metric is None and not (scores and _is_cross_entropy(outputs, *scores)):
            metric = LOSS
        if metric != LOSS:
            if scores is None:
                raise ValueError(
                    f"metric={metric!r} needs one class per example, not the labels of {type(outputs).__name__}; use"
                    " the loss or pass compute_loss"
                )
            logits.append(scores[0])
            labels.append(scores[1])
        losses.append(float(outputs.loss))
    if metric == ACCURACY:
        losses = [float((some.argmax(-1) != of).double().mean()) for some, of in zip(logits, labels, strict=True)]
        return "error rate (1 - accuracy)", losses
    if metric == LOSS or not losses:
        return LOSS, losses
    scale = inverse_temperature(torch.cat(logits), torch.cat(labels))
    return CALIBRATED, [float(cross_entropy(scale * some, of)) for some, of in zip(logits, labels, strict=True)]


def inverse_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the factor of logits `(N, C)` that minimises their cross-entropy with labels `(N,)`.

    A median example with the second-best class as its label is added, so that the factor is finite if all predictions
    are right. Logits of excluded classes, such as padded choices, can be as low as -inf.
    """
    logits = (logits - logits.amax(dim=-1, keepdim=True)).clamp(min=-_LARGEST)
    of_labels, second = logits.gather(-1, labels[:, None]), logits.topk(2, dim=-1).values[:, 1]
    wanted = float((of_labels.sum() + second.median()) / (len(labels) + 1))
    low, high = 1 / _LARGEST, _LARGEST
    for _ in range(_HALVINGS):  # the slope of the loss, expected minus wanted logit, grows with the factor
        middle = (low * high) ** 0.5
        expected = float(((middle * logits).softmax(-1) * logits).sum(-1).mean())
        low, high = (low, middle) if expected > wanted else (middle, high)
    return middle


def _class_scores(outputs: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Return logits `(N, C)` and labels `(N,)` of the labelled examples, or `None` without one class per example."""
    logits, labels = getattr(outputs, "logits", None), inputs.get("labels")
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[-1] < 2:
        return None
    if labels is None or labels.is_floating_point() or labels.shape != logits.shape[:1]:
        return None
    is_labelled = labels != -100
    return logits[is_labelled].float(), labels[is_labelled]


def _is_cross_entropy(outputs: Any, logits: Tensor, labels: Tensor) -> bool:
    """Whether the loss of a batch is the cross-entropy of its logits."""
    rounding = 1e-4 if outputs.logits.dtype == torch.float32 else 0.02
    expected = cross_entropy(logits, labels)
    return torch.allclose(outputs.loss.float(), expected, rtol=rounding, atol=rounding, equal_nan=True)


def _to_model(value: Any, name: str, model: Any) -> Any:
    """Move a tensor to the model's device, and inputs to its dtype."""
    if not isinstance(value, torch.Tensor):
        return value
    is_input = value.is_floating_point() and not name.startswith("label")
    return value.to(model.device, model.dtype) if is_input else value.to(model.device)
