"""Arguments of meta-training; needs no torch, so that a script can show its `--help` at once."""

from dataclasses import dataclass, field


@dataclass
class MetaTrainingArguments:
    """
    How [`meta_train`] trains; made for `transformers.HfArgumentParser`.

    Args:
        steps (`int`, *optional*, defaults to `5000`):
            Optimizer steps.
        batch_size (`int`, *optional*, defaults to `2048`):
            Transitions of each role in one step.
        learning_rate (`float`, *optional*, defaults to `1e-3`):
            Highest learning rate of Adam; a cosine brings it down to zero.
        warmup_steps (`int`, *optional*, defaults to `100`):
            Steps in which the learning rate rises linearly from zero.
        kernel_l1 (`float`, *optional*, defaults to `1e-6`):
            Factor of the published l1 norm of the outer kernels of every stream.
        bias_l1 (`float`, *optional*, defaults to `0.1`):
            Factor of the published l1 norm of their biases.
        max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Gradients of each role's network are clipped to this norm.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the initial weights and of the order of the transitions.
        log_every (`int`, *optional*, defaults to `100`):
            Steps over which a reported loss is averaged.

    Raises:
        `ValueError`: when a value is out of range.
    """

    steps: int = field(default=5000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=2048, metadata={"help": "Transitions of each role in one step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate of Adam, cosine to zero."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps in which the learning rate rises from zero."})
    kernel_l1: float = field(default=1e-6, metadata={"help": "Factor of the l1 norm of the outer kernels."})
    bias_l1: float = field(default=0.1, metadata={"help": "Factor of the l1 norm of the outer biases."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    seed: int = field(default=0, metadata={"help": "Seed of the initial weights and the order of transitions."})
    log_every: int = field(default=100, metadata={"help": "Steps over which a reported loss is averaged."})

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}: choose at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name}={value}: choose a value above 0")
        for name in ("warmup_steps", "kernel_l1", "bias_l1", "seed"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name}={value}: choose 0 or more")
