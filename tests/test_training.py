"""Meta-training of KNOWN on one process."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from doubles.toy_trajectories import record_lines
from torch import nn

from know_hf.known import KNOWNConfig, KNOWNModel
from know_hf.meta_learning import (
    MetaTrainingArguments,
    RoleSkill,
    TransitionDataset,
    meta_train,
    start_processes,
    training,
)
from know_hf.meta_learning.objective import MetaObjective

README = Path(__file__).parents[1] / "recipes/meta_train/README.md"


def fit(train, known=None, held_out=None, validation=None, **arguments):
    """Train for two steps by default."""
    args = MetaTrainingArguments(**{"steps": 2, "batch_size": 8, **arguments})
    return meta_train(known, train, held_out, validation=validation, args=args, progress=False)


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for index in range(3):
        record_lines(Path(f"trajectory-{index}"), seed=index)
    code = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[0]
    exec(code.replace("steps=2000", "steps=4"), {})
    assert capsys.readouterr().out.startswith("role")
    assert KNOWNModel.from_pretrained("known").config.trained_on["trajectories"] == 2


def test_beats_no_change_on_held_out_trajectories_and_is_reproducible(train, held_out):
    options = {"steps": 60, "batch_size": 128, "learning_rate": 5e-3, "warmup_steps": 10, "log_every": 25}
    result = fit(train, held_out=held_out, **options)
    assert list(result.held_out_skill) == ["held_out"]
    assert (result.num_processes, result.validation) == (1, [])
    for skills in (result.held_out_skill["held_out"], result.train_skill):
        assert list(skills) == ["conv", "fc", "bias"]
        assert all(skill.skill > 0.2 for skill in skills.values())
    assert [entry["step"] for entry in result.losses] == [25, 50, 60]
    assert all(result.losses[-1][role] < result.losses[0][role] for role in ("conv", "fc", "bias"))
    assert not result.model.training
    assert result.model.config.trained_on == {"trajectories": 2, "roles": train.describe()}
    json.dumps(result.model.config.trained_on)
    table = [line.split() for line in str(result).splitlines()]
    assert [line[0] for line in table] == ["role", "conv", "fc", "bias", "60"]
    skills = [result.train_skill["conv"].skill, result.held_out_skill["held_out"]["conv"].skill]
    assert table[1][3:] == [f"{skill:+.3f}" for skill in skills]
    assert "KNOWNModel(" not in repr(result)

    torch.manual_seed(99)
    again = fit(train, KNOWNConfig(), **options)
    assert again.held_out_skill == {}
    weights = again.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in result.model.state_dict().items())


def test_trains_a_given_model_in_place(train):
    model = KNOWNModel(KNOWNConfig())
    before = model.state_dict()["networks.fc.head.weight"].clone()
    result = fit(train, model)
    assert result.model is model and not torch.equal(model.state_dict()["networks.fc.head.weight"], before)


def test_objective_includes_the_bias_regularizer(train):
    def outer_biases(bias_l1):
        model = KNOWNModel(KNOWNConfig())
        for network in model.networks.values():
            nn.init.constant_(network.history_stream.expand.bias, 0.5)
        fit(train, model, steps=30, batch_size=16, learning_rate=1e-2, warmup_steps=0, bias_l1=bias_l1)
        return torch.stack([n.history_stream.expand.bias.abs().mean() for n in model.networks.values()])

    assert (outer_biases(0.1) < outer_biases(0.0) - 0.05).all()


def test_relative_loss_divides_by_the_error_of_each_tensor(tmp_path):
    """Two trajectories weigh the same although one moves a thousandth as far."""
    record_lines(tmp_path / "far", seed=0)
    record_lines(tmp_path / "near", seed=0, scale=1e-3)
    dataset = TransitionDataset([tmp_path / "far", tmp_path / "near"], progress=False)
    far, near = (
        next(b for b in dataset.blocks if b.role == "fc" and b.trajectory.endswith(n)) for n in ("far", "near")
    )
    model = KNOWNModel(KNOWNConfig())
    for network in model.networks.values():
        nn.init.zeros_(network.head.weight)  # predicts no change
    losses = {}
    for weighting in ("none", "relative"):
        objective = MetaObjective(model, dataset, MetaTrainingArguments(loss_weighting=weighting))
        for block in (far, near):
            batch = dataset.by_role(range(block.start, block.stop))
            losses[weighting, block.trajectory[-3:]] = objective(batch)["fc"].item()
    assert losses["none", "far"] == pytest.approx(far.no_change) == pytest.approx(1e3 * near.no_change, rel=1e-3)
    mean = (far.no_change + near.no_change) / 2
    assert losses["relative", "far"] == pytest.approx(mean) == pytest.approx(losses["relative", "ear"])
    assert fit(dataset, loss_weighting="relative").losses[-1]["fc"] > 0


def test_relative_loss_needs_something_that_moves(tmp_path):
    record_lines(tmp_path / "a", moves_until={"fc.bias": 1, "conv.bias": 1})
    dataset = TransitionDataset([tmp_path / "a"], progress=False)
    with pytest.raises(ValueError, match=r"bias.*loss_weighting"):
        fit(dataset, loss_weighting="relative")


@pytest.fixture
def validate(train, held_out, monkeypatch):
    """Function that trains with the given validation skills, two steps apart, and notes the weights at each."""

    def run(skills, **arguments):
        evaluate, given, weights = training.retrodiction_skill, iter(skills), []

        def skill(model, dataset, processes):
            if dataset is not held_out:
                return evaluate(model, dataset, processes)
            weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            return {role: RoleSkill(value, 0.0, 0.0, 0) for role, value in next(given).items()}

        monkeypatch.setattr(training, "retrodiction_skill", skill)
        arguments = {"steps": 100, "eval_every": 2, "patience": 2, **arguments}
        return fit(train, validation=held_out, **arguments), weights

    return run


def test_early_stopping_returns_the_best_weights_on_the_validation_split(validate, train, held_out):
    """The third evaluation is the best."""
    result, weights = validate({"conv": skill} for skill in (0.1, 0.2, 0.5, 0.4, 0.3, 0.9, 0.9))
    assert result.validation == [{"step": 2 * n, "conv": s} for n, s in enumerate([0.1, 0.2, 0.5, 0.4, 0.3], start=1)]
    assert result.losses[-1]["step"] == result.steps_done == 10 and result.best_step == 6
    assert all(torch.equal(tensor, weights[2][name]) for name, tensor in result.model.state_dict().items())
    with pytest.raises(ValueError, match=r"patience=2.*validation"):
        fit(train, held_out=held_out, patience=2)


def test_validation_ignores_roles_that_do_not_move(validate, tmp_path):
    """Skills of minus infinity are not counted, and an evaluation without another skill is not counted either."""
    skills = ({"conv": -math.inf, "fc": fc} for fc in (0.1, 0.3, -math.inf, 0.2, 0.2))
    result, _ = validate(skills, save_every=2, checkpoint_dir=str(tmp_path))
    expected = [{"step": 2 * n, "conv": None, "fc": s} for n, s in enumerate([0.1, 0.3, None, 0.2, 0.2], start=1)]
    assert result.validation == expected
    assert (result.steps_done, result.best_step) == (10, 4)
    run = json.loads((tmp_path / "step-00000010" / "run.json").read_text())
    assert run["progress"]["validation"] == expected and run["progress"]["best"] == 0.3


def test_without_a_finite_validation_skill_the_last_weights_are_returned(validate):
    result, _ = validate(6 * [{"fc": -math.inf}], steps=6, eval_every=1, patience=1)
    assert (result.steps_done, result.best_step, len(result.validation)) == (6, None, 6)


def test_workers_change_nothing_and_bfloat16_little(train):
    options = {"steps": 20, "batch_size": 64, "log_every": 20}
    expected = fit(train, **options).losses[-1]
    assert fit(train, num_workers=1, **options).losses[-1] == expected
    AcceleratorState._reset_state()
    half = fit(train, mixed_precision="bf16", **options).losses[-1]
    AcceleratorState._reset_state()
    assert half != expected and half == pytest.approx(expected, rel=0.05)


def test_trackers_receive_losses_and_skills(train, held_out, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"steps": 4, "log_every": 2, "eval_every": 2, "report_to": ["tensorboard"]}
    result = fit(train, validation=held_out, logging_dir=str(tmp_path), **options)
    (folder,) = {path.parent for path in tmp_path.rglob("events*") if path.parent.name == "know_hf-meta_train"}
    events = EventAccumulator(str(folder)).Reload()
    assert [round(event.value, 7) for event in events.Scalars("loss/fc")] == [
        round(entry["fc"], 7) for entry in result.losses
    ]
    assert [event.step for event in events.Scalars("validation/fc")] == [2, 4]
    assert "learning_rate" in events.Tags()["scalars"]


def test_tracker_that_is_not_installed(train):
    with pytest.raises(ImportError, match="pip install swanlab"):
        fit(train, report_to=["swanlab"])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "2 processes.* 1;"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "::1"}, "several processes"),
    ],
)
def test_processes_that_would_train_alone(train, monkeypatch, variables, message):
    PartialState()  # before the variables change, which it reads
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=message):
        start_processes()
    with pytest.raises(RuntimeError, match="ACCELERATE_USE_CPU=1 torchrun"):
        fit(train)


def test_damaged_checkpoints_are_named(train, tmp_path):
    fit(train, checkpoint_dir=str(tmp_path))
    folder = tmp_path / "step-00000002"
    run = (folder / "run.json").read_text()
    for name, content in (
        ("run.json", ""),
        ("run.json", "[]"),
        ("run.json", '{"run": {}, "progress": {"typo": 1}}'),
        ("model.safetensors", ""),
        ("optimizer.bin", ""),
    ):
        (folder / "run.json").write_text(run)
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=f"{folder}.*delete {folder} to resume"):
            fit(train, checkpoint_dir=str(tmp_path))


def test_role_without_transitions_keeps_its_network(tmp_path):
    record_lines(tmp_path / "a", frozen=("conv.weight",))
    dataset = TransitionDataset([tmp_path / "a"], progress=False)
    model = KNOWNModel(KNOWNConfig())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = fit(dataset, model)
    assert list(result.train_skill) == ["fc", "bias"]
    unchanged = {name for name, tensor in result.model.state_dict().items() if torch.equal(tensor, before[name])}
    assert {name for name in before if name.startswith("networks.conv.")} <= unchanged
    assert "networks.fc.head.weight" not in unchanged
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_errors(train):
    with pytest.raises(ValueError, match=r"a0 .*train.*held_out"):
        fit(train, held_out=TransitionDataset(train.trajectories[:1], progress=False))
    with pytest.raises(ValueError, match=r"num_states=5.* 3 states"):
        fit(train, KNOWNConfig(num_states=3))
    broken = KNOWNModel(KNOWNConfig())
    nn.init.constant_(broken.networks["fc"].head.bias, float("nan"))
    with pytest.raises(FloatingPointError, match=r"'fc' is nan .* 2;.*learning_rate"):
        fit(train, broken)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps.*0"),
        ({"learning_rate": 0.0}, "learning_rate.*0.0"),
        ({"bias_l1": -0.1}, "bias_l1.*-0.1"),
        ({"loss_weighting": "log"}, "loss_weighting.*'log'"),
    ],
)
def test_wrong_training_arguments(fields, message):
    with pytest.raises(ValueError, match=message):
        MetaTrainingArguments(**fields)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    for number in range(2):
        record_lines(folder / f"a{number}", seed=number)
    return TransitionDataset([folder / "a0", folder / "a1"], progress=False)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    record_lines(folder / "a2", seed=2)
    return TransitionDataset([folder / "a2"], max_per_tensor=None, progress=False)
