import os
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_resnet
from doubles.small_trainers import hashes
from safetensors.torch import load_file

import know_hf
from know_hf import RecordArguments, WeightTrajectory
from know_hf.cli import main, make_parser
from know_hf.evaluation.suites import load_suite
from know_hf.prediction import SHIPPED_KNOWN
from know_hf.tasks.recording_plan import RecordingPlan


def test_light_imports_need_neither_torch_nor_transformers():
    code = """
import contextlib, sys, know_hf
from know_hf.cli import main

def imported(): return {"torch", "transformers", "datasets"} & set(sys.modules)

dir(know_hf)
for command in (["--help"], ["quickstart", "--help"], ["record", "--help"]):
    with contextlib.suppress(SystemExit): main(command)
    assert not imported(), command
assert main(["record", "--task", "unknown"]) == 1 and not imported()
know_hf.ForgettingSchedule().indices(100)
assert not imported()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_all_public_names_can_be_imported():
    for name in know_hf.__all__:
        assert getattr(know_hf, name) is not None
    with pytest.raises(AttributeError, match="KnownModel"):
        know_hf.KnownModel  # noqa: B018


def test_version_and_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"know_hf {know_hf.__version__}\n"
    commands = next(action.choices for action in make_parser()._actions if action.dest == "command")
    names = ("quickstart", "record", "import", "inspect", "merge", "predict", "compare", "push", "pull")
    assert sorted(commands) == sorted(names)
    for command in commands:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert f"know-hf {command}" in capsys.readouterr().out


def one_line(capsys, command):
    """The error of a command, which is one line."""
    error = capsys.readouterr().err
    assert error.startswith(f"know-hf {command}: ") and error.count("\n") == 1
    return error


def test_inspect_prints_states_roles_and_displacement(recorded, capsys):
    assert main(["inspect", str(recorded), "--roles"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:4] == ["state", "examples", "steps", "eval_loss"]
    sizes = [["Θ0", "64", "32"], ["Θ1", "32", "8"], ["Θ2", "16", "4"], ["Θ3", "8", "2"], ["Θ4", "4", "1"]]
    assert [line[:3] for line in lines[1:7]] == [["start", "–", "0"], *sizes]
    assert lines[2][4:] == ["0.0000"] * 4 and lines[1][3:] == ["–"] * 5
    assert ["conv", "5", "5,000"] in lines
    assert ["fc", "4×16", "classifier.1.weight:"] in [line[:3] for line in lines]
    assert main(["inspect", str(recorded.parent)]) == 1
    error = one_line(capsys, "inspect")
    assert str(recorded.parent) in error and "trajectory.json" in error


def test_predict_plans_and_then_writes(recorded, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["predict", str(recorded), "--predictor", "shrink", '--predictor_options={"factor": 0.5}']
    assert main([*command, "--output-dir", str(out), "--dry-run"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["fc", "2", "192"] in [line[:3] for line in lines]
    assert list(tmp_path.iterdir()) == []
    assert main([*command, "--output-dir", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Wrote Shrink to {out}/; ") and shown.endswith(f'.from_pretrained("{out}/")\n')
    before = load_file(recorded / "state-0/model.safetensors")["classifier.1.weight"]
    torch.testing.assert_close(load_file(out / "model.safetensors")["classifier.1.weight"], 0.5 * before)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("predict t --output-dir out --predictor-options {factor}", "JSON object"),
        ("predict t --output-dir out --predictor-options [0.5]", "JSON object"),
        (f"predict t --output-dir out --predictor-options {'[' * 10_000}", "JSON object"),
        ("compare digits --output-dir out --data a/b", "NAME=VALUE"),
    ],
)
def test_malformed_flags_are_refused(command, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(command.split())
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--private"], "--private needs --push-to-hub"),
        (["--revision", "x"], "--revision needs --push-to-hub"),
        (["--create-pr"], "--create-pr needs --push-to-hub"),
        (["--report", "missing/report.json"], "missing/report.json"),
        (["--metric", "accuracy"], "--metric needs --validation"),
        (["--max-validation", "9"], "--max-validation needs --validation"),
        (["--base-model", "b"], "--base-model needs --validation"),
    ],
)
def test_predict_checks_flags_before_the_work(recorded, tmp_path, capsys, flags, message):
    assert main(["predict", str(recorded), "--output-dir", str(tmp_path / "out"), *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("target", "command", "args", "options"),
    [
        ("know_hf.evaluation.suites.run_quickstart", "quickstart --output-dir out --seed 3", ("out",), {"seed": 3}),
        (
            "know_hf.evaluation.run_suite",
            "compare digits --output_dir out --arms naive x --seeds 1 2 --data a/b=c --known mine=d --processes 2"
            " --max-minutes 9",
            ("digits", "out"),
            {"arms": ["naive", "x"], "seeds": [1, 2], "data": {"a/b": "c"}, "models": {}, "known": {"mine": "d"},
             "num_processes": 2, "max_minutes": 9},
        ),
        ("know_hf.hub.pull", "pull me/repo --output-dir out --revision v1", ("me/repo", "out"), {"revision": "v1"}),
        (
            "know_hf.trajectory.merging.merge_adapters",
            "merge t --base_model b --output-dir out --dtype bfloat16",  # _ is accepted for -
            ("t", "b"),
            {"output_dir": "out", "dtype": torch.bfloat16, "overwrite": False},
        ),
    ],
)  # fmt: skip
def test_commands_call_their_function(monkeypatch, capsys, target, command, args, options):
    calls = []
    result = SimpleNamespace(num_states=2, path="the result", start=None, states=(), tail=(), branches=())
    monkeypatch.setattr(target, lambda *args, **options: calls.append((args, options)) or result)
    assert main(command.split()) == 0
    assert "the result" in capsys.readouterr().out
    assert calls[0][0] == args
    assert {name: value for name, value in calls[0][1].items() if name != "command"} == options


def test_the_template_is_a_suite(tmp_path, capsys):
    assert main(["compare", "--template"]) == 0
    path = tmp_path / "my.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    suite = load_suite(path)
    assert suite.source.dataset == "sklearn/digits" and suite.arms[0].name == "naive"
    assert all(suite.trials_per_rate % len(arm.settings) == 0 for arm in suite.arms)


CONFIG = """
task: causal-lm
model: some/model
dataset: some/dataset
output_dir: out
epochs: 2
lora: {r: 4, use_dora: true}
training: {learning_rate: 1.0e-5, warmup_steps: 10}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def record(monkeypatch):
    """Runs `know-hf record` and returns the arguments that it read."""
    read = []

    def record(*flags):
        assert main(["record", *flags, "--plan"]) == 0
        return read.pop()

    monkeypatch.setattr("know_hf.tasks.recording_plan.plan_task", lambda args: read.append(args) or "")
    return record


def test_flags_of_record_override_or_replace_the_yaml(config, record):
    flags = "--epochs 4 --max_length 128 --pack --eval-split none --training learning_rate=5e-4 fp16=true --lora r=16"
    args = record("--config", config, *flags.split())
    assert (args.task, args.model) == ("causal-lm", "some/model")
    assert (args.epochs, args.max_length, args.pack, args.eval_split) == (4, 128, True, None)
    assert args.training == {"learning_rate": 5e-4, "warmup_steps": 10, "fp16": True}
    assert (args.lora.r, args.lora.use_dora, args.lora.target_modules) == (16, True, "all-linear")
    assert record("--config", config, "--lora", "none").lora is None
    assert record("--config", config) == RecordArguments.from_yaml(config)
    flags = ["--task", "causal-lm", "--model", "some/model", "--dataset", "some/dataset", "--output-dir", "out"]
    full = [*flags, "--epochs", "2", "--lora", "r=4", "use_dora=true"]
    assert record(*full, "--training", "learning_rate=1e-5", "warmup_steps=10") == RecordArguments.from_yaml(config)
    assert record(*flags, "--lora", "target_modules=[q, v]").lora.target_modules == ["q", "v"]
    assert record(*flags, "--lora").lora.r == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config", "{typo}"], ["{typo}", "'epoch'", "'epochs'"]),
        (["--config", "{config}", "--training", "fp16"], ["--training fp16", "KEY=VALUE"]),
        (["--task", "causal-lm"], ["model", "--model"]),
    ],
)
def test_wrong_arguments_of_record_are_one_line(tmp_path, config, capsys, flags, words):
    typo = tmp_path / "typo.yaml"
    typo.write_text(CONFIG.replace("epochs", "epoch"))
    names = {"config": config, "typo": typo}
    assert main(["record", *(flag.format(**names) for flag in flags)]) == 1
    error = one_line(capsys, "record")
    assert all(word.format(**names) in error for word in words)


def test_record_prints_the_next_command(config, recorded, monkeypatch, capsys):
    monkeypatch.setattr("know_hf.tasks.record.record_task", lambda args: WeightTrajectory(recorded))
    assert main(["record", "--config", config]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == f"Recorded in {recorded}; next:"
    assert last == f"know-hf predict {recorded} --output-dir {recorded.with_name('enhanced')}"
    make_parser().parse_args(shlex.split(last)[1:])


def test_record_reports_a_busy_folder(config, tmp_path, monkeypatch, capsys):
    busy, free = (WeightTrajectory.create(tmp_path / "trajectory") for _ in range(2))
    model = make_resnet()
    monkeypatch.setattr("know_hf.tasks.record.record_task", lambda _: free.record(model, num_examples=1, steps=1))
    with busy.recording():
        assert main(["record", "--config", config]) == 1
    error = one_line(capsys, "record")
    assert "another process" in error and str(free.path) in error


def test_record_can_only_plan(config, monkeypatch, capsys):
    plan = RecordingPlan([100, 50], [20, 5], [2, 1], 250, 1.5, 3_000_000, 12_000_000, 10**9)
    monkeypatch.setattr("know_hf.tasks.recording_plan.plan_task", lambda args: plan)
    monkeypatch.setattr("know_hf.tasks.record.record_task", None)
    assert main(["record", "--config", config, "--plan"]) == 0
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()[1:3]] == [["0", "100", "2", "20"], ["1", "50", "1", "5"]]
    for text in ("25 steps", "2.50 epochs", "1.25 times", "1.50", "12.0 MB", "3,000,000", "36.0 MB", "1.0 GB"):
        assert text in out


def test_errors_name_flags_and_files_that_do_not_exist(recorded, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["predict", str(recorded), "--predictor", "average", "--output-dir", str(tmp_path)]) == 1
    error = one_line(capsys, "predict")
    assert "--overwrite" in error and "overwrite=True" not in error
    assert main(["record", "--config", str(tmp_path / "nope.yaml")]) == 1
    assert "nope.yaml does not exist" in one_line(capsys, "record")
    assert main(["record"]) == 1
    assert "the flags: missing --task, --model, --dataset, --output-dir; " in one_line(capsys, "record")
    assert main(["record", "--config", str(tmp_path)]) == 1
    assert "is a folder; give a YAML file" in one_line(capsys, "record")
    record = ["record", "--task", "text-classification", "--model", "m", "--dataset", "d", "--output-dir", "o"]
    assert main([*record, "--epochs", "-1"]) == 1
    assert "--epochs -1.0: must be positive" in one_line(capsys, "record")
    assert main([*record, "--dataset", str(tmp_path / "file")]) == 1
    assert "file is a file; give the folder" in one_line(capsys, "record")
    assert main(["compare", "digits", "--output-dir", str(tmp_path / "file")]) == 1
    assert "is a file; choose a folder" in one_line(capsys, "compare")
    assert main(["compare", "digits", "--output-dir", str(tmp_path / "file" / "out")]) == 1
    assert "file" in (error := one_line(capsys, "compare")) and "Errno" not in error
    assert main(["compare", "digits", "--output-dir", str(tmp_path / "out"), "--processes", "0"]) == 1
    assert "--processes 0: must be at least 1" in one_line(capsys, "compare")
    assert main(["compare", "nosuch", "--output-dir", str(tmp_path / "out")]) == 1
    error = one_line(capsys, "compare")
    assert "unknown suite 'nosuch'; available: " in error and "site-packages" not in error


def test_output_survives_terminals_of_any_encoding(recorded):
    code = "import sys; from know_hf.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "predict", str(recorded), "--output-dir", "out", "--known", 1000 * "Σ"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 1 and b"\\u03a3" in done.stderr and b"Traceback" not in done.stderr
    assert len(done.stderr) < 3000  # long names are cut
    program = "from know_hf.terminal import run_program; run_program('x', lambda: print('Σ'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\u03a3\n", b"")


def test_defects_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("know_hf.evaluation.run_suite", lambda *_, **__: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        main(["compare", "digits", "--output-dir", "out"])


@pytest.mark.parametrize("steps", ["0", "-1", "1001", "9" * 100])
def test_numbers_of_steps_are_bounded(recorded, tmp_path, capsys, steps):
    assert main(["predict", str(recorded), "--steps", steps, "--output-dir", str(tmp_path / "out")]) == 1
    error = one_line(capsys, "predict")
    assert "steps must be an integer from 1 to 1000, got" in error and len(error) < 200


def test_the_report_replaces_no_input(trajectory_copy, tmp_path, capsys):
    known, other = tmp_path / "known", tmp_path / "other.json"
    shutil.copytree(SHIPPED_KNOWN, known)
    other.write_text("{}")
    before = hashes(trajectory_copy)
    command = ["predict", str(trajectory_copy), "--known", str(known), "--output-dir", str(tmp_path / "out")]
    for report in (trajectory_copy / "trajectory.json", trajectory_copy / "new.json", known / "config.json"):
        assert main([*command, "--overwrite", "--report", str(report)]) == 1
        assert "inside the" in one_line(capsys, "predict")
    assert main([*command, "--report", str(other)]) == 1
    assert "--overwrite" in one_line(capsys, "predict")
    assert hashes(trajectory_copy) == before and hashes(known) == hashes(SHIPPED_KNOWN)
    assert not (tmp_path / "out").exists() and other.read_text() == "{}"


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("know_hf.evaluation.run_suite", interrupt)
    assert main(["compare", "digits", "--output-dir", "out"]) == 130
    assert capsys.readouterr().err == "\nknow-hf compare: interrupted\n"


def test_a_closed_output_is_no_error():
    program = "import sys; from know_hf.terminal import run_program; run_program('x', lambda: sys.stdout.write('Σ'))"
    command = f'{shlex.quote(sys.executable)} -c "{program}" >&-'
    done = subprocess.run(command, shell=True, capture_output=True, env=dict(os.environ), check=False)
    assert (done.returncode, done.stderr) == (0, b"")
