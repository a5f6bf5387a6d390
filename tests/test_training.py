"""Meta-training of KNOWN, the skill of predictors, and the recipe."""

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import nn

from know_hf.known.configuration_known import KNOWNConfig
from know_hf.known.modeling_known import KNOWNModel
from know_hf.meta_learning import (
    MetaTrainingArguments,
    RoleSkill,
    TransitionDataset,
    meta_train,
    retrodiction_skill,
    start_processes,
    training,
)
from know_hf.meta_learning.objective import MetaObjective
from know_hf.predictors import Shrink, protocol
from know_hf.trajectory import WeightTrajectory

RECIPE = Path(__file__).parents[1] / "recipes" / "meta_train"


def test_beats_no_change_on_held_out_trajectories_and_repeats(train, held_out):
    args = MetaTrainingArguments(steps=120, batch_size=256, learning_rate=3e-3, warmup_steps=10, log_every=50)
    result = meta_train(None, train, held_out, args=args, progress=False)
    assert list(result.held_out_skill) == ["held_out"]
    assert (result.num_processes, result.validation) == (1, [])
    for skills in (result.held_out_skill["held_out"], result.train_skill):
        assert list(skills) == ["conv", "fc", "bias"]
        assert all(skill.skill > 0.3 for skill in skills.values())
    assert [entry["step"] for entry in result.losses] == [50, 100, 120]
    assert all(result.losses[-1][role] < result.losses[0][role] for role in ("conv", "fc", "bias"))
    assert not result.model.training
    assert result.model.config.trained_on == {"trajectories": 2, "roles": train.describe()}
    json.dumps(result.model.config.trained_on)

    torch.manual_seed(99)
    again = meta_train(KNOWNConfig(), train, args=args, progress=False)
    assert again.held_out_skill == {}
    weights = again.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in result.model.state_dict().items())


def test_goes_on_with_a_given_model(train):
    model = KNOWNModel(KNOWNConfig())
    before = model.state_dict()["networks.fc.head.weight"].clone()
    result = meta_train(model, train, args=MetaTrainingArguments(steps=2, batch_size=8), progress=False)
    assert result.model is model and not torch.equal(model.state_dict()["networks.fc.head.weight"], before)


def test_bias_regulariser_is_in_the_objective(train):
    def outer_biases(bias_l1):
        model = KNOWNModel(KNOWNConfig())
        for network in model.networks.values():
            nn.init.constant_(network.history_stream.expand.bias, 0.5)
        args = MetaTrainingArguments(steps=30, batch_size=16, learning_rate=1e-2, warmup_steps=0, bias_l1=bias_l1)
        meta_train(model, train, args=args, progress=False)
        return torch.stack([n.history_stream.expand.bias.abs().mean() for n in model.networks.values()])

    assert (outer_biases(0.1) < outer_biases(0.0) - 0.05).all()


def test_relative_loss_divides_by_the_error_of_each_tensor(tmp_path):
    """Two trajectories, one of which moves a thousandth as far: both count the same."""
    record(tmp_path / "far", seed=0)
    record(tmp_path / "near", seed=0, scale=1e-3)
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
            batch = dataset.__getitems__(range(block.start, block.stop))
            losses[weighting, block.trajectory[-3:]] = objective(batch)["fc"].item()
    assert losses["none", "far"] == pytest.approx(far.no_change) == pytest.approx(1e3 * near.no_change, rel=1e-3)
    mean = (far.no_change + near.no_change) / 2
    assert losses["relative", "far"] == pytest.approx(mean) == pytest.approx(losses["relative", "ear"])
    args = MetaTrainingArguments(steps=2, batch_size=8, loss_weighting="relative")
    assert meta_train(None, dataset, args=args, progress=False).losses[-1]["fc"] > 0


def test_relative_loss_needs_something_that_moves(tmp_path):
    record(tmp_path / "a", moves_until={"fc.bias": 1, "conv.bias": 1})
    dataset = TransitionDataset([tmp_path / "a"], progress=False)
    args = MetaTrainingArguments(steps=2, batch_size=8, loss_weighting="relative")
    with pytest.raises(ValueError, match=r"no tensor of the role bias moves in a step that is to be predicted"):
        meta_train(None, dataset, args=args, progress=False)


def test_ends_early_with_the_best_weights_on_the_validation_split(train, held_out, monkeypatch):
    """Only the looks decide; the third is the best."""
    skills = iter([0.1, 0.2, 0.5, 0.4, 0.3, 0.9, 0.9, 0.9])
    weights = []
    evaluate = training.retrodiction_skill

    def look(model, dataset, processes):
        if dataset is not held_out:
            return evaluate(model, dataset, processes)
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"conv": RoleSkill(next(skills), 0.0, 0.0, 0)}

    monkeypatch.setattr(training, "retrodiction_skill", look)
    args = MetaTrainingArguments(steps=100, batch_size=8, eval_every=2, patience=2)
    result = meta_train(None, train, validation=held_out, args=args, progress=False)
    assert result.validation == [{"step": 2 * n, "conv": s} for n, s in enumerate([0.1, 0.2, 0.5, 0.4, 0.3], start=1)]
    assert result.losses[-1]["step"] == result.steps_done == 10 and result.best_step == 6
    assert all(torch.equal(tensor, weights[2][name]) for name, tensor in result.model.state_dict().items())
    with pytest.raises(ValueError, match="patience=2 needs a validation split"):
        meta_train(None, train, held_out, args=args, progress=False)


def test_a_look_at_a_role_that_does_not_move_counts_the_others(train, held_out, monkeypatch, tmp_path):
    """Skills of minus infinity neither decide nor spoil the checkpoints; a look at nothing else is none."""
    evaluate = training.retrodiction_skill
    looks = iter([(-math.inf, 0.1), (-math.inf, 0.3), (-math.inf, -math.inf), (-math.inf, 0.2), (-math.inf, 0.2)])

    def look(model, dataset, processes):
        if dataset is not held_out:
            return evaluate(model, dataset, processes)
        return {role: RoleSkill(skill, 0.0, 0.0, 0) for role, skill in zip(("conv", "fc"), next(looks), strict=True)}

    monkeypatch.setattr(training, "retrodiction_skill", look)
    args = MetaTrainingArguments(steps=100, batch_size=8, eval_every=2, patience=2, save_every=2)
    args = replace(args, checkpoint_dir=str(tmp_path))
    result = meta_train(None, train, validation=held_out, args=args, progress=False)
    expected = [{"step": 2 * n, "conv": None, "fc": s} for n, s in enumerate([0.1, 0.3, None, 0.2, 0.2], start=1)]
    assert result.validation == expected
    assert (result.steps_done, result.best_step) == (10, 4)
    run = json.loads((tmp_path / "step-00000010" / "run.json").read_text())
    assert run["progress"]["validation"] == expected and run["progress"]["best"] == 0.3


def test_without_a_look_that_says_anything_the_last_weights_are_returned(train, held_out, monkeypatch):
    evaluate = training.retrodiction_skill

    def look(model, dataset, processes):
        nothing = {"fc": RoleSkill(-math.inf, 0.0, 0.0, 0)}
        return nothing if dataset is held_out else evaluate(model, dataset, processes)

    monkeypatch.setattr(training, "retrodiction_skill", look)
    args = MetaTrainingArguments(steps=6, batch_size=8, eval_every=1, patience=1)
    result = meta_train(None, train, validation=held_out, args=args, progress=False)
    assert (result.steps_done, result.best_step, len(result.validation)) == (6, None, 6)


def test_reading_processes_and_precision_change_little(train):
    args = MetaTrainingArguments(steps=20, batch_size=64, log_every=20)
    expected = meta_train(None, train, args=args, progress=False).losses[-1]
    assert meta_train(None, train, args=replace(args, num_workers=1), progress=False).losses[-1] == expected
    AcceleratorState._reset_state()
    half = meta_train(None, train, args=replace(args, mixed_precision="bf16"), progress=False).losses[-1]
    AcceleratorState._reset_state()
    assert half != expected and half == pytest.approx(expected, rel=0.05)


def test_trackers_are_told(train, held_out, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = MetaTrainingArguments(steps=4, batch_size=8, log_every=2, eval_every=2, report_to=["tensorboard"])
    args = replace(args, logging_dir=str(tmp_path))
    result = meta_train(None, train, validation=held_out, args=args, progress=False)
    (folder,) = {path.parent for path in tmp_path.rglob("events*") if path.parent.name == "know_hf-meta_train"}
    events = EventAccumulator(str(folder)).Reload()
    assert [round(event.value, 7) for event in events.Scalars("loss/fc")] == [
        round(entry["fc"], 7) for entry in result.losses
    ]
    assert [event.step for event in events.Scalars("validation/fc")] == [2, 4]
    assert "learning_rate" in events.Tags()["scalars"]


def test_trackers_that_are_not_there(train):
    args = MetaTrainingArguments(steps=1, batch_size=8, report_to=["swanlab"])
    with pytest.raises(ImportError, match="report_to=swanlab: not installed; pip install swanlab"):
        meta_train(None, train, args=args, progress=False)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "2 processes were launched, but accelerate runs 1"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "::1"},
            "several processes were asked for, but accelerate",
        ),
    ],
)
def test_processes_that_would_train_alone(train, monkeypatch, variables, message):
    PartialState()  # as it is: it reads the same variables
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=message):
        start_processes()
    with pytest.raises(RuntimeError, match="ACCELERATE_USE_CPU=1 torchrun"):
        meta_train(None, train, args=MetaTrainingArguments(steps=1, batch_size=8), progress=False)


def test_role_without_transitions_keeps_its_network(tmp_path):
    record(tmp_path / "a", frozen=("conv.weight",))
    dataset = TransitionDataset([tmp_path / "a"], progress=False)
    model = KNOWNModel(KNOWNConfig())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = meta_train(model, dataset, args=MetaTrainingArguments(steps=2, batch_size=8), progress=False)
    assert list(result.train_skill) == ["fc", "bias"]
    unchanged = {name for name, tensor in result.model.state_dict().items() if torch.equal(tensor, before[name])}
    assert {name for name in before if name.startswith("networks.conv.")} <= unchanged
    assert "networks.fc.head.weight" not in unchanged
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_skill_is_one_minus_the_ratio_of_sums(held_out):
    class Constant:
        num_states = None

        def residual(self, history, role):
            return torch.full((len(history),), 0.01 if role == "fc" else 0.0)

    skill = retrodiction_skill(Constant(), held_out)
    assert skill["conv"].skill == skill["bias"].skill == 0
    error = change = 0.0
    for block in held_out.blocks:
        if block.role == "fc":
            history, labels = held_out.block(block)
            error += (history[:, -1] + 0.01 - labels).abs().double().sum().item()
            change += (history[:, -1] - labels).abs().double().sum().item()
    assert skill["fc"].skill == pytest.approx(1 - error / change)
    count = sum(block.stop - block.start for block in held_out.blocks if block.role == "fc")
    assert skill["fc"].transitions == count
    assert skill["fc"].error == pytest.approx(error / count)
    assert skill["fc"].no_change == pytest.approx(change / count)
    assert skill["fc"].by_trajectory == {held_out.trajectories[0]: pytest.approx(skill["fc"].skill)}


def test_skill_of_a_part_estimates_that_of_all(tmp_path):
    """A tensor counts as much as it has scalars, however few were drawn."""
    record(tmp_path / "a")
    every = TransitionDataset([tmp_path / "a"], max_per_tensor=None, progress=False)
    some = TransitionDataset([tmp_path / "a"], max_per_tensor=100, progress=False)
    found, expected = (retrodiction_skill("linear", dataset) for dataset in (some, every))
    assert [skill.transitions for skill in found.values()] == [200, 200, 2 * (32 + 40)]
    for role in ("conv", "fc", "bias"):
        assert found[role].skill == pytest.approx(expected[role].skill, abs=0.05)
        assert found[role].median == found[role].skill
    error = change = 0.0
    for block in some.blocks:
        if block.role == "fc":
            history, labels = some.block(block)
            change += (history[:, -1] - labels).abs().double().sum().item() * 12.8
            error += 2560
    assert found["fc"].no_change == pytest.approx(change / error)


def test_skill_of_named_predictors(held_out):
    # The weights move on a line but for the noise, so a line beats no change and shrinking does not.
    assert all(skill.skill > 0.5 for skill in retrodiction_skill("linear", held_out).values())
    assert retrodiction_skill("shrink", held_out) == retrodiction_skill(Shrink(0.8), held_out)
    assert all(isinstance(skill, RoleSkill) for skill in retrodiction_skill("average", held_out).values())


def test_skill_where_nothing_moved(tmp_path):
    # The fc bias moves in the first step alone, which is in no window's last step.
    record(tmp_path / "a", moves_until={"fc.bias": 1, "conv.bias": 1})
    dataset = TransitionDataset([tmp_path / "a"], num_states=5, progress=False)
    assert retrodiction_skill(Shrink(1.0), dataset)["bias"].skill == 0
    assert retrodiction_skill("shrink", dataset)["bias"].skill == -math.inf


def test_errors(train, held_out, tmp_path):
    with pytest.raises(ValueError, match=r"a0 is trained on and held out \(held_out\)"):
        meta_train(None, train, TransitionDataset(train.trajectories[:1], progress=False), progress=False)
    with pytest.raises(ValueError, match=r"model takes 3 states, a dataset has num_states=5"):
        meta_train(KNOWNConfig(num_states=3), train, progress=False)
    with pytest.raises(ValueError, match=r"KNOWNPredictor takes 3 states, the dataset has num_states=5"):
        retrodiction_skill(KNOWNModel(KNOWNConfig(num_states=3)), held_out)
    broken = KNOWNModel(KNOWNConfig())
    nn.init.constant_(broken.networks["fc"].head.bias, float("nan"))
    with pytest.raises(FloatingPointError, match=r"loss of role 'fc' is nan before step 2.*smaller learning_rate"):
        meta_train(broken, train, args=MetaTrainingArguments(steps=2, batch_size=8), progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps=0: choose at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: choose a value above 0"),
        ({"bias_l1": -0.1}, "bias_l1=-0.1: choose 0 or more"),
        ({"loss_weighting": "log"}, "loss_weighting='log': choose 'none' or 'relative'"),
    ],
)
def test_wrong_training_arguments(fields, message):
    with pytest.raises(ValueError, match=message):
        MetaTrainingArguments(**fields)


def test_recipe_trains_and_writes_model_and_results(tmp_path, recipe, capsys):
    splits = ["train", "train", "held_out_trajectory", "train", "held_out_dataset"]
    for number, split in enumerate(splits):
        record(tmp_path / "data" / f"net-{number}", seed=number)
        (tmp_path / "data" / f"net-{number}" / "recipe.json").write_text(json.dumps({"split": split}))
    flags = ["--trajectories", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    flags += ["--steps", "3", "--batch_size", "16", "--log_every", "2", "--validation_share", "0.3", "--cache_dir"]
    flags += [str(tmp_path / "cache")]
    recipe.main(*recipe.parse_arguments(["--config", str(RECIPE / "known_base.yaml"), *flags]))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["validation"]) == 1 and results["held_out"] == ["net-2"]
    assert set(results["trained_on"] + results["validation"]) == {"net-0", "net-1", "net-3"}
    assert set(results["splits"]) == {"held_out_trajectory", "held_out_dataset"}
    assert results["splits"]["held_out_dataset"]["trajectories"] == ["net-4"]
    assert results["splits"]["held_out_trajectory"]["skill"] == results["held_out_skill"]
    assert list(results["held_out_skill"]) == ["known", "linear", "log", "average", "shrink", "ema", "task_vector"]
    assert results["held_out_skill"]["linear"]["fc"]["skill"] > 0.5
    assert results["held_out_skill"]["linear"]["fc"]["median"] == results["held_out_skill"]["linear"]["fc"]["skill"]
    assert results["held_out_skill"]["known"]["conv"]["trajectories"] == 1
    assert results["training_arguments"]["steps"] == 3 and results["steps_done"] == 3
    assert (results["best_step"], results["mixed_precision"]) == (None, "no")
    model = KNOWNModel.from_pretrained(tmp_path / "out")
    assert model.config.trained_on["trajectories"] == 2
    held_out = TransitionDataset([tmp_path / "data" / "net-2"], max_per_tensor=None, progress=False)
    skill = retrodiction_skill(model, held_out)["conv"].skill
    assert results["held_out_skill"]["known"]["conv"]["skill"] == skill
    output = capsys.readouterr().out
    assert f"{skill:+.4f}" in output and "held_out_dataset: skill" in output
    assert [path.name for path in sorted((tmp_path / "out/checkpoints").iterdir())] == ["step-00000003"]


def test_recipe_compares_with_the_published_weights(recipe):
    reference = Path(__file__).parents[2] / "shared" / "reference"
    if not reference.exists():
        pytest.skip("the published weights are not here")
    flags = ["--trajectories", "in", "--output_dir", "out", "--published_weights", str(reference)]
    script, _ = recipe.parse_arguments([*flags, "--predictors", "linear"])
    rivals = recipe.comparisons(script, KNOWNConfig())
    assert list(rivals) == ["published", "linear"] and isinstance(rivals["published"], KNOWNModel)


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--predictors", "linaer"], ValueError, "unknown predictor 'linaer'"),
        (["--predictors", "linear", "lines"], ValueError, "'lines' has to know how deep a layer lies"),
        (["--predictors", "long"], ValueError, "'long' takes 9 states, num_states=5"),
        (["--published_weights", "nowhere"], FileNotFoundError, r"nowhere/KNOWN_Conv\.h5 not found"),
    ],
)
def test_recipe_looks_at_what_it_compares_with_before_it_trains(recipe, tmp_path, monkeypatch, flags, error, message):
    class Long(Shrink):
        num_states = 9

    monkeypatch.setitem(protocol._PREDICTORS, "long", Long)
    monkeypatch.setattr("know_hf.meta_train", lambda *_, **__: pytest.fail("trained"))
    for number in range(2):
        record(tmp_path / f"net-{number}", seed=number)
    flags = ["--trajectories", str(tmp_path), "--held_out", "net-1", "--output_dir", str(tmp_path / "out"), *flags]
    with pytest.raises(error, match=message):
        recipe.main(*recipe.parse_arguments(flags))


def test_recipe_flags_override_the_yaml(recipe, tmp_path):
    flags = ["--trajectories", "in", "--output_dir", "out"]
    script, training = recipe.parse_arguments(["--config", str(RECIPE / "known_base.yaml"), *flags])
    assert (script.trajectories, script.held_out, training.learning_rate) == (["in"], [], 1e-3)
    script, training = recipe.parse_arguments(
        ["--config", str(RECIPE / "known_base.yaml"), *flags, "--learning_rate", "0.5", "--held_out", "a", "b-*"]
    )
    assert (script.held_out, training.learning_rate) == (["a", "b-*"], 0.5)
    (tmp_path / "null.yaml").write_text("cache_dir: null\nmixed_precision:\nsteps: 7\n")
    script, training = recipe.parse_arguments(["--config", str(tmp_path / "null.yaml"), *flags])
    assert (script.cache_dir, training.mixed_precision, training.steps) == (None, None, 7)
    (tmp_path / "wrong.yaml").write_text("learning_rte: 1")
    with pytest.raises(ValueError, match=r"not used.*--learning_rte"):
        recipe.parse_arguments(["--config", str(tmp_path / "wrong.yaml"), *flags])


def test_recipe_help_needs_no_torch():
    program = (
        "import runpy, sys\n"
        f"recipe = runpy.run_path({str(RECIPE / 'meta_train.py')!r})\n"
        "assert '--trajectories' in recipe['make_parser']().format_help()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture
def recipe():
    spec = importlib.util.spec_from_file_location("meta_train_recipe", RECIPE / "meta_train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    for number in range(2):
        record(folder / f"a{number}", seed=number)
    return TransitionDataset([folder / "a0", folder / "a1"], progress=False)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    record(folder / "a2", seed=2)
    return TransitionDataset([folder / "a2"], max_per_tensor=None, progress=False)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 32, 3)
        self.fc = nn.Linear(32, 40)


def record(path, num_states=7, seed=0, frozen=(), moves_until=None, scale=1.0, schedule=None):
    """A trajectory on which every weight moves along its own line, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    model, trajectory = Net(), WeightTrajectory.create(path, schedule)
    start = {name: 0.1 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    slope = {name: 0.02 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    for state in range(num_states):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                time = 0 if name in frozen else max(state, num_states - 1 - (moves_until or {}).get(name, num_states))
                noise = 0 if name in frozen or moves_until else 0.002
                parameter.copy_(start[name] + scale * slope[name] * time)
                parameter += scale * noise * torch.randn(parameter.shape, generator=generator)
        trajectory.record(model, num_examples=1000 - state, steps=1)
