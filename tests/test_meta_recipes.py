"""recipes/ablations and recipes/benchmarks/meta_training.py on trajectories of a toy net."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training import record

from know_hf import KNOWNConfig, KNOWNModel, TransitionDataset
from know_hf.meta_learning import read_collection, retrodiction_skill

RECIPES = Path(__file__).parents[1] / "recipes"


def load(monkeypatch, path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collection")
    rows = []
    for number in range(12):
        record(folder / f"net-{number:02}", seed=number)
        split = ("train", "train", "held_out_trajectory")[number % 3]
        rows.append({"path": f"net-{number:02}", "split": split, "ratio": 0.5 if number < 6 else 0.7})
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def ablations(monkeypatch):
    return load(monkeypatch, RECIPES / "ablations" / "ablations.py")


def test_ablations(ablations, collection, tmp_path, monkeypatch, capsys):
    flags = ["--trajectories", str(collection), "--output_dir", str(tmp_path / "out"), "--seeds", "0", "1"]
    flags += ["--steps", "2", "--batch_size", "16", "--counts", "4", "50", "--cache_dir", str(tmp_path / "cache")]
    args = ablations.make_parser().parse_args(flags)
    ablations.main(args)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out/ablations.json").read_text())
    assert [(row["group"], row["value"], len(row["trajectories"])) for row in results["rows"]] == [
        ("defaults", "S = 5, three networks, all trajectories", 8),
        ("states", "S = 2", 8),
        ("states", "S = 3", 8),
        ("states", "S = 4", 8),
        ("networks", "one for all roles", 8),
        ("ratio", "0.5", 4),
        ("ratio", "0.7", 4),
        ("ratio", "any", 4),
        ("trajectories", "4", 4),
        ("loss", "relative", 8),
    ]
    for row in results["rows"]:
        for result in row["results"]:
            assert set(result["skill"]) == {"held_out_trajectory", "r near 0.5", "r near 0.7"}
            assert {role: found["trajectories"] for role, found in result["skill"]["r near 0.5"].items()} == {
                "conv": 2,
                "fc": 2,
                "bias": 2,
            }
    nested = {row["value"]: set(row["trajectories"]) for row in results["rows"] if row["group"] == "trajectories"}
    assert nested["4"] == set(next(row for row in results["rows"] if row["value"] == "any")["trajectories"])
    first, second = (result["skill"]["held_out_trajectory"]["fc"]["skill"] for result in results["rows"][0]["results"])
    assert first != second
    assert f"{(first + second) / 2:+.3f} ({abs(first - second) / 2:.3f})" in printed
    assert (tmp_path / "out/ablations.md").read_text() == printed

    monkeypatch.setattr(ablations, "train", lambda *_: pytest.fail("a finished cell is trained again"))
    ablations.main(args)
    assert capsys.readouterr().out == printed
    with pytest.raises(ValueError, match="holds results with other steps: 2 there, 3 now"):
        ablations.main(ablations.make_parser().parse_args([*flags, "--steps", "3"]))
    monkeypatch.setattr(ablations, "version", lambda library: f"another {library}")
    with pytest.raises(ValueError, match="holds results with other versions: "):
        ablations.main(args)


def test_ablations_of_other_trajectories_with_the_same_names(ablations, collection, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "train", lambda *_: {"skill": {}})
    monkeypatch.setattr(ablations, "tables", lambda *_: [])
    names = ("net-00", "net-01", "net-02")
    rows = (collection / "index.jsonl").read_text().splitlines()[:3]
    for which in ("first", "second"):
        for name in names:
            shutil.copytree(collection / name, tmp_path / which / name)
        (tmp_path / which / "index.jsonl").write_text("\n".join(rows))
    flags = ["--output_dir", str(tmp_path / "out"), "--only", "loss", "--seeds", "0", "--trajectories"]

    def run(which):
        ablations.main(ablations.make_parser().parse_args([*flags, str(tmp_path / which)]))

    run("first")
    run("second")  # the same, elsewhere
    shutil.rmtree(tmp_path / "second/net-01")
    record(tmp_path / "second/net-01", seed=99)
    with pytest.raises(ValueError, match=r"holds results with other weights: .*train"):
        run("second")


def test_every_number_of_states_is_measured_on_the_same(ablations, collection):
    args = ablations.make_parser().parse_args(["--trajectories", "in", "--output_dir", "out"])
    part = ablations.dataset(read_collection(collection)[:2], 5, None, args)
    predictor = ablations.LastStates(KNOWNModel(KNOWNConfig(num_states=2)).eval())
    assert retrodiction_skill(predictor, part)["fc"].no_change == retrodiction_skill("linear", part)["fc"].no_change
    history, _ = part.block(part.blocks[0])
    expected = predictor.model(history=history[:, -2:], role="conv").residual
    assert torch.allclose(predictor.residual(history, "conv"), expected, atol=1e-6)


def test_benchmark_of_meta_training(monkeypatch, tmp_path, capsys):
    benchmark = load(monkeypatch, RECIPES / "benchmarks" / "meta_training.py")
    monkeypatch.setitem(benchmark.SIZES, "small", (8, 3))
    flags = ["--sizes", "small", "--processes", "--repetitions", "1", "--seconds", "0.01", "--batch_size", "64"]
    flags += ["--output-dir", str(tmp_path), "--json", str(tmp_path / "results.json")]
    benchmark.main(benchmark.make_parser().parse_args(flags))
    results = json.loads((tmp_path / "results.json").read_text())
    seconds = results["sizes"]["small"]["seconds"]
    assert set(seconds) == {
        "network",
        "network in bfloat16",
        "mapped",
        "in memory",
        "whole states of one trajectory",
    }
    printed = capsys.readouterr().out
    assert f"| network | {1e3 * seconds['network']:.2f} |" in printed
    rate = 3 * 64 / (seconds["network"] + seconds["mapped"])
    assert f"| transitions a second, mapped | {rate:,.0f} |" in printed
    assert list(tmp_path.iterdir()) == [tmp_path / "results.json"]


def test_benchmark_of_processes(monkeypatch):
    benchmark = load(monkeypatch, RECIPES / "benchmarks" / "meta_training.py")
    assert benchmark.processes_table({"processes": {}}) == []
    times = {1: {"wall": 0.02, "cpu": 0.018}, 2: {"wall": 0.0125, "cpu": 0.012}}
    *_, one, two = benchmark.processes_table({"processes": times, "cores": 2, "batch_size": 2000})
    assert one == "| 1 | 20.0 | 300,000 | 1.00 | 18.0 | 1.00 |"
    assert two == "| 2 | 12.5 | 480,000 | 1.60 | 12.0 | 1.50 |"


def test_plain_way_reads_the_same_transitions(monkeypatch, collection):
    benchmark = load(monkeypatch, RECIPES / "benchmarks" / "meta_training.py")
    dataset = TransitionDataset([collection / "net-00"], max_per_tensor=None, progress=False)
    batch = next(benchmark.whole_states([collection / "net-00"], dataset, 32))
    for role in dataset.roles:
        rows = {
            tuple(row.tolist())
            for block in dataset.blocks
            if block.role == role
            for row in torch.cat([dataset.block(block)[0], dataset.block(block)[1][:, None]], dim=1)
        }
        found = torch.cat([batch[role]["history"], batch[role]["labels"][:, None]], dim=1)
        assert {tuple(row.tolist()) for row in found} <= rows


@pytest.mark.parametrize("recipe", ["ablations/ablations.py", "benchmarks/meta_training.py"])
def test_help_needs_no_torch(recipe):
    program = (
        "import runpy, sys\n"
        f"runpy.run_path({str(RECIPES / recipe)!r})['make_parser']().format_help()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-"], input=program, text=True, check=True)
