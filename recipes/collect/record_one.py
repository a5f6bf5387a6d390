"""Record one trajectory: from a recipe to a folder with states and `result.json`."""

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import models
import torch
import transformers
from examples import accuracy, arg_max, load_examples
from jobs import RESULT_NAME
from space import Recipe
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments, set_seed

from know_hf import ForgettingSchedule, WeightTrajectory, induce_forgetting
from know_hf.checkpoint import write_json
from know_hf.trajectory.summary import displacement

RECIPE_NAME = "recipe.json"


def record_one(recipe: Recipe, source: dict[str, str], local_models: dict[str, str], output_dir: Path) -> None:
    """Record one trajectory, or the rest of it. The caller holds its lock.

    Args:
        recipe ([`Recipe`]):
            The draw.
        source (`dict[str, str]`):
            Dataset, see [`load_examples`].
        local_models (`dict[str, str]`):
            Local folders of pretrained models, by Hub id.
        output_dir (`Path`):
            Folder of the collection.

    Raises:
        `ValueError`: if data or architecture do not fit the recipe, the folder contains a recording of other data, or
            the training diverged.
    """
    begun = time.perf_counter()
    folder = output_dir / recipe.name
    folder.mkdir(exist_ok=True)
    data = load_examples(recipe, source, local_models, output_dir / ".cache")
    fingerprint = data.train.fingerprint
    _check_same_data(folder / RECIPE_NAME, fingerprint)
    set_seed(recipe.seed)
    model = make_model(recipe, data.num_labels, data.tokenizer, local_models)
    parameters = list(model.parameters())
    found = {
        "num_labels": data.num_labels,
        "num_parameters": sum(parameter.numel() for parameter in parameters),
        "num_trained_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "data_fingerprint": fingerprint,
    }
    write_json(folder / RECIPE_NAME, {**recipe.to_dict(), **found})
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
    write_json(folder / RESULT_NAME, {"status": "finished", **_curves(trajectory), "seconds": _since(begun)})


def make_model(recipe: Recipe, num_labels: int, tokenizer: Any, local_models: dict[str, str]) -> torch.nn.Module:
    """Return the untrained model of a recipe. Seed before: new weights are random.

    Raises:
        `ValueError`: if the class does not exist, or `freeze` matches no parameter.
    """
    model_class = getattr(models, recipe.model_class, None) or getattr(transformers, recipe.model_class, None)
    if model_class is None:
        raise ValueError(
            f"architecture {recipe.architecture!r}: neither models.py nor transformers has {recipe.model_class!r}"
        )
    options = {**recipe.model_config, "num_labels": num_labels}
    model: PreTrainedModel
    if recipe.pretrained is not None:
        model = model_class.from_pretrained(local_models.get(recipe.pretrained, recipe.pretrained), **options)
        # publish the Hub id, not the local folder
        model.name_or_path = model.config.name_or_path = recipe.pretrained
    else:
        if tokenizer is None:
            options |= {"image_size": recipe.inputs["image_size"], "num_channels": recipe.inputs["image_channels"]}
        else:
            names = ("pad_token_id", "bos_token_id", "eos_token_id")
            values = (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
            options |= {"vocab_size": len(tokenizer), **dict(zip(names, values, strict=True))}
            options |= {"max_position_embeddings": recipe.inputs["max_length"], "use_cache": False}
        model = model_class(model_class.config_class(**options))
    for beginning in recipe.freeze:
        frozen = [parameter for name, parameter in model.named_parameters() if name.startswith(beginning)]
        if not frozen:
            raise ValueError(f"architecture {recipe.architecture!r}: no parameter starts with freeze={beginning!r}")
        for parameter in frozen:
            parameter.requires_grad_(False)
    if recipe.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type=None if tokenizer is None else "SEQ_CLS", **recipe.lora))


def _check_same_data(path: Path, fingerprint: str) -> None:
    if path.exists() and (recorded := json.loads(path.read_text())["data_fingerprint"]) != fingerprint:
        raise ValueError(
            f"{path.parent} was recorded from other data (fingerprint {recorded}, now {fingerprint}); give the same"
            " dataset or delete the folder"
        )


def _curves(trajectory: WeightTrajectory) -> dict[str, list[float]]:
    """What the states say, full data first."""
    states = trajectory.states
    return {
        "state_examples": [state.num_examples for state in states],
        "state_steps": [state.steps for state in states],
        "eval_accuracy": [state.metrics["eval_accuracy"] for state in states],
        "eval_loss": [state.metrics["eval_loss"] for state in states],
        "displacement": [displacement(trajectory, state.index) for state in states],
    }


def _since(begun: float) -> float:
    return round(time.perf_counter() - begun, 1)
