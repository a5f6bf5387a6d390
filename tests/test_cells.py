import json
import os
import time

import pytest
import torch

from know_hf.evaluation import CellStore, run_cells
from know_hf.evaluation.cells import CellTimes, Order


def settings(cell):
    if cell == "bad":
        raise KeyError("planted")
    return os.getpid(), torch.get_num_threads()


def test_one_process_runs_cells_here_on_one_thread_under_a_bar(capfd):
    before = torch.get_num_threads()
    assert list(run_cells(settings, ["a", "b"])) == [(0, (os.getpid(), 1)), (1, (os.getpid(), 1))]
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError, match="planted"):
        list(run_cells(settings, ["bad"]))
    list(run_cells(settings, ["a"], description="compare", label=lambda cell: f"seed {cell}"))
    assert "compare" in (shown := capfd.readouterr().err) and "1/1" in shown and "seed a" in shown


def test_a_store_keeps_results_and_its_identity(tmp_path):
    store = CellStore(tmp_path / "new", {"seed": 1, "sizes": (1, 2)})
    assert store.read("seed-1") is None
    store.write("seed-1", {"accuracy": 0.5})
    assert CellStore(tmp_path / "new", {"sizes": [1, 2], "seed": 1}).read("seed-1") == {"accuracy": 0.5}
    with pytest.raises(ValueError, match=r"sizes: \[1, 2\] .* \[1, 3\]"):
        CellStore(tmp_path / "new", {"seed": 1, "sizes": (1, 3)})
    with pytest.raises(ValueError, match=r"sizes: .* null"):
        CellStore(tmp_path / "new", {"seed": 1})
    with pytest.raises(FileExistsError, match=r"identity\.json"):
        CellStore(tmp_path, {"seed": 1})  # a folder with other content


@pytest.mark.parametrize("text", ["", "[]", "null", '{"a": NaN}', '{"a": 1, "a": 2}', "\ufeff{}"])
def test_damaged_files_of_a_store_are_named(tmp_path, text):
    store = CellStore(tmp_path, {"seed": 1})
    (tmp_path / "cells/seed-1.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"cells/seed-1\.json .*delete it"):
        store.read("seed-1")
    (tmp_path / "identity.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"identity\.json .*new output folder"):
        CellStore(tmp_path, {"seed": 1})


def test_an_identity_tells_no_local_folder(tmp_path):
    store = CellStore(tmp_path / "new", {"task": {"data": "/home/someone/data"}})
    assert json.loads((store.path / "identity.json").read_text()) == {"task": {"data": ".../data"}}
    (store.path / "identity.json").write_text('{"task": {"data": "/home/someone/data"}}')  # as 0.2 did
    CellStore(store.path, {"task": {"data": "/elsewhere/data"}})


def test_cells_wait_for_others_and_none_starts_that_would_end_after_the_deadline():
    done, times = [], CellTimes()

    def run(cell):
        done.append(cell)
        return 100.0 if cell == "slow" else 1.0

    order = Order(lambda cell: cell != "late" or "first" in done, times.expected, time.monotonic() + 50)
    for index, seconds in run_cells(run, cells := ["late", "first", "slow", "slow", "last"], order=order):
        times.add(cells[index], seconds)
    assert done == ["first", "late", "slow"]  # the mean of three cells is below the limit, that of "slow" is not
    assert times.expected("trajectory") is None and times.expected("other") == pytest.approx(34)


def test_the_bar_shows_the_time_left(capfd):
    list(run_cells(time.sleep, [0.11, 0.12, 0.13], order=Order(expected=lambda cell: 60.0)))
    shown = capfd.readouterr().err
    assert "0.11, about 2 min left" in shown and "0.12, about 60 s left" in shown
