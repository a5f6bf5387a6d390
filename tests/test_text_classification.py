"""recipes/text_classification on a tiny BERT and made up reviews."""

import importlib.util
import json
from pathlib import Path

import pytest
from collect_space import sources

__all__ = ["sources"]

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # on CPUs

RECIPE = Path(__file__).parents[1] / "recipes/text_classification/text_classification.py"


def test_labels_in_a_column_of_another_name(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = Path(sources[-1].rpartition("=")[2]).parent
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    spec = importlib.util.spec_from_file_location("text_classification", RECIPE)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    flags = ["--output-dir", str(tmp_path / "out"), "--model", str(folder / "bert"), "--epochs", "1"]
    flags += ["--dataset", str(folder / "reviews"), "--text-column", "review", "--label-column", "kind"]
    flags += ["--num-test", "4", "--batch-size", "4", "--max-length", "8"]
    recipe.main(recipe.make_parser().parse_args(flags))
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert [name for name in results if name.startswith("state")] == [
        f"state {index} ({size} examples)" for index, size in enumerate((100, 50, 25, 12, 6))
    ]
    assert list(results)[5:] == ["known-1", "known-2", "known-3", "average"]
    assert all(0 <= result["eval_accuracy"] <= 1 and result["eval_loss"] > 0 for result in results.values())
    assert "weights" in capsys.readouterr().out
