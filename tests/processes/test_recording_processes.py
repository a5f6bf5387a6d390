"""Two processes on a CPU record what one process records, the first one writes, and an error ends both."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NUM_EXAMPLES, make_trainer
from doubles.small_trainers import BALANCED, PEFT_WARNING, SCHEDULE, TARGETS, adapt, hashes, make_case
from doubles.task_fixtures import make_texts, write_bert, write_dataset
from peft import PeftModel
from processes.sharded_recordings import HALVES, WITH_TAIL
from transformers import LlamaForCausalLM

from know_hf import WeightTrajectory, induce_forgetting
from know_hf.model_tensors import names_on_disk
from know_hf.trajectory.manifest import Manifest

WORKER = Path(__file__).with_name("processes_worker.py")
CONFIG = WORKER.parents[2] / "recipes/accelerate_configs/cpu_2.yaml"
pytestmark = PEFT_WARNING


@dataclass
class Launched:
    root: Path
    code: int
    output: str
    notes: list[dict[str, Any]]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """The one run that all tests look at; a process that waits forever fails them by the timeout."""
    root = tmp_path_factory.mktemp("processes")
    (root / "file").touch()
    for name, write in (("model", write_bert), ("dataset", lambda folder: write_dataset(folder, make_texts))):
        (root / name).mkdir()
        write(root / name)
    path = os.pathsep.join([str(WORKER.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(root)],
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": path,
            "HF_DATASETS_CACHE": str(root / "cache"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    notes = [root / f"rank-{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in notes), done.stdout
    return Launched(root, done.returncode, done.stdout, [json.loads(path.read_text()) for path in notes])


def assert_same_form(ours: WeightTrajectory, theirs: WeightTrajectory) -> None:
    """Files, names, roles and shapes agree; the values differ by rounding and batch order."""
    ours.verify()
    assert hashes(ours.path).keys() == hashes(theirs.path).keys()
    assert (ours.names, ours.roles, ours.tied_weights) == (theirs.names, theirs.roles, theirs.tied_weights)
    for name in theirs.names:
        assert (ours.shape(name), ours.dtype(name)) == (theirs.shape(name), theirs.dtype(name))


def test_two_processes_record_what_one_records(launched, tmp_path):
    assert [(n["num_processes"], n["distributed_type"]) for n in launched.notes] == [(2, "MULTI_CPU")] * 2
    trajectory = WeightTrajectory(launched.root / "trajectory")
    alone = induce_forgetting(make_trainer(tmp_path / "out"), BALANCED, tmp_path / "alone")
    assert_same_form(trajectory, alone)
    for ours, theirs in zip(trajectory.states, alone.states, strict=True):
        assert ours.num_examples == theirs.num_examples
        assert ours.subset_fingerprint == theirs.subset_fingerprint
        assert ours.metrics.keys() == theirs.metrics.keys()
        assert ours.steps == theirs.steps // 2  # two batches per step
    assert trajectory.states[0].num_examples == NUM_EXAMPLES
    weight = trajectory.tensor("classifier.1.weight", 0)
    for notes in launched.notes:
        assert notes["num_states"] == 3
        assert torch.equal(torch.tensor(notes["weight"]), weight.flatten())


def test_the_recipe_runs_in_the_launched_processes(launched):
    assert [notes["recipe"] for notes in launched.notes] == [0, 0]
    trajectory = WeightTrajectory(launched.root / "output_dir/trajectory")
    trajectory.verify()
    # 32 examples in batches of 8 per process
    assert [(state.num_examples, state.steps) for state in trajectory.states] == [(32, 2), (16, 1)]


def test_only_the_first_process_writes(launched):
    first, second = launched.notes
    assert second["written"] == second["written_again"] == []
    assert any("trajectory.json" in name for name in first["written"])
    assert set(first["written_again"]) <= {".lock"}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_other_trainers_and_models_are_recorded_completely(launched, tmp_path, name, kind):
    trainer = make_case(name, tmp_path)
    model = adapt(trainer, name).model if kind == "lora" else trainer.model
    trajectory = WeightTrajectory(launched.root / f"{name}-{kind}")
    trajectory.verify()
    size = len(trainer.train_dataset)
    assert [state.num_examples for state in trajectory.states] == [size, size // 2]
    assert set(trajectory.names) | set(trajectory.tied_weights) == set(names_on_disk(model).values())
    moved = [tensor for tensor in trajectory.names if not torch.equal(*trajectory.history(tensor))]
    assert len(moved) > len(trajectory.names) / 2


def test_an_error_of_the_first_process_is_raised_on_all(launched):
    for note, expected in (
        ("bad_folder", "NotADirectoryError"),
        ("diverged", r"TrajectoryError: tensor '.*' contains NaN .*state 0"),
    ):
        first, second = (notes[note] for notes in launched.notes)
        assert re.match(expected, first)
        assert second.startswith("RuntimeError") and first in second


@pytest.mark.parametrize(
    ("complete", "resumed"),
    [
        ("trajectory", "interrupted"),
        ("sharded", "sharded_interrupted"),
        ("sharded_lora", "sharded_lora_interrupted"),
    ],
)
def test_an_interrupted_recording_resumes_to_the_same_bytes(launched, complete, resumed):
    assert hashes(launched.root / resumed) == hashes(launched.root / complete)


@pytest.mark.parametrize("name", ["sharded", "sharded_lora"])
def test_sharded_weights_are_recorded_completely(launched, tmp_path, name):
    """FSDP2: each process holds a part of every weight."""
    model = {"sharded": "FSDPLlamaForCausalLM", "sharded_lora": "FSDPPeftModel"}[name]
    expected = {"distributed_type": "FSDP", "model": model, "num_states": 3, "holds_state_0": True}
    assert [notes[name] for notes in launched.notes] == [expected] * 2
    assert_records_what_one_process_records(launched.root, name, tmp_path)


def assert_records_what_one_process_records(root: Path, name: str, folder: Path) -> None:
    """The batches are the same, each split over the processes: only rounding and Adam's epsilon differ."""
    lora = name.endswith("lora")
    trajectory, trainer = WeightTrajectory(root / name), make_case("llama", folder)
    alone = induce_forgetting(adapt(trainer, "llama") if lora else trainer, WITH_TAIL, folder / "trajectory")
    assert_same_form(trajectory, alone)
    assert [state.steps for state in (*trajectory.states, *trajectory.tail)] == [4, 2, 1, 2]
    assert [state.steps for state in trajectory.states] == [state.steps for state in alone.states]
    close = {"rtol": 0, "atol": 2e-3}
    for tensor in alone.names:
        torch.testing.assert_close(trajectory.history(tensor), alone.history(tensor), **close)
        for snapshot in ("start", "tail-0"):
            torch.testing.assert_close(trajectory.tensor(tensor, snapshot), alone.tensor(tensor, snapshot), **close)
    assert not any(torch.equal(*trajectory.history(tensor)[:2]) for tensor in trajectory.names)
    if lora:
        assert Manifest.read(trajectory.path).base_fingerprint == Manifest.read(alone.path).base_fingerprint
        assert isinstance(trajectory.load_model(base_model=make_case("llama", folder).model), PeftModel)
    else:
        assert trajectory.tied_weights == {"lm_head.weight": "model.embed_tokens.weight"}
        assert isinstance(trajectory.load_model(), LlamaForCausalLM)


def test_branches_are_those_of_one_process(launched, tmp_path):
    assert_branches_of_one_process(launched.root / "branches", tmp_path)


def assert_branches_of_one_process(folder: Path, tmp_path: Path) -> None:
    branches = WeightTrajectory(folder)
    alone = induce_forgetting(make_case("llama", tmp_path / "out"), HALVES, tmp_path / "branches-alone")
    for name in alone.names:
        for branch in ("branch-0", "branch-1"):
            close = {"rtol": 0, "atol": 2e-3}
            torch.testing.assert_close(branches.tensor(name, branch), alone.tensor(name, branch), **close)


def test_the_callback_alone_records_sharded_weights_that_all_move(launched):
    trajectory = WeightTrajectory(launched.root / "sharded_loop")
    trajectory.verify()
    assert trajectory.num_states == SCHEDULE.num_states
    for name in trajectory.names:
        history = trajectory.history(name)
        assert all(not torch.equal(before, after) for before, after in pairwise(history)), name


def test_the_callback_alone_and_a_model_that_is_evaluated_before_its_first_training(launched):
    first, second = launched.notes
    assert first["loop"] == second["loop"]
    assert WeightTrajectory(launched.root / "loop").num_states == SCHEDULE.num_states
    for notes in launched.notes:
        assert re.search(r"Llama.* evaluated before .* DDP.* Trainer\(callbacks=", notes["evaluated_first"])
    assert not WeightTrajectory.exists(launched.root / "evaluated_first")


def test_an_error_of_another_process_ends_both(launched):
    assert launched.code != 0
    assert "rank 1 fails" in launched.output
    trajectory = WeightTrajectory(launched.root / "failed")
    assert trajectory.num_states == 1
    trajectory.verify()
    assert not list(trajectory.path.rglob("*.partial*"))
