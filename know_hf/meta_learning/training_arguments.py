"""Arguments of meta-training. The module does not import torch, so that `--help` of a script starts fast."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class MetaTrainingArguments:
    """
    Arguments of [`meta_train`], for use with `transformers.HfArgumentParser`.

    Args:
        steps (`int`, *optional*, defaults to `5000`):
            Optimizer steps.
        batch_size (`int`, *optional*, defaults to `2048`):
            Transitions of each role per step, over all processes. The number of processes changes only rounding.
        learning_rate (`float`, *optional*, defaults to `1e-3`):
            Peak learning rate of Adam, followed by cosine decay to zero.
        warmup_steps (`int`, *optional*, defaults to `100`):
            Steps of linear warmup.
        kernel_l1 (`float`, *optional*, defaults to `1e-6`):
            Factor of the published L1 norm of the kernels of the first and last layer of every stream.
        bias_l1 (`float`, *optional*, defaults to `0.1`):
            Factor of the published L1 norm of their biases.
        loss_weighting (`str`, *optional*, defaults to `"none"`):
            `"none"` is the published L1 loss, dominated by tensors that move far. `"relative"` divides the loss of
            each tensor by its no-change error `mean |Θ0 - Θ(-1)|`, so that tensors of a fine-tuned model or a LoRA
            count as much as those of a model trained from scratch, and multiplies it by the mean no-change error of
            the role, which preserves the balance with the regularizers.
        max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Maximum gradient norm of each network.
        mixed_precision (`str`, *optional*):
            `"no"`, `"bf16"` or `"fp16"`, see `accelerate.Accelerator`; defaults to the setting of the launcher.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the initial weights and of the order of the transitions.
        num_workers (`int`, *optional*, defaults to `0`):
            Data loading processes per training process; the batches do not depend on it.
        log_every (`int`, *optional*, defaults to `100`):
            Steps between reported losses, each the mean since the last report.
        report_to (`list[str]`, *optional*):
            Trackers of accelerate, for instance `tensorboard`; none by default.
        logging_dir (`str`, *optional*):
            Folder for trackers that write files.
        eval_every (`int`, *optional*, defaults to `500`):
            Steps between evaluations on the validation split, if there is one.
        patience (`int`, *optional*, defaults to `0`):
            Evaluations without a better validation skill (mean over the roles with a finite skill) before training
            stops and returns the best weights; `0` disables early stopping.
        checkpoint_dir (`str`, *optional*):
            Folder of checkpoints. Training resumes from its last one.
        save_every (`int`, *optional*, defaults to `1000`):
            Steps between checkpoints; losses are reported there, too.
        keep_checkpoints (`int`, *optional*, defaults to `2`):
            Number of checkpoints to keep.

    Raises:
        `ValueError`: If a value is out of range.
    """

    steps: int = field(default=5000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=2048, metadata={"help": "Transitions of each role per step, over all processes."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of Adam, cosine decay to 0."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps of linear warmup."})
    kernel_l1: float = field(default=1e-6, metadata={"help": "Factor of the L1 norm of the outer kernels."})
    bias_l1: float = field(default=0.1, metadata={"help": "Factor of the L1 norm of the outer biases."})
    loss_weighting: Literal["none", "relative"] = field(
        default="none", metadata={"help": "Whether the loss of each tensor is divided by its no-change error."}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Maximum gradient norm of each network."})
    mixed_precision: Literal["no", "bf16", "fp16"] | None = field(
        default=None, metadata={"help": "Mixed precision; defaults to the setting of the launcher."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the initial weights and the order of transitions."})
    num_workers: int = field(default=0, metadata={"help": "Data loading processes."})
    log_every: int = field(default=100, metadata={"help": "Steps between reported losses."})
    report_to: list[str] = field(default_factory=list, metadata={"help": "Trackers of accelerate; default: none."})
    logging_dir: str | None = field(default=None, metadata={"help": "Folder for trackers that write files."})
    eval_every: int = field(default=500, metadata={"help": "Steps between evaluations on the validation split."})
    patience: int = field(
        default=0, metadata={"help": "Evaluations without a better skill before training stops; 0: never."}
    )
    checkpoint_dir: str | None = field(
        default=None, metadata={"help": "Folder of checkpoints; training resumes from the last one."}
    )
    save_every: int = field(default=1000, metadata={"help": "Steps between checkpoints."})
    keep_checkpoints: int = field(default=2, metadata={"help": "Number of checkpoints to keep."})

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
