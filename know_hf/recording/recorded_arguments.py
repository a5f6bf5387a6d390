"""Training arguments that determine the trained weights, as text: recorded with every state, compared on resuming."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer, TrainingArguments

from ..config_files import default_of
from .optimizers import own_optimizer

ARGUMENTS_CLASS = "class"  # a keyword of Python, so no argument has this name

# Recorded even at their defaults, as know_hf 0.1 does. Of the others, those that differ from their defaults are.
_ALWAYS = frozenset(
    "examples_per_step learning_rate lr_scheduler_type warmup_steps num_train_epochs max_steps optim weight_decay"
    " adam_beta1 adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor neftune_noise_alpha".split()
)
_WITHOUT_EFFECT = frozenset(
    # part of examples_per_step, mixed_precision or StateRecord.seed
    "per_device_train_batch_size gradient_accumulation_steps bf16 fp16 seed"
    # device, memory and distribution of the same computation
    " use_cpu use_cache torch_empty_cache_steps activation_checkpointing activation_checkpointing_kwargs"
    " gradient_checkpointing gradient_checkpointing_kwargs activation_offloading parallelism_config fsdp fsdp_config"
    " ddp_backend ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout local_rank"
    # loading of the data
    " dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor"
    " dataloader_multiprocessing_context dataset_num_proc"
    # logs
    " logging_dir logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node log_level"
    " log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id"
    " trackio_static_space_id include_num_input_tokens_seen skip_memory_metrics debug"
    # files and the Hub
    " output_dir save_only_model save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token"
    " hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision resume_from_checkpoint ignore_data_skip"
    " restore_callback_states_from_checkpoint"
    # what an evaluation computes; when it runs counts, because it draws random numbers
    " do_train do_eval do_predict per_device_eval_batch_size prediction_loss_only eval_do_concat_batches"
    " eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics bf16_full_eval"
    " fp16_full_eval eval_packing predict_with_generate generation_max_length generation_num_beams"
    " generation_config".split()
)
# Of the trainer, compared only if recorded: [`WeightTransitionCallback`] may not know its trainer.
_WITHOUT_DEFAULT = frozenset(("data_collator", "trained_tensors"))
_OPTIMIZERS_WITHOUT_ADAM_ARGUMENTS = ("sgd", "rmsprop", "adagrad", "adafactor")
_OF_DEEPSPEED = ("optimizer", "scheduler")
_SECRETS = ("_token", "_key", "_secret", "password")
_MAX_LENGTH = 200


def trainer_arguments(trainer: Trainer) -> dict[str, Any]:
    """Return what a `Trainer` has besides its training arguments that may change the trained weights.

    `trained_tensors` is the number of tensors that train.
    """
    return {
        "optimizer_cls_and_kwargs": trainer.optimizer_cls_and_kwargs,
        "create_optimizer": own_optimizer(trainer),
        "compute_loss_func": trainer.compute_loss_func,
        "data_collator": trainer.data_collator,
        "trained_tensors": sum(parameter.requires_grad for parameter in trainer.model.parameters()),
    }


def recorded_arguments(args: TrainingArguments, of_trainer: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return the training arguments of a stage to record: those that differ from their defaults, and the usual ones.

    `of_trainer` has the [`trainer_arguments`].
    """
    texts, always = compared_arguments(args, of_trainer), _ALWAYS | _WITHOUT_DEFAULT
    recorded = {name: text for name, (text, default) in texts.items() if name in always or text != default}
    return {ARGUMENTS_CLASS: type(args).__name__, **recorded}


def compared_arguments(
    args: TrainingArguments, of_trainer: Mapping[str, Any] | None = None
) -> dict[str, tuple[str, str]]:
    """Return every argument that may change the trained weights, as text, with the text of its default."""
    values: dict[str, tuple[Any, Any]] = {"examples_per_step": (examples_per_step(args), None)}
    for field in fields(args):
        if field.name not in _without_effect(args) and not field.name.endswith(_SECRETS):
            values[field.name] = getattr(args, field.name), default_of(field)
    values["mixed_precision"] = args.mixed_precision, "no"
    values["deepspeed"] = _deepspeed_parts(args.deepspeed), None
    values |= {name: (v, v if name in _WITHOUT_DEFAULT else None) for name, v in (of_trainer or {}).items()}
    return {name: (argument_text(value), argument_text(default)) for name, (value, default) in values.items()}


def examples_per_step(args: TrainingArguments) -> int:
    """Return the number of examples of one optimizer step, over all processes."""
    processes = 1 if getattr(args.accelerator_config, "split_batches", False) else args.world_size
    return args.train_batch_size * args.gradient_accumulation_steps * processes


def argument_text(value: Any) -> str:
    """Return an argument as text that is the same on every machine.

    An enumeration counts by its value, because scripts also set it as a string, a file by its name, an object by its
    type. Long texts are hashed. What is empty reads `None`.
    """
    stable = _stable(value)
    if isinstance(stable, str | list | dict):
        text = stable if isinstance(stable, str) else json.dumps(stable, sort_keys=True, ensure_ascii=False)
        if len(text) <= _MAX_LENGTH and text.isprintable():
            return text if stable else "None"
        return f"sha256 {hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:16]}"
    return str(stable)


def _without_effect(args: TrainingArguments) -> frozenset[str]:
    names = set(_WITHOUT_EFFECT)
    if args.max_steps > 0:
        names.add("num_train_epochs")
    if argument_text(args.optim) in _OPTIMIZERS_WITHOUT_ADAM_ARGUMENTS:
        names |= {"adam_beta1", "adam_beta2", "adam_epsilon"}
    if argument_text(args.eval_strategy) == "no":
        names |= {"eval_steps", "eval_delay"}
    if not args.load_best_model_at_end:
        names |= {"save_strategy", "save_steps"}
    return frozenset(names)


def _deepspeed_parts(config: Any) -> dict[str, Any]:
    """The parts of a DeepSpeed config, or of its file, that replace the trainer's optimizer and scheduler."""
    if isinstance(config, str | os.PathLike) and Path(config).is_file():
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    return {name: config[name] for name in _OF_DEEPSPEED if name in config} if isinstance(config, Mapping) else {}


def _stable(value: Any) -> Any:
    """JSON without addresses of objects, folders and secrets."""
    if isinstance(value, Enum):
        return _stable(value.value)
    if isinstance(value, Mapping):
        return {str(key): _stable(item) for key, item in value.items() if not str(key).endswith(_SECRETS)}
    if isinstance(value, list | tuple):
        return [_stable(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(argument_text, value))
    if isinstance(value, partial):
        return _stable([value.func, value.args, value.keywords])
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _stable(v) for f in fields(value) if (v := getattr(value, f.name)) != default_of(f)}
    return _stable_scalar(value)


def _stable_scalar(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        return Path(text).name if text.startswith(("/", "~", "file:")) else text
    if isinstance(value, np.generic):
        return value.item()
    if type(value).__module__ == "torch":  # torch.float32, torch.device("cpu"), tensors
        return str(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
