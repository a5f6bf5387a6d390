"""Meta-training on two processes, and resumption after a kill at any moment."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
from dataclasses import asdict, dataclass, replace

import pytest
from accelerate.state import AcceleratorState
from doubles.deaths import count_changes
from doubles.toy_trajectories import record_lines

from know_hf import KNOWNConfig, KNOWNModel
from know_hf.meta_learning import (
    BalancedBatchSampler,
    MetaTrainingArguments,
    MetaTrainingResult,
    TransitionDataset,
    meta_train,
    start_processes,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
ARGUMENTS = MetaTrainingArguments(
    steps=60, batch_size=128, learning_rate=3e-3, warmup_steps=10, log_every=20, save_every=20
)
FEW_STEPS = MetaTrainingArguments(steps=12, batch_size=32, warmup_steps=2, log_every=5, save_every=4)


class NotedDataset(TransitionDataset):
    """Dataset that notes the items of every batch, and can kill its process before one is read."""

    kill_at: int | None = None

    def by_role(self, indices):
        noted = vars(self).setdefault("noted", [])
        if len(noted) + 1 == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        noted.append([int(index) for index in indices])
        return super().by_role(indices)


@dataclass
class Trained:
    result: MetaTrainingResult
    items: list[list[int]]

    @property
    def weights(self):
        return {name: tensor.flatten().tolist() for name, tensor in self.result.model.state_dict().items()}


def train(root, args, kill_at=None):
    options = {"cache_dir": root / "cache", "progress": False}
    dataset = NotedDataset([root / "a0", root / "a1"], **options)
    dataset.kill_at = kill_at
    held_out = TransitionDataset([root / "a2"], max_per_tensor=None, **options)
    result = meta_train(None, dataset, {"other": held_out}, args=args, progress=False)
    return Trained(result, vars(dataset).get("noted", []))


def run(*targets):
    """Run each target in a forked process and return the exit codes; a new process would spend its time on imports."""
    processes = [multiprocessing.get_context("fork").Process(target=target) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def run_pair(root, folder, args, kill_at=None, nodes=1):
    """Train on two processes as torchrun starts them on one or two nodes; they write `rank-{rank}.json`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])

    def child(rank):
        local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
        if nodes == 2:
            local = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": rank, "GROUP_WORLD_SIZE": "2"}
        os.environ |= {**local, "RANK": rank, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"}
        AcceleratorState._reset_state(reset_partial_state=True)
        processes = start_processes()
        trained = train(root, args, kill_at if rank == "1" else None)
        notes = {
            "num_processes": trained.result.num_processes,
            "items": trained.items,
            "losses": trained.result.losses,
            "weights": trained.weights,
            "skill": {role: asdict(skill) for role, skill in trained.result.held_out_skill["other"].items()},
        }
        (folder / f"rank-{rank}.json").write_text(json.dumps(notes))
        processes.destroy_process_group()

    return run(lambda: child("0"), lambda: child("1"))


def read_notes(folder):
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meta")
    for number in range(3):
        record_lines(folder / f"a{number}", seed=number)
    return folder


@pytest.fixture(scope="module")
def pair(root):
    """Notes of two processes that trained together."""
    assert run_pair(root, root, ARGUMENTS) == [0, 0]
    return read_notes(root)


def test_processes_share_the_same_batches(pair, root):
    dataset = TransitionDataset([root / "a0", root / "a1"], progress=False)
    batches = list(BalancedBatchSampler(dataset, ARGUMENTS.batch_size, ARGUMENTS.steps))
    assert [notes["num_processes"] for notes in pair] == [2, 2]
    for batch, *parts in zip(batches, *(notes["items"] for notes in pair), strict=True):
        assert parts[0] != parts[1] and [len(part) for part in parts] == [192, 192]
        assert sorted(parts[0] + parts[1]) == sorted(batch.tolist())


def test_two_processes_agree_with_one(pair, root):
    alone = train(root, ARGUMENTS)
    assert len(alone.items[0]) == 2 * len(pair[0]["items"][0])
    assert pair[0]["weights"] == pair[1]["weights"]
    for role, skill in alone.result.held_out_skill["other"].items():
        of_processes = [notes["skill"][role] for notes in pair]
        assert of_processes[0] == of_processes[1]
        assert skill.skill > 0.2
        assert of_processes[0]["skill"] == pytest.approx(skill.skill, abs=0.01)
        assert of_processes[0]["transitions"] == skill.transitions
    for ours, theirs in zip(pair[0]["losses"], alone.result.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=0.01)


def test_two_nodes_resume_after_one_is_killed(pair, root, tmp_path):
    args = replace(ARGUMENTS, checkpoint_dir=str(tmp_path / "checkpoints"))
    assert run_pair(root, tmp_path, args, kill_at=35, nodes=2) == [1, -signal.SIGKILL]
    assert run_pair(root, tmp_path, args, nodes=2) == [0, 0]
    for resumed, uninterrupted in zip(read_notes(tmp_path), pair, strict=True):
        assert resumed["items"] == uninterrupted["items"][20:]  # from the checkpoint at step 20
        assert resumed["weights"] == uninterrupted["weights"]
        assert resumed["losses"] == uninterrupted["losses"]


def finish(root, folder, args=FEW_STEPS):
    return train(root, replace(args, checkpoint_dir=str(folder)))


def kill(root, folder, before_step=None, before_change=None):
    """Train in a forked process that dies before a step, or before a change in the checkpoint folder."""

    def child():
        count_changes(folder, before_change)
        train(root, replace(FEW_STEPS, checkpoint_dir=str(folder)), before_step)

    (code,) = run(child)
    return code


def test_resumes_after_a_kill_at_any_moment(root, tmp_path):
    expected = finish(root, tmp_path / "uninterrupted")
    assert [path.name for path in sorted((tmp_path / "uninterrupted").iterdir())] == ["step-00000008", "step-00000012"]
    assert [entry["step"] for entry in expected.result.losses] == [4, 8, 12]
    moments = random.Random(0).sample(range(1, 25), 6)
    for number, kills in enumerate([{"before_step": 7}, *({"before_change": m} for m in moments)]):
        folder = tmp_path / str(number)
        assert kill(root, folder, **kills) == -signal.SIGKILL, kills
        resumed = finish(root, folder)
        assert resumed.weights == expected.weights, kills
        assert resumed.result.losses == expected.result.losses
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000008", "step-00000012"]


def test_validation_and_best_weights_resume(root, tmp_path):
    dataset, other = (TransitionDataset([root / name], progress=False) for name in ("a0", "a1"))
    args = replace(FEW_STEPS, checkpoint_dir=str(tmp_path), eval_every=2, patience=4, learning_rate=3e-3)
    expected = meta_train(None, dataset, validation=other, args=args, progress=False)
    shutil.rmtree(tmp_path / "step-00000012")
    again = meta_train(None, dataset, validation=other, args=args, progress=False)
    assert again.validation == expected.validation and len(again.validation) == 6
    assert Trained(again, []).weights == Trained(expected, []).weights


def test_checkpoint_of_another_training(root, tmp_path, monkeypatch):
    finish(root, tmp_path)
    assert finish(root, tmp_path, replace(FEW_STEPS, log_every=3)).items == []  # the training was finished
    with pytest.raises(ValueError, match=r"step-00000012.*learning_rate=0\.001"):
        finish(root, tmp_path, replace(FEW_STEPS, learning_rate=0.1))
    with monkeypatch.context() as launcher:
        launcher.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        AcceleratorState._reset_state()
        with pytest.raises(ValueError, match=r"precision='no'.*'bf16'"):
            finish(root, tmp_path)
    AcceleratorState._reset_state()
    dataset = TransitionDataset([root / "a0", root / "a1"], progress=False)
    args = replace(FEW_STEPS, checkpoint_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"initial_weights="):
        meta_train(KNOWNModel(KNOWNConfig()), dataset, args=args, progress=False)
    with pytest.raises(ValueError, match=r" train="):
        meta_train(None, dataset.with_one_role("fc"), args=args, progress=False)
