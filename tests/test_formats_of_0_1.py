"""Trajectories, checkpoints, KNOWN weights and comparison folders written by know_hf 0.1.0 still load."""

import json
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification, BertConfig, BertForSequenceClassification

from know_hf import KNOWNModel, WeightTrajectory, compare_arms, predict_overflowed_weights

FIXTURES = Path(__file__).parent / "fixtures" / "v0_1"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))
FROZEN = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FIXTURES))
    return Path(shutil.copytree(FIXTURES, tmp_path / "v0_1"))


def check_tensors(path, expected):
    tensors = load_file(path / "model.safetensors")
    assert sorted(tensors) == sorted(expected)
    for name, tensor in tensors.items():
        assert (list(tensor.shape), str(tensor.dtype)) == (expected[name]["shape"], expected[name]["dtype"])
        assert float(tensor.double().sum()) == pytest.approx(expected[name]["sum"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", sorted(EXPECTED["trajectories"]))
def test_trajectories(folder, name):
    expected = EXPECTED["trajectories"][name]
    trajectory = WeightTrajectory(folder / name)
    trajectory.verify()
    for key in ("num_states", "is_adapter", "base_model", "base_revision", "tied_weights"):
        assert getattr(trajectory, key) == expected[key]
    newer = {"tail_states": 0, "kind": "nested", "branch_from": "state-0"}
    assert (trajectory.schedule and trajectory.schedule.to_dict()) == (
        expected["schedule"] and expected["schedule"] | newer
    )
    assert [path.name for path in trajectory.model_files] == expected["model_files"]
    for state, of_state in zip(trajectory.states, expected["states"], strict=True):
        for key, value in of_state.items():
            assert ([file.path for file in state.files] if key == "files" else getattr(state, key)) == value
    assert trajectory.names == sorted(expected["tensors"])
    for tensor, of_tensor in expected["tensors"].items():
        shape, dtype, role = trajectory.shape(tensor), trajectory.dtype(tensor), trajectory.roles[tensor]
        assert (list(shape), str(dtype)) == (of_tensor["shape"], of_tensor["dtype"])
        assert role.role == of_tensor["role"]
        assert role.is_batch_norm == ("BatchNorm" in of_tensor["reason"])
        sums = trajectory.history(tensor).double().reshape(trajectory.num_states, -1).sum(1).tolist()
        assert sums == pytest.approx(of_tensor["history_sums"], rel=1e-9, abs=1e-9)


def test_states_are_loaded_with_tensors_that_are_stored_once(folder):
    trajectory = WeightTrajectory(folder / "trajectory")
    stored = load_file(folder / "trajectory/state-0/model.safetensors")[FROZEN]
    assert trajectory.is_unchanged(FROZEN)
    for model in (
        trajectory.load_model(2),
        AutoModelForImageClassification.from_pretrained(folder / "trajectory", subfolder="state-2"),
    ):
        assert torch.equal(model.state_dict()[FROZEN], stored)
    WeightTrajectory(folder / "tied_trajectory").load_model(1)


def test_adapters_are_loaded(folder):
    trajectory = WeightTrajectory(folder / "adapter_trajectory")
    base = BertForSequenceClassification(BertConfig(**EXPECTED["adapter_base"]))
    state_dict = trajectory.load_model(2, base_model=base).state_dict()
    for name in (name for name in trajectory.names if "lora_" in name):
        assert torch.equal(state_dict[name.replace(".weight", ".default.weight")], trajectory.tensor(name, 2))


def test_an_enhanced_checkpoint(folder, tmp_path):
    check_tensors(folder / "enhanced", EXPECTED["enhanced"])
    AutoModelForImageClassification.from_pretrained(folder / "enhanced")
    again = predict_overflowed_weights(folder / "trajectory", predictor="average", output_dir=tmp_path / "again")
    check_tensors(again.path, EXPECTED["enhanced"])


def test_known_weights(folder, tmp_path):
    expected = EXPECTED["known"]
    history = torch.tensor(expected["history"])
    for known in (KNOWNModel.from_pretrained(folder / "known"), AutoModel.from_pretrained(folder / "known")):
        assert {key: getattr(known.config, key) for key in expected["config"]} == expected["config"]
        for role, residual in expected["residuals"].items():
            with torch.no_grad():
                assert known(history, role).residual.tolist() == pytest.approx(residual, abs=1e-6)
    for kernel in ("eager", "auto"):
        result = predict_overflowed_weights(
            folder / "trajectory", folder / "known", steps=2, kernel=kernel, output_dir=tmp_path / kernel, card=False
        )
        check_tensors(result.path, expected["two_steps_from_trajectory"])


def test_a_finished_comparison_folder_is_read_without_running_a_cell(folder):
    from comparison_task import OPTIONS, make_task, refuse_to_evaluate

    output_dir = folder / "comparison"
    old = json.loads((output_dir / "report.json").read_text(encoding="utf-8"))
    set_versions(output_dir)
    cells = {path.name: path.read_bytes() for path in (output_dir / "cells").iterdir()}
    (output_dir / "report.json").unlink()
    compare_arms(replace(make_task(folder), evaluate=refuse_to_evaluate), output_dir, pages=False, **OPTIONS)
    new = json.loads((output_dir / "report.json").read_text(encoding="utf-8"))
    assert {path.name: path.read_bytes() for path in (output_dir / "cells").iterdir()} == cells
    assert new["cells"] == old["cells"] and new["trajectories"] == old["trajectories"]
    assert new["states"] == EXPECTED["comparison"]["states"]
    for result, expected in zip(new["results"], EXPECTED["comparison"]["means"], strict=True):
        assert (result["protocol"], result["measure"]["name"]) == (expected["protocol"], expected["measure"])
        for arm, values in expected["arms"].items():
            assert result["arms"][arm]["mean"] == pytest.approx(values["mean"])
            assert result["arms"][arm]["per_seed"] == pytest.approx(values["per_seed"])
    with pytest.raises(ValueError, match=r"different versions: .*0\.1\.0"):  # later results are not mixed with them
        compare_arms(make_task(folder), output_dir, pages=False, **{**OPTIONS, "arms": (*OPTIONS["arms"], "random")})


def set_versions(output_dir, **versions):
    """Write the installed versions of the other libraries, as the fixtures name those that wrote them."""
    path = output_dir / "identity.json"
    identity = json.loads(path.read_text(encoding="utf-8"))
    identity["versions"] |= {name: version(name) for name in identity["versions"] if name != "know_hf"} | versions
    identity["device"] = "cpu"
    if torch.accelerator.is_available():
        identity["device"] = torch.accelerator.current_accelerator().type
    path.write_text(json.dumps(identity), encoding="utf-8")


def test_results_of_other_versions_are_not_mixed(folder):
    from comparison_task import OPTIONS, make_task

    set_versions(folder / "comparison", torch="1.0")
    with pytest.raises(ValueError, match=r"versions.*1\.0"):
        compare_arms(make_task(folder), folder / "comparison", pages=False, **OPTIONS)


def test_pages_of_an_old_report(folder):
    from know_hf.evaluation.report.pages import write_report

    files = write_report(folder / "comparison", folder / "pages")
    assert "known-step-1" in files.markdown.read_text(encoding="utf-8")
