"""Configuration of KNOWN, the hyper-model that predicts how a scalar weight would move with more training data."""

import math
import os
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

KNOWN_ROLES = ("conv", "fc", "bias")

_VARIANTS = ("reference", "combination")
_LARGEST_SIZE = 65_536


@strict
class KNOWNConfig(PreTrainedConfig):
    r"""
    Configuration of a [`KNOWNModel`]. The defaults give the published network (arXiv 2508.05059): 9,425 parameters
    for each of the roles conv, fc and bias.

    Args:
        variant (`str`, *optional*, defaults to `"reference"`):
            `"reference"`: the published networks, which read the history of each scalar weight. `"combination"`: one
            small network that reads statistics of complete tensors and combines their displacements, see
            [`KNOWNModel.coefficients`]. Of the sizes below, it uses only `combination_size`.
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
        combination_size (`int`, *optional*, defaults to `16`):
            Hidden units of the variant `"combination"`, for the tensor and for each state.
        largest_coefficient (`float`, *optional*, defaults to `1.5`):
            Bound of the coefficients of the variant `"combination"`.
        trained_on (`dict[str, Any]`, *optional*):
            Description of the meta-training data in JSON values, for example the number of trajectories and, in
            `roles`, the largest weight and displacement by role. Prediction warns if its input is far outside.

    Raises:
        `huggingface_hub.errors.StrictDataclassClassValidationError`: If a value is out of range.
    """

    model_type = "known"

    variant: str = "reference"
    num_states: int = 5
    hidden_size: int = 64
    bottleneck_size: int = 8
    stream_size: int = 32
    leaky_slope: float = 0.3
    initializer_scale: float = 0.1
    combination_size: int = 16
    largest_coefficient: float = 1.5
    trained_on: dict[str, Any] | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that have their own network; empty for `"combination"`, whose one network takes every role."""
        return KNOWN_ROLES if self.variant == "reference" else ()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> "KNOWNConfig":
        """
        Read a `config.json`, with the arguments of [`~transformers.PreTrainedConfig.from_pretrained`].

        Raises:
            `ValueError`: If the file is not a config of KNOWN; the message names its folder or repo.
            `OSError`: If the file is missing or is not JSON.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except (AttributeError, LookupError, RecursionError, StrictDataclassError, TypeError, ValueError) as error:
            cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
            reason = " ".join(f"{type(cause).__name__}: {cause}"[:500].split())
            source = f"config.json of {pretrained_model_name_or_path}"
            raise ValueError(f"{source} is not a config of KNOWN ({reason}); restore it from a copy") from error

    def validate_values(self) -> None:
        """Require two states (for a difference), a unit per layer, a monotone LeakyReLU and a positive variance."""
        if self.variant not in _VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(_VARIANTS)}, got {self.variant!r:.60}")
        sizes = ("hidden_size", "bottleneck_size", "stream_size", "combination_size")
        for name, least in {"num_states": 2, **dict.fromkeys(sizes, 1)}.items():
            if not least <= (value := getattr(self, name)) <= _LARGEST_SIZE:
                raise ValueError(
                    f"{name} must be in [{least}, {_LARGEST_SIZE}], got {value!r:.60}; omit it for the published value"
                )
        if not 0 <= self.leaky_slope < 1:
            raise ValueError(f"leaky_slope must be in [0, 1), got {self.leaky_slope}; the published value is 0.3")
        if not 0 < (scale := self.initializer_scale) < math.inf:
            raise ValueError(f"initializer_scale must be positive, got {scale}; the published value is 0.1")
        if not 0 < (bound := self.largest_coefficient) < math.inf:
            raise ValueError(f"largest_coefficient must be positive, got {bound}; the default is 1.5")

    def validate_trained_on(self) -> None:
        """Require a number of `"trajectories"` and `"roles"` that map to finite numbers by name, if they are given."""
        trained_on = self.trained_on or {}
        if type(count := trained_on.get("trajectories", 0)) is not int:
            raise ValueError(f"trained_on has trajectories={count!r:.60}, expected an integer")
        roles = trained_on.get("roles", {})
        for role, numbers in roles.items() if isinstance(roles, dict) else [("roles", roles)]:
            for name, value in numbers.items() if isinstance(numbers, dict) else [(role, numbers)]:
                if type(value) not in (int, float) or not math.isfinite(value):
                    raise ValueError(f"trained_on of {role} has {name}={value!r:.60}, expected a finite number")


AutoConfig.register("known", KNOWNConfig, exist_ok=True)

__all__ = ["KNOWN_ROLES", "KNOWNConfig"]
