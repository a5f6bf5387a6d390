"""Models and examples for [`compare_checkpoints`], from folders, the Hub or memory."""

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, default_data_collator
from transformers.trainer_utils import RemoveColumnsCollator

from ...model_tensors import is_adapter
from ...trajectory import WeightTrajectory, load_pretrained
from ...trajectory.importing import local_folder
from ...trajectory.merging import load_merged
from ..fine_tuning import Examples


def load_checkpoint(checkpoint: str | Path | PreTrainedModel, base_model: str | Path | None = None) -> PreTrainedModel:
    """Load a folder, a Hub id or Θ0 of a trajectory, or return a model as it is; adapters are merged."""
    if isinstance(checkpoint, PreTrainedModel):
        return checkpoint
    if isinstance(checkpoint, nn.Module) and is_adapter(checkpoint):
        adapted: Any = copy.deepcopy(checkpoint)
        return adapted.merge_and_unload(safe_merge=True)
    folder = local_folder(checkpoint)
    if any((folder / part / "adapter_config.json").exists() for part in ("", "state-0")):
        return load_merged(folder, base_model)
    if not (WeightTrajectory.exists(folder) or (folder / "config.json").exists()):
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a model, adapter or trajectory")
    model: Any = WeightTrajectory(folder).load_model() if WeightTrajectory.exists(folder) else load_pretrained(folder)
    return model.float()


def as_examples(dataset: Any, model: PreTrainedModel, data_collator: Callable[[list[Any]], Any] | None) -> Examples:
    """Return the inputs of a model and the labels of all examples as tensors of one length."""
    if isinstance(dataset, Mapping):
        return dataset
    accepted = {*inspect.signature(model.forward).parameters, "label", "label_ids"}
    collate = RemoveColumnsCollator(data_collator or default_data_collator, accepted)
    try:
        examples = collate([dataset[index] for index in range(len(dataset))])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"cannot collate {len(dataset)} examples of {type(dataset).__name__} ({error}); pass data_collator=, for"
            " example DataCollatorWithPadding(tokenizer)"
        ) from error
    return {name: value for name, value in dict(examples).items() if isinstance(value, Tensor)}


def are_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of examples, or two state dicts, are equal."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
