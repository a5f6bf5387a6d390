"""recipes/meta_train and recipes/ablations on trajectories of a toy network."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from doubles.toy_trajectories import record_lines

from know_hf import KNOWNConfig, KNOWNModel, TransitionDataset
from know_hf.meta_learning import read_collection, retrodiction_skill, split_collection
from know_hf.predictors import Shrink, protocol

RECIPES = Path(__file__).parents[1] / "recipes"
KNOWN_BASE = RECIPES / "meta_train" / "known_base.yaml"
REFERENCE = Path(__file__).parents[2] / "shared" / "reference"


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collection")
    rows = []
    for number in range(12):
        record_lines(folder / f"net-{number:02}", seed=number)
        split = ("train", "train", "held_out_trajectory")[number % 3]
        rows.append({"path": f"net-{number:02}", "split": split, "ratio": 0.5 if number < 6 else 0.7})
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def meta_train(load_script):
    return load_script(RECIPES / "meta_train" / "meta_train.py")


@pytest.fixture
def ablations(load_script):
    return load_script(RECIPES / "ablations" / "ablations.py")


def parse(ablations, *flags):
    (args,) = ablations.make_parser().parse_args_into_dataclasses(args=list(map(str, flags)))
    return args


def test_meta_train(tmp_path, meta_train, capsys):
    splits = ["train", "train", "held_out_trajectory", "train", "held_out_dataset"]
    for number, split in enumerate(splits):
        record_lines(tmp_path / "data" / f"net-{number}", seed=number)
        (tmp_path / "data" / f"net-{number}" / "recipe.json").write_text(json.dumps({"split": split}))
    flags = ["--trajectories", str(tmp_path / "data"), "--output-dir", str(tmp_path / "out")]
    flags += ["--steps", "3", "--batch-size", "16", "--log_every", "2", "--validation-share", "0.3", "--cache_dir"]
    flags += [str(tmp_path / "cache")]
    meta_train.main(*meta_train.parse_arguments(["--config", str(KNOWN_BASE), *flags]))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["validation"]) == 1 and results["held_out"] == ["net-2"]
    assert set(results["trained_on"] + results["validation"]) == {"net-0", "net-1", "net-3"}
    assert set(results["splits"]) == {"held_out_trajectory", "held_out_dataset"}
    assert results["splits"]["held_out_dataset"]["trajectories"] == ["net-4"]
    skill = results["held_out_skill"]
    assert results["splits"]["held_out_trajectory"]["skill"] == skill
    assert list(skill) == ["known", "linear", "log", "average", "shrink", "ema", "task_vector"]
    assert skill["linear"]["fc"]["median"] == skill["linear"]["fc"]["skill"] > 0.5
    assert (skill["known"]["conv"]["trajectories"], skill["linear"]["fc"]["trajectories_above_zero"]) == (1, 1)
    assert list(results["held_out_skill_by_trajectory"]["fc"]) == ["net-2"]
    assert results["training_arguments"]["steps"] == 3 and results["steps_done"] == 3
    assert "checkpoint_dir" not in results["training_arguments"]
    assert (results["best_step"], results["mixed_precision"]) == (None, "no")
    model = KNOWNModel.from_pretrained(tmp_path / "out")
    assert model.config.trained_on["trajectories"] == 2
    held_out = TransitionDataset([tmp_path / "data" / "net-2"], max_per_tensor=None, progress=False)
    conv_skill = retrodiction_skill(model, held_out)["conv"].skill
    assert skill["known"]["conv"]["skill"] == pytest.approx(conv_skill)
    output = capsys.readouterr().out
    assert f"{skill['known']['conv']['skill']:+.4f}" in output and "held_out_dataset: skill" in output
    assert [path.name for path in sorted((tmp_path / "out/checkpoints").iterdir())] == ["step-00000003"]


@pytest.mark.skipif(not REFERENCE.exists(), reason="needs the published weights")
def test_meta_train_compares_with_the_published_weights(meta_train):
    flags = ["--trajectories", "in", "--output_dir", "out", "--published_weights", str(REFERENCE)]
    args, _ = meta_train.parse_arguments([*flags, "--predictors", "linear"])
    baselines = meta_train.load_baselines(args, KNOWNConfig())
    assert list(baselines) == ["published", "linear"] and isinstance(baselines["published"], KNOWNModel)


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--predictors", "linaer"], ValueError, "'linaer'"),
        (["--predictors", "linear", "lines"], ValueError, r"'lines' .*depth"),
        (["--predictors", "model_stock"], ValueError, r"'model_stock' needs complete tensors"),
        (["--predictors", "long"], ValueError, r"'long' .*9 states.*num_states=5"),
        (["--published_weights", "nowhere"], FileNotFoundError, r"nowhere/KNOWN_Conv\.h5"),
        (["--validation-share", "1"], ValueError, "validation_share.*1"),
    ],
)
def test_meta_train_checks_its_arguments_before_training(
    meta_train, collection, tmp_path, monkeypatch, flags, error, message
):
    class Long(Shrink):
        num_states = 9

    monkeypatch.setitem(protocol._PREDICTORS, "long", Long)
    monkeypatch.setattr("know_hf.meta_train", lambda *_, **__: pytest.fail("trained"))
    flags = ["--trajectories", str(collection), "--output_dir", str(tmp_path / "out"), *flags]
    with pytest.raises(error, match=message):
        meta_train.main(*meta_train.parse_arguments(flags))


def test_meta_train_flags_override_the_yaml(meta_train, tmp_path):
    flags = ["--trajectories", "in", "--output_dir", "out"]
    args, training_args = meta_train.parse_arguments(["--config", str(KNOWN_BASE), *flags])
    assert (args.trajectories, args.held_out, training_args.learning_rate) == (["in"], [], 1e-3)
    args, training_args = meta_train.parse_arguments(
        ["--config", str(KNOWN_BASE), *flags, "--learning_rate", "0.5", "--held-out", "a", "b-*"]
    )
    assert (args.held_out, training_args.learning_rate) == (["a", "b-*"], 0.5)
    (tmp_path / "null.yaml").write_text("cache_dir: null\nmixed_precision:\nsteps: 7\n")
    args, training_args = meta_train.parse_arguments(["--config", str(tmp_path / "null.yaml"), *flags])
    assert (args.cache_dir, training_args.mixed_precision, training_args.steps) == (None, None, 7)
    (tmp_path / "wrong.yaml").write_text("learning_rte: 1")
    with pytest.raises(ValueError, match=r"not used.*--learning_rte"):
        meta_train.parse_arguments(["--config", str(tmp_path / "wrong.yaml"), *flags])
    (tmp_path / "list.yaml").write_text("[steps, 7]")
    with pytest.raises(ValueError, match=r"list\.yaml must contain a mapping"):
        meta_train.parse_arguments(["--config", str(tmp_path / "list.yaml"), *flags])


def test_rows_of_ablations(ablations, collection):
    args = parse(ablations, "--trajectories", "in", "--output_dir", "out", "--counts", 4, 50)
    settings = ablations.make_settings(split_collection(read_collection(collection))["train"], args)
    assert [(setting.group, setting.value, len(setting.trajectories)) for setting in settings] == [
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
    assert settings[7].trajectories == settings[8].trajectories


def test_ablations(ablations, collection, tmp_path, monkeypatch, capsys):
    flags = ["--trajectories", collection, "--output_dir", tmp_path / "out", "--seeds", 0, 1, "--only", "networks"]
    flags += ["--steps", 2, "--batch-size", 16, "--max_per_tensor", 64, "--cache-dir", tmp_path / "cache"]
    args = parse(ablations, *flags)
    ablations.main(args)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out/ablations.json").read_text())
    for row in results["rows"]:
        for result in row["results"]:
            assert set(result["skill"]) == {"held_out_trajectory", "r near 0.5", "r near 0.7"}
            trajectories = {role: skill["trajectories"] for role, skill in result["skill"]["r near 0.5"].items()}
            assert trajectories == {"conv": 2, "fc": 2, "bias": 2}
    first, second = (result["skill"]["held_out_trajectory"]["fc"]["skill"] for result in results["rows"][0]["results"])
    assert first != second
    assert f"{(first + second) / 2:+.3f} ({abs(first - second) / 2:.3f})" in printed
    assert (tmp_path / "out/ablations.md").read_text() == printed

    monkeypatch.setattr(ablations, "train", lambda *_: pytest.fail("trained a finished cell"))
    ablations.main(args)
    assert capsys.readouterr().out == printed
    with pytest.raises(ValueError, match=r"steps: 2 .* 3"):
        ablations.main(parse(ablations, *flags, "--steps", 3))
    monkeypatch.setattr(ablations, "version", lambda library: f"another {library}")
    with pytest.raises(ValueError, match="versions"):
        ablations.main(args)


def test_table_of_ratios(ablations):
    skill = {name: {"fc": {"skill": value}} for name, value in (("r near 0.5", 0.25), ("r near 0.7", -1))}
    rows = [
        {"group": "defaults"},
        *({"group": "ratio", "value": v, "results": [{"skill": skill}]} for v in ("0.5", "any")),
    ]
    (text,) = ablations.ratio_tables(rows)
    assert text.splitlines()[2:] == [
        "| trained on | fc, r near 0.5 | fc, r near 0.7 |",
        "| --- | --- | --- |",
        "| r near 0.5 | +0.250 (0.000) | -1.000 (0.000) |",
        "| any r | +0.250 (0.000) | -1.000 (0.000) |",
    ]
    assert ablations.ratio_tables(rows[:1]) == []


def test_ablations_of_other_trajectories_with_the_same_names(ablations, collection, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "train", lambda *_: {"skill": {}})
    monkeypatch.setattr(ablations, "split_tables", lambda *_: [])
    flags = ["--output_dir", tmp_path / "out", "--only", "loss", "--seeds", 0, "--trajectories", tmp_path / "data"]
    (tmp_path / "data").mkdir()
    for name in ("net-00", "net-01", "net-02"):
        shutil.copytree(collection / name, tmp_path / "data" / name)
    rows = (collection / "index.jsonl").read_text().splitlines()[:3]
    (tmp_path / "data" / "index.jsonl").write_text("\n".join(rows))
    ablations.main(parse(ablations, *flags))
    (tmp_path / "data").rename(tmp_path / "moved")
    flags[-1] = tmp_path / "moved"
    ablations.main(parse(ablations, *flags))
    shutil.rmtree(tmp_path / "moved/net-01")
    record_lines(tmp_path / "moved/net-01", seed=99)
    with pytest.raises(ValueError, match=r"weights: .*train"):
        ablations.main(parse(ablations, *flags))


def test_every_number_of_states_is_evaluated_on_the_same_transitions(ablations, collection):
    args = parse(ablations, "--trajectories", "in", "--output_dir", "out")
    part = ablations.load(read_collection(collection)[:2], 5, None, args)
    predictor = ablations.LastStates(KNOWNModel(KNOWNConfig(num_states=2)).eval())
    assert retrodiction_skill(predictor, part)["fc"].no_change == retrodiction_skill("linear", part)["fc"].no_change
    history, _ = part.block(part.blocks[0])
    expected = predictor.model(history=history[:, -2:], role="conv").residual
    assert torch.allclose(predictor.residual(history, "conv"), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["meta_train/meta_train", "ablations/ablations"])
def test_help_needs_no_torch(name):
    program = (
        "import runpy, sys\n"
        f"help = runpy.run_path({str(RECIPES / name) + '.py'!r})['make_parser']().format_help()\n"
        "assert '--batch_size' in help\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-"], input=program, text=True, check=True)
