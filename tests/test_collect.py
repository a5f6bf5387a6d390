"""recipes/collect: what is drawn from a space, the data and the models of a recipe, and one recipe after the other."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
from collect_space import ARCHITECTURES, FOLDER, PRETRAINED, VISION, collect, sources, write_space

from know_hf import ForgettingSchedule, WeightTrajectory

__all__ = ["collect", "sources"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft's own
    "ignore:Could not find a config file in nobody/tiny-bert:UserWarning",  # peft asks the Hub
)


@pytest.fixture
def space(collect: ModuleType) -> Any:
    from space import Space

    return Space.from_yaml(FOLDER / "known_base.yaml")


@pytest.fixture
def job(collect: ModuleType, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Makes the job of a space, as main does."""
    from space import Space
    from workers import Job

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    output = tmp_path / "collection"

    def make(**changes: Any) -> Job:
        space = Space.from_yaml(write_space(tmp_path / "space.yaml", **changes))
        arguments = collect.make_parser().parse_args(["--output-dir", str(output), *sources])
        models = collect._pairs("--model", arguments.model)
        (output / ".locks").mkdir(parents=True, exist_ok=True)
        return Job(space.recipes(), collect._sources(space, arguments.data), models, output)

    return make


class _Messages(list):
    """Takes the place of a worker's pipe."""

    def send(self, message: tuple[str | None, str | None]) -> None:
        self.append(message)


# The space


def test_the_shipped_space_is_the_one_the_readme_names(space: Any) -> None:
    recipes = space.recipes()
    assert Counter(recipe.split for recipe in recipes) == {
        "train": 72,
        "held_out_trajectory": 13,
        "held_out_architecture": 12,
        "held_out_dataset": 18,
    }
    assert len({recipe.name for recipe in recipes}) == len({recipe.seed for recipe in recipes}) == 115
    train = [recipe for recipe in recipes if recipe.split in ("train", "held_out_trajectory")]
    assert {recipe.dataset for recipe in train} == {"fashion_mnist", "imdb"}
    assert not {"densenet", "gpt2"} & {recipe.architecture for recipe in train}
    first = recipes[0]
    assert (first.name, first.split, first.seed) == ("cnn-fashion_mnist-000", "train", 973958681)
    assert first.schedule["ratio"] == pytest.approx(0.49122488, abs=1e-8)
    ratios = [recipe.schedule["ratio"] for recipe in recipes]
    assert 0.3 <= min(ratios) < 0.36 and 0.84 < max(ratios) <= 0.9


def test_every_recipe_can_be_run(space: Any) -> None:
    from peft import LoraConfig
    from record_one import make_model
    from transformers import TrainingArguments

    least = {"mnist": 60_000, "fashion_mnist": 60_000, "imdb": 25_000, "rotten_tomatoes": 6_824}
    for recipe in space.recipes():
        batch_size = recipe.training_arguments["per_device_train_batch_size"]
        sizes = ForgettingSchedule(**recipe.schedule).sizes(recipe.num_examples, batch_size)
        assert len(sizes) == 7 and sizes[0] <= least[recipe.dataset], recipe.name
        TrainingArguments("nowhere", **recipe.training_arguments)
        if recipe.lora is not None:
            assert LoraConfig(**recipe.lora).r == recipe.lora["r"]
    from_nothing = {json.dumps([r.architecture, r.model_config]): r for r in space.recipes() if not r.pretrained}
    for recipe in from_nothing.values():
        tokenizer = None if "image_size" in recipe.inputs else _Tokens()
        with torch.device("meta"):
            model = make_model(recipe, 10, tokenizer, {})
        assert 5_000 < model.num_parameters() < 500_000, recipe.name


class _Tokens:
    pad_token_id, cls_token_id, sep_token_id = 0, 2, 3

    def __len__(self) -> int:
        return 4096


def test_more_draws_and_architectures_leave_the_others_as_they_are(space: Any) -> None:
    vit = {**space.architectures["vit"], "draws": {"mnist": 1, "fashion_mnist": 2}}
    fewer = replace(space, architectures={"vit": vit})
    by_name = {recipe.name: recipe for recipe in space.recipes()}
    assert [r.name for r in fewer.recipes()] == ["vit-mnist-000", "vit-fashion_mnist-000", "vit-fashion_mnist-001"]
    assert all(by_name[recipe.name] == recipe for recipe in fewer.recipes())


def test_data_grows_and_large_batches_go_where_the_ratio_is_small(space: Any) -> None:
    def with_ratio(ratio: float) -> list[Any]:
        vision = space.training["vision"]
        vision = {**vision, "schedule": vision["schedule"] | {"ratio": ratio}, "min_steps": 1000}
        return replace(
            space, architectures={"cnn": space.architectures["cnn"]}, training=space.training | {"vision": vision}
        ).recipes()

    for recipe in with_ratio(0.3):
        assert recipe.training_arguments["per_device_train_batch_size"] == 32
        assert recipe.num_examples == 43_896  # ceil(32 / 0.3^6)
        assert recipe.training_arguments["num_train_epochs"] == 1
    assert all(1000 <= recipe.num_examples <= 4000 for recipe in with_ratio(0.9))


def test_a_trajectory_is_held_out_in_one_way(collect: ModuleType) -> None:
    from space import HeldOut

    held_out = HeldOut(architectures=["vit"], datasets=["mnist"], every=3)
    assert [held_out.split("cnn", "cifar", draw) for draw in range(3)] == ["train", "train", "held_out_trajectory"]
    assert held_out.split("vit", "cifar", 2) == "held_out_architecture"
    assert held_out.split("cnn", "mnist", 2) == "held_out_dataset"
    assert held_out.split("vit", "mnist", 2) is None
    assert HeldOut().split("cnn", "mnist", 0) == "train"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drawz": 3}, r"unknown keys \['drawz'\]"),
        (
            {"datasets": {"shapes": {"path": "x"}}},
            r"dataset 'shapes' of .* \['eval', 'image', 'label', 'train'\]",
        ),
        ({"architectures": {"cnn": {"training": "vision", "draws": {}}}}, r"'cnn' of .* \['config', 'model_cl"),
        ({"architectures": {"cnn": {**ARCHITECTURES["cnn"], "training": "vison"}}}, r"training of .*'vison'"),
        ({"architectures": {"cnn": {**ARCHITECTURES["cnn"], "draws": {"mnits": 1}}}}, r"draws of .*'mnits'"),
        (
            {"architectures": {"cnn": {**ARCHITECTURES["cnn"], "draws": {"reviews": 1}}}},
            "'reviews'",
        ),
        ({"held_out": {"datasets": ["mnits"]}}, r"held_out of .*'mnits'.* shapes, reviews"),
        ({"held_out": {"each": 2}}, r"held_out of .*\['each'\]"),
        (
            {
                "architectures": {"cnn": {**ARCHITECTURES["cnn"], "config": {"width": {"normal": [1, 2]}}}},
                "held_out": {},
            },
            r"unknown distribution 'normal' of 1/cnn-shapes-000/model_config/width",
        ),
    ],
)
def test_a_wrong_space_is_an_error_that_names_the_key(
    collect: ModuleType, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    from space import Space

    with pytest.raises(ValueError, match=message):
        Space.from_yaml(write_space(tmp_path / "space.yaml", **changes)).recipes()


def test_help_and_plan_need_no_torch(tmp_path: Path) -> None:
    space = write_space(tmp_path / "space.yaml")
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
    assert [(recipe["name"], recipe["split"]) for recipe in plan] == [
        ("cnn-shapes-000", "train"),
        ("vit-shapes-000", "held_out_architecture"),
        ("gpt2-reviews-000", "held_out_dataset"),
        ("lora-reviews-000", "held_out_dataset"),
        ("cnn-shapes-001", "held_out_trajectory"),
    ]
    assert not (tmp_path / "out").exists()


def test_flags_name_what_the_space_has(collect: ModuleType, space: Any) -> None:
    with pytest.raises(ValueError, match=r"--data mnits=/tmp: .* fashion_mnist, mnist"):
        collect._sources(space, ["mnits=/tmp"])
    with pytest.raises(ValueError, match=r"--model me/model: give NAME=PATH"):
        collect._pairs("--model", ["me/model"])
    assert collect._sources(space, ["mnist=/tmp"])["mnist"]["path"] == "/tmp"
    assert space.datasets["mnist"]["path"] == "ylecun/mnist"


# Data


def test_images_are_those_of_the_recipe_with_their_labels(job: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    import examples

    made = job()
    recipe, source, cache = made.recipes[0], made.sources["shapes"], made.output_dir / ".cache"
    plain = replace(recipe, augmentation=[])
    data = examples.load_examples(plain, source, {}, cache)
    assert (len(data.train), len(data.evaluation), data.num_labels) == (recipe.num_examples, 10, 2)
    assert data.tokenizer is None
    batch = data.train.__getitems__([0, 3, 5])
    assert batch["pixel_values"].shape == (3, 1, 8, 8) and batch["pixel_values"].dtype == torch.float32
    assert torch.equal(batch["pixel_values"][1], data.train[3]["pixel_values"].float() / 127.5 - 1)
    everything = data.train.__getitems__(list(range(len(data.train))))
    assert -1 <= everything["pixel_values"].min() < -0.7 and 0.7 < everything["pixel_values"].max() <= 1
    bright = everything["pixel_values"].mean((1, 2, 3)) > 0
    assert torch.equal(bright.long(), everything["labels"]) and 0 < bright.sum() < len(bright)

    colours = replace(plain, seed=5, inputs={"image_size": 8, "image_channels": 3})
    other = examples.load_examples(colours, source, {}, cache)
    assert other.train.tensors["pixel_values"].shape == (recipe.num_examples, 3, 8, 8)
    assert other.train.fingerprint != data.train.fingerprint
    grey = other.evaluation.tensors["pixel_values"][:, :1]
    assert torch.equal(grey, data.evaluation.tensors["pixel_values"])

    monkeypatch.setattr(examples, "decode", None)  # was done once and for all
    again = examples.load_examples(plain, source, {}, cache)
    assert again.train.fingerprint == data.train.fingerprint
    with pytest.raises(ValueError, match=r"cnn-shapes-000 .*101 examples.* 100"):
        examples.load_examples(replace(recipe, num_examples=101), source, {}, cache)


def test_texts_are_tokenised_once_and_padded_by_the_batch(job: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    import examples

    made = job()
    recipe = next(recipe for recipe in made.recipes if recipe.architecture == "gpt2")
    source, cache = made.sources["reviews"], made.output_dir / ".cache"
    data = examples.load_examples(replace(recipe, augmentation=[]), source, {}, cache)
    words = data.tokenizer.get_vocab()
    assert [words[name] for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    assert len(words) == 5 + 13 and {"bad", "film"} <= set(words)  # "good" stands after what is read of a text
    short = (data.train.tensors["labels"] == 0).nonzero()[:2, 0].tolist()
    batch = data.train.__getitems__(short)
    assert batch["input_ids"].shape == (2, 6) and batch["attention_mask"].all()
    assert data.tokenizer.decode(batch["input_ids"][0]).startswith("[CLS] ")
    assert data.tokenizer.decode(batch["input_ids"][0]).endswith("bad [SEP]")
    mixed = data.train.__getitems__([short[0], int((data.train.tensors["labels"] == 1).nonzero()[0, 0])])
    assert mixed["input_ids"].shape == (2, 12)
    assert mixed["attention_mask"].sum(1).tolist() == [6, 12] and (mixed["input_ids"][0, 6:] == 0).all()

    torch.manual_seed(0)
    dropping = examples.load_examples(recipe, source, {}, cache)
    everything = list(range(len(data.train)))
    kept, dropped = (d.train.__getitems__(everything)["input_ids"] for d in (data, dropping))
    changed = kept != dropped
    assert (dropped[changed] == 4).all() and (kept[changed] > 4).all()
    assert 0.05 < changed.sum() / (kept > 4).sum() < 0.15
    held = dropping.evaluation.__getitems__([0, 1])["input_ids"]
    assert torch.equal(held, data.evaluation.__getitems__([0, 1])["input_ids"])

    monkeypatch.setattr(examples, "tokenize", None)
    again = examples.load_examples(recipe, source, {}, cache)
    assert again.train.fingerprint == data.train.fingerprint


def test_augmentation_moves_images_as_it_says(collect: ModuleType) -> None:
    from images import ImageBatches

    stored = {"pixel_values": torch.zeros(200, 1, 8, 8, dtype=torch.uint8), "labels": torch.arange(200)}
    stored["pixel_values"][:, :, 3, 2] = 255
    torch.manual_seed(0)
    flipped = ImageBatches(["flip"])(stored)["pixel_values"]
    columns = flipped[:, 0, 3].argmax(1)
    assert flipped.max() > 0.999 and set(columns.tolist()) == {2, 5} and 60 < (columns == 5).sum() < 140
    shifted = ImageBatches(["shift"])(stored)["pixel_values"].flatten(1).argmax(1)
    assert set((shifted // 8).tolist()) == set(range(1, 6)) and set((shifted % 8).tolist()) == set(range(5))
    cropped = ImageBatches(["crop"])(stored)
    assert torch.equal(cropped["labels"], stored["labels"]) and cropped["pixel_values"].min() == -1
    assert len(cropped["pixel_values"].flatten(1).unique(dim=0)) > 190
    bright = {"pixel_values": torch.full((50, 3, 8, 8), 255, dtype=torch.uint8), "labels": torch.zeros(50)}
    assert ImageBatches(["crop"])(bright)["pixel_values"][:, :, 1:-1, 1:-1].min() > 0.999  # nothing from outside
    with pytest.raises(ValueError, match=r"\['rotate'\].*flip, shift, crop"):
        ImageBatches(["rotate"])


# Models


@pytest.mark.parametrize(
    ("name", "config", "convolutions", "biases"),
    [
        ("SmallCNN", {"width": 4}, 3, 5),
        ("SmallCNN", {"width": 4, "batch_norm": True}, 3, 2),
        ("SmallDenseNet", {"growth": 4, "depths": [2, 2]}, 1 + 2 + 1 + 2, 2),
        ("SmallDenseNet", {"growth": 4, "depths": [2, 2], "batch_norm": False}, 6, 7),
        ("SmallMobileNet", {"width": 4, "depths": [1, 2]}, 1 + 3 * 2, 1),
        ("SmallMobileNet", {"width": 4, "depths": [1, 2], "expansion": 3}, 1 + 3 * 3, 1),
    ],
)
def test_small_architectures(
    collect: ModuleType, tmp_path: Path, name: str, config: dict[str, Any], convolutions: int, biases: int
) -> None:
    import models

    torch.manual_seed(0)
    model_class = getattr(models, name)
    model = model_class(model_class.config_class(image_size=10, num_channels=3, num_labels=5, **config))
    images = torch.randn(4, 3, 10, 10)
    outputs = model(pixel_values=images, labels=torch.arange(4))
    assert outputs.logits.shape == (4, 5)
    expected = torch.nn.functional.cross_entropy(outputs.logits, torch.arange(4))
    assert outputs.loss.item() == pytest.approx(expected.item())
    outputs.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.dim() > 1)
    layers = list(model.modules())
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in layers) == convolutions
    with_bias = [layer for layer in layers if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    assert sum(layer.bias is not None for layer in with_bias) == biases

    model.eval().save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixel_values=images).logits, model(pixel_values=images).logits)
    with pytest.raises(Exception, match="image_size=7"):
        model_class.config_class(image_size=7)


def test_models_of_a_recipe(job: Callable, sources: list[str]) -> None:
    from record_one import make_model

    made = job()
    recipe = next(recipe for recipe in made.recipes if recipe.architecture == "lora")
    adapter = make_model(recipe, 3, _Tokens(), made.models)
    trained = [name for name, parameter in adapter.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or "classifier" in name for name in trained) and len(trained) == 6
    assert adapter.peft_config["default"].base_model_name_or_path == PRETRAINED
    whole = make_model(replace(recipe, lora=None, freeze=["bert.embeddings"]), 3, _Tokens(), made.models)
    assert whole.config._name_or_path == PRETRAINED and whole.config.num_labels == 3
    frozen = {name.split(".")[1] for name, parameter in whole.named_parameters() if not parameter.requires_grad}
    assert frozen == {"embeddings"}
    with pytest.raises(ValueError, match=r"'lora'.*freeze='encoder'"):
        make_model(replace(recipe, lora=None, freeze=["encoder"]), 3, _Tokens(), made.models)


# One after the other


def test_what_fails_is_written_down_and_the_others_go_on(
    job: Callable, collect: ModuleType, sources: list[str], capsys: pytest.CaptureFixture
) -> None:
    from workers import result, take_what_is_left

    wild = {**ARCHITECTURES["cnn"], "training": "wild", "draws": {"shapes": 1}}
    broken = {**ARCHITECTURES["cnn"], "model_class": "NoSuchNet", "draws": {"shapes": 1}}
    good = {**ARCHITECTURES["cnn"], "draws": {"shapes": 1}}
    exploding = {**VISION, "optimizers": {"sgd": {"optim": "sgd", "learning_rate": 1e30, "max_grad_norm": 0.0}}}
    changes = {
        "architectures": {"broken": broken, "wild": wild, "good": good},
        "training": {"vision": VISION, "wild": exploding},
        "held_out": {},
    }
    made, messages = job(**changes), _Messages()
    take_what_is_left(made, messages)
    names = ["broken-shapes-000", "wild-shapes-000", "good-shapes-000"]
    assert [name for name, _ in messages if name] == names
    assert [result(made.output_dir, name)["status"] for name in names] == ["failed", "failed", "finished"]
    assert "ValueError: architecture 'broken': neither" in result(made.output_dir, names[0])["error"]
    assert "not finite" in result(made.output_dir, names[1])["error"]
    assert "Traceback" in messages[1][1] and messages[-1] == (None, None)

    space = write_space(made.output_dir.parent / "space.yaml", **changes)
    arguments = ["--output-dir", str(made.output_dir), "--space", str(space), *sources]
    assert collect.main(collect.make_parser().parse_args(arguments)) == 1  # no process is started
    done = capsys.readouterr()
    assert "1 of 3 trajectories finished" in done.out and "failed: wild-shapes-000: TrajectoryError" in done.err
    rows = [json.loads(line) for line in (made.output_dir / "index.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == ["good-shapes-000"]


def test_a_trajectory_that_somebody_is_at_is_left_to_them(job: Callable) -> None:
    from workers import _claimed, result, take_what_is_left

    made = job(architectures={"cnn": ARCHITECTURES["cnn"]}, held_out={})
    first, second = (recipe.name for recipe in made.recipes)

    class Others(_Messages):
        """Whoever is at the first trajectory finishes it when the second one is done."""

        def send(self, message: tuple[str | None, str | None]) -> None:
            super().send(message)
            if message[0] is None:
                (made.output_dir / first).mkdir()
                (made.output_dir / first / "result.json").write_text('{"status": "finished"}')

    messages = Others()
    with _claimed(made.output_dir, first) as mine:
        assert mine
        take_what_is_left(made, messages)
    assert messages == [(second, None), (None, None)]
    assert result(made.output_dir, second)["status"] == "finished"
    assert not (made.output_dir / first / "trajectory.json").exists()


def test_the_index_has_a_row_a_finished_trajectory(job: Callable, tmp_path: Path) -> None:
    from index import write_index
    from space import Space
    from workers import take_what_is_left

    made = job()
    take_what_is_left(made, _Messages())
    space_file = tmp_path / "space.yaml"
    rows = write_index(Space.from_yaml(space_file), space_file, made.output_dir)
    index = datasets.load_dataset(str(made.output_dir), split="trajectories", cache_dir=str(tmp_path / "datasets"))
    assert index.column_names == list(rows[0]) and len(index) == len(rows) == 5
    assert [row["path"] for row in index] == [recipe.name for recipe in made.recipes]
    for row, recipe in zip(index, made.recipes, strict=True):
        trajectory = WeightTrajectory(made.output_dir / row["path"])
        trajectory.verify()
        stored = json.loads((made.output_dir / row["path"] / "recipe.json").read_text())
        assert recipe.to_dict().items() <= stored.items()
        assert row["split"] == recipe.split and row["num_labels"] == 2 and row["seconds"] > 0
        assert row["learning_rate"] == recipe.training_arguments["learning_rate"]
        assert row["state_examples"] == trajectory.schedule.sizes(recipe.num_examples)
        assert row["eval_accuracy"] == [state.metrics["eval_accuracy"] for state in trajectory.states]
        assert row["state_steps"][0] >= 8 and len(row["eval_loss"]) == 3
        assert row["displacement"][0] == 0 < row["displacement"][1]
    lora = index[3]
    assert (lora["trained"], lora["pretrained"], lora["modality"]) == ("lora", PRETRAINED, "text")
    assert json.loads(lora["lora"])["r"] == 2 and 0 < lora["num_trained_parameters"] < lora["num_parameters"]
    assert WeightTrajectory(made.output_dir / lora["path"]).base_model == PRETRAINED
    texts = [path for path in made.output_dir.rglob("*.json") if ".cache" not in path.parts]
    assert texts and not any(str(tmp_path.parent) in path.read_text() for path in texts)  # no folder of this machine
    card = (made.output_dir / "README.md").read_text()
    assert "| cnn | shapes | 1 | 1 |  |  |" in card
    assert "| `held_out_architecture` | architectures that are not in `train`: vit |" in card


def test_other_data_than_it_was_begun_with(collect: ModuleType, tmp_path: Path) -> None:
    from record_one import _check_same_data

    path = tmp_path / "recipe.json"
    _check_same_data(path, "abc")
    path.write_text('{"data_fingerprint": "abc"}')
    _check_same_data(path, "abc")
    with pytest.raises(ValueError, match=r"fingerprint abc, now xyz"):
        _check_same_data(path, "xyz")


def test_a_folder_of_other_data_is_an_error_before_anything_is_recorded(
    collect: ModuleType, job: Callable, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import workers

    architectures = {name: {**ARCHITECTURES[name], "draws": {"shapes": 1}} for name in ("cnn", "vit")}
    made = job(architectures=architectures, held_out={})
    finished, left = (recipe.name for recipe in made.recipes)
    recorded: list[str] = []
    monkeypatch.setattr(workers, "record_all", lambda job, *_, **__: recorded.extend(r.name for r in job.recipes))
    space = ["--space", str(tmp_path / "space.yaml")]
    flags = ["--output-dir", str(made.output_dir), *space, *sources]
    assert collect.main(collect.make_parser().parse_args(flags)) == 0 and recorded == [finished, left]
    kept = json.loads((made.output_dir / ".data.json").read_text())
    assert list(kept) == ['shapes {"image_channels": 1, "image_size": 8}']

    same, other = tmp_path / "same", tmp_path / "other"
    for copy in (same, other):
        shutil.copytree(made.sources["shapes"]["path"], copy)
    recorded.clear()
    assert collect.main(collect.make_parser().parse_args([*flags, "--data", f"shapes={same}"])) == 0
    assert recorded == [finished, left]
    table = datasets.Dataset.from_parquet(str(same / "test.parquet"), cache_dir=str(tmp_path / "cache"))
    table.select([1, 0, *range(2, 20)]).to_parquet(other / "test.parquet")
    flags += ["--data", f"shapes={other}"]
    recorded.clear()
    with pytest.raises(ValueError, match=rf"another 'shapes' than {other}.*fingerprint"):
        collect.main(collect.make_parser().parse_args(flags))
    assert recorded == [] and json.loads((made.output_dir / ".data.json").read_text()) == kept
    for name in (finished, left):
        (made.output_dir / name).mkdir()
        (made.output_dir / name / "result.json").write_text('{"status": "failed", "error": "?"}')
    assert collect.main(collect.make_parser().parse_args(flags)) == 1  # nothing is left to record from it


@pytest.mark.parametrize("workers", ["0", "-2"])
def test_no_workers_record_nothing(collect: ModuleType, workers: str) -> None:
    with pytest.raises(ValueError, match=f"--workers {workers}"):
        collect.main(collect.make_parser().parse_args(["--output-dir", "out", f"--workers={workers}"]))


def test_a_worker_is_alone(collect: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers import _be_alone

    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x", "PATH": "/bin"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for visible, number, expected in ((None, 1, "1"), (None, 6, "2"), ("3,7", 1, "7"), ("GPU-abc", 5, "GPU-abc")):
        variables = launched | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
        monkeypatch.setattr(os, "environ", variables)
        _be_alone(number)
        assert variables["CUDA_VISIBLE_DEVICES"] == expected
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"} & set(variables)
        assert (variables["PATH"], variables["OMP_NUM_THREADS"]) == ("/bin", "1")
