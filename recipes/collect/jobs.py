"""What the workers of a collection record, and how a trajectory ended."""

import json
from dataclasses import dataclass
from pathlib import Path

from space import Recipe

RESULT_NAME = "result.json"


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; pickled to it.

    Args:
        recipes (`list[Recipe]`): All of them, whoever records them.
        sources (`dict`): From the name of a dataset in the space to where it is.
        models (`dict[str, str]`): Folders to take instead of Hub ids of models.
        output_dir (`Path`): Folder of the collection.
    """

    recipes: list[Recipe]
    sources: dict[str, dict[str, str]]
    models: dict[str, str]
    output_dir: Path


def result(output_dir: Path, name: str) -> dict[str, object] | None:
    """How a trajectory ended: with `"status"` `"finished"` or `"failed"`; `None` for one that has not."""
    path = output_dir / name / RESULT_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
