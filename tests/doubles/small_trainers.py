"""Trainers of small models of every supported kind, adapters for them, and what the recording tests share."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_images, make_resnet, make_trainer
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from know_hf import ForgettingSchedule, WeightTrajectory, induce_forgetting

OPTIONS = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 1,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}
SCHEDULE = ForgettingSchedule(num_states=3)
BALANCED = ForgettingSchedule(num_states=3, stratify_by="labels")  # of the images of conftest
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
PEFT_WARNING = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def make_tokens(num_examples: int = 32) -> np.ndarray:
    return np.random.RandomState(0).randint(3, 32, size=(num_examples, 6))


def next_tokens() -> Dataset:
    return Dataset.from_dict({"input_ids": make_tokens(), "labels": make_tokens()})


def bert(folder: Path) -> Trainer:
    tokens = make_tokens()
    data = Dataset.from_dict({"input_ids": tokens, "label": (tokens[:, 1] < tokens[:, 0]).astype(int)})
    return Trainer(
        BertForSequenceClassification(BertConfig(vocab_size=32, **SIZES)),
        TrainingArguments(str(folder), **OPTIONS),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
    )


def tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **SIZES))


def llama(folder: Path) -> Trainer:
    return Trainer(tiny_llama(), TrainingArguments(str(folder), **OPTIONS), train_dataset=next_tokens())


def gpt2(folder: Path) -> Trainer:
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2)
    return Trainer(GPT2LMHeadModel(config), TrainingArguments(str(folder), **OPTIONS), train_dataset=next_tokens())


def vit(folder: Path) -> Trainer:
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=4, **SIZES))
    return Trainer(model, TrainingArguments(str(folder), **OPTIONS), train_dataset=make_images(32))


def resnet(folder: Path) -> Trainer:
    return make_trainer(folder, num_train_epochs=1)


def t5(folder: Path) -> Trainer:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
    generation = {"predict_with_generate": True, "generation_max_length": 4, "generation_num_beams": 1}
    return Seq2SeqTrainer(
        T5ForConditionalGeneration(config),
        Seq2SeqTrainingArguments(str(folder), **generation, **OPTIONS),
        train_dataset=next_tokens(),
        eval_dataset=next_tokens().select(range(8)),
        compute_metrics=lambda p: {"first_token": float((p.predictions[:, 1] == p.label_ids[:, 0]).mean())},
    )


def sft(folder: Path) -> Trainer:
    trl = pytest.importorskip("trl")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(29))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = [" ".join(f"w{token - 3}" for token in row) for row in make_tokens()]
    return trl.SFTTrainer(
        tiny_llama(),
        args=trl.SFTConfig(str(folder), max_length=8, bf16=False, activation_checkpointing=False, **OPTIONS),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        ),
    )


CASES: dict[str, tuple[Callable[[Path], Trainer], type]] = {
    "bert": (bert, AutoModelForSequenceClassification),
    "llama": (llama, AutoModelForCausalLM),
    "gpt2": (gpt2, AutoModelForCausalLM),
    "vit": (vit, AutoModelForImageClassification),
    "resnet": (resnet, AutoModelForImageClassification),
    "t5": (t5, AutoModelForSeq2SeqLM),
    "sft": (sft, AutoModelForCausalLM),
}
TARGETS = {"bert": "query", "llama": "q_proj", "gpt2": "c_attn", "vit": "q_proj", "t5": "q", "sft": "q_proj"}
TARGETS |= {"resnet": "shortcut.convolution"}
KINDS = {
    "lora": {"target_modules": ["shortcut.convolution", "classifier.1"]},
    "rslora": {"target_modules": ["shortcut.convolution", "classifier.1"], "use_rslora": True},
    "dora": {"target_modules": ["classifier.1"], "use_dora": True},
    "modules_to_save": {"target_modules": ["shortcut.convolution"], "modules_to_save": ["classifier"]},
}


def make_case(name: str, folder: Path) -> Trainer:
    """A trainer of `CASES`, always with the same initial weights."""
    set_seed(0)
    return CASES[name][0](folder)


def make_adapter(kind: str, name: str = "default", **options: object) -> PeftModel:
    """One of `KINDS` around the small ResNet."""
    torch.manual_seed(1)
    return get_peft_model(make_resnet(), LoraConfig(r=2, **{**KINDS[kind], **options}), adapter_name=name)


def adapt(trainer: Trainer, name: str) -> Trainer:
    """Wraps the model of a trainer of `CASES` with an adapter."""
    config = LoraConfig(r=2, target_modules=[TARGETS[name]], fan_in_fan_out=name == "gpt2")
    torch.manual_seed(1)
    trainer.model = trainer.model_wrapped = get_peft_model(trainer.model, config)
    return trainer


class NoTraining(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        pytest.fail("a training has begun")


class StopAfter(TrainerCallback):
    """Ctrl-C in the training that follows a number of complete ones."""

    def __init__(self, trainings: int):
        self.left = trainings

    def on_train_begin(self, args, state, control, **kwargs):
        self.left -= 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.left < 0:
            raise KeyboardInterrupt


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in the folder; folders are listed too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


def assert_refused(
    trainer: Any, folder: Path, error: type[Exception], match: str, schedule: Any = BALANCED, **options: Any
) -> None:
    """The recording fails before any training and before it writes a trajectory."""
    if isinstance(trainer, Trainer):
        trainer.add_callback(NoTraining())
    existed = WeightTrajectory.exists(folder)
    with pytest.raises(error, match=match):
        induce_forgetting(trainer, schedule, folder, **options)
    assert WeightTrajectory.exists(folder) == existed


def assert_same_states(first: WeightTrajectory, second: WeightTrajectory) -> None:
    assert (first.num_states, first.names) == (second.num_states, second.names)
    for name in first.names:
        assert torch.equal(first.history(name), second.history(name)), name


def assert_equal_weights(ours: nn.Module, theirs: nn.Module) -> None:
    first, second = ours.state_dict(), theirs.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
