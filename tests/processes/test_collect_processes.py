"""recipes/collect on several processes."""

import multiprocessing
import os
import signal
import sys
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
from doubles.collect_space import ARCHITECTURES, WARNINGS, collect, job, recorded, run, sources

from know_hf import WeightTrajectory

__all__ = ["collect", "job", "recorded", "sources"]

pytestmark = [*WARNINGS, pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")]
FORK = multiprocessing.get_context("fork")  # a new process would spend most of its time on imports


def test_two_ranks_share_the_work_and_one_worker_dies(collect, job, recorded, sources, tmp_path, monkeypatch, capfd):
    """Each trajectory is finished once, with the weights that a single uninterrupted process gives."""
    import workers

    job = job(architectures={**ARCHITECTURES, "broken": {**ARCHITECTURES["cnn"], "model_class": "NoSuchNet"}})
    record = WeightTrajectory.record

    def record_or_die(trajectory, *args, **kwargs):
        if trajectory.path.name == "cnn-shapes-000" and trajectory.num_states and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        record(trajectory, *args, **kwargs)

    def start(rank):
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not those of pytest
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        os._exit(run(collect, job, sources))

    monkeypatch.setattr(WeightTrajectory, "record", record_or_die)
    monkeypatch.setattr(workers, "get_context", lambda method: FORK)
    ranks = [FORK.Process(target=start, args=(rank,)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    error = capfd.readouterr().err
    assert [rank.exitcode for rank in ranks] == [1, 0], error  # rank 0 reports the broken trajectories
    assert f"a worker died with exit code {-signal.SIGKILL} at cnn-shapes-000" in error
    assert "failed: broken-shapes-000: ValueError: architecture 'broken'" in error
    logs = [path.read_text() for path in (job.output_dir / ".logs").iterdir()]
    lines = Counter(line for log in logs for line in log.splitlines() if line.endswith((": finished", ": recording")))
    assert lines["cnn-shapes-000: recording"] == 2
    for recipe in recorded.recipes:
        assert lines[f"{recipe.name}: finished"] == 1
        trajectory, reference = (WeightTrajectory(each.folder(recipe)) for each in (job, recorded))
        trajectory.verify()
        assert trajectory.states == reference.states  # with hashes and metrics


def test_spawned_workers(job, tmp_path, monkeypatch):
    """They import a module in place of `record_one`, whose libraries would take long."""
    import workers

    job = job()
    (tmp_path / "record_one.py").write_text("def record_one(job, recipe):\n    raise ValueError(recipe.name)\n")
    monkeypatch.syspath_prepend(tmp_path)
    workers.record_all(job, workers=1, first_device=0, show=False)
    assert [job.error(recipe) for recipe in job.recipes] == [f"ValueError: {recipe.name}" for recipe in job.recipes]


def test_trajectories_that_kill_two_workers_fail(job, monkeypatch, capsys):
    import record_one
    import workers

    job = job()
    job = workers.Job(job.recipes[:1], job.sources, job.models, job.output_dir)
    monkeypatch.setattr(workers, "get_context", lambda method: FORK)
    monkeypatch.setattr(record_one, "record_one", lambda job, recipe: os._exit(9))
    workers.record_all(job, workers=3, first_device=0, show=False)
    assert "2 workers died" in job.error(job.recipes[0])
    assert capsys.readouterr().err.count("exit code 9 at cnn-shapes-000") == 2


def test_failure_is_stored_once_no_other_process_has_the_lock(collect, tmp_path):
    import workers

    recipe = SimpleNamespace(name="deadly")
    job = workers.Job([recipe], {}, {}, tmp_path)
    worker = workers._Worker(SimpleNamespace(exitcode=9), None, 0, recipe)
    deaths: Counter[str] = Counter()
    with workers._lock(job, recipe):
        assert [workers._replace(job, worker, deaths, print) for _ in range(2)] == [True, True]
        assert job.result(recipe) is None
    assert not workers._replace(job, worker, deaths, print)
    assert job.result(recipe)["status"] == "failed"


class Unreadable:
    name = "cnn-shapes-000"

    def __reduce__(self):
        return partial(os._exit, 3), ()


def test_workers_that_cannot_start(collect, tmp_path):
    from workers import Job, record_all

    with pytest.raises(RuntimeError, match=r"workers died before .*\.logs"):
        record_all(Job([Unreadable()], {}, {}, tmp_path), workers=1, first_device=0, show=False)
