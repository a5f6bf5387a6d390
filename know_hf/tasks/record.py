"""Recording for the common tasks from a few arguments: model, processor, data and `Trainer` are made here.

output_dir/
  record.json      the arguments; later runs into the folder must have the same
  trajectory/      the states, a [`WeightTrajectory`]
  forgetting.png   the forgetting curve, where matplotlib is installed and the states were evaluated
  trainer/         whatever the Trainer writes, such as its logs
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BaseImageProcessor,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from ..checkpoint import write_json
from ..config_files import check_keys
from ..model_tensors import whole_shape
from ..plotting import forgetting_picture, save_figure
from ..recording import induce_forgetting
from ..trajectory import WeightTrajectory, state_nbytes
from ..trajectory.snapshot import recorded_tensors, with_place
from .arguments import IMAGE, LABELS, LM, TEXT, LoraArguments, RecordArguments
from .task_data import CausalCollator, load_splits, process_images, tokenize

TRAJECTORY_NAME = "trajectory"
_ARGUMENTS_NAME = "record.json"
_PLOT_NAME = "forgetting.png"
_LONGEST = 512  # tokens of an example when max_length is not given
_AUTO_MODELS = {
    TEXT: AutoModelForSequenceClassification,
    IMAGE: AutoModelForImageClassification,
    LM: AutoModelForCausalLM,
}
_LORA_TASKS = {TEXT: "SEQ_CLS", IMAGE: None, LM: "CAUSAL_LM"}


@dataclass
class TaskParts:
    """What a task's `Trainer` is made of; of its keywords each is the Trainer's of that name."""

    model: nn.Module
    args: TrainingArguments
    train_dataset: datasets.Dataset
    eval_dataset: datasets.Dataset | None
    processing_class: PreTrainedTokenizerBase | BaseImageProcessor
    data_collator: Callable[[list[Any]], Any]
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None
    preprocess_logits_for_metrics: Callable[[Any, torch.Tensor], torch.Tensor] | None

    def make_trainer(self) -> Trainer:
        return Trainer(**{part.name: getattr(self, part.name) for part in fields(self)})


@dataclass(frozen=True)
class RecordingPlan:
    """What a recording would train and write.

    Args:
        num_examples, steps (`list[int]`): Examples and optimizer steps of every state, full data first; no steps for a
            state 0 that is taken as it is.
        epochs (`list[float]`): Epochs of every state.
        examples_seen (`int`): Examples the whole recording trains on, each counted as often as it is seen.
        relative_cost (`float`): Σ r^k, the examples of one epoch of every state in units of one epoch on all data.
        parameters, bytes_per_state (`int`): What one state holds; of an adapter only the adapter.
        free_bytes (`int`): Free on the disk of the output folder.
    """

    num_examples: list[int]
    steps: list[int]
    epochs: list[float]
    examples_seen: int
    relative_cost: float
    parameters: int
    bytes_per_state: int
    free_bytes: int

    @property
    def bytes_needed(self) -> int:
        """Of all states together; less where tensors do not change from state to state."""
        return self.bytes_per_state * len(self.num_examples)

    def __str__(self) -> str:
        rows = [f"{'state':>5}  {'examples':>10}  {'epochs':>6}  {'steps':>9}"]
        for state, (examples, epochs, steps) in enumerate(
            zip(self.num_examples, self.epochs, self.steps, strict=True)
        ):
            rows.append(f"{state:>5}  {examples:>10,}  {epochs:>6.3g}  {steps:>9,}")
        times = self.examples_seen / self.num_examples[0]
        cost = f"cost: {sum(self.steps):,} steps, {self.examples_seen:,} examples seen: {times:.2f} epochs on all data"
        if first := self.epochs[0]:
            cost += f", {times / first:.2f} times the training of state 0 alone"
        cost += f" (Σ r^k = {self.relative_cost:.2f})"
        disk = (
            f"disk: {len(self.num_examples)} states of {_size(self.bytes_per_state)} ({self.parameters:,} parameters)"
            f" = {_size(self.bytes_needed)}, {_size(self.free_bytes)} free"
        )
        return "\n".join([*rows, "", cost, disk])


def record_task(args: RecordArguments) -> WeightTrajectory:
    """Fine-tunes a model on a dataset, makes it forget, and records every state.

    Called again with the same arguments, it goes on with the first state that is missing.

    Args:
        args ([`RecordArguments`]): The task, the model, the data and the training.

    Returns:
        [`WeightTrajectory`]: in `args.output_dir/trajectory`.

    Raises:
        `ValueError`: as [`induce_forgetting`]; when the dataset's columns do not fit the task; for a training argument
            that transformers does not know; when the folder's trajectory was recorded with other arguments.
    """
    output_dir = Path(args.output_dir)
    training = _training_arguments(args)
    with training.main_process_first(desc="arguments"):
        _keep_arguments(args, output_dir, write=training.process_index == 0)
    trainer = prepare_task(args).make_trainer()
    trajectory = induce_forgetting(trainer, args.schedule, output_dir / TRAJECTORY_NAME, start=args.start)  # type: ignore[arg-type]
    if trainer.is_world_process_zero():
        picture = forgetting_picture(trajectory)
        if picture is not None:
            save_figure(picture, output_dir / _PLOT_NAME)
    return trajectory


def plan_task(args: RecordArguments) -> RecordingPlan:
    """Loads everything a recording needs, so that what fails does so now, and counts; trains and writes nothing.

    Args:
        args ([`RecordArguments`]): As for [`record_task`], which raises the same.

    Returns:
        [`RecordingPlan`]: printable with `str`.
    """
    parts = prepare_task(args)
    training, schedule = parts.args, args.schedule
    batch = training.train_batch_size * training.world_size
    sizes = schedule.sizes(len(parts.train_dataset), batch * training.gradient_accumulation_steps)
    per_epoch = [_steps_per_epoch(size, batch, training) for size in sizes]
    lengths = [(args.epochs, training.max_steps)] + [(args.epochs_per_stage, args.steps_per_stage or -1)] * (
        args.num_states - 1
    )
    if args.start == "current":
        lengths[0] = (0.0, -1)
    steps = [most if most > 0 else math.ceil(n * each) for (n, most), each in zip(lengths, per_epoch, strict=True)]
    epochs = [most / each if most > 0 else n for (n, most), each in zip(lengths, per_epoch, strict=True)]
    return RecordingPlan(
        num_examples=sizes,
        steps=steps,
        epochs=epochs,
        examples_seen=round(sum(size * length for size, length in zip(sizes, epochs, strict=True))),
        relative_cost=schedule.relative_cost,
        parameters=sum(whole_shape(tensor).numel() for tensor in recorded_tensors(parts.model)),
        bytes_per_state=state_nbytes(parts.model)[0],
        free_bytes=shutil.disk_usage(_existing(Path(args.output_dir))).free,
    )


def prepare_task(args: RecordArguments) -> TaskParts:
    """Loads data, processor and model of a task, with what its `Trainer` needs beside them.

    Args:
        args ([`RecordArguments`]): As for [`record_task`], which raises the same.

    Returns:
        [`TaskParts`]: whose `make_trainer` makes the Trainer.
    """
    training = _training_arguments(args)
    with training.main_process_first(desc="data"):
        train, evaluation, classes = load_splits(args)
        config = AutoConfig.from_pretrained(args.model, **_revision(args))
        processor: PreTrainedTokenizerBase | BaseImageProcessor
        if args.task == IMAGE:
            # The same pixels whether torchvision is installed or not.
            processor = AutoImageProcessor.from_pretrained(args.model, backend="pil", **_revision(args))
            prepare = partial(process_images, processor=processor, channels=getattr(config, "num_channels", 3))
        else:
            processor = _tokenizer(args)
            length = _max_length(args, processor, config)
            prepare = partial(tokenize, tokenizer=processor, max_length=length, causal=args.task == LM, pack=args.pack)
        train, evaluation = prepare(train), None if evaluation is None else prepare(evaluation)
    model, new = _model(args, classes)
    text_config = model.config.get_text_config()
    if isinstance(processor, PreTrainedTokenizerBase) and getattr(text_config, "pad_token_id", None) is None:
        text_config.pad_token_id = processor.pad_token_id
    return TaskParts(
        model=model if args.lora is None else _with_adapter(model, args.lora, args.task, new),
        args=training,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        data_collator={TEXT: DataCollatorWithPadding, LM: CausalCollator}[args.task](processor)
        if args.task != IMAGE
        else default_data_collator,
        compute_metrics=None if args.task == LM else _accuracy,
        preprocess_logits_for_metrics=None if args.task == LM else _arg_max,
    )


def _training_arguments(args: RecordArguments) -> TrainingArguments:
    names = [option.name for option in fields(TrainingArguments) if option.init]
    check_keys(args.training, names, "training")
    options: dict[str, Any] = {
        "save_strategy": "no",
        "dataloader_pin_memory": torch.accelerator.is_available(),
        **args.training,
        "num_train_epochs": args.epochs,
        "seed": args.seed,
        "label_names": [LABELS],
        # Images come from a column that no model takes, and the labels of language modelling from the collator.
        "remove_unused_columns": args.task == TEXT,
    }
    return TrainingArguments(str(Path(args.output_dir) / "trainer"), **options)


def _keep_arguments(args: RecordArguments, output_dir: Path, write: bool) -> None:
    """Refuses other arguments than those of a trajectory in the folder, on every process; the main one writes."""
    path = output_dir / _ARGUMENTS_NAME
    new = _with_places(args.to_dict())
    if path.exists() and WeightTrajectory.exists(output_dir / TRAJECTORY_NAME):
        old = _with_places(json.loads(path.read_text(encoding="utf-8")))
        for key in sorted((new.keys() | old.keys()) - {"output_dir"}):
            if old.get(key) != json.loads(json.dumps(new.get(key))):
                raise ValueError(
                    f"{output_dir} was recorded with {key}={old.get(key)!r}, not {new.get(key)!r}; give what it was"
                    " recorded with to go on, or record to another output_dir"
                )
        return
    if write:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, new)


def _with_places(content: dict[str, Any]) -> dict[str, Any]:
    return content | {key: with_place(content[key]) for key in ("model", "dataset") if key in content}


def _revision(args: RecordArguments) -> dict[str, str]:
    return {} if args.model_revision is None else {"revision": args.model_revision}


def _tokenizer(args: RecordArguments) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(args.model, **_revision(args))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {args.model} has neither a padding nor an end-of-text token;"
                " save it with a pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _max_length(args: RecordArguments, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    if args.max_length is None:
        return min(longest, _LONGEST)
    if args.max_length > longest:
        raise ValueError(f"max_length={args.max_length}: {args.model} takes at most {longest} tokens")
    return args.max_length


def _model(args: RecordArguments, classes: list[str] | None) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of those of its tensors that the checkpoint does not have."""
    options: dict[str, Any] = _revision(args)
    if classes is not None:
        label2id = {name: index for index, name in enumerate(classes)}
        id2label = dict(enumerate(classes))
        options |= {"num_labels": len(classes), "id2label": id2label, "label2id": label2id}
        options["ignore_mismatched_sizes"] = True  # a head of other classes is replaced
    set_seed(args.seed)
    model, info = _AUTO_MODELS[args.task].from_pretrained(
        args.model,
        dtype=args.dtype or ("float32" if args.lora is None else "auto"),
        output_loading_info=True,
        **options,
    )
    if classes is not None:
        # These models take the Trainer's count of examples but do not divide by it: their loss would be multiplied by
        # the number of processes and of accumulated batches.
        model.accepts_loss_kwargs = False
    new = sorted({*info["missing_keys"], *(mismatch[0] for mismatch in info["mismatched_keys"])})
    if new and args.start == "current":
        raise ValueError(
            f"start='current' takes the weights of {args.model} as those trained on all of the data, but it has none"
            f" for {new[0]!r} of this task; give start='train', or a model that was trained on the task"
        )
    return model, new


def _with_adapter(model: PreTrainedModel, lora: LoraArguments, task: str, new: list[str]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    heads = [] if task == LM else _heads(model)
    fresh = {name.rpartition(".")[0] for name in new}
    # BatchNorm too: else its statistics, which the training moves, would be in no state
    norms = {name for name, part in model.named_modules() if isinstance(part, _BatchNorm) and part.track_running_stats}
    whole = heads + sorted(name for name in fresh | norms if name and name.partition(".")[0] not in heads)
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
        modules_to_save=whole or None,
        task_type=_LORA_TASKS[task],
    )
    return get_peft_model(model, config)


def _heads(model: PreTrainedModel) -> list[str]:
    """What stands on top of the base model: trained whole, as a new head has to be."""
    base = model.base_model
    if base is model:
        return []
    return [
        name for name, child in model.named_children() if child is not base and any(True for _ in child.parameters())
    ]


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def _arg_max(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _steps_per_epoch(size: int, batch: int, training: TrainingArguments) -> int:
    batches = size // batch if training.dataloader_drop_last else math.ceil(size / batch)
    return max(math.ceil(batches / training.gradient_accumulation_steps), 1)


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _size(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"
