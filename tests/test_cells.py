import os
import sys

import pytest
import torch

from know_hf.evaluation.cell_store import CellStore
from know_hf.evaluation.runner import run_cells


def whose(cell, advance):
    advance(f"cell {cell}")
    sys.stderr.write("this is not seen in a worker\n")
    if cell == "bad":
        raise KeyError("planted")
    if cell == "off":
        raise ValueError("factor=7 is off; choose less")
    if cell == "dead":
        os._exit(3)
    return os.getpid(), torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")


def test_cells_run_in_other_processes_and_an_error_there_is_told(capfd):
    results, before = [], os.environ.get("OMP_NUM_THREADS")
    with pytest.raises(RuntimeError, match=r"(?s)cell 2 failed in its process.*planted"):
        for result in run_cells(whose, ["a", "b", "bad"], num_processes=2):
            results.append(result)
    assert results  # the third cell was handed out when one of the first two had ended
    for index, (process, threads, variable) in results:
        assert index in (0, 1) and process != os.getpid() and (threads, variable) == (1, "1")
    assert os.environ.get("OMP_NUM_THREADS") == before
    assert "not seen" not in capfd.readouterr().err


def test_a_process_that_dies_is_told():
    with pytest.raises(ChildProcessError, match=r"process that ran cell [01] ended without a result"):
        list(run_cells(whose, ["dead", "dead"], num_processes=2))


def test_what_is_wrong_with_the_input_is_told_as_in_one_process():
    with pytest.raises(ValueError, match=r"^factor=7 is off; choose less$") as told:
        list(run_cells(whose, ["off", "off"], num_processes=2))
    assert "Traceback" in str(told.value.__cause__)


def test_one_process_runs_the_cells_here_on_one_thread():
    before = torch.get_num_threads()
    assert list(run_cells(whose, ["a"])) == [(0, (os.getpid(), 1, os.environ.get("OMP_NUM_THREADS")))]
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError, match="planted"):
        list(run_cells(whose, ["bad"]))


def test_a_store_keeps_results_and_its_identity(tmp_path):
    store = CellStore(tmp_path / "new", {"seed": 1, "sizes": (1, 2)})
    assert store.read("seed-1") is None
    store.write("seed-1", {"accuracy": 0.5})
    assert CellStore(tmp_path / "new", {"sizes": [1, 2], "seed": 1}).read("seed-1") == {"accuracy": 0.5}
    with pytest.raises(ValueError, match=r"holds results with other sizes: \[1, 2\] there, \[1, 3\] now"):
        CellStore(tmp_path / "new", {"seed": 1, "sizes": (1, 3)})
    with pytest.raises(ValueError, match=r"holds results with other sizes: .* null now"):
        CellStore(tmp_path / "new", {"seed": 1})
