"""recipes/collect: the space, and a miniature collection from synthetic images, run as its users run it."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from know_hf import ForgettingSchedule, WeightTrajectory

FOLDER = Path(__file__).parents[1] / "recipes" / "collect"
MODULES = ("collect", "images", "models", "space")

ARCHITECTURES = {
    "cnn": {"model_class": "SmallCNN", "config": {"width": 2, "batch_norm": {"choice": [False, True]}}},
    "resnet": {
        "model_class": "ResNetForImageClassification",
        "config": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"},
    },
    "vit": {
        "model_class": "ViTForImageClassification",
        "config": {
            "patch_size": 4,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    },
}


@pytest.fixture
def collect(monkeypatch):
    """The script as a module; its neighbours' short names are given back afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import collect

    yield collect
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def space(collect):
    from space import Space

    return Space.from_yaml(FOLDER / "known_base.yaml")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A dataset folder of bright and dark 16×16 images in two classes."""
    import datasets
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["dark", "bright"])})
    random = np.random.RandomState(0)
    for split, count in (("train", 100), ("test", 20)):
        kinds = [index % 2 for index in range(count)]
        pictures = [Image.fromarray(random.randint(0, 128, (16, 16), np.uint8) + np.uint8(127 * k)) for k in kinds]
        table = datasets.Dataset.from_dict({"picture": pictures, "kind": kinds}, features=features)
        table.to_parquet(folder / f"{split}.parquet")
    return folder


def _write_space(path: Path, **changes: object) -> Path:
    content = {
        "seed": 1,
        "draws": 1,
        "held_out_every": 2,
        "image_size": 8,
        "image_channels": 1,
        "num_eval_examples": 10,
        "num_examples": {"log_uniform": [60, 80]},
        "num_examples_limit": 80,
        "min_steps": 8,
        "schedule": {
            "num_states": 3,
            "ratio": {"uniform": [0.5, 0.6]},
            "epochs_per_stage": 1,
            "stratify_by": "labels",
        },
        "training_arguments": {
            "learning_rate": {"uniform": [1.0e-3, 1.0e-2]},
            "per_device_train_batch_size": {"choice": [8, 16]},
        },
        "architectures": ARCHITECTURES,
        "datasets": {
            "tiny": {"path": "nobody/tiny", "image": "picture", "label": "kind", "train": "train", "eval": "test"}
        },
    }
    path.write_text(yaml.safe_dump(content | changes))
    return path


def test_the_shipped_space_is_the_one_the_card_names(space):
    recipes = space.recipes()
    assert Counter((r.architecture, r.dataset, r.split) for r in recipes) == {
        (architecture, dataset, split): count
        for architecture in ("cnn", "resnet", "vit")
        for dataset in ("mnist", "fashion_mnist")
        for split, count in (("train", 8), ("held_out", 2))
    }
    assert len({recipe.name for recipe in recipes}) == len({recipe.seed for recipe in recipes}) == 60
    first = recipes[0]
    assert (first.name, first.split, first.seed) == ("cnn-mnist-000", "train", 1380859293)
    assert first.schedule["ratio"] == pytest.approx(0.49615630, abs=1e-8)
    assert first.training_arguments["learning_rate"] == pytest.approx(3.04807873e-3, abs=1e-11)
    ratios = [recipe.schedule["ratio"] for recipe in recipes]
    assert 0.3 <= min(ratios) < 0.36 and 0.84 < max(ratios) <= 0.9
    assert all(1e-5 <= recipe.training_arguments["learning_rate"] <= 4e-3 for recipe in recipes)
    assert {recipe.training_arguments["per_device_train_batch_size"] for recipe in recipes} == {32, 64, 128}


def test_every_recipe_can_be_run(space, collect):
    import torch
    from transformers import TrainingArguments

    for recipe in space.recipes():
        batch_size = recipe.training_arguments["per_device_train_batch_size"]
        sizes = ForgettingSchedule(**recipe.schedule).sizes(recipe.num_examples, batch_size)
        assert len(sizes) == 7 and sizes[0] <= 60_000
    for recipe in {json.dumps(r.model_config): r for r in space.recipes()}.values():
        with torch.device("meta"):
            model = collect._make_model(recipe, num_labels=10)
        assert 10_000 < model.num_parameters() < 150_000
    assert TrainingArguments(**recipe.training_arguments).learning_rate == recipe.training_arguments["learning_rate"]


def test_more_draws_and_architectures_leave_the_others_as_they_are(space):
    fewer = replace(space, draws=2, architectures={"vit": space.architectures["vit"]})
    by_name = {recipe.name: recipe for recipe in space.recipes()}
    assert len(fewer.recipes()) == 4
    assert all(by_name[recipe.name] == recipe for recipe in fewer.recipes())


def test_data_grows_and_large_batches_go_where_the_ratio_is_small(space):
    steep = replace(space, schedule=space.schedule | {"ratio": 0.3})
    for recipe in steep.recipes():
        assert recipe.training_arguments["per_device_train_batch_size"] == 32
        assert recipe.num_examples == 43_896  # ceil(32 / 0.3^6)
        assert recipe.training_arguments["num_train_epochs"] == 1
    gentle = replace(space, schedule=space.schedule | {"ratio": 0.9})
    assert all(1000 <= recipe.num_examples <= 4000 for recipe in gentle.recipes())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drawz": 3}, r"unknown keys \['drawz'\]"),
        ({"datasets": {"tiny": {"path": "x"}}}, r"dataset 'tiny' of .* has no \['eval', 'image', 'label', 'train'\]"),
        ({"architectures": {"cnn": {"model_class": "SmallCNN"}}}, r"architecture 'cnn' of .* has no \['config'\]"),
        ({"num_examples": {"normal": [1, 2]}}, r"unknown distribution 'normal' of 1/cnn-tiny-000/num_examples"),
    ],
)
def test_a_wrong_space_is_an_error_that_names_the_key(collect, tmp_path, changes, message):
    from space import Space

    with pytest.raises(ValueError, match=message):
        Space.from_yaml(_write_space(tmp_path / "space.yaml", **changes)).recipes()


def test_help_and_plan_need_no_torch(tmp_path):
    space = _write_space(tmp_path / "space.yaml")
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
    )
    for flags in (["--help"], ["--plan", "--output-dir", str(tmp_path / "out"), "--space", str(space)]):
        # argv[0] of `python -c` is '-c'; the path has to be the script's
        setup = (
            f"import sys; sys.argv = {[str(FOLDER / 'collect.py'), *flags]!r}; sys.path.insert(0, {str(FOLDER)!r})\n"
        )
        done = subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    plan = [json.loads(line) for line in done.stdout.splitlines()]
    assert [recipe["name"] for recipe in plan] == ["cnn-tiny-000", "resnet-tiny-000", "vit-tiny-000"]
    assert not (tmp_path / "out").exists()


def test_a_collection_end_to_end(collect, data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "collection"
    broken = {"broken": {"model_class": "NoSuchNet", "config": {}}, **ARCHITECTURES}
    space = _write_space(tmp_path / "space.yaml", architectures=broken)
    arguments = ["--output-dir", str(output), "--data", f"tiny={data}", "--space", str(space)]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # of the worker, a process of its own
    assert collect.main(collect.make_parser().parse_args(arguments)) == 1
    done = capsys.readouterr()
    message = "failed: broken-tiny-000: ValueError: architecture 'broken': neither models.py nor transformers has a"
    assert f"{message} 'NoSuchNet'" in done.err
    assert "3 of 4 trajectories finished, 0 of them held out" in done.out

    rows = [json.loads(line) for line in (output / "index.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["cnn-tiny-000", "resnet-tiny-000", "vit-tiny-000"]
    for row in rows:
        trajectory = WeightTrajectory(output / row["name"])
        trajectory.verify()
        recipe = json.loads((output / row["name"] / "recipe.json").read_text())
        assert recipe.items() <= row.items()
        assert (recipe["split"], recipe["dataset_path"], recipe["num_labels"]) == ("train", "nobody/tiny", 2)
        assert row["state_examples"] == [state.num_examples for state in trajectory.states]
        assert row["state_examples"] == trajectory.schedule.sizes(recipe["num_examples"])
        assert row["eval_accuracy"] == [state.metrics["eval_accuracy"] for state in trajectory.states]
        assert row["state_steps"][0] >= 8 and len(row["eval_loss"]) == 3

    _cut_off_last_state(output / "vit-tiny-000")
    before = {path: path.read_bytes() for path in output.glob("*-tiny-000/state-*/model.safetensors")}
    recorded = []

    def in_this_process(recipes, sources, output_dir, workers):
        for recipe in recipes:
            recorded.append(recipe.name)
            collect._record(recipe, sources[recipe.dataset], output_dir)
            yield recipe.name, None

    monkeypatch.setattr(collect, "_run", in_this_process)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    _write_space(space)
    assert collect.main(collect.make_parser().parse_args(arguments)) == 0
    assert recorded == ["vit-tiny-000"]
    assert {path: path.read_bytes() for path in before} == before
    assert WeightTrajectory(output / "vit-tiny-000").num_states == 3

    _write_space(space, seed=2)
    with pytest.raises(ValueError, match=r"cnn-tiny-000/recipe.json has seed=\d+, the space now gives \d+"):
        collect.main(collect.make_parser().parse_args(arguments))


class _KillsItsProcess:
    """Takes the place of a recipe; the process that unpickles it dies, as one that runs out of memory would."""

    name, dataset = "killer", "tiny"

    def __reduce__(self):
        return os._exit, (1,)


def test_a_process_that_dies_does_not_stop_the_others(collect, tmp_path, monkeypatch):
    from concurrent.futures.process import BrokenProcessPool

    monkeypatch.setattr(collect, "_record", print)  # takes any arguments, and a new process knows it too
    monkeypatch.setattr(collect, "_start_worker", os.getpid)
    recipes = [SimpleNamespace(name=f"sound-{index}", dataset="tiny") for index in range(5)]
    recipes.insert(2, _KillsItsProcess())
    ended = list(collect._run(recipes, {"tiny": {}}, tmp_path, 2))
    assert sorted(name for name, _ in ended) == sorted(recipe.name for recipe in recipes)
    failed = {name: error for name, error in ended if error is not None}
    assert "killer" in failed and len(failed) <= 2
    assert all(isinstance(error, BrokenProcessPool) for error in failed.values())


def test_images_are_those_of_the_recipe_with_their_labels(collect, data, tmp_path, monkeypatch):
    import torch
    from images import load_images
    from space import Space

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    space = Space.from_yaml(_write_space(tmp_path / "space.yaml"))
    recipe = space.recipes()[0]
    source = space.datasets["tiny"] | {"path": str(data)}
    train, test, num_labels = load_images(recipe, source)
    assert (len(train), len(test), num_labels) == (recipe.num_examples, 10, 2)
    batch = train.__getitems__([0, 3, 5])
    assert batch["pixel_values"].shape == (3, 1, 8, 8) and batch["pixel_values"].dtype == torch.float32
    assert torch.equal(batch["pixel_values"][1], train[3]["pixel_values"])
    everything = train.__getitems__(range(len(train)))
    assert -1 <= everything["pixel_values"].min() < -0.7 and 0.7 < everything["pixel_values"].max() <= 1
    bright = everything["pixel_values"].mean((1, 2, 3)) > 0
    assert torch.equal(bright.long(), everything["labels"]) and 0 < bright.sum() < len(bright)

    other, same_test, _ = load_images(replace(recipe, seed=5, image_channels=3), source)
    assert other.images.shape == (recipe.num_examples, 3, 8, 8)
    assert other.fingerprint != train.fingerprint and torch.equal(same_test.images[:, :1], test.images)
    with pytest.raises(ValueError, match=r"cnn-tiny-000 needs 101 images, but .* has 100 in this split"):
        load_images(replace(recipe, num_examples=101), source)


def test_other_images_than_those_it_was_begun_with(collect, tmp_path):
    path = tmp_path / "recipe.json"
    collect._check_same_data(path, "abc")
    path.write_text('{"data_fingerprint": "abc"}')
    collect._check_same_data(path, "abc")
    with pytest.raises(ValueError, match=r"fingerprint abc, now xyz"):
        collect._check_same_data(path, "xyz")


def test_data_of_an_unknown_name(collect, space):
    with pytest.raises(ValueError, match=r"--data mnits=/tmp: .* mnist, fashion_mnist"):
        collect._sources(space, ["mnits=/tmp"])
    assert collect._sources(space, ["mnist=/tmp"])["mnist"]["path"] == "/tmp"
    assert space.datasets["mnist"]["path"] == "ylecun/mnist"


def _cut_off_last_state(folder: Path) -> None:
    """Leaves the folder as a run that was killed while it wrote its last state."""
    manifest = json.loads((folder / "trajectory.json").read_text())
    del manifest["states"][-1]
    (folder / "trajectory.json").write_text(json.dumps(manifest))
