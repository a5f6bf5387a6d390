"""Configuration of KNOWN, the network that predicts by how much a weight would move with more data."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

KNOWN_ROLES = ("conv", "fc", "bias")


@strict
class KNOWNConfig(PreTrainedConfig):
    r"""
    The defaults are the published network: 9,425 parameters for each of the three roles conv, fc and bias
    (arXiv 2508.05059).

    Args:
        num_states (`int`, *optional*, defaults to `5`):
            Length S of the history of one scalar weight: S - 1 forgotten states and the full-data state.
        hidden_size (`int`, *optional*, defaults to `64`):
            Width of the first layer of each of the two streams (history and its differences).
        bottleneck_size (`int`, *optional*, defaults to `8`):
            Inner width of the TrAct activation.
        stream_size (`int`, *optional*, defaults to `32`):
            Number of features each stream hands to the head.
        leaky_slope (`float`, *optional*, defaults to `0.3`):
            Slope of the LeakyReLU at the end of a stream for negative inputs.
        initializer_scale (`float`, *optional*, defaults to `0.1`):
            Scale of the variance-scaling initialiser (fan in, uniform) of the first and last layer of a stream.
        trained_on (`dict[str, Any]`, *optional*):
            What the weights were meta-trained on, JSON values only: for instance the numbers of trajectories and
            the largest weight and displacement seen, so that a prediction far outside can be told.

    Raises:
        `huggingface_hub.errors.StrictDataclassClassValidationError`: when a value is out of range; the message names
        the field, its value and the mend.
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
        """The roles a model has a network for; fixed, one network each."""
        return KNOWN_ROLES

    def validate_num_states(self) -> None:
        """Two states are the least that have a difference."""
        if self.num_states < 2:
            raise ValueError(f"num_states={self.num_states}: a history has at least 2 states, the published one has 5")

    def validate_sizes(self) -> None:
        """Every layer has at least one unit."""
        for name in ("hidden_size", "bottleneck_size", "stream_size"):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"{name}={size}: a layer needs at least 1 unit; leave it out for the published size")

    def validate_scales(self) -> None:
        """The slope leaves the LeakyReLU monotone, the initialiser a positive variance."""
        if not 0 <= self.leaky_slope < 1:
            raise ValueError(f"leaky_slope={self.leaky_slope}: choose a slope in [0, 1), the published one is 0.3")
        if not self.initializer_scale > 0:
            raise ValueError(f"initializer_scale={self.initializer_scale}: choose a scale above 0, published: 0.1")


AutoConfig.register("known", KNOWNConfig, exist_ok=True)

__all__ = ["KNOWN_ROLES", "KNOWNConfig"]
