"""Recordings that are killed, interrupted, run out of disk or meet a second recorder end in the same bytes."""

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
from conftest import make_trainer
from doubles.small_trainers import assert_refused, hashes

from know_hf import WeightTrajectory

WORKER = Path(__file__).with_name("crash_worker.py")


class Server:
    """A process that runs crash_worker.py; its docstring describes the requests."""

    def __init__(self):
        path = os.pathsep.join([str(WORKER.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", str(WORKER)],
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
        self._before = len(self.trainings), self.num_recorded
        self.server.start(task=self.task, folder=str(self.folder), notes=str(self.notes), **request)

    def wait(self) -> dict[str, Any]:
        answer = self.server.wait()
        self.codes.append(answer["code"])
        trained, recorded = self._before
        begun = self.trainings[trained:]
        assert begun == list(range(recorded, recorded + len(begun)))  # no state is trained twice
        if begun:  # at most the state in training and one that was being written are lost
            assert self.num_recorded >= begun[-1] - 1
        return answer

    @property
    def trainings(self) -> list[int]:
        path = self.notes / "trainings"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    @property
    def num_recorded(self) -> int:
        path = self.folder / "trajectory.json"
        return len(json.loads(path.read_text())["states"]) if path.exists() else 0

    @property
    def output(self) -> str:
        return (self.notes / "output").read_text()


@dataclass
class Undisturbed:
    """A recording that nothing happened to."""

    hashes: dict[str, str]
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
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Undisturbed]:
    recorded: dict[str, Undisturbed] = {}

    def record(task: str) -> Undisturbed:
        root = tmp_path_factory.mktemp("undisturbed")
        run = Recording(server, task, root / "trajectory", root)
        seconds = run.run()["seconds"]
        assert run.codes == [0], run.output
        assert run.trainings == list(range(run.num_recorded))
        WeightTrajectory(run.folder).verify()
        assert not [name for name in hashes(run.folder) if name.endswith((".partial", ".old"))]
        return Undisturbed(hashes(run.folder), seconds, int((root / "changes").read_text()))

    def undisturbed(task: str) -> Undisturbed:
        if task not in recorded:
            first, recorded[task] = record(task), record(task)  # the first warms up
            assert first.hashes == recorded[task].hashes
        return recorded[task]

    return undisturbed


@pytest.mark.parametrize(("task", "kills"), [("trainer", 20), ("large", 12)])
def test_kills_at_random_moments_change_no_byte(undisturbed, recording, task, kills):
    expected, moments, killed, folders = undisturbed(task), random.Random(0), 0, count()
    while killed < kills:
        run, patience = recording(task, f"trajectory-{next(folders)}"), expected.seconds
        while run.codes[-1:] != [0]:
            run.run(kill_after=moments.uniform(0, patience))
            assert run.codes[-1] in (0, -signal.SIGKILL), run.output
            patience *= 1.05  # so that a busy machine finishes too
        assert hashes(run.folder) == expected.hashes
        killed += len(run.codes) - 1


def test_a_kill_before_any_change_on_disk_changes_no_byte(undisturbed, recording):
    expected = undisturbed("loop")
    for change in range(1, expected.changes + 1):
        run = recording("loop", f"at-{change}")
        run.run(kill_at=change)
        run.run()
        assert run.codes == [-signal.SIGKILL, 0], run.output
        assert hashes(run.folder) == expected.hashes


def test_a_recording_resumes_after_ctrl_c(undisturbed, recording):
    expected, moments = undisturbed("trainer"), random.Random(1)
    run = recording("trainer")
    for _ in range(5):
        run.run(kill_after=moments.uniform(0.2, 0.6) * expected.seconds, signal=signal.SIGINT)
        if run.codes[-1]:
            assert "KeyboardInterrupt" in run.output
        assert not list(run.folder.rglob("*.partial*"))
    run.run()
    assert run.codes[-1] == 0
    assert hashes(run.folder) == expected.hashes


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    folder = tmp_path / "disk"

    def mount(option: str) -> Path:
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not permitted here")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [("limit_file_size", "File too large"), ("fill_disk", "No space left on device")],
)
def test_a_full_disk_keeps_the_states_before(undisturbed, recording, mount, tmp_path, trouble, message):
    run = recording("large", parent=mount("size=45m") if trouble == "fill_disk" else tmp_path)
    run.run(trouble=trouble)
    assert run.codes == [1]
    assert "OSError: state 2" in run.output and str(run.folder) in run.output and message in run.output
    assert run.num_recorded == 2
    WeightTrajectory(run.folder).verify()
    run.folder.with_name("ballast").unlink(missing_ok=True)
    run.run()
    assert run.codes == [1, 0], run.output
    assert run.trainings == [0, 1, 2, 2]
    assert hashes(run.folder) == undisturbed("large").hashes


def test_a_read_only_folder_is_refused_before_training(mount, tmp_path):
    assert_refused(make_trainer(tmp_path), mount("ro") / "trajectory", OSError, "disk/trajectory")


def test_a_second_recorder_is_refused_and_the_first_finishes(undisturbed, recording, tmp_path):
    run = recording("trainer")
    run.start(trouble="pause")
    while not (run.notes / "paused").exists():
        time.sleep(0.01)
    assert_refused(make_trainer(tmp_path), run.folder, RuntimeError, rf"another process.*{run.folder}")
    (run.notes / "resume").touch()
    run.wait()
    assert run.codes == [0], run.output
    assert hashes(run.folder) == undisturbed("trainer").hashes
