"""Record one trajectory: from a recipe to a folder with states and `result.json`."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import models
import torch
import transformers
from examples import accuracy, arg_max, load_examples
from jobs import RECIPE_NAME, RESULT_NAME, Job
from space import Recipe
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments, set_seed

from know_hf import ForgettingSchedule, WeightTrajectory, induce_forgetting
from know_hf.checkpoint import read_json_object, write_json
from know_hf.checkpoint.safe_loading import from_safetensors
from know_hf.trajectory.summary import displacement


def record_one(job: Job, recipe: Recipe) -> None:
    """
    Record one trajectory, or the rest of it. The caller holds its lock.

    Raises:
        `ValueError`: If data or architecture do not fit the recipe, the folder was recorded from other data, or the
        training diverged.
    """
    start = time.perf_counter()
    folder = job.folder(recipe)
    folder.mkdir(exist_ok=True)
    data = load_examples(job, recipe)
    fingerprint = data.train.fingerprint
    _check_same_data(folder / RECIPE_NAME, fingerprint)
    set_seed(recipe.seed)
    model = make_model(job, recipe, data.num_labels, data.tokenizer)
    parameters = list(model.parameters())
    properties = {
        "num_labels": data.num_labels,
        "num_parameters": sum(parameter.numel() for parameter in parameters),
        "num_trained_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "data_fingerprint": fingerprint,
    }
    write_json(folder / RECIPE_NAME, {**recipe.to_dict(), **properties})
    with TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            TrainingArguments(
                scratch,
                seed=recipe.seed,
                per_device_eval_batch_size=250 if data.tokenizer is None else 50,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                label_names=["labels"],
                dataloader_pin_memory=torch.cuda.is_available(),
                **recipe.training_arguments,
            ),
            data_collator=lambda batch: batch,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            processing_class=data.tokenizer,
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=arg_max,
        )
        trainer.remove_callback(PrinterCallback)
        trajectory = induce_forgetting(trainer, ForgettingSchedule(**recipe.schedule), folder, start="train")
    seconds = round(time.perf_counter() - start, 1)
    write_json(folder / RESULT_NAME, {"status": "finished", **_curves(trajectory), "seconds": seconds})


def make_model(job: Job, recipe: Recipe, num_labels: int, tokenizer: Any) -> torch.nn.Module:
    """
    Create the untrained model of a recipe. New weights are random: call `set_seed` first.

    Raises:
        `ValueError`: If the class does not exist, or `freeze` matches no parameter.
    """
    model_class = getattr(models, recipe.model_class, None) or getattr(transformers, recipe.model_class, None)
    if model_class is None:
        raise ValueError(
            f"architecture {recipe.architecture!r}: neither models.py nor transformers has {recipe.model_class!r}"
        )
    options = {**recipe.model_config, "num_labels": num_labels}
    model: PreTrainedModel
    if recipe.pretrained is not None:
        model = from_safetensors(model_class, job.model_path(recipe), **options)
        # Publish the Hub id, not the local folder.
        model.name_or_path = model.config.name_or_path = recipe.pretrained
    else:
        if tokenizer is None:
            options |= {"image_size": recipe.inputs["image_size"], "num_channels": recipe.inputs["image_channels"]}
        else:
            options |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
            options |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
            options |= {"max_position_embeddings": recipe.inputs["max_length"], "use_cache": False}
        model = model_class(model_class.config_class(**options))
    for prefix in recipe.freeze:
        frozen = [parameter for name, parameter in model.named_parameters() if name.startswith(prefix)]
        if not frozen:
            raise ValueError(f"architecture {recipe.architecture!r}: no parameter starts with freeze={prefix!r}")
        for parameter in frozen:
            parameter.requires_grad_(False)
    if recipe.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type=None if tokenizer is None else "SEQ_CLS", **recipe.lora))


def _check_same_data(path: Path, fingerprint: str) -> None:
    if path.exists() and (recorded := read_json_object(path).get("data_fingerprint")) != fingerprint:
        raise ValueError(
            f"{path.parent} was recorded from other data (fingerprint {recorded}, now {fingerprint}); use the same"
            " dataset, or delete the folder"
        )


def _curves(trajectory: WeightTrajectory) -> dict[str, list[float]]:
    """Return lists over the states, full data first."""
    states = trajectory.states
    return {
        "state_examples": [state.num_examples for state in states],
        "state_steps": [state.steps for state in states],
        "eval_accuracy": [state.metrics["eval_accuracy"] for state in states],
        "eval_loss": [state.metrics["eval_loss"] for state in states],
        "displacement": [displacement(trajectory, state.index) for state in states],
    }
