"""Arguments of meta-training; needs no torch, so that a script can show its `--help` at once."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class MetaTrainingArguments:
    """
    How [`meta_train`] trains; made for `transformers.HfArgumentParser`.

    Args:
        steps (`int`, *optional*, defaults to `5000`):
            Optimizer steps.
        batch_size (`int`, *optional*, defaults to `2048`):
            Transitions of each role in one step, over all processes: another number of processes changes nothing but
            the rounding.
        learning_rate (`float`, *optional*, defaults to `1e-3`):
            Highest learning rate of Adam; a cosine brings it down to zero.
        warmup_steps (`int`, *optional*, defaults to `100`):
            Steps in which the learning rate rises linearly from zero.
        kernel_l1 (`float`, *optional*, defaults to `1e-6`):
            Factor of the published l1 norm of the outer kernels of every stream.
        bias_l1 (`float`, *optional*, defaults to `0.1`):
            Factor of the published l1 norm of their biases.
        loss_weighting (`str`, *optional*, defaults to `"none"`):
            `"none"` is the published l1 loss, to which a tensor adds as much as its weights move. `"relative"` divides
            the loss of each tensor by its no-change error `mean |Θ0 - Θ(-1)|`, so that tensors of a fine-tuned model
            or a LoRA count as much as those of a net trained from scratch, and multiplies it by the mean no-change
            error of the role, so that the regularisers weigh as before.
        max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Gradients of each role's network are clipped to this norm.
        mixed_precision (`str`, *optional*):
            `"no"`, `"bf16"` or `"fp16"`, see `accelerate.Accelerator`; by default what the launcher says.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the initial weights and of the order of the transitions.
        num_workers (`int`, *optional*, defaults to `0`):
            Processes that read batches beside each training process; the batches are the same for any number.
        log_every (`int`, *optional*, defaults to `100`):
            Steps over which a reported loss is averaged.
        report_to (`list[str]`, *optional*):
            Trackers of accelerate that are told the losses, `tensorboard` for instance; none by default.
        logging_dir (`str`, *optional*):
            Folder for those of them that write files.
        eval_every (`int`, *optional*, defaults to `500`):
            Steps between two looks at the validation split, where there is one.
        patience (`int`, *optional*, defaults to `0`):
            Training ends after so many looks without a better validation skill (mean over the roles whose skill is
            finite), and the weights of the best look are returned; `0` for none of it.
        checkpoint_dir (`str`, *optional*):
            Folder for checkpoints. Training goes on from the last one in it.
        save_every (`int`, *optional*, defaults to `1000`):
            Steps between two checkpoints; losses are reported there, too.
        keep_checkpoints (`int`, *optional*, defaults to `2`):
            Checkpoints that are kept.

    Raises:
        `ValueError`: when a value is out of range.
    """

    steps: int = field(default=5000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=2048, metadata={"help": "Transitions of each role a step, over all processes."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate of Adam, cosine to zero."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps in which the learning rate rises from zero."})
    kernel_l1: float = field(default=1e-6, metadata={"help": "Factor of the l1 norm of the outer kernels."})
    bias_l1: float = field(default=0.1, metadata={"help": "Factor of the l1 norm of the outer biases."})
    loss_weighting: Literal["none", "relative"] = field(
        default="none", metadata={"help": "Whether each tensor's loss is divided by its no-change error."}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    mixed_precision: Literal["no", "bf16", "fp16"] | None = field(
        default=None, metadata={"help": "Precision of the network; default: what the launcher says."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the initial weights and the order of transitions."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read batches."})
    log_every: int = field(default=100, metadata={"help": "Steps over which a reported loss is averaged."})
    report_to: list[str] = field(default_factory=list, metadata={"help": "Trackers of accelerate; default: none."})
    logging_dir: str | None = field(default=None, metadata={"help": "Folder for trackers that write files."})
    eval_every: int = field(default=500, metadata={"help": "Steps between two looks at the validation split."})
    patience: int = field(default=0, metadata={"help": "Looks without a better skill that end it; 0: never."})
    checkpoint_dir: str | None = field(default=None, metadata={"help": "Folder for checkpoints; goes on from there."})
    save_every: int = field(default=1000, metadata={"help": "Steps between two checkpoints."})
    keep_checkpoints: int = field(default=2, metadata={"help": "Checkpoints that are kept."})

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "eval_every", "save_every", "keep_checkpoints"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}: choose at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name}={value}: choose a value above 0")
        for name in ("warmup_steps", "kernel_l1", "bias_l1", "seed", "num_workers", "patience"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name}={value}: choose 0 or more")
        if self.loss_weighting not in ("none", "relative"):
            raise ValueError(f"loss_weighting={self.loss_weighting!r}: choose 'none' or 'relative'")
