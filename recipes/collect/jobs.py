"""The job that workers share, and the result of a trajectory."""

import json
from dataclasses import dataclass
from pathlib import Path

from space import Recipe

RESULT_NAME = "result.json"


@dataclass(frozen=True)
class Job:
    """Everything a worker needs; pickled.

    Args:
        recipes (`list[Recipe]`):
            All recipes of the collection.
        sources (`dict`):
            Path, columns and splits of each dataset, by its name in the space.
        models (`dict[str, str]`):
            Local folders of pretrained models, by Hub id.
        output_dir (`Path`):
            Folder of the collection.
    """

    recipes: list[Recipe]
    sources: dict[str, dict[str, str]]
    models: dict[str, str]
    output_dir: Path


def result(output_dir: Path, name: str) -> dict[str, object] | None:
    """Return the result of a trajectory, whose `"status"` is `"finished"` or `"failed"`; `None` if it has none yet."""
    path = output_dir / name / RESULT_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
