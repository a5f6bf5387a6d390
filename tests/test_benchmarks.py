"""recipes/benchmarks: help without imports, tiny runs, and counts."""

import json
import os
import pickle
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from doubles.toy_trajectories import record_lines
from torch.utils.flop_counter import FlopCounterMode

from know_hf import KNOWNConfig, KNOWNModel, TransitionDataset

FOLDER = Path(__file__).parents[1] / "recipes" / "benchmarks"
MODULES = (
    "prediction",
    "contestants",
    "trajectories",
    "memory",
    "meta_training",
    "comparison",
    "one_by_one",
    "many_tensors",
    "gpu",
    "recording",
)


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The scripts are imported under their short names, and forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        yield
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def prediction(scripts):
    return import_module("prediction")


@pytest.fixture
def meta_training(scripts):
    return import_module("meta_training")


def test_help_needs_no_torch():
    for name in ("prediction", "meta_training", "recording", "comparison", "many_tensors", "gpu"):
        program = (
            "import runpy, sys\n"
            f"sys.path.insert(0, {str(FOLDER)!r})\n"
            f"runpy.run_path({str(FOLDER / name) + '.py'!r})['make_parser']().format_help()\n"
            "assert not {'torch', 'transformers', 'numpy', 'tensorflow', 'know_hf'} & set(sys.modules)\n"
        )
        subprocess.run([sys.executable, "-"], input=program, text=True, check=True)


class InThisProcess:
    """Replaces `contestants.Contestant` where starting processes would take long."""

    def __init__(self, prepare, *arguments):
        self.failure, self.details, self.properties = None, "", {}
        try:
            self.run, self.properties = prepare(*pickle.loads(pickle.dumps(arguments)))
        except ValueError as error:
            self.failure, self.run = str(error), dict

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def test_prediction(prediction, tmp_path, monkeypatch, capsys):
    numbers, disk = tmp_path / "numbers.json", tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr(prediction, "Contestant", InThisProcess)
    monkeypatch.setattr(prediction, "find_spec", lambda name: None)
    monkeypatch.setattr(prediction.os, "environ", dict(os.environ))
    command = ["--sizes", "tiny", "--kernels", "eager", "unknown", "--peers", "graph", "--rows", "2048"]
    command += ["--seconds", "0", "--repetitions", "1", "--threads", "1"]
    command += ["--predict-with", "auto", "linear", "--plot", str(tmp_path / "plot.svg")]
    command += ["--output-dir", str(disk), "--json", str(numbers)]
    prediction.main(prediction.make_parser().parse_args(command))
    results = json.loads(numbers.read_text())
    eager, (end_to_end, linear) = results["function"]["eager"], results["end_to_end"]
    assert eager["difference"] < 5e-7
    assert eager["flops_per_second"] == pytest.approx(results["flops"]["published"] / eager["seconds"])
    assert "unknown" in results["function"]["unknown"]["not_run"]
    assert results["function"]["graph"] == {"not_run": "tensorflow is not installed"}
    assert end_to_end["runs"] == 1
    assert end_to_end["written_bytes"] > 4 * end_to_end["parameters"] > 4 * 5_000
    printed = capsys.readouterr().out
    assert f"| eager | {eager['seconds']:.2e} (" in printed
    assert "| peer: Keras graph | not run: tensorflow is not installed |" in printed
    assert f"| tiny ResNet | auto | {end_to_end['parameters']:,} | float32 |" in printed
    for row in (end_to_end, linear):
        assert 0.8 < row["planned_peak_bytes"] / row["peak_bytes"] < 1.2
    assert "CPU nanoseconds per weight" in (tmp_path / "plot.svg").read_text()
    assert not list(disk.iterdir())
    prediction.main(prediction.make_parser().parse_args(command))
    assert json.loads(numbers.read_text())["end_to_end"] == [end_to_end, linear]  # not repeated


def test_many_tensors(scripts, tmp_path, monkeypatch, capsys):
    many_tensors = import_module("many_tensors")
    monkeypatch.setattr(many_tensors, "Contestant", InThisProcess)
    monkeypatch.setattr(many_tensors.os, "environ", dict(os.environ))
    numbers, disk = tmp_path / "numbers.json", tmp_path / "disk"
    disk.mkdir()
    command = ["--tensors", "3", "--side", "2", "--repetitions", "1", "--threads", "1"]
    command += ["--output-dir", str(disk), "--json", str(numbers)]
    many_tensors.main(many_tensors.make_parser().parse_args(command))
    results = json.loads(numbers.read_text())
    assert results["parameters"] == 12
    seconds = results["seconds"]["predict"]
    assert results["ratios"]["predict"] == pytest.approx(seconds["many"] / seconds["one"])
    assert f"| predict | {seconds['many']:.2f} | {seconds['one']:.2f} |" in capsys.readouterr().out
    assert not list(disk.iterdir())


def test_contestants_report_failures(prediction):
    with prediction.Contestant(divmod, 1, 0) as contestant:
        assert contestant.failure == "integer division or modulo by zero"
        assert "Traceback" in contestant.details
        assert contestant.run() == {}
    with prediction.Contestant(os._exit, 3) as contestant:
        assert contestant.failure == "its process ended with code 3"


@pytest.mark.skipif(find_spec("tensorflow") is None, reason="needs tensorflow")
@pytest.mark.parametrize("mode", ["graph", "predict", "xla"])
def test_peer_computes_the_same_function(prediction, tmp_path, mode):
    contestants = import_module("contestants")
    contestants.prepare_inputs(tmp_path, None, 1000, 1, [], tmp_path)
    with prediction.Contestant(contestants.prepare_peer, mode, tmp_path, 256, 1, 0) as peer:
        assert peer.failure is None, peer.details
        assert peer.properties["difference"] < 5e-7
        assert peer.run()["seconds"] > 0


def test_sizes_are_those_of_the_models():
    plan = import_module("trajectories").plan
    assert plan("resnet18")["parameters"] == 11_689_512
    assert plan("bert")["parameters"] == 109_482_240
    billion = plan("1b")
    assert billion["parameters"] == 1_235_814_400
    assert billion["disk_bytes"] == 3 * 2 * billion["parameters"]  # two states and the prediction, bfloat16


def test_flops(prediction):
    config = KNOWNConfig()
    with FlopCounterMode(display=False) as counter:
        KNOWNModel(config)(history=torch.zeros(1, 5), role="fc")
    layers = counter.get_total_flops()
    others = 4 + 2 * (8 + 3 * 64 + 32) + 1  # differences; relu, products and sum of TrAct, leaky relu; tanh
    assert prediction.flops(config.to_dict(), folded=False) == layers + others
    saved = 2 * (2 * 64 * 8 + 2 * 8 * 64 + 64 - 2 * 8 * 32 - 32) - 2 * (5 + 4) * 8
    assert prediction.flops(config.to_dict(), folded=True) == layers + others - saved


def test_meta_training(meta_training, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(meta_training.SIZES, "small", (8, 3))
    flags = ["--sizes", "small", "--processes", "--repetitions", "1", "--seconds", "0.01", "--batch-size", "64"]
    flags += ["--output-dir", str(tmp_path), "--json", str(tmp_path / "results.json")]
    meta_training.main(meta_training.make_parser().parse_args(flags))
    seconds = json.loads((tmp_path / "results.json").read_text())["sizes"]["small"]["seconds"]
    assert list(seconds) == ["network", "network in bfloat16", *meta_training.READERS]
    printed = capsys.readouterr().out
    assert f"| network | {1e3 * seconds['network']:.2f} |" in printed
    rate = 3 * 64 / (seconds["network"] + seconds["mapped"])
    assert f"| transitions per second, mapped | {rate:,.0f} |" in printed
    assert list(tmp_path.iterdir()) == [tmp_path / "results.json"]


def test_table_of_processes(meta_training):
    assert meta_training.processes_table({"processes": {}}) == ""
    times = {1: {"wall": 0.02, "cpu": 0.018}, 2: {"wall": 0.0125, "cpu": 0.012}}
    text = meta_training.processes_table({"processes": times, "cores": 2, "batch_size": 2000})
    assert text.splitlines()[-2:] == [
        "| 1 | 20.0 | 300,000 | 1.00 | 18.0 | 1.00 |",
        "| 2 | 12.5 | 480,000 | 1.60 | 12.0 | 1.50 |",
    ]


def test_full_states_hold_the_same_transitions(meta_training, tmp_path):
    path = record_lines(tmp_path / "net").path
    dataset = TransitionDataset([path], max_per_tensor=None, progress=False)
    batch = next(meta_training.full_states([path], dataset, 32))
    for role in dataset.roles:
        blocks = [dataset.block(block) for block in dataset.blocks if block.role == role]
        rows = {tuple(row.tolist()) for parts in blocks for row in torch.column_stack(parts)}
        drawn = torch.column_stack([batch[role]["history"], batch[role]["labels"]])
        assert {tuple(row.tolist()) for row in drawn} <= rows


SUITE = """
name: tiny
description: Digits.
seeds: 2
inputs: {image_size: 8}
source: {dataset: sklearn/digits, classes: [0, 2, 4], train: 16, validation: 20, test: 20}
target: {dataset: sklearn/digits, classes: [1, 3, 5], train: 12, validation: 20, test: 20}
model: {class_name: SmallCNN, config: {width: 4, num_layers: 1}}
schedule: {ratio: 0.5, num_states: 2}
training: {num_train_epochs: 1, use_cpu: true}
trials_per_rate: 1
protocols:
  - {kind: fine_tuning, learning_rates: [0.01], head_rates: [0.01, 0.1], head_learning_rate: [0.01, 0.1], steps: 2}
  - {kind: linear_probe, learning_rates: [0.1], steps: 5}
  - {kind: zero_shot}
arms: [naive, random]
"""


def test_comparison_measures_the_same_trials_in_both_ways(scripts, tmp_path, capsys, monkeypatch):
    comparison, entries = import_module("comparison"), []
    measure = import_module("know_hf.evaluation.measure")
    monkeypatch.setattr(
        measure, "measure_arm", lambda *args, original=measure.measure_arm, **kw: entries.append(original(*args, **kw))
    )
    (tmp_path / "tiny.yaml").write_text(SUITE)
    flags = [str(tmp_path / "tiny.yaml"), "--arms", "naive", "--repetitions", "1", "--output-dir", str(tmp_path)]
    comparison.main(comparison.make_parser().parse_args([*flags, "--json", str(tmp_path / "numbers.json")]))
    one_by_one, together = (entry["measured"] for entry in entries[-2:])
    for name, (draw,) in together.items():
        assert len(draw["trials"]) == (2 if name == "few-shot" else 1)
        for trial, alone in zip(draw["trials"], one_by_one[name][0]["trials"], strict=True):
            assert trial["test"] == pytest.approx(alone["test"], rel=1e-4)
            assert trial.get("head_learning_rate") == alone.get("head_learning_rate")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    old, new = (numbers["seconds"]["naive"]["all"][path][0] for path in comparison.PATHS)
    assert f"| naive | all | {old:.2f} | {new:.2f} | {old / new:.1f} |" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_gpu_runs_to_the_end_on_a_cpu(scripts, tmp_path, capsys):
    gpu = import_module("gpu")
    gpu.main(gpu.make_parser().parse_args(["--smoke", "--output-dir", str(tmp_path)]))
    table, _, last = capsys.readouterr().out.strip().rpartition("\n")
    results = json.loads(last)
    assert results["kernel"]["folded: seconds per weight"] > 0 and "more than" not in str(results["kernel"])
    assert results["meta-training"] and results["recording"]["parameters"] == 411_136
    assert results["stacked comparison"]["all, together, seconds"] > 0
    assert 0 < results["published protocol"]["naive, linear-probe: accuracy"] <= 1
    assert "| recording | parameters | 411136 |" in table
    assert not list(tmp_path.iterdir())


def test_gpu_lists_the_parts_that_fail(scripts, tmp_path, monkeypatch, capsys):
    gpu = import_module("gpu")
    for part in ("kernel", "meta_training", "recording", "comparison", "published"):
        monkeypatch.setattr(gpu, part, lambda setting: {}["cuda"])
    gpu.main(gpu.make_parser().parse_args(["--smoke", "--output-dir", str(tmp_path)]))
    assert capsys.readouterr().out.count("| not run | KeyError: 'cuda' |") == 5
