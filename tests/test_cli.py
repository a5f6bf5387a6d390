import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from know_hf.cli import main, make_parser
from know_hf.inspection import inspect_trajectory


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "code",
    [
        "import know_hf; dir(know_hf)",
        "from know_hf.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from know_hf.cli import main\ntry: main(['quickstart', '--help'])\nexcept SystemExit: pass",
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


def test_predict_writes_the_checkpoint(recorded, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["predict", str(recorded), "--predictor", "shrink", "--output-dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "role" in printed
    assert printed.endswith(f"written to {out}\n")
    before = load_file(recorded / "state-0/model.safetensors")["classifier.1.weight"]
    torch.testing.assert_close(load_file(out / "model.safetensors")["classifier.1.weight"], 0.8 * before)


def test_errors_are_told_in_one_line(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"know-hf inspect: {tmp_path} holds no trajectory.json")
    assert error.count("\n") == 1
