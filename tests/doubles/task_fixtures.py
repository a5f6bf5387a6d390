"""Small models, datasets in folders and arguments for the tests of the tasks."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    set_seed,
)

from know_hf import RecordArguments

WORDS = ["good", "bad", "film", "a", "the", "was", "this"]
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
QUICK = {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def make_tokenizer(words=WORDS, **tokens):
    special = list(dict.fromkeys(tokens.values()))
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=tokens["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def make_texts(num_examples=32, seed=0):
    random = np.random.RandomState(seed)
    labels = np.arange(num_examples) % 2
    texts = [f"{('bad', 'good')[label]} {' '.join(random.choice(WORDS[2:], 4))}" for label in labels]
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


def make_pictures(num_examples=32, seed=0):
    """Grey images, dark or light, with string classes."""
    random = np.random.RandomState(seed)
    labels = np.arange(num_examples) % 2
    pixels = (random.randint(0, 100, (num_examples, 10, 12)) + 150 * labels[:, None, None]).astype(np.uint8)
    images = {"img": [Image.fromarray(p) for p in pixels], "label": [("dark", "light")[label] for label in labels]}
    features = datasets.Features(img=datasets.Image(), label=datasets.Value("string"))
    return datasets.Dataset.from_dict(images, features=features)


def write_dataset(folder, make):
    make().to_parquet(folder / "train-00000-of-00001.parquet")
    make(8, seed=7).to_parquet(folder / "test-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("texts"), make_texts)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("pictures"), make_pictures)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))


def write_bert(folder, words=WORDS, seed=0, model_class=BertModel, **options):
    """Write a BERT with a tokenizer that knows some words."""
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = make_tokenizer(words, **special)
    set_seed(seed)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **SIZES, **options)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_vit(folder, **options):
    set_seed(0)
    mean = [0.5] * options.get("num_channels", 3)
    ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZES, **options)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=mean, image_std=mean).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return write_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Tied embeddings and, like most language models, a tokenizer without a padding token."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = make_tokenizer(unk_token="<unk>", eos_token="</s>")
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 1}
    set_seed(0)
    config = LlamaConfig(**tokens, max_position_embeddings=32, tie_word_embeddings=True, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text_arguments(bert, texts, tmp_path):
    paths = {"model": bert, "dataset": texts, "eval_split": "test", "output_dir": str(tmp_path / "out")}
    return RecordArguments(task="text-classification", **paths, num_states=3, epochs=2, training=QUICK)


@pytest.fixture
def image_arguments(text_arguments, vit, pictures):
    return replace(text_arguments, task="image-classification", model=vit, dataset=pictures)


@pytest.fixture
def lm_arguments(text_arguments, llama):
    return replace(text_arguments, task="causal-lm", model=llama)
