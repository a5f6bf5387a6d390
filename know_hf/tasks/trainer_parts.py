"""Model, processor, data and training arguments of a task, ready for a `Trainer`."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..checkpoint.safe_loading import from_safetensors, load_config
from ..config_files import check_keys, check_types
from ..terminal import first_names
from .arguments import IMAGE, LABELS, LM, SINGLE_LABEL, TEXT, LoraArguments, RecordArguments
from .preprocessing import Processor, load_preprocessing
from .task_data import class_numbers, load_splits

_AUTO_MODELS = {
    TEXT: AutoModelForSequenceClassification,
    IMAGE: AutoModelForImageClassification,
    LM: AutoModelForCausalLM,
}
_LORA_TASKS = {TEXT: "SEQ_CLS", IMAGE: None, LM: "CAUSAL_LM"}


@dataclass
class TrainerParts:
    """Keyword arguments of a task's `Trainer`."""

    model: nn.Module
    args: TrainingArguments
    train_dataset: datasets.Dataset
    eval_dataset: datasets.Dataset | None
    processing_class: Processor
    data_collator: Callable[[list[Any]], Any]
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None
    preprocess_logits_for_metrics: Callable[[Any, torch.Tensor], torch.Tensor] | None

    def make_trainer(self) -> Trainer:
        return Trainer(**{part.name: getattr(self, part.name) for part in fields(self)})


def prepare_task(args: RecordArguments) -> TrainerParts:
    """Load data, processor and model of a task; errors as [`record_task`]."""
    training = training_arguments(args)
    with training.main_process_first(desc="data"):
        train, evaluation, classes = load_splits(args)
        preprocessing = load_preprocessing(args)
        prepare = preprocessing.prepare
        train, evaluation = prepare(train), None if evaluation is None else prepare(evaluation)
    model, new_tensors = load_model(args, classes, preprocessing.processor)
    return TrainerParts(
        model=model if args.lora is None else _add_adapter(model, args.lora, args.task, new_tensors),
        args=training,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=preprocessing.processor,
        data_collator=preprocessing.collator,
        compute_metrics=None if args.task == LM else _accuracy,
        preprocess_logits_for_metrics=None if args.task == LM else _arg_max,
    )


def training_arguments(args: RecordArguments) -> TrainingArguments:
    """Return the `TrainingArguments` of a recording; a `ValueError` names an unknown key or a wrong type."""
    check_keys(args.training, [option.name for option in fields(TrainingArguments) if option.init], "training")
    check_types(args.training, TrainingArguments, "training.")
    options: dict[str, Any] = {
        "save_strategy": "no",
        "dataloader_pin_memory": torch.accelerator.is_available(),
        **args.training,
        "num_train_epochs": args.epochs,
        "seed": args.seed,
        "label_names": [LABELS],
        # the image column is no input of a model, and the collator adds the labels of language modelling
        "remove_unused_columns": args.task == TEXT,
    }
    return TrainingArguments(str(Path(args.output_dir) / "trainer"), **options)


def load_model(
    args: RecordArguments, classes: list[str] | None, processor: Processor
) -> tuple[PreTrainedModel, list[str]]:
    """Return the model before the training, without adapter, and the names of tensors that its checkpoint lacks."""
    options: dict[str, Any] = {}
    if classes is not None:
        label2id = {name: index for index, name in enumerate(classes)}
        options |= {"num_labels": len(classes), "id2label": dict(enumerate(classes)), "label2id": label2id}
        options["ignore_mismatched_sizes"] = True  # a head for other classes is replaced
        options["problem_type"] = SINGLE_LABEL  # not that of a checkpoint for regression or several labels
    set_seed(args.seed)
    dtype = args.dtype or ("float32" if args.lora is None else "auto")
    options |= {"dtype": dtype, "output_loading_info": True}
    model, info = from_safetensors(_AUTO_MODELS[args.task], args.model, args.model_revision, **options)
    if classes is not None:
        # These models accept the Trainer's num_items_in_batch but do not divide by it: the loss would grow with the
        # numbers of processes and accumulated batches.
        model.accepts_loss_kwargs = False
    new_tensors = sorted({*info["missing_keys"], *(mismatch[0] for mismatch in info["mismatched_keys"])})
    if new_tensors and args.start == "current":
        raise ValueError(
            f"start='current' needs a model trained on the task, but {args.model} has no {new_tensors[0]!r} for"
            f" {args.task}; use start='train'"
        )
    if classes is not None and args.start == "current":
        own = load_config(args.model, args.model_revision)
        names = [own.id2label[index] for index in sorted(own.id2label)]
        if class_numbers(classes, own, args.dataset) != list(range(len(classes))):
            raise ValueError(
                f"the classes of {args.model} are {first_names(names, 10)}, those of {args.dataset}"
                f" {first_names(classes, 10)}; start='current' needs one order: cast the labels to a ClassLabel with"
                " the names in the order of the model"
            )
    text_config = model.config.get_text_config()
    if isinstance(processor, PreTrainedTokenizerBase) and getattr(text_config, "pad_token_id", None) is None:
        text_config.pad_token_id = processor.pad_token_id
    return model, new_tensors


def _add_adapter(model: PreTrainedModel, lora: LoraArguments, task: str, new_tensors: list[str]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    heads = [] if task == LM else _heads(model)
    others = {name.rpartition(".")[0] for name in new_tensors}
    # training changes BatchNorm statistics, which no state holds unless the layers are trained in full
    others |= {
        name for name, part in model.named_modules() if isinstance(part, _BatchNorm) and part.track_running_stats
    }
    in_full = heads + sorted(name for name in others if name and name.partition(".")[0] not in heads)
    targets = lora.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        targets = [name.strip() for name in targets.split(",")]
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        modules_to_save=in_full or None,
        task_type=_LORA_TASKS[task],
    )
    return get_peft_model(model, config)


def _heads(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules on top of the base model."""
    base = model.base_model
    children = [] if base is model else model.named_children()
    return [name for name, child in children if child is not base and [*child.parameters()]]


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def _arg_max(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
