"""Cells in worker processes, and a comparison that is killed."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
from doubles.deaths import count_changes
from quadrants import source, target

from know_hf.evaluation import ComparisonTask, LinearProbe, ZeroShot, compare_arms, run_cells

TESTS = Path(__file__).parents[1]


def settings(cell):
    sys.stderr.write("written by a worker\n")
    if cell == "invalid":
        raise ValueError("factor=7 is invalid")
    if cell == "unpicklable":
        raise Unpicklable("planted", 1)  # it would break the pool if it were sent
    if cell == "dead":
        os._exit(3)
    if cell == "b":
        os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C reaches all processes of a terminal; the parent ends the others
    if cell == "slow":
        time.sleep(600)
    return os.getpid(), torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")


class Unpicklable(Exception):
    def __init__(self, what, number):
        super().__init__(what)


def test_workers_run_cells_on_one_thread_and_report_an_error(capfd):
    results, before = [], os.environ.get("OMP_NUM_THREADS")
    with pytest.raises(RuntimeError, match=r"cell 2 .*Unpicklable: planted") as error:
        for result in run_cells(settings, ["a", "b", "unpicklable", "slow"], num_processes=2):
            results.append(result)
    assert "Traceback" in str(error.value.__cause__)
    for index, (process, threads, variable) in results:
        assert index in (0, 1) and process != os.getpid() and (threads, variable) == (1, "1")
    assert os.environ.get("OMP_NUM_THREADS") == before
    assert "written by a worker" not in capfd.readouterr().err
    assert not multiprocessing.active_children()  # the slow cell was stopped


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [("dead", ChildProcessError, "died .*__main__"), ("invalid", ValueError, r"^factor=7 is invalid$")],
)
def test_errors_of_workers(cell, error, message):
    with pytest.raises(error, match=message):
        list(run_cells(settings, [cell, cell], num_processes=2))


SCRIPT = """
from test_comparison_processes import *
if __name__ == "__main__":
    {}
"""
INTERRUPTED = """
    from know_hf.terminal import run_program
    def run():
        for _, result in run_cells(settings, ["a", "slow", "slow"], num_processes=2): print(result[0], flush=True)
    sys.exit(run_program("know-hf", run))
"""
ORPHANS = "for _, result in run_cells(settings, ['a', 'slow', 'slow'], num_processes=2): print(result[0], flush=True)"


def start(command, *arguments, **options):
    path = os.pathsep.join([str(TESTS), str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT.format(command), *map(str, arguments)]
    # a shell starts background jobs with SIGINT ignored, which children inherit
    interruptible = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    options = {"stderr": subprocess.DEVNULL, "preexec_fn": interruptible, **options}
    return subprocess.Popen(command, env=environment, **options)


def test_workers_end_with_a_parent_that_is_killed():
    process = start(ORPHANS, stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(worker)


def test_an_interrupt_of_all_processes_is_one_line():
    process = start(INTERRUPTED, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert int(process.stdout.readline())
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate()[1]
    assert process.returncode == 130
    assert errors.endswith("know-hf: interrupted\n") and "Traceback" not in errors and "leaked" not in errors


def _runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def compare(trajectory, output_dir, num_processes=1):
    task = ComparisonTask([trajectory] * 2, target, source)
    protocols = (LinearProbe((1e-2, 1e-1), steps=5), ZeroShot())
    arms, options = ["naive", "average", "shrink"], {"num_processes": num_processes, "pages": False}
    return compare_arms(task, output_dir, protocols=protocols, arms=arms, **options)


def test_a_killed_comparison_resumes_to_the_same_results(recorded, tmp_path):
    process = start("compare(sys.argv[1], sys.argv[2])", recorded, tmp_path / "out")
    cells = tmp_path / "out" / "cells"
    while process.poll() is None and not list(cells.glob("seed-0.naive.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.name: path.read_bytes() for path in cells.glob("seed-*")}
    assert "seed-0.naive.json" in finished and not (tmp_path / "out" / "report.json").exists()
    resumed = compare(recorded, tmp_path / "out", num_processes=2)
    uninterrupted = compare(recorded, tmp_path / "other")
    assert all((cells / name).read_bytes() == content for name, content in finished.items())
    assert [cell["measured"] for cell in resumed.cells] == [cell["measured"] for cell in uninterrupted.cells]


def fork(function, *arguments, kill_at=None):
    """Run a function in a fork, killed before a change to the folder `arguments[1]`; return code and changes."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        changes = count_changes(arguments[1], kill_at)
        try:
            function(*arguments)
            os.write(writing, str(changes()).encode())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reading) as pipe:
        return code, pipe.read()


def compare_states(trajectory, output_dir):
    task, protocols = ComparisonTask([trajectory] * 2, target, source), [LinearProbe((1e-2,), steps=1)]
    compare_arms(task, output_dir, protocols=protocols, arms=["naive", "state-1"], trials_per_rate=1, pages=False)


def kill_before_changes(trajectory, root):
    torch.set_num_threads(1)
    compare_states(trajectory, f"{root}/first")  # loads what the forks need
    changes = int(fork(compare_states, trajectory, f"{root}/whole")[1])
    for change in (*range(1, 7), changes // 2, changes):  # the first ones make the folder
        codes = [fork(compare_states, trajectory, f"{root}/{change}", kill_at=kill)[0] for kill in (change, None)]
        assert codes == [-signal.SIGKILL, 0], (change, codes)


def test_a_comparison_resumes_after_kills_before_changes_on_disk(recorded, tmp_path):
    process = start("kill_before_changes(*sys.argv[1:])", recorded, tmp_path)
    assert process.wait() == 0
    reports = [json.loads(path.read_text()) for path in tmp_path.glob("*/report.json")]
    assert len(reports) == 10
    measured = [[cell["measured"] for cell in report["cells"]] for report in reports]
    assert all(one == measured[0] for one in measured)
