"""What `know-hf` prints: JSON, nothing, one line for errors, and help with the names of everything."""

import json
import logging
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from tqdm.auto import tqdm

import know_hf
from know_hf.cli import main, make_parser
from know_hf.cli.parser import KERNELS, PREDICTORS, flags
from know_hf.cli.program import name_flags
from know_hf.known import kernels
from know_hf.predictors import protocol
from know_hf.tasks.recording_plan import RecordingPlan
from know_hf.trajectory import WeightTrajectory

COMMANDS = next(action.choices for action in make_parser()._actions if action.dest == "command")


def document(capsys):
    """The JSON document on standard output."""
    return json.loads(capsys.readouterr().out)


def noisy(*args, **options):
    """A result after what libraries print."""
    sys.stdout.write("noise\n")
    logging.getLogger("noise").warning("noise")
    for _ in tqdm([1], desc="noise", disable=False):
        pass
    return SimpleNamespace(num_states=0, path="out", start=None, states=(), tail=(), branches=())


@pytest.mark.parametrize(
    ("target", "command", "values"),
    [
        (
            "know_hf.trajectory.merging.merge_adapters",
            "merge t --output-dir out",
            {"path": "out", "num_states": 0, "snapshots": []},
        ),
        ("know_hf.hub.push", "push enhanced me/model", {"url": "out"}),
        ("know_hf.hub.pull", "pull me/model --output-dir out", {"path": "out"}),
    ],
)
def test_json_is_alone_on_standard_output_and_quiet_hides_the_rest(monkeypatch, capsys, target, command, values):
    call = noisy if "merge" in target else lambda *args, **options: noisy().path
    monkeypatch.setattr(target, call)
    assert main([*command.split(), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == values
    assert "noise\n" in shown.err and "1/1" not in shown.err  # no bars: standard error is no terminal
    assert main([*command.split(), "--json", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert (json.loads(shown.out), shown.err) == (values, "")
    assert main([*command.split(), "--quiet"]) == 0
    assert tuple(capsys.readouterr()) == ("", "")


def test_quiet_prints_errors(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nosuch"), "--quiet", "--json"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "nosuch does not exist" in shown.err


def test_json_of_inspect_and_predict(recorded, tmp_path, capsys):
    assert main(["inspect", str(recorded), "--roles", "--json"]) == 0
    summary = document(capsys)
    assert [record["num_examples"] for record in summary["snapshots"]] == [64, 32, 16, 8, 4, None]
    assert summary["roles"]["classifier.1.weight"]["shape"] == [4, 16]
    assert list(summary["displacement"]["fc"]) == [f"state-{index}" for index in range(5)]
    command = ["predict", str(recorded), "--predictor", "shrink", '--predictor-options={"factor": 0.5}', "--json"]
    out = tmp_path / "out"
    assert main([*command, "--output-dir", str(out), "--dry-run"]) == 0
    plan = document(capsys)
    assert plan["name"] == "Shrink" and plan["tensors"]["classifier.1.weight"]["network"] == "fc"
    assert main([*command, "--output-dir", str(out), "--report", str(tmp_path / "report.json")]) == 0
    result = document(capsys)
    assert (result["path"], result["url"], result["gate"]) == (str(out), None, None)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.pop("tensors")["classifier.1.weight"]["shrink_factor"] == pytest.approx(0.5)
    assert report["roles"]["fc"]["shrink_factor"] == pytest.approx(0.5) and report.items() <= result.items()


def test_json_of_record(recorded, monkeypatch, capsys):
    flags = "record --task causal-lm --model some/model --dataset some/dataset --output-dir out --json".split()
    plan = RecordingPlan([100, 50], [20, 5], [2, 1], 250, 1.5, 3_000_000, 12_000_000, 10**9)
    monkeypatch.setattr("know_hf.tasks.recording_plan.plan_task", lambda args: plan)
    assert main([*flags, "--plan"]) == 0
    assert document(capsys)["bytes_needed"] == 36_000_000
    monkeypatch.setattr("know_hf.tasks.record.record_task", lambda args: WeightTrajectory(recorded))
    assert main(flags) == 0
    result = document(capsys)
    assert result["path"] == str(recorded) and result["next"].startswith("know-hf predict ")
    assert len(result["snapshots"]) == 6


def test_names_in_the_help_are_those_of_the_package():
    assert ("auto", *kernels.KERNELS) == KERNELS
    own = {name for name, cls in protocol._PREDICTORS.items() if cls.__module__.startswith("know_hf.")}
    assert set(PREDICTORS) == own


@pytest.mark.parametrize("flags", [["--kernel", "fast"], ["--predictor", "nosuch"], ["--predictor", "average+nosuch"]])
def test_unknown_names_are_refused_with_the_known_ones(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["predict", "t", "--output-dir", "out", *flags])
    error = capsys.readouterr().err
    assert (
        flags[1].rpartition("+")[2] in error and {"--kernel": "folded", "--predictor": "jackknife"}[flags[0]] in error
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_description_defaults_and_an_example_that_parses(command):
    parser = COMMANDS[command]
    assert parser.description
    for action in parser._actions:
        if action.default and action.default != "==SUPPRESS==":
            assert "(default: " in action.help, action.dest
    title, *examples = parser.epilog.splitlines()
    assert title == "example:" and examples
    for example in examples:
        program, *arguments = shlex.split(example)
        assert program == "know-hf" and make_parser().parse_args(arguments).command == command
        assert example in parser.format_help()


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("pass overwrite=True", "pass --overwrite"),
        ("not recorded; pass base_model=, the model", "not recorded; pass --base-model, the model"),
        ("open a pull request (create_pr=True)", "open a pull request (--create-pr)"),
        ("pass revision='x' instead of create_pr", "pass --revision 'x' instead of --create-pr"),
        ("steps=-1: must be positive", "--steps -1: must be positive"),
        ("no example of steps=512 tokens", "no example of --steps 512 tokens"),
        ("pass gate=Gate(data), token= or model_class=", "pass gate=Gate(data), token= or model_class="),
        ("/tmp/base_model/x, 'base_model', a.base_model=3", "/tmp/base_model/x, 'base_model', a.base_model=3"),
        ("pass base_model=. base_model.model.a", "pass --base-model. base_model.model.a"),
        ("the overwrite of two steps", "the overwrite of two steps"),
    ],
)  # fmt: skip
def test_errors_name_flags(message, shown):
    names = ("overwrite", "base_model", "create_pr", "revision", "steps")
    assert name_flags(message, {name: f"--{name.replace('_', '-')}" for name in names}) == shown
    assert (
        name_flags("split= or max_examples=0", flags(COMMANDS["predict"]))
        == "--validation-split or --max-validation 0"
    )


def test_errors_of_commands_name_their_flags(monkeypatch, capsys):
    def fail(*args, **options):
        raise ValueError("pass base_model= and kernel=")

    monkeypatch.setattr("know_hf.trajectory.merging.merge_adapters", fail)
    assert main(["merge", "t", "--output-dir", "out"]) == 1
    assert capsys.readouterr().err == "know-hf merge: pass --base-model and kernel=\n"


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("offline"), LocalEntryNotFoundError("not cached")])
def test_errors_of_the_connection_say_how_to_do_without(monkeypatch, capsys, error):
    def fail(*args, **options):
        raise OSError("cannot load") from error

    monkeypatch.setattr("know_hf.evaluation.run_suite", fail)
    assert main(["compare", "reviews", "--output-dir", "out"]) == 1
    message = capsys.readouterr().err
    assert "--data ID=FOLDER" in message and "--model ID=FOLDER" in message
    monkeypatch.setattr("know_hf.evaluation.run_suite", lambda *_, **__: exec('raise OSError("full")'))
    assert main(["compare", "reviews", "--output-dir", "out"]) == 1
    assert capsys.readouterr().err == "know-hf compare: full\n"


@pytest.mark.parametrize("name", ["./nosuch", "~/nosuch", "/nosuch", "a/b/c", "nosuch/", "..\\nosuch"])
@pytest.mark.parametrize(
    "command",
    [
        "predict t --output-dir out --known",
        "predict t --output-dir out --validation",
        "merge t --output-dir out --base-model",
        "import --output-dir out me/model",
        "compare me/a me/b --dataset",
        "compare digits --output-dir out --known",
        "record --task causal-lm --dataset some/dataset --output-dir out --model",
    ],
)
def test_a_folder_that_does_not_exist_is_refused_before_the_hub_is_asked(command, name, capsys):
    arguments = [*command.split(), name if "digits" not in command else f"mine={name}"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert f"no such folder: {name}" in error and error.count("\n") == 1


def test_python_runs_the_package():
    done = subprocess.run([sys.executable, "-m", "know_hf", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"know_hf {know_hf.__version__}\n"
