"""`write_checkpoint`, and that pieces, shards and processes do not change what is written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import edit_manifest, make_resnet, rewrite_state
from doubles.constant_predictor import Constant, weights
from doubles.small_trainers import hashes
from processes.prediction_worker import labelled_images, size_of_the_first_bias
from safetensors.torch import load_file
from test_predict import BIAS, CONV, FC
from torch import nn

from know_hf import WeightTrajectory, plan_prediction, predict_overflowed_weights
from know_hf.checkpoint import file_sha256
from know_hf.prediction import SHIPPED_KNOWN, Gate, StateTensors, WriteOptions, pieces, write_checkpoint
from know_hf.prediction.engine import PredictedTensors
from know_hf.prediction.pieces import split_pieces
from know_hf.trajectory import TrajectoryError

TESTS = Path(__file__).parent


def run(*arguments, **environment):
    """Run Python in another process with one thread and return it with its output."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("size", [7, 64, 1000])
@pytest.mark.parametrize("predictor", ["known", "task_vector", "linear", "log", "average", "ema", "shrink", "lines"])
def test_the_size_of_a_piece_changes_nothing(trajectory, tmp_path, monkeypatch, size, predictor):
    options = {"predictor": predictor, "steps": 2, "card": False}
    predict_overflowed_weights(trajectory, output_dir=tmp_path / "whole", **options)
    monkeypatch.setattr(pieces, "PIECE_SIZE", size)
    result = predict_overflowed_weights(trajectory, output_dir=tmp_path / "pieces", **options)
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "pieces")
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=2e-7, msg=name)
    assert (result.report["fc"].tensors, result.report["fc"].parameters) == (2, 4 * 16 + 16 * 8)


def test_processes_share_pieces_of_about_the_same_cost(trajectory, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_SIZE", 100)
    plan = plan_prediction(trajectory, steps=2)
    cost = PredictedTensors(plan).cost
    whole = split_pieces(plan.specs, cost)
    for parts in (2, 3, 7):
        shares = [split_pieces(plan.specs, cost, part, parts) for part in range(parts)]
        assert [piece for share in shares for piece in share] == whole
        sizes = [sum(p.stop - p.start for p in share if plan.tensors[p.name].network) for share in shares]
        assert max(sizes) - min(sizes) <= 200
    ends = dict.fromkeys(plan.tensors, 0)
    for piece in whole:
        assert piece.start == ends[piece.name]
        ends[piece.name] = piece.stop
    assert ends == {name: tensor.spec.shape.numel() for name, tensor in plan.tensors.items()}


def test_a_tensor_that_changes_only_in_its_last_piece_is_predicted_in_all_pieces(record_states, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_SIZE", 10)
    trajectory = record_states(nn.Linear(8, 8, bias=False), num_states=2)

    def move_last(by):
        def change(tensors):
            tensors["weight"] = load_file(trajectory.path / "state-0/model.safetensors")["weight"].clone()
            tensors["weight"][-1, -1] += by

        rewrite_state(trajectory.path, 1, change)

    move_last(by=1)
    result = predict_overflowed_weights(trajectory.path, predictor=Constant(0.5), output_dir=tmp_path / "out")
    assert torch.equal(weights(tmp_path / "out")["weight"], trajectory.tensor("weight") + 0.5)
    assert result.report["fc"].predicted == 64

    move_last(by=0)
    predictor = Constant(0.5)
    result = predict_overflowed_weights(trajectory.path, predictor=predictor, output_dir=tmp_path / "still")
    assert predictor.calls == [] and result.report["fc"].unchanged == 1 and result.report["fc"].predicted == 0
    assert torch.equal(weights(tmp_path / "still")["weight"], trajectory.tensor("weight"))


def test_a_damaged_file_is_named_even_if_its_values_are_invalid(trajectory_copy, tmp_path):
    path = trajectory_copy / "state-2/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = b"\xff\xff\xff\xff"  # a NaN
    path.write_bytes(content)
    with pytest.raises(TrajectoryError, match=r"state.2"):
        predict_overflowed_weights(trajectory_copy, predictor="shrink", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_disk_errors_leave_nothing(trajectory, tmp_path, monkeypatch):
    def fail(self, name, piece, start=0):
        raise OSError("the disk is gone")

    predictor = Constant(0.5)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"0\.00 GB free"):
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        predict_overflowed_weights(trajectory, predictor=predictor, output_dir=tmp_path / "out")
    assert predictor.calls == [] and list(tmp_path.iterdir()) == []
    monkeypatch.setattr("know_hf.checkpoint.CheckpointWriter.write", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        predict_overflowed_weights(trajectory, predictor=predictor, output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_write_the_bytes_of_one(tmp_path, record_states):
    trajectory = record_states(make_resnet(), name="trajectory")

    def hashes(folder):
        files = {path.name: file_sha256(path) for path in (tmp_path / folder).iterdir()}
        return files | {"README.md": (tmp_path / folder / "README.md").read_text().replace(folder, "out")}

    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run(*launch, TESTS / "processes/prediction_worker.py", tmp_path, ACCELERATE_USE_CPU="1")
    notes = [tmp_path / f"rank-{rank}.json" for rank in range(2)]
    assert all(note.exists() for note in notes), done.stdout
    alone = predict_overflowed_weights(trajectory, steps=2, output_dir=tmp_path / "alone", max_shard_size=5000)
    gate = Gate(size_of_the_first_bias, candidates=[1, "average"])
    gated = predict_overflowed_weights(trajectory, predictor="shrink", output_dir=tmp_path / "gated-alone", gate=gate)
    assert gated.gate.chosen == "Shrink"
    gate = Gate(dataset=labelled_images(), batch_size=2, candidates=[1])
    classified = predict_overflowed_weights(trajectory, predictor="average", output_dir=tmp_path / "none", gate=gate)
    assert classified.gate.metric == "calibrated loss"
    assert hashes("together") == hashes("alone") and len(hashes("alone")) > 3
    assert hashes("gated-together") == hashes("gated-alone")
    errors = ["RuntimeError: process 1 failed with ValueError: rank 1 fails", "ValueError: rank 1 fails"]
    for note, error in zip(notes, errors, strict=True):
        parameters, mean_residual, *decisions, caught = json.loads(note.read_text())
        assert parameters == {role: report.parameters for role, report in alone.report.items()}
        assert mean_residual == pytest.approx(alone.report["conv"].mean_residual)
        assert (decisions, caught) == ([str(gated.gate), str(classified.gate)], error)
    assert not (tmp_path / "failed").exists() and not list(tmp_path.glob(".failed*"))


CAPPED = """
import resource, sys
import torch
from know_hf import WeightTrajectory, predict_overflowed_weights
from know_hf.prediction import plan_prediction
torch.set_num_threads(1)
predict_overflowed_weights(sys.argv[1] + "/small", predictor="linear", output_dir=sys.argv[1] + "/warm")
planned = plan_prediction(sys.argv[1] + "/large", predictor="linear").peak_memory
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
cap = used + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
predict_overflowed_weights(sys.argv[1] + "/large", predictor="linear", output_dir=sys.argv[1] + "/out")
peak = open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]
print("planned / peak =", planned / (1024 * int(peak)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited and measured on Linux only")
def test_memory_does_not_grow_with_the_model(tmp_path, record_states):
    record_states(nn.Linear(4, 4), num_states=2, name="small")
    model = nn.Sequential(*(nn.Linear(4000, 4000, bias=False) for _ in range(3))).to(torch.bfloat16)
    trajectory = record_states(model, num_states=2, name="large")
    cap = plan_prediction(trajectory, predictor="linear").memory + 30 * 10**6  # stacks of three threads
    assert trajectory.states[0].files[-1].size > cap
    done = run("-c", CAPPED, tmp_path, cap, MALLOC_ARENA_MAX="2")
    assert done.returncode == 0, done.stdout
    assert 0.8 < float(done.stdout.rpartition("=")[2]) < 1.2
    expected = (2 * trajectory.tensor("1.weight").float() - trajectory.tensor("1.weight", 1).float()).bfloat16()
    torch.testing.assert_close(weights(tmp_path / "out")["1.weight"], expected, rtol=0.01, atol=1e-6)


def test_the_plan_describes_the_prediction(trajectory, tmp_path):
    plan = plan_prediction(trajectory, steps=2)
    assert plan.predicted == sum(
        trajectory.shape(name).numel() for name, r in trajectory.roles.items() if r.role in ("conv", "fc", "bias")
    )
    result = predict_overflowed_weights(trajectory, steps=2, output_dir=tmp_path / "out", card=False)
    assert plan.disk == sum(path.stat().st_size for path in result.path.iterdir())
    plan.evaluates = True
    assert plan.peak_memory == plan.process_memory + plan.memory + plan.tensor_bytes
    assert "for the model of the gate" in str(plan)
    assert plan.seconds > 0 and plan_prediction(trajectory, predictor="lines").seconds > 0
    lines = str(plan).splitlines()
    assert lines[0].split() == ["role", "tensors", "parameters", "action"]
    assert "fc              2            192  predicted as fc" in lines
    assert "norm           12            144  copied" in lines
    text = str(plan_prediction(trajectory, predictor="shrink", norm="predict", estimate_time=False))
    assert "norm           12            144  predicted as bias" in text and "time" not in text


def test_a_function_of_pieces_is_written(trajectory, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_SIZE", 50)

    def halved(name, start, stop):
        return 0.5 * trajectory.read(name, start, stop) if name in (CONV, FC) else None

    options = WriteOptions(dtype=torch.bfloat16, max_shard_size=5000)
    reports = write_checkpoint(trajectory, halved, tmp_path / "out", options)
    written = weights(tmp_path / "out")
    assert torch.equal(written[CONV], (0.5 * trajectory.tensor(CONV)).bfloat16())
    others = [name for name in trajectory.names if name not in (CONV, FC) and written[name].is_floating_point()]
    assert all(torch.equal(written[name], trajectory.tensor(name).bfloat16()) for name in others)
    assert sum(report.parameters for report in reports.values()) == sum(t.numel() for t in written.values())
    with pytest.raises(ValueError, match=f"returned 1 values.*{BIAS}"):
        write_checkpoint(trajectory, lambda name, *_: torch.zeros(1) if name == BIAS else None, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("state", [0, 3])
def test_a_state_is_written_bit_for_bit_and_finished_before_it_appears(trajectory, tmp_path, state):
    def finish(folder, reports):
        assert not (tmp_path / "out").exists() and reports.keys() == set(trajectory.names)
        (folder / "note.txt").write_text("finished")

    write_checkpoint(trajectory, StateTensors(trajectory, state), tmp_path / "out", finish=finish)
    recorded = (trajectory.path / f"state-{state}/model.safetensors").read_bytes()
    assert (tmp_path / "out/model.safetensors").read_bytes() == recorded
    assert (tmp_path / "out/note.txt").exists()
    with pytest.raises(ValueError, match="state 5"):
        StateTensors(trajectory, 5)


@pytest.mark.parametrize("overwrite", [True, False])
def test_inputs_and_trajectories_are_no_output(trajectory_copy, tmp_path, overwrite):
    known = shutil.copytree(SHIPPED_KNOWN, tmp_path / "known")
    (tmp_path / "base").mkdir()
    edit_manifest(trajectory_copy, lambda content: content.update(base_model="../base"))
    shutil.copytree(trajectory_copy, tmp_path / "other")
    before = hashes(tmp_path)
    for name in (
        "",
        "trajectory",
        "trajectory/state-0",
        "trajectory/sub/out",
        "known",
        "known/out",
        "base",
        "base/out",
    ):
        with pytest.raises(ValueError, match=r"input "):
            predict_overflowed_weights(trajectory_copy, known, output_dir=tmp_path / name, overwrite=overwrite)
    for name in ("other/state-0", "other/out", *(["other"] if overwrite else [])):
        with pytest.raises(ValueError, match=r"trajectory .*other"):
            predict_overflowed_weights(trajectory_copy, known, output_dir=tmp_path / name, overwrite=overwrite)
    assert hashes(tmp_path) == before


def test_the_base_model_of_a_gate_is_no_output(trajectory, tmp_path):
    base = make_resnet()
    base.config.name_or_path = str(tmp_path)
    gate = Gate(lambda model: [0.0] * 10, base_model=base)
    with pytest.raises(ValueError, match="input"):
        predict_overflowed_weights(trajectory, predictor="shrink", gate=gate, output_dir=tmp_path / "out")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_permissions_are_those_of_the_umask(trajectory_copy, tmp_path, umask, mode):
    (trajectory_copy / "config.json").chmod(0o600)
    before = os.umask(umask)
    try:
        batches = [{"pixel_values": torch.randn(4, 1, 8, 8)}]  # BatchNorm statistics are written with safetensors
        result = predict_overflowed_weights(
            trajectory_copy, output_dir=tmp_path / "out", recalibrate_with=batches, max_shard_size=2000
        )
        states = WeightTrajectory.create(tmp_path / "states")
        states.record(make_resnet(), num_examples=1, steps=1)
    finally:
        os.umask(before)
    for folder in (result.path, states.path):
        assert {path.stat().st_mode & 0o777 for path in folder.rglob("*.*") if path.is_file()} == {mode}
        assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
