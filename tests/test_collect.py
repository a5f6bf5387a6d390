"""recipes/collect: draws of a space, data and models of a recipe, and recording in one process."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from doubles.collect_space import (
    ARCHITECTURES,
    FOLDER,
    PRETRAINED,
    VISION,
    WARNINGS,
    collect,
    job,
    recorded,
    run,
    sources,
    write_space,
)
from doubles.loopback_hub import environment
from huggingface_hub import snapshot_download

from know_hf import ForgettingSchedule, WeightTrajectory
from know_hf.hub import HubError

__all__ = ["collect", "job", "recorded", "sources"]

pytestmark = WARNINGS
CNN = {**ARCHITECTURES["cnn"], "draws": {"shapes": 1}}


@pytest.fixture(scope="module")
def space(collect):
    from space import Space

    return Space.from_yaml(FOLDER / "known_base.yaml")


class Tokens:
    pad_token_id, cls_token_id, sep_token_id = 0, 2, 3

    def __len__(self):
        return 4096


# Space


def test_shipped_space(space):
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


def test_recipes_of_the_shipped_space_can_be_run(space):
    from jobs import Job
    from peft import LoraConfig
    from record_one import make_model
    from transformers import TrainingArguments

    num_rows = {"mnist": 60_000, "fashion_mnist": 60_000, "imdb": 25_000, "rotten_tomatoes": 6_824}
    for recipe in space.recipes():
        batch_size = recipe.training_arguments["per_device_train_batch_size"]
        sizes = ForgettingSchedule(**recipe.schedule).sizes(recipe.num_examples, batch_size)
        assert len(sizes) == 7 and sizes[0] <= num_rows[recipe.dataset], recipe.name
        TrainingArguments("nowhere", **recipe.training_arguments)
        if recipe.lora is not None:
            assert LoraConfig(**recipe.lora).r == recipe.lora["r"]
    from_scratch = {json.dumps([r.architecture, r.model_config]): r for r in space.recipes() if not r.pretrained}
    for recipe in from_scratch.values():
        tokenizer = None if "image_size" in recipe.inputs else Tokens()
        with torch.device("meta"):
            model = make_model(Job([], {}, {}, Path()), recipe, 10, tokenizer)
        assert 5_000 < model.num_parameters() < 500_000, recipe.name


def test_draws_do_not_depend_on_other_draws_and_architectures(space):
    vit = {**space.architectures["vit"], "draws": {"mnist": 1, "fashion_mnist": 2}}
    fewer = replace(space, architectures={"vit": vit}).recipes()
    by_name = {recipe.name: recipe for recipe in space.recipes()}
    assert [recipe.name for recipe in fewer] == ["vit-mnist-000", "vit-fashion_mnist-000", "vit-fashion_mnist-001"]
    assert all(by_name[recipe.name] == recipe for recipe in fewer)


def test_small_ratios_come_with_much_data_and_small_batches(space):
    def with_ratio(ratio):
        vision = space.training["vision"]
        vision = {**vision, "schedule": vision["schedule"] | {"ratio": ratio}, "min_steps": 1000}
        cnn = {"cnn": space.architectures["cnn"]}
        return replace(space, architectures=cnn, training=space.training | {"vision": vision}).recipes()

    for recipe in with_ratio(0.3):
        assert recipe.training_arguments["per_device_train_batch_size"] == 32
        assert recipe.num_examples == 43_896  # ceil(32 / 0.3^6)
        assert recipe.training_arguments["num_train_epochs"] == 1
    assert all(1000 <= recipe.num_examples <= 4000 for recipe in with_ratio(0.9))


def test_splits(collect):
    from space import HeldOut

    held_out = HeldOut(architectures=["vit"], datasets=["mnist"], every=3)
    assert [held_out.split("cnn", "cifar", draw) for draw in range(3)] == ["train", "train", "held_out_trajectory"]
    assert held_out.split("vit", "cifar", 2) == "held_out_architecture"
    assert held_out.split("cnn", "mnist", 2) == "held_out_dataset"
    assert held_out.split("vit", "mnist", 2) is None
    assert HeldOut().split("cnn", "mnist", 0) == "train"


ODD_STEPS = {"training": {"vision": {**VISION, "min_steps": "x"}}, "architectures": {"cnn": CNN}, "held_out": {}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drawz": 3}, "unknown key 'drawz'"),
        ({"datasets": {"shapes": {"path": "x"}}}, r"dataset 'shapes' of .*image, label, train, eval"),
        ({"architectures": {"cnn": {"training": "vision", "draws": {}}}}, r"'cnn' of .*model_class, config"),
        ({"architectures": {"cnn": {**CNN, "training": "vison"}}}, r"training of .*'vison'.*'vision'"),
        ({"architectures": {"cnn": {**CNN, "draws": {"mnits": 1}}}}, r"draws of .*'mnits'"),
        ({"architectures": {"cnn": {**CNN, "draws": {"reviews": 1}}}}, "images.*'reviews'.*text"),
        ({"held_out": {"datasets": ["mnits"]}}, r"held_out of .*'mnits'.* shapes, reviews"),
        ({"held_out": {"each": 2}}, r"held_out of .*'each'"),
        (
            {"architectures": {"cnn": {**CNN, "config": {"width": {"normal": [1, 2]}}}}, "held_out": {}},
            r"width of config of .*'cnn'.*space\.yaml must be .*'normal'",
        ),
        ({"datasets": [1]}, r"datasets of .*space\.yaml must be a mapping"),
        ({"datasets": {"shapes": None}}, r"dataset 'shapes' of .*space\.yaml must be a mapping"),
        ({"seed": "x"}, r"seed of .*space\.yaml must be an integer"),
        ({"held_out": {"every": 0}}, r"every in held_out of .*space\.yaml .*got 0"),
        ({"architectures": {"cnn": {**CNN, "draws": {"shapes": 10**9}}}}, r"draws of 'shapes' .* to 10,000, got"),
        ({"architectures": {"cnn": {**CNN, "config": {"width": {"choice": []}}}}}, r"width .*space\.yaml"),
        (ODD_STEPS, r"space\.yaml: no recipes can be drawn"),
    ],
)
def test_wrong_space(collect, tmp_path, changes, message):
    from space import Space

    with pytest.raises(ValueError, match=message):
        Space.from_yaml(write_space(tmp_path / "space.yaml", **changes)).recipes()


def test_help_and_plan_need_no_torch(tmp_path):
    space, script = write_space(tmp_path / "space.yaml"), FOLDER / "collect.py"
    for flags in (["--help"], ["--plan", "--output-dir", str(tmp_path / "out"), "--space", str(space)]):
        program = (
            "import runpy, sys\n"
            f"sys.argv = {[str(script), *flags]!r}\nsys.path.insert(0, {str(FOLDER)!r})\n"
            f"try:\n    runpy.run_path({str(script)!r}, run_name='__main__')\n"
            "except SystemExit as end:\n    assert not end.code, end.code\n"
            "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert [(recipe["name"], recipe["split"]) for recipe in map(json.loads, done.stdout.splitlines())] == [
        ("cnn-shapes-000", "train"),
        ("vit-shapes-000", "held_out_architecture"),
        ("gpt2-reviews-000", "held_out_dataset"),
        ("lora-reviews-000", "held_out_dataset"),
        ("cnn-shapes-001", "held_out_trajectory"),
    ]
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_named_in_one_line(tmp_path):
    space, output = write_space(tmp_path / "space.yaml"), tmp_path / "out"
    space_of_others = tmp_path / "other.yaml"
    space_of_others.write_text("seed: 1\nseed: 2\n")
    (output / "cnn-shapes-000").mkdir(parents=True)
    (output / "cnn-shapes-000/result.json").write_text("[]")
    for path, name in ((space_of_others, "other.yaml"), (space, "result.json")):
        command = [sys.executable, str(FOLDER / "collect.py"), "--output-dir", str(output), "--space", str(path)]
        done = subprocess.run([*command, "--retry-failed"], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and done.stderr.startswith("collect.py: ")
        assert name in done.stderr and done.stderr.count("\n") == 1


def test_flags(collect, space, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--data mnits=/tmp: .* fashion_mnist, mnist"):
        collect.read_sources(space, ["mnits=/tmp"])
    with pytest.raises(ValueError, match=r"--model me/model: .*NAME=PATH"):
        collect.read_pairs("--model", ["me/model"])
    assert collect.read_sources(space, ["mnist=/tmp"])["mnist"]["path"] == "/tmp"
    assert space.datasets["mnist"]["path"] == "ylecun/mnist"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for workers, message in (("0", "--workers .* 0"), ("-2", "--workers .* -2"), ("2", "--workers 2: the launcher")):
        arguments = collect.make_parser().parse_args(["--output-dir", str(tmp_path), f"--workers={workers}"])
        with pytest.raises(ValueError, match=message):
            collect.main(arguments)


# Data


def test_images(job, monkeypatch):
    import examples

    job = job()
    recipe = replace(job.recipes[0], augmentation=[])
    data = examples.load_examples(job, recipe)
    assert (len(data.train), len(data.evaluation), data.num_labels) == (recipe.num_examples, 10, 2)
    assert data.tokenizer is None
    batch = data.train.__getitems__([0, 3, 5])
    assert batch["pixel_values"].shape == (3, 1, 8, 8) and batch["pixel_values"].dtype == torch.float32
    assert torch.equal(batch["pixel_values"][1], data.train[3]["pixel_values"].float() / 127.5 - 1)
    everything = data.train.__getitems__(list(range(len(data.train))))
    assert -1 <= everything["pixel_values"].min() < -0.7 and 0.7 < everything["pixel_values"].max() <= 1
    bright = everything["pixel_values"].mean((1, 2, 3)) > 0
    assert torch.equal(bright.long(), everything["labels"]) and 0 < bright.sum() < len(bright)

    other = examples.load_examples(job, replace(recipe, seed=5, inputs={"image_size": 8, "image_channels": 3}))
    assert other.train.tensors["pixel_values"].shape == (recipe.num_examples, 3, 8, 8)
    assert other.train.fingerprint != data.train.fingerprint
    grey = other.evaluation.tensors["pixel_values"][:, :1]
    assert torch.equal(grey, data.evaluation.tensors["pixel_values"])

    monkeypatch.setattr(examples, "decode", None)  # the images are cached
    assert examples.load_examples(job, recipe).train.fingerprint == data.train.fingerprint
    with pytest.raises(ValueError, match=r"cnn-shapes-000 .*101 examples.* 100"):
        examples.load_examples(job, replace(recipe, num_examples=101))


def test_texts(job, monkeypatch):
    import examples

    job = job()
    recipe = next(recipe for recipe in job.recipes if recipe.architecture == "gpt2")
    data = examples.load_examples(job, replace(recipe, augmentation=[]))
    words = data.tokenizer.get_vocab()
    assert [words[name] for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    assert len(words) == 5 + 13 and {"bad", "film"} <= set(words)  # texts are cut before "good"
    short = (data.train.tensors["labels"] == 0).nonzero()[:2, 0].tolist()
    batch = data.train.__getitems__(short)
    assert batch["input_ids"].shape == (2, 6) and batch["attention_mask"].all()
    text = data.tokenizer.decode(batch["input_ids"][0])
    assert text.startswith("[CLS] ") and text.endswith("bad [SEP]")
    mixed = data.train.__getitems__([short[0], int((data.train.tensors["labels"] == 1).nonzero()[0, 0])])
    assert mixed["input_ids"].shape == (2, 12)
    assert mixed["attention_mask"].sum(1).tolist() == [6, 12] and (mixed["input_ids"][0, 6:] == 0).all()

    torch.manual_seed(0)
    monkeypatch.setattr(examples, "tokenize", None)  # the tokens are cached
    augmented = examples.load_examples(job, recipe)
    assert augmented.train.fingerprint == data.train.fingerprint
    everything = list(range(len(data.train)))
    before, after = (d.train.__getitems__(everything)["input_ids"] for d in (data, augmented))
    changed = before != after
    assert (after[changed] == 4).all() and (before[changed] > 4).all()
    assert 0.05 < changed.sum() / (before > 4).sum() < 0.15
    held_out = (d.evaluation.__getitems__([0, 1])["input_ids"] for d in (data, augmented))
    assert torch.equal(*held_out)


def test_augmentation_of_images(collect):
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
    assert ImageBatches(["crop"])(bright)["pixel_values"][:, :, 1:-1, 1:-1].min() > 0.999  # inside the image
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
def test_small_architectures(collect, tmp_path, name, config, convolutions, biases):
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
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in layers) == convolutions
    assert sum(layer.bias is not None for layer in layers) == biases

    model.eval().save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixel_values=images).logits, model(pixel_values=images).logits)
    with pytest.raises(Exception, match=r"image_size.* 7"):
        model_class.config_class(image_size=7)


def test_models_of_a_recipe(job):
    from record_one import make_model

    job = job()
    recipe = next(recipe for recipe in job.recipes if recipe.architecture == "lora")
    adapter = make_model(job, recipe, 3, Tokens())
    trained = [name for name, parameter in adapter.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or "classifier" in name for name in trained) and len(trained) == 6
    assert adapter.peft_config["default"].base_model_name_or_path == PRETRAINED
    full = make_model(job, replace(recipe, lora=None, freeze=["bert.embeddings"]), 3, Tokens())
    assert full.config._name_or_path == PRETRAINED and full.config.num_labels == 3
    frozen = {name.split(".")[1] for name, parameter in full.named_parameters() if not parameter.requires_grad}
    assert frozen == {"embeddings"}
    with pytest.raises(ValueError, match=r"'lora'.*freeze='encoder'"):
        make_model(job, replace(recipe, lora=None, freeze=["encoder"]), 3, Tokens())


# Recording in one process


def test_failures_are_stored_and_do_not_stop_the_others(job, collect, sources, capsys):
    from workers import record_rest

    wild = {**VISION, "optimizers": {"sgd": {"optim": "sgd", "learning_rate": 1e30, "max_grad_norm": 0.0}}}
    architectures = {"broken": {**CNN, "model_class": "NoSuchNet"}, "wild": {**CNN, "training": "wild"}, "good": CNN}
    job = job(architectures=architectures, training={"vision": VISION, "wild": wild}, held_out={})
    messages: list[Any] = []
    record_rest(job, lambda *message: messages.append(message))
    assert [recipe for recipe, _ in messages if recipe] == job.recipes
    assert [job.result(recipe)["status"] for recipe in job.recipes] == ["failed", "failed", "finished"]
    assert "ValueError: architecture 'broken': neither" in job.error(job.recipes[0])
    assert "NaN or infinite" in job.error(job.recipes[1])
    assert "Traceback" in messages[1][1] and messages[-1] == (None, None)

    assert run(collect, job, sources) == 1  # starts no process
    done = capsys.readouterr()
    assert "1 of 3 trajectories finished" in done.out and "failed: wild-shapes-000: TrajectoryError" in done.err
    rows = [json.loads(line) for line in (job.output_dir / "index.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == ["good-shapes-000"]


def test_locked_trajectories_are_left_to_their_process(job, monkeypatch):
    import workers

    job = job(architectures={"cnn": ARCHITECTURES["cnn"]}, held_out={})
    first, second = job.recipes
    monkeypatch.setattr(workers, "_record", lambda *_: workers._write_failure(job, second, "?"))
    messages = []

    def send(*message):
        messages.append(message)
        if message[0] is None:  # the other process finishes the first trajectory now
            workers._write_failure(job, first, "?")

    monkeypatch.setattr(workers.time, "sleep", lambda seconds: None)
    with workers._lock(job, first) as is_locked:
        assert is_locked
        workers.record_rest(job, send)
    assert messages == [(second, None), (None, None)]


def test_index(recorded, collect, tmp_path):
    from index import write_index
    from space import Space

    output, space_file = recorded.output_dir, recorded.output_dir.parent / "space.yaml"
    rows = write_index(recorded, Space.from_yaml(space_file), space_file)
    index = datasets.load_dataset(str(output), split="trajectories", cache_dir=str(tmp_path / "datasets"))
    assert index.column_names == list(rows[0]) and len(index) == len(rows) == 5
    assert [row["path"] for row in index] == [recipe.name for recipe in recorded.recipes]
    for row, recipe in zip(index, recorded.recipes, strict=True):
        trajectory = WeightTrajectory(recorded.folder(recipe))
        trajectory.verify()
        stored = json.loads((recorded.folder(recipe) / "recipe.json").read_text())
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
    assert WeightTrajectory(output / lora["path"]).base_model == PRETRAINED
    texts = [path.read_text() for path in output.rglob("*.json") if ".cache" not in path.parts]
    assert texts and not any(str(output.parents[1]) in text for text in texts)  # no local paths
    card = (output / "README.md").read_text()
    assert "| cnn | shapes | 1 | 1 |  |  |" in card
    assert "| `held_out_architecture` | architectures that are not in `train`: vit |" in card


def test_push(collect, recorded, sources, tmp_path, hub, capsys):
    shutil.copytree(recorded.output_dir.parent, tmp_path / "copy", ignore=shutil.ignore_patterns("cache"))
    job = replace(recorded, output_dir=tmp_path / "copy" / "collection")
    (job.output_dir / "gpt2-reviews-000" / "result.json").write_text('{"status": "failed", "error": "?"}')
    assert run(collect, job, sources, "--push-to-hub=me/trajectories", "--private") == 1
    done = capsys.readouterr()
    assert "4 of 5 trajectories finished" in done.out and f"{hub.url}/datasets/me/trajectories/commit/" in done.out
    repo = hub.repo("me/trajectories", "dataset")
    files = repo.files()
    assert repo.private and repo.titles()[0] == "Upload 4 trajectories"
    assert {"README.md", "index.jsonl", "space.yaml", "cnn-shapes-001/state-2/model.safetensors"} <= set(files)
    assert not any(".lock" in path or "gpt2" in path or path.startswith((".cache", ".logs")) for path in files)

    pulled = Path(snapshot_download("me/trajectories", repo_type="dataset", local_dir=tmp_path / "pulled"))
    program = "import datasets; print(*datasets.load_dataset('me/trajectories', split='trajectories')['path'][:])"
    variables = environment(hub, tmp_path / "home")
    printed = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
    names = printed.stdout.split()
    assert names == ["cnn-shapes-000", "vit-shapes-000", "lora-reviews-000", "cnn-shapes-001"], printed.stderr
    for name in names:
        WeightTrajectory(pulled / name).verify()


def test_nothing_private_is_pushed_to_a_public_repo(collect, recorded, hub):
    from index import push

    hub.create("me/public", type="dataset")
    with pytest.raises(HubError, match="me/public is public"):
        push(recorded.output_dir, [], "me/public", private=True)
    assert hub.repo("me/public", "dataset").files() == {}


@pytest.mark.parametrize(("recorded_from", "is_same"), [(None, True), ("abc", True), ("xyz", False)])
def test_trajectory_of_other_data(collect, tmp_path, recorded_from, is_same):
    from record_one import _check_same_data

    if recorded_from is not None:
        (tmp_path / "recipe.json").write_text(json.dumps({"data_fingerprint": recorded_from}))
    with nullcontext() if is_same else pytest.raises(ValueError, match="fingerprint xyz, now abc"):
        _check_same_data(tmp_path / "recipe.json", "abc")


def test_collection_of_other_data_or_another_space(collect, job, sources, tmp_path, monkeypatch):
    import workers

    architectures = {name: {**ARCHITECTURES[name], "draws": {"shapes": 1}} for name in ("cnn", "vit")}
    job = job(architectures=architectures, held_out={})
    starts: list[Any] = []
    monkeypatch.setattr(workers, "record_all", lambda job, *_, **__: starts.append(job))
    assert run(collect, job, sources) == 0 and len(starts) == 1
    stored = json.loads((job.output_dir / ".data.json").read_text())
    assert list(stored) == ['shapes {"image_channels": 1, "image_size": 8}']

    same, other = (shutil.copytree(job.sources["shapes"]["path"], tmp_path / name) for name in ("same", "other"))
    assert run(collect, job, sources, f"--data=shapes={same}") == 0 and len(starts) == 2
    table = datasets.Dataset.from_parquet(str(same / "test.parquet"), cache_dir=str(tmp_path / "cache"))
    table.select([1, 0, *range(2, 20)]).to_parquet(other / "test.parquet")
    with pytest.raises(ValueError, match=rf"another 'shapes' than {other}.*fingerprint"):
        run(collect, job, sources, f"--data=shapes={other}")
    assert len(starts) == 2 and json.loads((job.output_dir / ".data.json").read_text()) == stored
    for recipe in job.recipes:
        workers._write_failure(job, recipe, "?")
    assert run(collect, job, sources, f"--data=shapes={other}") == 1  # all recipes are done
    assert run(collect, job, sources, "--retry-failed") == 0
    (job.folder(job.recipes[0]) / "recipe.json").write_text(json.dumps({**job.recipes[0].to_dict(), "seed": 1}))
    with pytest.raises(ValueError, match=r"recipe\.json has seed=1"):
        run(collect, job, sources)


def test_workers_are_isolated(collect, monkeypatch):
    from workers import _isolate

    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x", "PATH": "/bin"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for visible, number, expected in ((None, 1, "1"), (None, 6, "2"), ("3,7", 1, "7"), ("GPU-abc", 5, "GPU-abc")):
        variables = launched | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
        monkeypatch.setattr(os, "environ", variables)
        _isolate(number)
        assert variables["CUDA_VISIBLE_DEVICES"] == expected
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"} & set(variables)
        assert (variables["PATH"], variables["OMP_NUM_THREADS"]) == ("/bin", "1")
