"""Job that workers share, and the result of a trajectory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from space import Recipe

RECIPE_NAME, RESULT_NAME = "recipe.json", "result.json"


@dataclass(frozen=True)
class Job:
    """
    Recipes of a collection and the paths of their data; pickled for each worker.

    Attributes:
        recipes (`list[Recipe]`):
            All recipes of the collection.
        sources (`dict[str, dict[str, str]]`):
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

    @property
    def cache(self) -> Path:
        """Folder of prepared data, shared by all processes."""
        return self.output_dir / ".cache"

    def folder(self, recipe: Recipe) -> Path:
        return self.output_dir / recipe.name

    def model_path(self, recipe: Recipe) -> str | None:
        """Return the folder or Hub id of the pretrained model."""
        return self.models.get(recipe.pretrained, recipe.pretrained)

    def result(self, recipe: Recipe) -> dict[str, Any] | None:
        """Return the result, whose `status` is `"finished"` or `"failed"`, or `None` if the recipe is not done."""
        from know_hf.checkpoint import (
            read_json_object,  # not at the top: workers set variables before torch is imported
        )

        path = self.folder(recipe) / RESULT_NAME
        if not path.exists():
            return None
        hint = "delete it to record the trajectory again"
        result = read_json_object(path, hint)
        if result.get("status") == "finished" or isinstance(result.get("error"), str):
            return result
        raise ValueError(
            f"{path} has neither status='finished' nor an error; delete it to record the trajectory again"
        )

    def error(self, recipe: Recipe) -> str | None:
        """Return the error of a failed recipe."""
        result = self.result(recipe)
        return result["error"] if result is not None and result["status"] == "failed" else None
