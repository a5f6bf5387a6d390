"""The model of a suite."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.utils import cached_file

from ...checkpoint import INDEX_NAME, WEIGHTS_NAME, file_sha256, read_json_object
from ...checkpoint.safe_loading import check_index, from_safetensors, load_config
from .small_cnn import SmallCNN


@dataclass(frozen=True)
class ModelSpec:
    """The model of a suite.

    Args:
        pretrained (`str`, *optional*):
            Hub id of the weights to start from.
        class_name (`str`, *optional*):
            Class of transformers, or `"SmallCNN"`. Defaults to the class that the `Auto` classes choose for
            `pretrained`.
        config (`Mapping[str, Any]`, *optional*):
            Configuration of the model, or changes to that of `pretrained`.
        new (`bool`, *optional*, defaults to `False`):
            Whether to take only the architecture of `pretrained`, with random weights.
        lora (`Mapping[str, Any]`, *optional*):
            Arguments of `peft.LoraConfig`, to train an adapter instead of the model.
    """

    pretrained: str | None = None
    class_name: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    new: bool = False
    lora: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.pretrained is None and self.class_name is None:
            raise ValueError("a model needs pretrained, class_name, or both")
        if self.lora is not None and not self.starts_pretrained:
            raise ValueError("lora needs pretrained weights to adapt; give pretrained, without new")

    @property
    def starts_pretrained(self) -> bool:
        """Whether training starts from pretrained weights."""
        return self.pretrained is not None and not self.new

    @property
    def model_class(self) -> type[PreTrainedModel] | None:
        """The class called `class_name`."""
        import transformers

        if self.class_name is None:
            return None
        model_class = SmallCNN if self.class_name == "SmallCNN" else getattr(transformers, self.class_name, None)
        if model_class is None:
            raise ValueError(f"transformers has no class {self.class_name!r}; give one of its classes or SmallCNN")
        return model_class

    def path(self, model_paths: Mapping[str, str]) -> str | None:
        """Return the folder or Hub id that `pretrained` is read from."""
        return None if self.pretrained is None else model_paths.get(self.pretrained, self.pretrained)

    def build(self, seed: int, num_labels: int, path: str | None, is_image: bool, new: bool) -> PreTrainedModel:
        """Load the model from a path, see [`ModelSpec.path`], or initialise all of it (`new`), without an adapter.

        The seed is that of the weights that are initialised. A language model has `num_labels=0`.
        """
        options = {**self.config, **({"num_labels": num_labels} if num_labels else {})}
        model_class = self.model_class
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if path is None:
                assert model_class is not None and model_class.config_class is not None
                return model_class(model_class.config_class(**options))
            auto: Any = AutoModelForImageClassification if is_image else AutoModelForSequenceClassification
            if num_labels == 0:
                auto = AutoModelForCausalLM
            if new:
                config = load_config(path, **options)
                return auto.from_config(config) if model_class is None else model_class(config)
            model = from_safetensors(model_class or auto, path, ignore_mismatched_sizes=True, **options)
            if self.lora is None:  # peft needs the folder: it reads the base model's config whenever it saves
                model.name_or_path = model.config.name_or_path = self.pretrained
            return model

    def with_adapter(self, model: PreTrainedModel, seed: int) -> nn.Module:
        """Add the adapter of `lora`, if any."""
        if self.lora is None:
            return model
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(model, LoraConfig(**self.lora))

    def weights_hash(self, path: str | None) -> str | None:
        """Return the hashes of the pretrained weight files, in a folder or the Hub cache."""
        if path is None or not self.starts_pretrained:
            return None
        if file := _cached(path, WEIGHTS_NAME):
            return file_sha256(file)[:20]
        if file := _cached(path, INDEX_NAME):
            check_index(file)
            names = sorted(set(read_json_object(file)["weight_map"].values()))
            return ",".join(file_sha256(shard)[:20] for name in names if (shard := _cached(path, name)))
        return None


def _cached(path: str, name: str) -> Path | None:
    file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return None if file is None else Path(file)
