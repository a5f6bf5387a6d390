"""Configuration of KNOWN, the hyper-model that predicts how a scalar weight would move with more training data."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

KNOWN_ROLES = ("conv", "fc", "bias")


@strict
class KNOWNConfig(PreTrainedConfig):
    r"""
    Configuration of a [`KNOWNModel`]. The defaults give the published network (arXiv 2508.05059): 9,425 parameters
    for each of the roles conv, fc and bias.

    Args:
        num_states (`int`, *optional*, defaults to `5`):
            Length S of the history of one scalar weight: S - 1 forgotten states and the full-data state.
        hidden_size (`int`, *optional*, defaults to `64`):
            Width of the first layer of each of the two streams (history and its differences).
        bottleneck_size (`int`, *optional*, defaults to `8`):
            Inner width of the TrAct activation.
        stream_size (`int`, *optional*, defaults to `32`):
            Number of features that each stream passes to the head.
        leaky_slope (`float`, *optional*, defaults to `0.3`):
            Slope for negative inputs of the LeakyReLU at the end of a stream.
        initializer_scale (`float`, *optional*, defaults to `0.1`):
            Scale of the variance-scaling initializer (fan in, uniform) of the first and last layer of a stream.
        trained_on (`dict[str, Any]`, *optional*):
            Description of the meta-training data, JSON values only: for instance the number of trajectories and the
            largest weight and displacement. Prediction warns when its input lies far outside.

    Raises:
        `huggingface_hub.errors.StrictDataclassClassValidationError`: If a value is out of range.
    """

    model_type = "known"

    num_states: int = 5
    hidden_size: int = 64
    bottleneck_size: int = 8
    stream_size: int = 32
    leaky_slope: float = 0.3
    initializer_scale: float = 0.1
    trained_on: dict[str, Any] | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles with a network of their own; fixed."""
        return KNOWN_ROLES

    def validate_values(self) -> None:
        """Require two states (for a difference), a unit per layer, a monotone LeakyReLU and a positive variance."""
        for name, least in {"num_states": 2, "hidden_size": 1, "bottleneck_size": 1, "stream_size": 1}.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}; omit it for the published value")
        if not 0 <= self.leaky_slope < 1:
            raise ValueError(f"leaky_slope must be in [0, 1), got {self.leaky_slope}; the published value is 0.3")
        if not (scale := self.initializer_scale) > 0:
            raise ValueError(f"initializer_scale must be positive, got {scale}; the published value is 0.1")


AutoConfig.register("known", KNOWNConfig, exist_ok=True)

__all__ = ["KNOWN_ROLES", "KNOWNConfig"]
