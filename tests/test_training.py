"""Meta-training of KNOWN, the skill of predictors, and the recipe."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from know_hf.configuration_known import KNOWNConfig
from know_hf.meta_learning import MetaTrainingArguments, RoleSkill, TransitionDataset, meta_train, retrodiction_skill
from know_hf.modeling_known import KNOWNModel
from know_hf.predictors import Shrink
from know_hf.trajectory import WeightTrajectory

RECIPE = Path(__file__).parents[1] / "recipes" / "meta_train"


def test_beats_no_change_on_held_out_trajectories_and_repeats(train, held_out):
    args = MetaTrainingArguments(steps=120, batch_size=256, learning_rate=3e-3, warmup_steps=10, log_every=50)
    result = meta_train(None, train, held_out, args=args, progress=False)
    for skills in (result.held_out_skill, result.train_skill):
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
    with pytest.raises(ValueError, match=r"a0 is trained on and held out"):
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
    ],
)
def test_wrong_training_arguments(fields, message):
    with pytest.raises(ValueError, match=message):
        MetaTrainingArguments(**fields)


def test_recipe_trains_and_writes_model_and_results(tmp_path, recipe, capsys):
    for number, split in enumerate(["train", "train", "held_out"]):
        record(tmp_path / "data" / f"net-{number}", seed=number)
        (tmp_path / "data" / f"net-{number}" / "recipe.json").write_text(json.dumps({"split": split}))
    flags = ["--trajectories", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    flags += ["--steps", "3", "--batch_size", "16", "--log_every", "2"]
    recipe.main(*recipe.parse_arguments(["--config", str(RECIPE / "known_base.yaml"), *flags]))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["trained_on"] == ["net-0", "net-1"] and results["held_out"] == ["net-2"]
    assert set(results["held_out_skill"]) == {"known", "shrink", "average", "linear"}
    assert results["held_out_skill"]["linear"]["fc"]["skill"] > 0.5
    assert results["held_out_skill"]["known"]["conv"]["trajectories"] == 1
    assert results["training_arguments"]["steps"] == 3
    model = KNOWNModel.from_pretrained(tmp_path / "out")
    assert model.config.trained_on["trajectories"] == 2
    held_out = TransitionDataset([tmp_path / "data" / "net-2"], max_per_tensor=None, progress=False)
    skill = retrodiction_skill(model, held_out)["conv"].skill
    assert results["held_out_skill"]["known"]["conv"]["skill"] == skill
    assert f"{skill:+.4f}" in capsys.readouterr().out


def test_recipe_flags_override_the_yaml(recipe, tmp_path):
    flags = ["--trajectories", "in", "--output_dir", "out"]
    script, training = recipe.parse_arguments(["--config", str(RECIPE / "known_base.yaml"), *flags])
    assert (script.trajectories, script.held_out, training.learning_rate) == ("in", None, 1e-3)
    script, training = recipe.parse_arguments(
        ["--config", str(RECIPE / "known_base.yaml"), *flags, "--learning_rate", "0.5", "--held_out", "a", "b-*"]
    )
    assert (script.held_out, training.learning_rate) == (["a", "b-*"], 0.5)
    (tmp_path / "wrong.yaml").write_text("learning_rte: 1")
    with pytest.raises(ValueError, match=r"not used.*--learning_rte"):
        recipe.parse_arguments(["--config", str(tmp_path / "wrong.yaml"), *flags])


def test_recipe_split(recipe, tmp_path):
    for name in ("cnn-0", "cnn-1", "vit-0"):
        record(tmp_path / name, num_states=2)
    train, held_out = recipe.split(tmp_path, ["vit-*"])
    assert ([path.name for path in train], [path.name for path in held_out]) == (["cnn-0", "cnn-1"], ["vit-0"])
    with pytest.raises(ValueError, match=r"no trajectory in .* matches held_out resnet-\*"):
        recipe.split(tmp_path, ["vit-*", "resnet-*"])
    with pytest.raises(ValueError, match=r"3 of 3 trajectories in .* are held out"):
        recipe.split(tmp_path, ["*"])
    with pytest.raises(ValueError, match=r"cnn-0 has no recipe\.json"):
        recipe.split(tmp_path, None)


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


def record(path, num_states=7, seed=0, frozen=(), moves_until=None):
    """A trajectory on which every weight moves along its own line, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    model, trajectory = Net(), WeightTrajectory.create(path)
    start = {name: 0.1 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    slope = {name: 0.02 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    for state in range(num_states):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                time = 0 if name in frozen else max(state, num_states - 1 - (moves_until or {}).get(name, num_states))
                noise = 0 if name in frozen or moves_until else 0.002
                parameter.copy_(start[name] + slope[name] * time)
                parameter += noise * torch.randn(parameter.shape, generator=generator)
        trajectory.record(model, num_examples=1000 - state, steps=1)
