"""Every promised kind of trainer and model is recorded, resumed and written back bit for bit."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import make_images, make_resnet
from doubles.constant_predictor import Constant
from doubles.small_trainers import (
    CASES,
    OPTIONS,
    SCHEDULE,
    StopAfter,
    assert_equal_weights,
    hashes,
    make_case,
)
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments

from know_hf import WeightTrajectory, WeightTransitionCallback, induce_forgetting, predict_overflowed_weights

TIED = ("llama", "gpt2", "t5", "sft")
METRICS = {"bert": {"eval_loss", "eval_accuracy"}, "resnet": {"eval_loss"}, "t5": {"eval_loss", "eval_first_token"}}


@dataclass
class Case:
    """One of `CASES`, recorded; the trainer as the recording left it."""

    name: str
    trainer: Trainer
    trajectory: WeightTrajectory

    def load(self, folder: Path) -> PreTrainedModel:
        return CASES[self.name][1].from_pretrained(folder)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    trainer = make_case(request.param, folder)
    return Case(request.param, trainer, induce_forgetting(trainer, SCHEDULE, folder / "trajectory"))


def test_all_states_are_recorded_and_all_trained_tensors_move(case):
    trajectory = case.trajectory
    trajectory.verify()
    sizes = SCHEDULE.sizes(len(case.trainer.train_dataset))
    assert [state.num_examples for state in trajectory.states] == sizes
    batch = case.trainer.args.per_device_train_batch_size
    assert [state.steps for state in trajectory.states] == [size // batch for size in sizes]
    assert all(set(state.metrics) == METRICS.get(case.name, set()) for state in trajectory.states)
    assert trajectory.roles.keys() == set(trajectory.names)
    assert not {name: role.reason for name, role in trajectory.roles.items() if "unknown" in role.reason}
    trained = [name for name, role in trajectory.roles.items() if role.role in ("fc", "conv")]
    assert trained
    for name in trained:
        oldest, middle, newest = trajectory.history(name)
        assert not torch.equal(oldest, middle), name
        assert not torch.equal(middle, newest), name
    assert_equal_weights(case.trainer.model, trajectory.load_model(0))


def test_an_interrupted_recording_resumes_to_the_same_bytes(case, tmp_path):
    folder = tmp_path / "trajectory"
    trainer = make_case(case.name, tmp_path)
    trainer.add_callback(StopAfter(2))
    train_dataset, args = trainer.train_dataset, trainer.args
    with pytest.raises(KeyboardInterrupt):
        induce_forgetting(trainer, SCHEDULE, folder)
    assert trainer.train_dataset is train_dataset and trainer.args is args
    assert WeightTrajectory(folder).num_states == 2
    induce_forgetting(make_case(case.name, tmp_path), SCHEDULE, folder)
    assert hashes(folder) == hashes(case.trajectory.path)


def test_zero_residual_writes_the_full_data_state(case, tmp_path):
    predict_overflowed_weights(case.trajectory, predictor=Constant(0.0), output_dir=tmp_path / "enhanced")
    recorded = case.trajectory.path / "state-0/model.safetensors"
    assert (tmp_path / "enhanced/model.safetensors").read_bytes() == recorded.read_bytes()
    model = case.load(tmp_path / "enhanced")
    assert type(model) is type(case.trainer.model)
    assert_equal_weights(model, case.trainer.model)
    if case.trainer.processing_class is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "enhanced")
        assert tokenizer("w0 w28")["input_ids"] == [3, 31]


def test_tied_weights_are_stored_once_and_stay_tied(case, tmp_path):
    tied = case.trajectory.tied_weights
    assert bool(tied) == (case.name in TIED)
    assert not set(tied) & set(case.trajectory.names)
    predict_overflowed_weights(case.trajectory, predictor=Constant(0.5), output_dir=tmp_path / "enhanced")
    state_dict = case.load(tmp_path / "enhanced").state_dict(keep_vars=True)
    for target, source in tied.items():
        assert state_dict[target] is state_dict[source]
        assert torch.equal(state_dict[source], case.trajectory.tensor(source) + 0.5)


def record_with_plain_loop(folder: Path, model: nn.Module, stages: int | None = None) -> WeightTrajectory:
    dataset = make_images(32)
    if WeightTrajectory.exists(folder):
        trajectory = WeightTrajectory(folder)
        trajectory.load_into(model, trajectory.num_states - 1)
    else:
        trajectory = WeightTrajectory.create(folder, SCHEDULE)
    for indices in SCHEDULE.indices(len(dataset))[trajectory.num_states : stages]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in dataset.select(indices).iter(8):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trajectory.record(model, num_examples=len(indices), steps=len(indices) // 8)
    return trajectory


def record_with_callback(folder: Path, model: nn.Module, stages: int | None = None) -> WeightTrajectory:
    dataset = make_images(32)
    callback = WeightTransitionCallback(folder, SCHEDULE)
    recorded = callback.trajectory.num_states
    if recorded:
        callback.trajectory.load_into(model, recorded - 1)
    for indices in SCHEDULE.indices(len(dataset))[recorded:stages]:
        args = TrainingArguments(str(folder.parent / "out"), **OPTIONS)
        Trainer(model, args, train_dataset=dataset.select(indices), callbacks=[callback]).train()
    callback.trajectory.check(wait=True)
    return callback.trajectory


@pytest.mark.parametrize("record", [record_with_plain_loop, record_with_callback])
def test_own_loops_are_recorded_and_resumed(tmp_path, record):
    model = make_resnet()
    trajectory = record(tmp_path / "complete", model)
    assert [(state.num_examples, state.steps) for state in trajectory.states] == [(32, 4), (16, 2), (8, 1)]
    assert_equal_weights(model, trajectory.load_model(2))
    assert trajectory.schedule == SCHEDULE
    record(tmp_path / "resumed", make_resnet(), stages=2)
    record(tmp_path / "resumed", make_resnet(seed=5))
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "complete")
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **OPTIONS), train_dataset=make_images(32))
    trainer.add_callback(WeightTransitionCallback(tmp_path / "complete", SCHEDULE))
    with pytest.raises(ValueError, match=r"state 3 .*32 examples.* 8;"):
        trainer.train()
