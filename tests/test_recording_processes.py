"""Two processes with DDP on a CPU record what one process records, only the first writes, and none is left waiting."""

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
from processes_worker import SCHEDULE
from test_recording_models import CASES, hashes, llama
from test_recording_models import SCHEDULE as SHARDED_SCHEDULE
from test_recording_peft import PEFT_WARNING, TARGETS, adapt, make_adapter
from transformers import LlamaForCausalLM, set_seed

from know_hf import WeightTrajectory, induce_forgetting
from know_hf.model_tensors import names_on_disk

TESTS = Path(__file__).parent
pytestmark = PEFT_WARNING


@dataclass
class Launched:
    root: Path
    code: int
    output: str
    notes: list[dict[str, Any]]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """The one run that all tests look at; a process that waits for ever fails them by the timeout."""
    root = tmp_path_factory.mktemp("processes")
    (root / "file").touch()
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(TESTS / "processes_worker.py"), str(root)],
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )  # fmt: skip
    notes = [root / f"rank-{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in notes), done.stdout
    return Launched(root, done.returncode, done.stdout, [json.loads(path.read_text()) for path in notes])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> WeightTrajectory:
    folder = tmp_path_factory.mktemp("alone")
    return induce_forgetting(make_trainer(folder / "out"), SCHEDULE, folder / "trajectory")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_two_processes_ran(launched):
    assert [notes["num_processes"] for notes in launched.notes] == [2, 2]
    assert [notes["distributed_type"] for notes in launched.notes] == ["MULTI_CPU", "MULTI_CPU"]


def test_the_trajectory_has_the_form_of_one_process(launched, alone):
    trajectory = WeightTrajectory(launched.root / "trajectory")
    trajectory.verify()
    assert files(trajectory.path) == files(alone.path)
    assert trajectory.names == alone.names
    assert trajectory.roles == alone.roles
    for name in alone.names:
        assert (trajectory.shape(name), trajectory.dtype(name)) == (alone.shape(name), alone.dtype(name))
    for ours, theirs in zip(trajectory.states, alone.states, strict=True):
        assert ours.num_examples == theirs.num_examples
        assert ours.subset_fingerprint == theirs.subset_fingerprint
        assert ours.metrics.keys() == theirs.metrics.keys()
        assert ours.steps == theirs.steps // 2  # two batches a step
    assert trajectory.states[0].num_examples == NUM_EXAMPLES


def test_only_the_first_process_writes(launched):
    first, second = launched.notes
    assert second["written"] == second["written_again"] == []
    assert ".trajectory.json.partial" in first["written"]
    assert set(first["written_again"]) <= {".lock"}


def test_every_process_ends_with_the_full_data_state(launched):
    weight = WeightTrajectory(launched.root / "trajectory").tensor("classifier.1.weight", 0)
    for notes in launched.notes:
        assert notes["num_states"] == 3
        assert torch.equal(torch.tensor(notes["weight"]), weight.flatten())


def test_an_adapter_is_recorded_as_by_one_process(launched, tmp_path):
    trainer = make_trainer(tmp_path / "out", make_adapter("lora"))
    alone, together = (
        induce_forgetting(trainer, SCHEDULE, tmp_path / "alone"),
        WeightTrajectory(launched.root / "adapter"),
    )
    assert [notes["adapter_states"] for notes in launched.notes] == [3, 3]
    together.verify()
    assert (together.names, together.roles) == (alone.names, alone.roles)
    assert files(together.path) == files(alone.path)
    assert not torch.equal(together.history(alone.names[0])[0], together.history(alone.names[0])[-1])


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_other_trainers_and_models_are_recorded_whole(launched, tmp_path, name, kind):
    set_seed(0)
    trainer = CASES[name][0](tmp_path)
    model = adapt(trainer).model if kind == "lora" else trainer.model
    trajectory = WeightTrajectory(launched.root / f"{name}-{kind}")
    trajectory.verify()
    assert [state.num_examples for state in trajectory.states] == [32, 16]
    assert set(trajectory.names) | set(trajectory.tied_weights) == set(names_on_disk(model).values())
    moved = [tensor for tensor in trajectory.names if not torch.equal(*trajectory.history(tensor))]
    assert len(moved) > len(trajectory.names) / 2


def test_an_error_of_the_first_process_comes_out_on_all(launched):
    first, second = (notes["bad_folder"] for notes in launched.notes)
    assert first.startswith("NotADirectoryError")
    assert second == f"RuntimeError: the main process failed with {first}"
    first, second = (notes["diverged"] for notes in launched.notes)
    assert re.match(r"TrajectoryError: tensor '.*' is not finite at the end of the training of state 0", first)
    assert second == f"RuntimeError: the main process failed with {first}"


@pytest.mark.parametrize(("whole", "resumed"), [("trajectory", "interrupted"), ("sharded", "sharded_interrupted")])
def test_an_interrupted_recording_goes_on_to_the_same_bytes(launched, whole, resumed):
    assert hashes(launched.root / resumed) == hashes(launched.root / whole)


def test_sharded_weights_are_recorded_whole(launched, tmp_path):
    """FSDP2: each process holds a part of every weight."""
    assert [notes["sharded"] for notes in launched.notes] == [
        {"distributed_type": "FSDP", "model": "FSDPLlamaForCausalLM", "num_states": 3}
    ] * 2
    trajectory = WeightTrajectory(launched.root / "sharded")
    trajectory.verify()
    set_seed(0)
    whole = induce_forgetting(llama(tmp_path), SHARDED_SCHEDULE, tmp_path / "trajectory")
    assert files(trajectory.path) == files(whole.path)
    assert trajectory.roles == whole.roles
    assert trajectory.tied_weights == whole.tied_weights == {"lm_head.weight": "model.embed_tokens.weight"}
    for name in whole.names:
        assert (trajectory.shape(name), trajectory.dtype(name)) == (whole.shape(name), whole.dtype(name))
        # the same batches, each split in two, so that only rounding and Adam's epsilon differ
        torch.testing.assert_close(trajectory.history(name), whole.history(name), rtol=0, atol=2e-3)
    assert [state.steps for state in trajectory.states] == [state.steps for state in whole.states]
    assert isinstance(trajectory.load_model(), LlamaForCausalLM)


def test_the_callback_alone_records_sharded_weights_that_all_move(launched):
    trajectory = WeightTrajectory(launched.root / "sharded_loop")
    trajectory.verify()
    assert trajectory.num_states == SHARDED_SCHEDULE.num_states
    for name in trajectory.names:
        history = trajectory.history(name)
        assert all(not torch.equal(before, after) for before, after in pairwise(history)), name


def test_when_another_process_fails_none_is_left_waiting(launched):
    assert launched.code != 0
    assert "rank 1 fails on purpose" in launched.output
    trajectory = WeightTrajectory(launched.root / "failed")
    assert trajectory.num_states == 1
    trajectory.verify()
    assert not [name for name in files(trajectory.path) if name.endswith(".partial")]
