"""Every kind of trainer and model that is promised: recorded, resumed, and written back bit for bit."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images, make_resnet, make_trainer
from datasets import Dataset
from test_predict import Constant
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
    PreTrainedModel,
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

from know_hf import (
    ForgettingSchedule,
    WeightTrajectory,
    WeightTransitionCallback,
    induce_forgetting,
    predict_overflowed_weights,
)

SCHEDULE = ForgettingSchedule(num_states=3)
OPTIONS = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 1,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


def make_texts(num_examples: int = 32) -> dict[str, np.ndarray]:
    """Tokens 3 to 31, and as label whether the second is smaller than the first."""
    tokens = np.random.RandomState(0).randint(3, 32, size=(num_examples, 6))
    return {"input_ids": tokens, "label": (tokens[:, 1] < tokens[:, 0]).astype(int)}


def next_tokens() -> Dataset:
    tokens = make_texts()["input_ids"]
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def bert(folder: Path) -> Trainer:
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    data = Dataset.from_dict(make_texts())
    return Trainer(
        BertForSequenceClassification(config),
        TrainingArguments(str(folder), **OPTIONS),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
    )


def tiny_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **sizes))


def llama(folder: Path) -> Trainer:
    return Trainer(tiny_llama(), TrainingArguments(str(folder), **OPTIONS), train_dataset=next_tokens())


def gpt2(folder: Path) -> Trainer:
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2)
    return Trainer(GPT2LMHeadModel(config), TrainingArguments(str(folder), **OPTIONS), train_dataset=next_tokens())


def vit(folder: Path) -> Trainer:
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, num_labels=4,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    return Trainer(model, TrainingArguments(str(folder), **OPTIONS), train_dataset=make_images(32))


def resnet(folder: Path) -> Trainer:
    return make_trainer(folder, num_train_epochs=1)


def t5(folder: Path) -> Trainer:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
    data = next_tokens()
    return Seq2SeqTrainer(
        T5ForConditionalGeneration(config),
        Seq2SeqTrainingArguments(
            str(folder), predict_with_generate=True, generation_max_length=4, generation_num_beams=1, **OPTIONS
        ),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        compute_metrics=lambda p: {"first_token": float((p.predictions[:, 1] == p.label_ids[:, 0]).mean())},
    )


def sft(folder: Path) -> Trainer:
    trl = pytest.importorskip("trl")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(29))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = [" ".join(f"w{token - 3}" for token in row) for row in make_texts()["input_ids"]]
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
TIED = ("llama", "gpt2", "t5", "sft")
METRICS = {"bert": {"eval_loss", "eval_accuracy"}, "resnet": {"eval_loss"}, "t5": {"eval_loss", "eval_first_token"}}


@dataclass
class Case:
    """One of `CASES`, recorded.

    Attributes:
        name (`str`): Its name there.
        make (`Callable`): Makes the trainer anew, with the weights that it had.
        auto_class (`type`): What loads the model.
        trainer (`Trainer`): As recording left it.
    """

    name: str
    make: Callable[[Path], Trainer]
    auto_class: type
    trainer: Trainer
    trajectory: WeightTrajectory


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    maker, auto_class = CASES[request.param]

    def make(folder: Path) -> Trainer:
        set_seed(0)
        return maker(folder)

    folder = tmp_path_factory.mktemp(request.param)
    trainer = make(folder)
    return Case(request.param, make, auto_class, trainer, induce_forgetting(trainer, SCHEDULE, folder / "trajectory"))


class StopAfter(TrainerCallback):
    """Ctrl-C in the middle of the training that comes after so many others."""

    def __init__(self, trainings: int):
        self.left = trainings

    def on_train_begin(self, args, state, control, **kwargs):
        self.left -= 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.left < 0:
            raise KeyboardInterrupt


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_equal_weights(ours: nn.Module, theirs: nn.Module) -> None:
    first, second = ours.state_dict(), theirs.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_every_state_is_recorded_and_every_tensor_has_an_owner(case):
    trajectory = case.trajectory
    trajectory.verify()
    sizes = SCHEDULE.sizes(len(case.trainer.train_dataset))
    assert [state.num_examples for state in trajectory.states] == sizes
    batch = case.trainer.args.per_device_train_batch_size
    assert [state.steps for state in trajectory.states] == [size // batch for size in sizes]
    assert trajectory.roles.keys() == set(trajectory.names)
    assert not {name: role.reason for name, role in trajectory.roles.items() if "owner unknown" in role.reason}
    trained = [name for name, role in trajectory.roles.items() if role.role in ("fc", "conv")]
    assert trained
    for name in trained:
        oldest, middle, newest = trajectory.history(name)
        assert not torch.equal(oldest, middle), name
        assert not torch.equal(middle, newest), name


def test_the_trainer_holds_the_full_data_state(case):
    assert_equal_weights(case.trainer.model, case.trajectory.load_model(0))


def test_metrics_are_those_of_the_trainer(case):
    for state in case.trajectory.states:
        assert set(state.metrics) == METRICS.get(case.name, set())


def test_an_interrupted_recording_goes_on_to_the_same_bytes(case, tmp_path):
    folder = tmp_path / "trajectory"
    trainer = case.make(tmp_path)
    trainer.add_callback(StopAfter(2))
    with pytest.raises(KeyboardInterrupt):
        induce_forgetting(trainer, SCHEDULE, folder)
    assert WeightTrajectory(folder).num_states == 2
    induce_forgetting(case.make(tmp_path), SCHEDULE, folder)
    assert hashes(folder) == hashes(case.trajectory.path)


def test_zero_residual_writes_a_model_that_is_the_full_data_state(case, tmp_path):
    predict_overflowed_weights(case.trajectory, predictor=Constant(0.0), output_dir=tmp_path / "enhanced")
    recorded = case.trajectory.path / "state-0/model.safetensors"
    assert (tmp_path / "enhanced/model.safetensors").read_bytes() == recorded.read_bytes()
    model = case.auto_class.from_pretrained(tmp_path / "enhanced")
    assert type(model) is type(case.trainer.model)
    assert_equal_weights(model, case.trainer.model)


def test_tied_weights_are_stored_once_and_stay_tied(case, tmp_path):
    tied = case.trajectory.tied_weights
    assert bool(tied) == (case.name in TIED)
    assert not set(tied) & set(case.trajectory.names)
    predict_overflowed_weights(case.trajectory, predictor=Constant(0.5), output_dir=tmp_path / "enhanced")
    state_dict = case.auto_class.from_pretrained(tmp_path / "enhanced").state_dict(keep_vars=True)
    for target, source in tied.items():
        assert state_dict[target] is state_dict[source]
        assert torch.equal(state_dict[source], case.trajectory.tensor(source) + 0.5)


def test_the_tokenizer_stands_beside_the_model(tmp_path):
    trainer = sft(tmp_path)
    trajectory = induce_forgetting(trainer, SCHEDULE, tmp_path / "trajectory")
    result = predict_overflowed_weights(trajectory, predictor=Constant(0.0), output_dir=tmp_path / "enhanced")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(result.path)
    assert tokenizer("w0 w28")["input_ids"] == [3, 31]


def train(model: nn.Module, dataset: Dataset, epochs: int = 1, stop: bool = False) -> int:
    """A loop as anyone writes it; returns its number of steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [batch for _ in range(epochs) for batch in dataset.iter(8)]
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if stop:
            raise KeyboardInterrupt
    return len(batches)


def record_plain_loop(model: PreTrainedModel, folder: Path, stop_at: int | None = None) -> WeightTrajectory:
    dataset = make_images(32)
    if WeightTrajectory.exists(folder):
        trajectory = WeightTrajectory(folder)
        trajectory.load_into(model, trajectory.num_states - 1)
    else:
        trajectory = WeightTrajectory.create(folder, SCHEDULE)
    members = SCHEDULE.indices(len(dataset))
    for index in range(trajectory.num_states, SCHEDULE.num_states):
        steps = train(model, dataset.select(members[index]), stop=index == stop_at)
        trajectory.record(model, num_examples=len(members[index]), steps=steps)
    return trajectory


def test_a_plain_pytorch_loop(tmp_path):
    model = make_resnet()
    trajectory = record_plain_loop(model, tmp_path / "whole")
    assert [(state.num_examples, state.steps) for state in trajectory.states] == [(32, 4), (16, 2), (8, 1)]
    assert_equal_weights(model, trajectory.load_model(2))
    assert trajectory.schedule == SCHEDULE
    with pytest.raises(KeyboardInterrupt):
        record_plain_loop(make_resnet(), tmp_path / "stopped", stop_at=2)
    assert record_plain_loop(make_resnet(seed=5), tmp_path / "stopped").num_states == 3
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "whole")
    result = predict_overflowed_weights(trajectory, predictor=Constant(0.0), output_dir=tmp_path / "enhanced")
    assert_equal_weights(result.load_model(), trajectory.load_model(0))


def record_with_callback(folder: Path, model: PreTrainedModel, trainings: int | None = None) -> WeightTrajectory:
    dataset = make_images(32)
    callback = WeightTransitionCallback(folder, SCHEDULE)
    done = callback.trajectory.num_states
    if done:
        callback.trajectory.load_into(model, done - 1)
    for indices in SCHEDULE.indices(len(dataset))[done:trainings]:
        args = TrainingArguments(str(folder.parent / "out"), **OPTIONS)
        Trainer(model, args, train_dataset=dataset.select(indices), callbacks=[callback]).train()
    callback.trajectory.check(wait=True)
    return callback.trajectory


def test_the_callback_alone(tmp_path):
    model = make_resnet()
    trajectory = record_with_callback(tmp_path / "whole", model)
    assert [(state.num_examples, state.steps) for state in trajectory.states] == [(32, 4), (16, 2), (8, 1)]
    assert_equal_weights(model, trajectory.load_model(2))
    record_with_callback(tmp_path / "stopped", make_resnet(), trainings=2)
    assert record_with_callback(tmp_path / "stopped", make_resnet(seed=5)).num_states == 3
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "whole")
