"""recipes/benchmarks/prediction.py: its help is instant, it runs as its users run it, and it counts right."""

import json
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from know_hf import KNOWNConfig, KNOWNModel

FOLDER = Path(__file__).parents[1] / "recipes" / "benchmarks"
MODULES = ("prediction", "contestants", "trajectories")


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module; its neighbours' short names are given back afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import prediction

    yield prediction
    for name in MODULES:
        sys.modules.pop(name, None)


def test_help_is_instant():
    code = f"""
import runpy, sys
sys.path.insert(0, {str(FOLDER)!r})
sys.argv = ["prediction.py", "--help"]
try:
    runpy.run_path({str(FOLDER / "prediction.py")!r}, run_name="__main__")
finally:
    assert not {{"torch", "transformers", "numpy", "tensorflow", "know_hf"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--peer-weights" in done.stdout


class InThisProcess:
    """Stands in for `contestants.Contestant` where starting processes would take long."""

    def __init__(self, prepare, *arguments):
        self.failure, self.details, self.facts = None, "", {}
        try:
            self.run, self.facts = prepare(*pickle.loads(pickle.dumps(arguments)))
        except ValueError as error:
            self.failure, self.run = str(error), dict

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def test_a_tiny_run_measures_both_parts_and_leaves_nothing(benchmark, tmp_path, monkeypatch, capsys):
    numbers, disk = tmp_path / "numbers.json", tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr(benchmark, "Contestant", InThisProcess)
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    monkeypatch.setattr(benchmark.os, "environ", dict(os.environ))
    command = ["--sizes", "tiny", "--kernels", "eager", "unknown", "--peers", "graph", "--rows", "2048"]
    command += ["--seconds", "0", "--repetitions", "1", "--threads", "1"]
    benchmark.main(benchmark.make_parser().parse_args([*command, "--output-dir", str(disk), "--json", str(numbers)]))
    results = json.loads(numbers.read_text())
    eager, (whole,) = results["function"]["eager"], results["end_to_end"]
    assert eager["difference"] < 5e-7
    assert eager["flops_per_second"] == pytest.approx(results["flops"]["published"] / eager["seconds"])
    assert "unknown" in results["function"]["unknown"]["not_run"]
    assert results["function"]["graph"] == {"not_run": "tensorflow is not installed"}
    assert whole["runs"] == 1
    assert whole["written_bytes"] > 4 * whole["parameters"] > 4 * 5_000
    printed = capsys.readouterr().out
    assert f"| eager | {eager['seconds']:.2e} (" in printed
    assert "| peer: Keras graph | not run: tensorflow is not installed |" in printed
    assert f"| tiny ResNet | auto | {whole['parameters']:,} | float32 |" in printed
    assert not list(disk.iterdir())


def test_a_contestant_runs_in_a_process_of_its_own_and_tells_why_it_can_not(benchmark):
    with benchmark.Contestant(divmod, 1, 0) as contestant:
        assert contestant.failure == "integer division or modulo by zero"
        assert "Traceback" in contestant.details
        assert contestant.run() == {}
    with benchmark.Contestant(os._exit, 3) as contestant:
        assert contestant.failure == "its process ended with code 3"


@pytest.mark.skipif(find_spec("tensorflow") is None, reason="needs tensorflow")
@pytest.mark.parametrize("mode", ["graph", "predict", "xla"])
def test_the_peer_is_the_same_function(benchmark, tmp_path, mode):
    import contestants

    contestants.prepare_inputs(tmp_path, None, 1000, 1, [], tmp_path)
    with benchmark.Contestant(contestants.prepare_peer, mode, tmp_path, 256, 1, 0) as peer:
        assert peer.failure is None, peer.details
        assert peer.facts["difference"] < 5e-7
        assert peer.run()["seconds"] > 0


def test_sizes_are_those_of_the_models(benchmark):
    from trajectories import plan

    assert plan("resnet18")["parameters"] == 11_689_512
    assert plan("bert")["parameters"] == 109_482_240
    billion = plan("1b")
    assert billion["parameters"] == 1_235_814_400
    assert billion["disk_bytes"] == 6 * 2 * billion["parameters"]  # five states and the prediction, bfloat16


def test_flops_are_those_of_the_layers_and_of_what_is_between_them(benchmark):
    config = KNOWNConfig()
    with FlopCounterMode(display=False) as counter:
        KNOWNModel(config)(history=torch.zeros(1, 5), role="fc")
    layers = counter.get_total_flops()
    between = 4 + 2 * (8 + 3 * 64 + 32) + 1  # differences; relu, the products and the sum of TrAct, leaky relu; tanh
    assert benchmark.flops(config.to_dict(), folded=False) == layers + between
    saved = 2 * (2 * 64 * 8 + 2 * 8 * 64 + 64 - 2 * 8 * 32 - 32) - 2 * (5 + 4) * 8
    assert benchmark.flops(config.to_dict(), folded=True) == layers + between - saved
