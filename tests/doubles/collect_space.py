"""A miniature space of recipes/collect: images, texts and a pretrained model, with the fixtures of its tests."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

FOLDER = Path(__file__).parents[2] / "recipes" / "collect"
_MODULES = ("collect", "examples", "images", "index", "jobs", "models", "record_one", "space", "texts", "workers")
_WORDS = ("film", "plot", "actor", "scene", "the", "a", "was", "it", "and", "long", "short", "loud")

PRETRAINED = "nobody/tiny-bert"
WARNINGS = [
    pytest.mark.filterwarnings("ignore:Could not find a config file in nobody/tiny-bert:UserWarning"),  # of peft
]
CONFIG = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
ARCHITECTURES = {
    "cnn": {
        "training": "vision",
        "draws": {"shapes": 2},
        "model_class": "SmallCNN",
        "config": {"width": 2, "batch_norm": {"choice": [False, True]}},
    },
    "vit": {
        "training": "vision",
        "draws": {"shapes": 1},
        "model_class": "ViTForImageClassification",
        "config": {"patch_size": 4, **CONFIG},
    },
    "gpt2": {
        "training": "text",
        "draws": {"reviews": 1},
        "model_class": "GPT2ForSequenceClassification",
        "config": {"n_embd": 8, "n_layer": 1, "n_head": 2},
    },
    "lora": {
        "training": "adapter",
        "draws": {"reviews": 1},
        "model_class": "BertForSequenceClassification",
        "pretrained": PRETRAINED,
        "config": {},
        "lora": {"r": 2, "target_modules": ["query", "value"], "use_rslora": True},
    },
}
VISION = {
    "inputs": {"image_size": 8, "image_channels": 1},
    "augmentation": {"choice": [[], ["flip", "shift", "crop"]]},
    "num_examples": {"log_uniform": [60, 80]},
    "num_examples_limit": 80,
    "num_eval_examples": 10,
    "min_steps": {"uniform": [8, 12]},
    "schedule": {"num_states": 3, "ratio": {"uniform": [0.5, 0.6]}, "epochs_per_stage": 1, "stratify_by": "labels"},
    "training_arguments": {"per_device_train_batch_size": {"choice": [8, 16]}},
    "optimizers": {
        "adamw": {"optim": "adamw_torch", "learning_rate": {"uniform": [1e-3, 1e-2]}, "weight_decay": 0.01},
        "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05},
        "adafactor": {"optim": "adafactor", "learning_rate": "1e-2"},
    },
}
_TEXT = {**VISION, "inputs": {"max_length": 12, "num_words": 20}, "augmentation": ["token_dropout"]}
TRAINING = {"vision": VISION, "text": _TEXT, "adapter": {**_TEXT, "inputs": {"max_length": 12}}}


def write_space(path: Path, **changes: Any) -> Path:
    content = {
        "seed": 1,
        "held_out": {"architectures": ["vit"], "datasets": ["reviews"], "every": 2},
        "training": TRAINING,
        "architectures": ARCHITECTURES,
        "datasets": {
            "shapes": {"path": "nobody/shapes", "image": "picture", "label": "kind", "train": "train", "eval": "test"},
            "reviews": {"path": "nobody/reviews", "text": "review", "label": "kind", "train": "train", "eval": "test"},
        },
    }
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def collect() -> Iterator[ModuleType]:
    """The script as a module; its neighbors are imported under their short names, and forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        for name in _MODULES:
            patch.delitem(sys.modules, name, raising=False)
        yield import_module("collect")
        for name in _MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for a dataset of bright and dark images, one of good and bad texts, and a tiny BERT."""
    folder = tmp_path_factory.mktemp("sources")
    random = np.random.RandomState(0)
    for split, count in (("train", 100), ("test", 20)):
        kinds = [index % 2 for index in range(count)]
        pictures = [Image.fromarray(random.randint(0, 128, (16, 16), np.uint8) + np.uint8(127 * k)) for k in kinds]
        texts = [" ".join([*random.choice(_WORDS, 3 + k * 12), ("bad", "good")[k]]) for k in kinds]
        for name, column, values, feature in (
            ("shapes", "picture", pictures, datasets.Image()),
            ("reviews", "review", texts, datasets.Value("string")),
        ):
            features = datasets.Features({column: feature, "kind": datasets.ClassLabel(names=["low", "high"])})
            table = datasets.Dataset.from_dict({column: values, "kind": kinds}, features=features)
            table.to_parquet(folder / name / f"{split}.parquet")
    _save_tiny_bert(folder / "bert")
    data = [f"--data={name}={folder / name}" for name in ("shapes", "reviews")]
    return [*data, f"--model={PRETRAINED}={folder / 'bert'}"]


@pytest.fixture
def job(collect: ModuleType, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Function that creates the job of a space, as main does."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return partial(make_job, collect, sources, tmp_path)


@pytest.fixture(scope="module")
def recorded(collect: ModuleType, sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Job of the miniature space with all of its trajectories, recorded by one process. Do not change its folder."""
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        job = make_job(collect, sources, folder)
        import_module("workers").record_rest(job, lambda *message: None)
    return job


def make_job(collect: ModuleType, sources: list[str], folder: Path, **changes: Any) -> Any:
    space = import_module("space").Space.from_yaml(write_space(folder / "space.yaml", **changes))
    output = folder / "collection"
    output.mkdir(exist_ok=True)
    arguments = collect.make_parser().parse_args(["--output-dir", str(output), *sources])
    data, models = collect.read_sources(space, arguments.data), collect.read_pairs("--model", arguments.model)
    return import_module("jobs").Job(space.recipes(), data, models, output)


def run(collect: ModuleType, job: Any, sources: list[str], *flags: str) -> int:
    """Run the script on the folder and the space of a job."""
    command = [f"--output-dir={job.output_dir}", f"--space={job.output_dir.parent / 'space.yaml'}", *sources, *flags]
    return collect.main(collect.make_parser().parse_args(command))


def _save_tiny_bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizer, set_seed

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", *_WORDS]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    tokenizer.save_pretrained(folder)
    set_seed(0)
    BertModel(BertConfig(vocab_size=len(words), **CONFIG)).save_pretrained(folder)
