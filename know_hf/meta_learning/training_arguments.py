"""Arguments of meta-training. The module does not import torch, so that `--help` of a script starts fast."""

from dataclasses import dataclass, field
from typing import Any, Literal


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class MetaTrainingArguments:
    """Arguments of [`meta_train`], for use with `transformers.HfArgumentParser`. The `help` of each field describes
    it.

    Raises:
        `ValueError`: If a value is out of range.
    """

    steps: int = _option(5000, "Optimizer steps.")
    batch_size: int = _option(
        2048, "Transitions of each role per step, over all processes, whose number changes only rounding."
    )
    learning_rate: float = _option(1e-3, "Peak learning rate of Adam, followed by cosine decay to zero.")
    warmup_steps: int = _option(100, "Steps of linear warmup.")
    kernel_l1: float = _option(1e-6, "Factor of the L1 norm of the first and last kernel of every stream.")
    bias_l1: float = _option(0.1, "Factor of the L1 norm of the first and last bias of every stream.")
    loss_weighting: Literal["none", "relative"] = _option(
        "none",
        "'none' is the published L1 loss, dominated by tensors that move far. 'relative' divides the loss of each"
        " tensor by its no-change error, mean |Θ0 - Θ(-1)|, so that tensors of a fine-tuned model or a LoRA count as"
        " much as those of a model trained from scratch, and multiplies it by the mean no-change error of the role,"
        " which preserves the balance with the regularizers.",
    )
    max_grad_norm: float = _option(1.0, "Maximum gradient norm of each network.")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = _option(
        None, "Mixed precision; defaults to the setting of the launcher."
    )
    seed: int = _option(0, "Seed of the initial weights and of the order of the transitions.")
    num_workers: int = _option(0, "Data loading processes; the batches do not depend on their number.")
    log_every: int = _option(100, "Steps between reported losses, each the mean since the last report.")
    report_to: list[str] = field(
        default_factory=list, metadata={"help": "Trackers of accelerate, such as tensorboard; none by default."}
    )
    logging_dir: str | None = _option(None, "Folder for trackers that write files.")
    eval_every: int = _option(500, "Steps between evaluations on the validation split, if there is one.")
    patience: int = _option(
        0,
        "Evaluations without a better validation skill (mean over the roles with a finite skill) before training stops"
        " and returns the best weights; 0 disables early stopping.",
    )
    checkpoint_dir: str | None = _option(None, "Folder of checkpoints; training resumes from the last one.")
    save_every: int = _option(1000, "Steps between checkpoints; losses are reported there, too.")
    keep_checkpoints: int = _option(2, "Number of checkpoints to keep.")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "eval_every", "save_every", "keep_checkpoints"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("learning_rate", "max_grad_norm"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("warmup_steps", "kernel_l1", "bias_l1", "seed", "num_workers", "patience"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if self.loss_weighting not in ("none", "relative"):
            raise ValueError(f"loss_weighting must be 'none' or 'relative', got {self.loss_weighting!r}")
