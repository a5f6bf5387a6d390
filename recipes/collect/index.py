"""Index, dataset card and push of a collection."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from jobs import RECIPE_NAME, Job
from space import SPLITS, Space

from know_hf.checkpoint import read_json_object
from know_hf.hub import HubError
from know_hf.markdown import table

INDEX_NAME, SPACE_NAME, CARD_NAME = "index.jsonl", "space.yaml", "README.md"
_TITLE = "Trajectories of structured forgetting"


def write_index(job: Job, space: Space, space_file: Path) -> list[dict[str, Any]]:
    """
    Write index, card and space of the finished trajectories atomically, even if several processes call this.

    Args:
        job ([`Job`]):
            Job of the collection.
        space ([`Space`]):
            Space of the collection.
        space_file (`Path`):
            YAML file of the space.

    Returns:
        `list[dict[str, Any]]`: Rows of the index.
    """
    rows = []
    for recipe in job.recipes:
        result = job.result(recipe)
        if result is not None and result["status"] == "finished":
            rows.append(_row(read_json_object(job.folder(recipe) / RECIPE_NAME), result))
    with FileLock(job.output_dir / ".locks" / "index.lock"):
        _write(job.output_dir / SPACE_NAME, space_file.read_text(encoding="utf-8"))
        _write(job.output_dir / CARD_NAME, _card(space, rows))
        _write(job.output_dir / INDEX_NAME, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def summary(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return a table of trajectories per split and accuracies of the first and last state."""
    lines = [["architecture", "dataset", *SPLITS, "Θ0", f"Θ{rows[0]['num_states'] - 1}" if rows else "last"]]
    for key in dict.fromkeys((row["architecture"], row["dataset"]) for row in rows):
        group = [row for row in rows if (row["architecture"], row["dataset"]) == key]
        counts = Counter(row["split"] for row in group)
        columns = [str(counts[split] or "") for split in SPLITS]
        for state in (0, -1):
            values = [row["eval_accuracy"][state] for row in group]
            columns.append(f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append([*key, *columns])
    return lines


def push(output_dir: Path, rows: list[dict[str, Any]], repo_id: str, private: bool) -> str:
    """
    Push index, card and finished trajectories as one dataset repo; resumes an interrupted push.

    Args:
        output_dir (`Path`):
            Folder of the collection.
        rows (`list[dict]`):
            Rows of the index.
        repo_id (`str`):
            Id of the dataset repo, created if missing.
        private (`bool`):
            Whether a new repo is private.

    Returns:
        `str`: URL of the commit.

    Raises:
        `HubError`: If `private` is requested and the repo is public.
    """
    api = HfApi()
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    if private and not api.dataset_info(repo_id).private:
        raise HubError(f"{repo_id} is public, not private; change that on the Hub or use another repo")
    commit = api.upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=output_dir,
        allow_patterns=[INDEX_NAME, SPACE_NAME, CARD_NAME, *(f"{row['path']}/*" for row in rows)],
        ignore_patterns=["*.lock", "*.partial"],
        commit_message=f"Upload {len(rows)} trajectories",
    )
    return str(commit.commit_url)


def _row(recipe: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Return a flat row; values that differ between architectures are JSON, so that all rows have the same columns."""
    arguments, schedule = recipe["training_arguments"], recipe["schedule"]
    trained = "all" if recipe["num_trained_parameters"] == recipe["num_parameters"] else "part"

    def values(*names: str) -> dict[str, Any]:
        return {name: recipe[name] for name in names}

    return {
        "path": recipe["name"],
        **values("split", "architecture", "model_class"),
        "pretrained": recipe["pretrained"] or "",
        "trained": trained if recipe["lora"] is None else "lora",
        **values("num_parameters", "num_trained_parameters"),
        "model_config": json.dumps(recipe["model_config"]),
        "lora": json.dumps(recipe["lora"]),
        **values("dataset", "dataset_path"),
        "modality": "text" if "max_length" in recipe["inputs"] else "image",
        **values("num_labels", "num_examples"),
        "augmentation": " ".join(recipe["augmentation"]),
        "optimizer": recipe["optimizer"],
        "learning_rate": arguments["learning_rate"],
        "weight_decay": float(arguments.get("weight_decay", 0)),
        "batch_size": arguments["per_device_train_batch_size"],
        "epochs": arguments["num_train_epochs"],
        "epochs_per_stage": float(schedule["epochs_per_stage"]),
        "ratio": schedule["ratio"],
        "num_states": schedule["num_states"],
        "seed": recipe["seed"],
        **{key: value for key, value in result.items() if key != "status"},
    }


def _card(space: Space, rows: list[dict[str, Any]]) -> str:
    data = DatasetCardData(
        license=space.license,
        pretty_name=_TITLE,
        size_categories=["n<1K"],
        tags=["weight-space-learning", "weight-trajectory", "know_hf"],
        source_datasets=sorted({row["dataset_path"] for row in rows}) or None,
        configs=[{"config_name": "default", "data_files": [{"split": "trajectories", "path": INDEX_NAME}]}],
    )
    held_out = space.held_out
    card = DatasetCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        title=_TITLE,
        count=len(rows),
        table=table(summary(rows)),
        every="none" if held_out.every is None else f"every {held_out.every}th draw",
        architectures=", ".join(held_out.architectures) or "none",
        datasets=", ".join(held_out.datasets) or "none",
    )
    return str(card)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
