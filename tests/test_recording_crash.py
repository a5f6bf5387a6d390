"""Recordings that are killed, interrupted, run out of disk or meet another recorder end in the same bytes."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_trainer
from crash_worker import SCHEDULE
from transformers import TrainerCallback

from know_hf import WeightTrajectory, induce_forgetting

TESTS = Path(__file__).parent


class Server:
    """The other end of `crash_worker.py`, whose docstring says what can be asked for."""

    def __init__(self):
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", str(TESTS / "crash_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )

    def start(self, **request: Any) -> None:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def wait(self) -> dict[str, Any]:
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(timeout=30) == 0
        self.process.stdout.close()


@dataclass
class Recording:
    """A trajectory that the server records, in as many runs as it takes, and what the runs noted."""

    server: Server
    task: str
    folder: Path
    notes: Path
    codes: list[int] = field(default_factory=list)

    def run(self, **request: Any) -> dict[str, Any]:
        self.start(**request)
        return self.wait()

    def start(self, **request: Any) -> None:
        self._before = len(self.trainings), self.finished
        self.server.start(task=self.task, folder=str(self.folder), notes=str(self.notes), **request)

    def wait(self) -> dict[str, Any]:
        answer = self.server.wait()
        self.codes.append(answer["code"])
        self._check_only_unfinished_states_were_trained()
        return answer

    def _check_only_unfinished_states_were_trained(self) -> None:
        trained, finished = self._before
        begun = self.trainings[trained:]
        assert begun == list(range(finished, finished + len(begun)))
        if begun:  # what is lost is the state in training, and one that was still being written
            assert self.finished >= begun[-1] - 1

    @property
    def trainings(self) -> list[int]:
        path = self.notes / "trainings"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    @property
    def finished(self) -> int:
        path = self.folder / "trajectory.json"
        return len(json.loads(path.read_text())["states"]) if path.exists() else 0

    @property
    def output(self) -> str:
        return (self.notes / "output").read_text()

    def contents(self) -> dict[str, str]:
        return {
            path.relative_to(self.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else "folder"
            for path in self.folder.rglob("*")
        }


@dataclass
class Whole:
    """What a recording is that nothing happened to."""

    contents: dict[str, str]
    seconds: float
    changes: int


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def recording(server: Server, tmp_path: Path) -> Callable[..., Recording]:
    def recording(task: str, name: str = "trajectory", parent: Path = tmp_path) -> Recording:
        notes = tmp_path / f"{name}-notes"
        notes.mkdir()
        return Recording(server, task, parent / name, notes)

    return recording


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    recorded: dict[str, Whole] = {}

    def record(task: str) -> Whole:
        root = tmp_path_factory.mktemp("whole")
        recording = Recording(server, task, root / "trajectory", root)
        seconds = recording.run()["seconds"]
        assert recording.codes == [0], recording.output
        assert recording.trainings == list(range(recording.finished))
        WeightTrajectory(recording.folder).verify()
        assert not [name for name in recording.contents() if name.endswith((".partial", ".old"))]
        return Whole(recording.contents(), seconds, int((root / "changes").read_text()))

    def whole(task: str) -> Whole:
        if task not in recorded:
            first, recorded[task] = record(task), record(task)  # the first warms up
            assert first.contents == recorded[task].contents
        return recorded[task]

    return whole


@pytest.mark.parametrize(("task", "kills"), [("trainer", 20), ("large", 12)])
def test_kills_at_random_moments_change_no_byte(whole, recording, task, kills):
    expected, moments, killed, folders = whole(task), random.Random(0), 0, count()
    while killed < kills:
        run, patience = recording(task, f"trajectory-{next(folders)}"), expected.seconds
        while run.codes[-1:] != [0]:
            run.run(kill_after=moments.uniform(0, patience))
            assert run.codes[-1] in (0, -signal.SIGKILL), run.output
            patience *= 1.05  # a busy machine gets to an end, too
        assert run.contents() == expected.contents
        killed += len(run.codes) - 1


def test_a_kill_before_any_change_on_disk_changes_no_byte(whole, recording):
    expected = whole("loop")
    for change in range(1, expected.changes + 1):
        run = recording("loop", f"at-{change}")
        run.run(kill_at=change)
        run.run()
        assert run.codes == [-signal.SIGKILL, 0], run.output
        assert run.contents() == expected.contents


def test_ctrl_c_at_random_moments_leaves_what_can_be_gone_on_with(whole, recording):
    expected, moments = whole("trainer"), random.Random(1)
    run = recording("trainer")
    for _ in range(5):
        run.run(kill_after=moments.uniform(0.2, 0.6) * expected.seconds, signal=signal.SIGINT)
        if run.codes[-1]:
            assert "KeyboardInterrupt" in run.output
        assert not [name for name in run.contents() if ".partial" in name]
    run.run()
    assert run.codes[-1] == 0
    assert run.contents() == expected.contents


def test_a_full_disk_leaves_the_states_before(whole, recording):
    """A file must not grow beyond 1 MB from state 2 on: the same failed writes as on a full disk."""
    run = recording("large")
    run.run(trouble="limit_file_size")
    assert run.codes == [1]
    assert f"OSError: state 2 could not be written to {run.folder} " in run.output
    assert "File too large" in run.output
    assert run.finished == 2
    WeightTrajectory(run.folder).verify()
    run.run()
    assert run.trainings == [0, 1, 2, 2]
    assert run.contents() == whole("large").contents


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=45m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_tmpfs_leaves_the_states_before(whole, recording, small_disk):
    run = recording("large", parent=small_disk)
    run.run(trouble="fill_disk")
    assert run.codes == [1]
    assert f"OSError: state 2 could not be written to {run.folder} " in run.output
    assert "No space left on device" in run.output
    assert run.finished == 2
    (small_disk / "ballast").unlink()
    run.run()
    assert run.codes == [1, 0], run.output
    assert run.contents() == whole("large").contents


class NoTraining(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        pytest.fail("a training has begun")


def test_a_folder_that_cannot_be_written_is_told_before_training(tmp_path):
    (tmp_path / "file").touch()
    trainer = make_trainer(tmp_path)
    trainer.add_callback(NoTraining())
    with pytest.raises(OSError, match="file/trajectory"):
        induce_forgetting(trainer, SCHEDULE, tmp_path / "file/trajectory")


def test_a_read_only_folder_is_told_before_training(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        trainer = make_trainer(tmp_path)
        trainer.add_callback(NoTraining())
        with pytest.raises(OSError, match="disk/trajectory"):
            induce_forgetting(trainer, SCHEDULE, folder / "trajectory")
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_second_recorder_is_refused_and_the_first_goes_on(whole, recording, tmp_path):
    run = recording("trainer")
    run.start(trouble="pause")
    while not (run.notes / "paused").exists():
        time.sleep(0.01)
    trainer = make_trainer(tmp_path)
    trainer.add_callback(NoTraining())
    with pytest.raises(RuntimeError, match=f"another process is recording to {run.folder}"):
        induce_forgetting(trainer, SCHEDULE, run.folder)
    with pytest.raises(RuntimeError, match="another process"):
        WeightTrajectory(run.folder).record(trainer.model, num_examples=1, steps=1)
    (run.notes / "go").touch()
    run.wait()
    assert run.codes == [0], run.output
    assert run.contents() == whole("trainer").contents


def test_a_recorder_that_was_overtaken_is_refused(whole, recording):
    """Two loops that take turns: the lock is free, but what one of them knows of the folder is old."""
    run = recording("loop")
    run.run()
    behind = WeightTrajectory(run.folder)
    WeightTrajectory(run.folder).record(behind.load_model(), num_examples=1, steps=1)
    with pytest.raises(RuntimeError, match="holds 3 states, 2 were expected: another process"):
        behind.record(behind.load_model(), num_examples=1, steps=1)
    assert torch.equal(
        WeightTrajectory(run.folder).tensor("classifier.1.bias", 2), behind.tensor("classifier.1.bias", 0)
    )
