"""recipes/hyper_model on toy tasks."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from know_hf import WeightTrajectory
from know_hf.evaluation.suites import load_suite
from know_hf.evaluation.suites.suite import SUITES_DIR

RECIPE = Path(__file__).parents[1] / "recipes" / "hyper_model"
SPLIT = """
inputs: {image_size: 8, channels: 1}
source: {characters: 3, train: 24, validation: 6}
target: {characters: 3, labels_per_class: 2}
schedule: {ratio: 0.5, num_states: 3, tail_states: 2}
stages: [1.0]
training: {per_device_train_batch_size: 4, learning_rate: 0.003, use_cpu: true}
architectures:
  mlp: {class_name: MLP, config: {width: 6, num_inputs: 64}}
  vit:
    class_name: ViTForImageClassification
    config: {image_size: 8, patch_size: 4, num_channels: 1, hidden_size: 8, num_hidden_layers: 1,
             num_attention_heads: 1, intermediate_size: 8}
regimes: {short: {epochs: 1}, pretrained: {epochs: 1, pretrained: 1}}
parts:
  train: {first_seed: 20, tasks: 3, alphabets: [A, B], pretraining: [A, B, C], architectures: [mlp, vit]}
  test: {first_seed: 30, tasks: 1, alphabets: [B, C], pretraining: [A], architectures: [mlp]}
"""


@pytest.fixture
def recipe(monkeypatch, load_script):
    """The modules of the recipe by name."""
    names = ("meta_tasks", "objective", "record", "search", "gradient", "report")
    modules = {name: load_script(RECIPE / f"{name}.py") for name in names}
    monkeypatch.setattr(modules["meta_tasks"], "_TARGET_VALIDATION", 6)
    return SimpleNamespace(**modules)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a split and data: 3 alphabets of 4 characters, a blurred pattern each."""
    folder = tmp_path_factory.mktemp("hyper_model")
    (folder / "split.yaml").write_text(SPLIT)
    random, rows = np.random.RandomState(0), []
    for label in range(12):
        pattern = random.randint(0, 256, (8, 8))
        for _ in range(14):
            image = np.clip(pattern + random.randint(-60, 60, (8, 8)), 0, 255).astype(np.uint8)
            rows.append({"image": image, "label": label, "alphabet": "ABC"[label // 4]})
    from PIL import Image

    rows = [{**row, "image": Image.fromarray(row["image"])} for row in rows]
    (folder / "data").mkdir()
    Dataset.from_list(rows).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


def run(module, folder, *flags):
    common = ("--data", folder / "data", "--output-dir", folder / "out", "--split", folder / "split.yaml")
    arguments = module.make_parser().parse_args(list(map(str, (*flags, *common))))
    return module.main(arguments)


@pytest.fixture
def tasks(recipe, folder):
    assert run(recipe.record, folder, "--parts", "train", "test") == 0
    return recipe.objective.load_tasks(folder / "split.yaml", "train", str(folder / "data"), folder / "out")


def test_shipped_split_is_apart_from_the_suites(recipe):
    split = recipe.meta_tasks.read_split(RECIPE / "split.yaml")
    suites = [load_suite(path) for path in SUITES_DIR.glob("*.yaml")]
    assert not any(
        split["dataset"] in side.dataset.lower() for suite in suites for side in (suite.source, suite.target)
    )
    assert all(part["first_seed"] > 10_000 for part in split["parts"].values())
    models = [(suite.model.class_name, suite.model.config) for suite in suites]
    assert not any((own["class_name"], own["config"]) in models for own in split["architectures"].values())
    train, validation, test = (set(part["alphabets"]) for part in split["parts"].values())
    assert not (train & validation or train & test or validation & test)


def test_soft_maximum(recipe):
    values = torch.tensor([[0.5, 0.5], [0.5, 0.6]])
    even, uneven = recipe.objective.soft_maximum(values, temperature=0.01).tolist()
    assert even == pytest.approx(0.5)
    assert 0.55 < uneven < 0.6


def test_controls_are_combinations(recipe, tasks):
    task = tasks[0]
    rules = recipe.objective.controls(task)
    weights = {name: task.weights(rule(task)) for name, rule in rules.items()}
    nested, branches = (WeightTrajectory(task.task.folder / name) for name in ("nested", "branches"))
    name = "features.1.weight"
    assert torch.equal(weights["naive"][name], nested.tensor(name))
    assert not torch.equal(weights["compute-matched"][name], nested.tensor(name))
    for control, expected in {
        "average": nested.history(name).mean(dim=0),
        "start-0.5": (nested.tensor(name) + nested.tensor(name, "start")) / 2,
        "task-vector+0.5": 1.5 * nested.tensor(name) - 0.5 * nested.tensor(name, 2),
        "tail-average": sum(nested.tensor(name, state) for state in (0, "tail-0", "tail-1")) / 3,
        "branch-average": (branches.tensor(name, "branch-0") + branches.tensor(name, "branch-1")) / 2,
        "shrink-0.5": nested.tensor(name) / 2,
        "compute-matched": load_file(task.task.further / "model.safetensors")[name],
    }.items():
        assert torch.allclose(weights[control][name], expected, atol=1e-6), control


def test_utility_ignores_the_size_of_features_and_counts_source_loss(recipe, tasks):
    task = tasks[0]
    naive = task.utility(task.theta0)
    assert naive.source_loss == pytest.approx(task.source_loss)
    assert naive.accuracy == pytest.approx(naive.per_draw.mean())
    last = {name: tensor * (2 if name.startswith("features.3") else 1) for name, tensor in task.theta0.items()}
    larger = task.utility(last)
    assert larger.accuracy == pytest.approx(naive.accuracy)
    wrong = task.utility({**task.theta0, "classifier.weight": -5 * task.theta0["classifier.weight"]})
    assert wrong.source_loss > naive.source_loss
    cost = min(0.1 * (wrong.source_loss - naive.source_loss), 0.1)
    assert wrong.per_draw.mean() == pytest.approx(naive.accuracy - cost)


def test_a_task_of_some_characters_has_their_drawings_only(recipe, tasks):
    task = tasks[0]
    some = task.of_characters([0, 2])
    assert some.num_labels == 2 and some.train.shape[0] == task.train.shape[0]
    for old, new in ((task.train, some.train), (task.test, some.test)):
        before, after = task.images["labels"][new], some.images["labels"][new]
        assert set(before.flatten().tolist()) == {0, 2} and torch.equal(after, (before == 2).long())
        assert len(new[0]) == int(torch.isin(task.images["labels"][old[0]], torch.tensor([0, 2])).sum())
    assert 0 <= some.utility(task.theta0).accuracy <= 1


def test_gradient_reads_the_weights_that_are_evaluated(recipe, tasks):
    for task in tasks:
        of_task = recipe.gradient.DifferentiableTask(task, leave_out=("tail",))
        coefficients = torch.linspace(-0.4, 0.4, len(of_task.elements)).repeat(len(task.bases), 1)
        values = dict(zip(of_task.elements, coefficients[0].tolist(), strict=True)) | {"tail": 0.0}
        expected = task.weights(dict.fromkeys(task.bases, values))
        weights = of_task.weights(coefficients)
        assert weights.keys() == expected.keys() == task.model.state_dict().keys()
        for name, tensor in expected.items():
            assert torch.allclose(weights[name], tensor, atol=1e-6), name


def test_fitted_coefficients_raise_the_smooth_utility(recipe, tasks):
    task = recipe.gradient.DifferentiableTask(tasks[0])
    zero = torch.zeros(len(task.stacks), len(task.elements))
    for loss in (task.loss, task.validation_loss, task.episode_loss):
        assert loss(recipe.gradient.fit_coefficients(task, loss, steps=20)).item() < loss(zero).item()
    free = recipe.gradient.DifferentiableTask(tasks[0], penalties=[0.1], loss_weight=0.0)
    far = torch.ones_like(zero)  # where source loss costs
    assert free.loss(far).item() < task.loss(far).item() <= 0.1
    halves = [tasks[0].is_tested(half) for half in (0, 1)]
    assert torch.equal(halves[0], ~halves[1])


def test_batch_norm_of_first_examples(recipe):
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    images = torch.randn(6, 3, 4, 4) + torch.arange(6.0)[:, None, None, None]
    with recipe.gradient._batch_norm_of_first(model, 2):
        output = model(images).detach()
    assert output[:2].mean() == pytest.approx(0, abs=1e-5)
    assert torch.allclose(output[:2], model(images[:2]), rtol=0.03)  # the variance of BatchNorm divides by N
    assert output[2:].mean() > 1


def test_search_resumes_with_the_same_values(recipe, folder, tasks, capsys):
    pytest.importorskip("cma")
    flags = ("--population", 4, "--tasks", 1, "--draws", 2)
    assert run(recipe.search, folder, *flags, "--generations", 3, "--name", "whole") == 0
    for generations in (1, 3):
        assert run(recipe.search, folder, *flags, "--generations", generations, "--name", "parts") == 0
    logs = [(folder / "out" / "searches" / name / "log.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["generation"] for line in logs[0].splitlines()] == [0, 1, 2]
    for table in ("coefficients", "controls"):
        assert run(recipe.report, folder, table, "--parts", "train", "--searches", "whole") == 0
    assert "| whole |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="other settings"):
        run(recipe.search, folder, "--population", 6, "--name", "whole")


def test_tables_without_a_search(recipe, folder, tasks, capsys):
    for table in ("controls", "elements", "noise"):
        assert run(recipe.report, folder, table, "--parts", "train") == 0
    printed = capsys.readouterr().out
    assert "best control of each task" in printed
    assert "| branches |" in printed
    assert "| pretrained |" in printed


@pytest.mark.parametrize("element", ["states", "start", "filtered"])
def test_a_network_learns_without_an_element(recipe, tasks, element):
    model = recipe.gradient.train_network(tasks[:1], steps=2, rate=0.01, batch=1, seed=0, leave_out=(element,))
    assert any(parameter.any() for parameter in model.combination.tensor_head.parameters())


def test_trained_network_is_in_tables(recipe, folder, tasks, capsys, monkeypatch):
    monkeypatch.setattr(recipe.gradient.fit_coefficients, "__defaults__", (False, 5))  # steps
    assert run(recipe.gradient, folder, "--steps", 2, "--batch", 1, "--name", "gradient") == 0
    for table, row in (
        ("controls", "gradient"),
        ("statistics", "spectrum"),
        ("ceiling", "coefficients of a tensor"),
        ("characters", "coefficients"),
        ("fitted", "fitted to validation data"),
    ):
        assert run(recipe.report, folder, table, "--parts", "train", "--searches", "gradient") == 0
        assert f"| {row} |" in capsys.readouterr().out


def test_shuffled_statistics_change_what_a_network_gives(recipe, tasks):
    model = recipe.search.new_network(0)
    torch.nn.init.normal_(model.combination.tensor_head.weight, generator=torch.Generator().manual_seed(0))
    found = SimpleNamespace(rule=recipe.search.model_rule(model))
    before = [found.rule(task) for task in tasks]
    seen = []
    recorded = SimpleNamespace(rule=lambda task: seen.append(found.rule(task)) or seen[-1])
    recipe.report.shuffled_utilities(tasks, recorded, "role and depth")
    assert seen != before
    assert [found.rule(task) for task in tasks] == before
