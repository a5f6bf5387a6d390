import json
import subprocess
import sys

import pytest
import torch
from conftest import make_resnet
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import know_hf.tasks
from know_hf import WeightTrajectory
from know_hf.cli import main, make_parser
from know_hf.tasks import RecordingPlan
from know_hf.tasks.arguments import RecordArguments, read_flags
from know_hf.trajectory.summary import inspect_trajectory


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "code",
    [
        "import know_hf; dir(know_hf)",
        "from know_hf.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from know_hf.cli import main\ntry: main(['quickstart', '--help'])\nexcept SystemExit: pass",
        "from know_hf.cli import main\ntry: main(['record', '--help'])\nexcept SystemExit: pass",
        "from know_hf.cli import main\nassert main(['record', '--task', 'unknown']) == 1",
        "from know_hf import ForgettingSchedule; ForgettingSchedule().indices(100)",
    ],
)
def test_light_imports_need_neither_torch_nor_transformers(code):
    done = run_python(f"{code}\nimport sys; assert not {{'torch', 'transformers', 'datasets'}} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_every_public_name_can_be_imported():
    import know_hf

    for name in know_hf.__all__:
        assert getattr(know_hf, name) is not None
    with pytest.raises(AttributeError, match="'know_hf' has no attribute 'KnownModel'"):
        know_hf.KnownModel  # noqa: B018


def test_a_folder_that_is_recorded_to_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    busy, free = (WeightTrajectory.create(tmp_path / "trajectory") for _ in range(2))
    monkeypatch.setattr(know_hf.tasks, "record_task", lambda args: free.record(make_resnet(), num_examples=1, steps=1))
    command = ["record", "--task", "text-classification", "--model", "m", "--dataset", "d", "--output-dir", "out"]
    with busy.recording():
        assert main(command) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"know-hf record: another process is recording to {free.path}; wait for it to end")
    assert told.count("\n") == 1


def test_a_report_that_has_no_folder_is_told_before_the_work(recorded, tmp_path, capsys):
    command = [
        "predict",
        str(recorded),
        "--output-dir",
        str(tmp_path / "out"),
        "--report",
        str(tmp_path / "no" / "r.json"),
    ]
    assert main(command) == 1
    assert "there is no folder" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", [["--private"], ["--revision", "x"], ["--create-pr"]])
def test_flags_of_a_push_need_one(recorded, tmp_path, capsys, flag):
    assert main(["predict", str(recorded), "--output-dir", str(tmp_path / "out"), *flag]) == 1
    assert f"{flag[0]} is of a push; give --push-to-hub too" in capsys.readouterr().err


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit, match="0"):
        make_parser().parse_args(["--version"])
    assert capsys.readouterr().out == "know_hf 0.1.0\n"


def test_inspect_lists_states_roles_and_displacement(recorded, capsys):
    assert main(["inspect", str(recorded)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:4] == ["state", "examples", "steps", "eval_loss"]
    assert [line[:3] for line in lines[1:6]] == [
        ["0", "64", "32"],
        ["1", "32", "8"],
        ["2", "16", "4"],
        ["3", "8", "2"],
        ["4", "4", "1"],
    ]
    assert lines[1][4:] == ["0.0000"] * 4
    assert ["conv", "5", "5,000"] in lines


def test_inspect_can_list_every_tensor(recorded, capsys):
    assert main(["inspect", str(recorded), "--roles"]) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert ["fc", "4×16", "classifier.1.weight: weight of Linear, 2 axes"] in lines


def test_displacement_is_relative_to_the_full_data_state(trajectory):
    summary = inspect_trajectory(trajectory)
    fc = [name for name, role in trajectory.roles.items() if role.role == "fc"]
    states = [torch.cat([trajectory.tensor(name, s).flatten() for name in fc]).double() for s in range(5)]
    expected = [float((state - states[0]).norm() / states[0].norm()) for state in states]
    assert summary.displacement["fc"] == pytest.approx(expected)
    assert summary.displacement["fc"][0] == 0 < summary.displacement["fc"][4]
    assert "copied" not in summary.displacement


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_merge_makes_whole_models_of_adapters(tmp_path, capsys):
    base = make_resnet()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(target_modules=["classifier.1"], r=2))
    trajectory = WeightTrajectory.create(tmp_path / "adapters")
    for num_examples in (4, 2):
        trajectory.record(model, num_examples=num_examples, steps=1)
        torch.nn.init.constant_(model.base_model.model.classifier[1].lora_B["default"].weight, 0.1)
    command = ["merge", str(tmp_path / "adapters"), "--base-model", str(tmp_path / "base")]
    assert main([*command, "--output-dir", str(tmp_path / "merged")]) == 0
    assert f"2 states of whole models, written to {tmp_path / 'merged'}" in capsys.readouterr().out
    merged = WeightTrajectory(tmp_path / "merged")
    assert not merged.is_adapter
    assert torch.equal(merged.tensor("classifier.1.weight"), make_resnet().classifier[1].weight)
    assert not torch.equal(merged.tensor("classifier.1.weight", 1), merged.tensor("classifier.1.weight"))


def test_predict_dry_run_writes_nothing(recorded, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["predict", str(recorded), "--steps", "2", "--output-dir", str(out), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "fc              2            192  predicted as fc" in printed and "steps     2" in printed
    assert list(tmp_path.iterdir()) == []


def test_predict_takes_options_and_reports_every_tensor(recorded, tmp_path):
    options = ["--predictor", "shrink", "--predictor-options", '{"factor": 0.5}']
    report = tmp_path / "report.json"
    command = ["predict", str(recorded), *options, "--output-dir", str(tmp_path / "out"), "--report", str(report)]
    assert main(command) == 0
    tensors = json.loads(report.read_text())["tensors"]
    assert tensors["classifier.1.weight"]["shrink_factor"] == pytest.approx(0.5)


@pytest.mark.parametrize(("text", "message"), [("{factor}", "is not JSON"), ("[0.5]", "is no JSON object")])
def test_predictor_options_that_are_no_object(text, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["predict", "t", "--output-dir", str(tmp_path), "--predictor", "shrink", "--predictor-options", text])
    assert message in capsys.readouterr().err


def test_predict_writes_the_checkpoint(recorded, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["predict", str(recorded), "--predictor", "shrink", "--output-dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "role" in printed
    assert printed.endswith(f"written to {out}\n")
    before = load_file(recorded / "state-0/model.safetensors")["classifier.1.weight"]
    torch.testing.assert_close(load_file(out / "model.safetensors")["classifier.1.weight"], 0.8 * before)


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


def parse_record(*flags):
    return read_flags(make_parser().parse_args(["record", *flags]))


def test_flags_of_record_go_before_its_yaml(config):
    flags = "--epochs 4 --max-length 128 --pack --eval-split none --training learning_rate=5e-4 fp16=true --lora r=16"
    args = parse_record("--config", config, *flags.split())
    assert (args.task, args.model, args.epochs, args.max_length, args.pack) == (
        "causal-lm",
        "some/model",
        4,
        128,
        True,
    )
    assert args.eval_split is None
    assert args.training == {"learning_rate": 5e-4, "warmup_steps": 10, "fp16": True}
    assert (args.lora.r, args.lora.use_dora, args.lora.target_modules) == (16, True, "all-linear")
    assert parse_record("--config", config, "--lora", "none").lora is None
    assert parse_record("--config", config) == RecordArguments.from_yaml(config)


def test_flags_of_record_need_no_yaml(config):
    flags = ["--task", "causal-lm", "--model", "some/model", "--dataset", "some/dataset", "--output-dir", "out"]
    flags += ["--epochs", "2", "--lora", "r=4", "use_dora=true", "--training", "learning_rate=1e-5", "warmup_steps=10"]
    assert parse_record(*flags) == RecordArguments.from_yaml(config)
    assert parse_record(*flags[:8], "--lora", "target_modules=[q_proj, v_proj]").lora.target_modules == [
        "q_proj",
        "v_proj",
    ]


def test_mistyped_keys_of_record_are_told_in_one_line(tmp_path, config, capsys):
    path = tmp_path / "typo.yaml"
    path.write_text(CONFIG.replace("epochs", "epoch"))
    assert main(["record", "--config", str(path)]) == 1
    error = f"know-hf record: {path}: unknown key 'epoch'; did you mean 'epochs'?\n"
    assert capsys.readouterr().err == error
    assert main(["record", "--config", config, "--training", "fp16"]) == 1
    assert capsys.readouterr().err == "know-hf record: --training fp16: give KEY=VALUE\n"
    assert main(["record", "--config", config, "--lora", "rank=3"]) == 1
    assert "unknown key 'rank'; known are r, alpha" in capsys.readouterr().err


def test_record_says_what_was_recorded_and_what_comes_next(config, recorded, monkeypatch, capsys):
    monkeypatch.setattr(know_hf.tasks, "record_task", lambda args: WeightTrajectory(recorded))
    assert main(["record", "--config", config]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["state", "examples", "steps"]
    assert lines[-2:] == [
        f"recorded in {recorded}; next:",
        f"know-hf predict {recorded} --output-dir {recorded.with_name('enhanced')}",
    ]
    make_parser().parse_args(lines[-1].split()[1:])


def test_record_can_only_plan(config, monkeypatch, capsys):
    plan = RecordingPlan([100, 50], [20, 5], [2, 1], 250, 1.5, 3_000_000, 12_000_000, 10**9)
    monkeypatch.setattr(know_hf.tasks, "plan_task", lambda args: plan)
    monkeypatch.setattr(know_hf.tasks, "record_task", None)
    assert main(["record", "--config", config, "--plan"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "state    examples  epochs      steps",
        "    0         100       2         20",
        "    1          50       1          5",
        "",
        "cost: 25 steps, 250 examples seen: 2.50 epochs on all data, 1.25 times the training of state 0 alone"
        " (Σ r^k = 1.50)",
        "disk: 2 states of 12.0 MB (3,000,000 parameters) = 24.0 MB, 1.0 GB free",
    ]


def test_quickstart_prints_its_tables(tmp_path, capsys, monkeypatch):
    def run_quickstart(output_dir, seed):
        return f"tables of {output_dir} from seed {seed}"

    monkeypatch.setattr("know_hf.quickstart.run_quickstart", run_quickstart)
    assert main(["quickstart", "--output-dir", str(tmp_path), "--seed", "3"]) == 0
    assert capsys.readouterr().out == f"tables of {tmp_path} from seed 3\n"


def test_errors_are_told_in_one_line(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"know-hf inspect: {tmp_path} holds no trajectory.json")
    assert error.count("\n") == 1
