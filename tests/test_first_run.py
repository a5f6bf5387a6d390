"""The example of the README is a recipe, and runs as it is."""

import runpy
from pathlib import Path

import pytest
from test_readme import README, blocks

from know_hf import WeightTrajectory

SCRIPT = Path(__file__).parents[1] / "recipes/first_run/first_run.py"


def test_the_readme_shows_the_recipe():
    code = SCRIPT.read_text(encoding="utf-8").partition('"""\n\n')[2]
    assert code in blocks(README, "python")


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # on CPUs
def test_the_recipe_records_and_chooses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(SCRIPT))
    trajectory = WeightTrajectory(tmp_path / "first_run" / "trajectory")
    assert [state.num_examples for state in trajectory.states] == [400, 200, 100, 50, 25]
    assert trajectory.states[0].metrics["eval_loss"] < 1
    assert example["enhanced"].gate.chosen in capsys.readouterr().out
    assert (tmp_path / "first_run" / "enhanced" / "model.safetensors").exists()
    assert example["model"].config.num_labels == 10
