"""The guide "add a predictor, an arm or a protocol": its script runs, and its README shows what exists."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import know_hf
from know_hf.predictors import protocol

RECIPE = Path(__file__).parents[1] / "recipes" / "extend"


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(protocol, "_PREDICTORS", dict(protocol._PREDICTORS))


def test_the_example_compares_its_own_predictor_arm_and_protocol(tmp_path):
    example = runpy.run_path(str(RECIPE / "extend.py"))
    report = example["run"](tmp_path / "out", seeds=range(2))
    assert {cell["arm"] for cell in report.cells} == {"naive", "median", "halfway", "average"}
    assert set(report.protocols) == {"source", "noisy-inputs"}
    naive = next(cell for cell in report.cells if cell["arm"] == "naive" and cell["seed"] == 0)
    accuracy = {name: draws[0]["trials"][0]["test"]["accuracy"] for name, draws in naive["measured"].items()}
    assert accuracy["noisy-inputs"] < accuracy["source"]
    assert (tmp_path / "out" / "report.json").exists()


def test_the_code_of_the_readme_runs():
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", (RECIPE / "README.md").read_text(encoding="utf-8"), re.DOTALL):
        exec(block, namespace)
    for name in ("halfway", "tuned", "median"):
        assert namespace[name].predictor == "median"
        namespace[name].check_options()
    assert (namespace["halfway"].role, namespace["median"].role) == ("method", "control")
    history = torch.tensor([[1.0, 2.0, 5.0]])
    assert know_hf.get_predictor("median").residual(history, "fc").tolist() == [-3.0]
