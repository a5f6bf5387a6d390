"""Tail states of the training of state 0, and branches from Θ0 on complementary halves."""

import numpy as np
import pytest
import torch
from conftest import make_images, make_resnet, make_trainer
from doubles.small_trainers import StopAfter, assert_same_states
from transformers import TrainerCallback

from know_hf import ForgettingSchedule, Gate, WeightTrajectory, WeightTransitionCallback, induce_forgetting
from know_hf import predict_overflowed_weights as predict
from know_hf.cards import trajectory_card
from know_hf.data.subsets import divide

NAME = "classifier.1.weight"
TAIL = ForgettingSchedule(num_states=2, stratify_by="labels", tail_states=4)
HALVES = ForgettingSchedule(kind="complementary", stratify_by="labels")
FROM_START = ForgettingSchedule(kind="complementary", stratify_by="labels", branch_from="start")


class Spy(TrainerCallback):
    """Notes the weights at the start of every training and after every step of the first."""

    def __init__(self):
        self.starts, self.steps = [], []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.starts.append(model.classifier[1].weight.detach().clone())

    def on_step_end(self, args, state, control, model, **kwargs):
        if len(self.starts) == 1:
            self.steps.append(model.classifier[1].weight.detach().clone())


def record(tmp_path, schedule, name="trajectory", *callbacks):
    trainer = make_trainer(tmp_path)
    for callback in callbacks:
        trainer.add_callback(callback)
    return induce_forgetting(trainer, schedule, tmp_path / name)


def test_tail_states_are_the_weights_of_the_second_half(tmp_path):
    spy = Spy()
    trajectory = record(tmp_path, TAIL, "trajectory", spy)
    trajectory.verify()
    assert [(state.name, state.steps) for state in trajectory.tail] == [
        ("tail-0", 16), ("tail-1", 20), ("tail-2", 24), ("tail-3", 28)
    ]  # fmt: skip
    for state in trajectory.tail:
        assert torch.equal(trajectory.tensor(NAME, state.name), spy.steps[state.steps - 1])
    assert torch.equal(trajectory.tensor(NAME), spy.steps[-1])
    assert [state.steps for state in trajectory.states] == [32, 8] and trajectory.schedule == TAIL
    assert torch.equal(trajectory.load_model("tail-3").classifier[1].weight, spy.steps[27])
    plain = record(tmp_path, ForgettingSchedule(num_states=2, stratify_by="labels"), "plain")
    assert torch.equal(plain.tensor(NAME), trajectory.tensor(NAME)) and plain.tail == ()


def test_a_training_that_is_killed_in_its_tail_starts_again(tmp_path):
    trainer = make_trainer(tmp_path)

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 22:
                raise KeyboardInterrupt

    trainer.add_callback(Kill())
    with pytest.raises(KeyboardInterrupt):
        induce_forgetting(trainer, TAIL, tmp_path / "trajectory")
    assert (tmp_path / "trajectory/tail-1").exists() and not WeightTrajectory.exists(tmp_path / "trajectory")
    again, whole = record(tmp_path, TAIL), record(tmp_path, TAIL, "whole")
    again.verify()
    assert again.tail == whole.tail and again.start == whole.start
    assert_same_states(again, whole)


def test_a_training_that_restarts_with_a_smaller_batch_has_one_tail(tmp_path):
    class OutOfMemory(TrainerCallback):
        failed = False

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 26 and not self.failed:
                self.failed = True
                raise RuntimeError("CUDA out of memory.")

    trainer = make_trainer(tmp_path, auto_find_batch_size=True, dataloader_drop_last=True)
    trainer.add_callback(OutOfMemory())
    trajectory = induce_forgetting(trainer, TAIL, tmp_path / "trajectory")
    trajectory.verify()
    assert trajectory.states[0].steps > 32
    assert [state.steps for state in trajectory.tail] == TAIL.tail_steps(trajectory.states[0].steps)


def test_the_callback_alone_records_a_tail(tmp_path):
    callback = WeightTransitionCallback(tmp_path / "trajectory", ForgettingSchedule(num_states=2, tail_states=2))
    model = make_resnet()
    for size in (16, 8):
        trainer = make_trainer(tmp_path, model, num_train_epochs=1)
        trainer.train_dataset = trainer.train_dataset.select(range(size))
        trainer.add_callback(callback)
        trainer.train()
    assert [state.steps for state in callback.trajectory.tail] == [2, 3]
    assert [state.steps for state in callback.trajectory.states] == [4, 2]


def test_branches_begin_at_the_full_data_state_on_halves(tmp_path):
    spy = Spy()
    trajectory = record(tmp_path, HALVES, "trajectory", spy)
    trajectory.verify()
    theta0, first, second = (trajectory.tensor(NAME, name) for name in (0, "branch-0", "branch-1"))
    assert all(torch.equal(start, theta0) for start in spy.starts[1:]) and len(spy.starts) == 3
    assert not torch.equal(first, theta0) and not torch.equal(first, second)
    assert [state.num_examples for state in (*trajectory.states, *trajectory.branches)] == [64, 32, 32]
    assert [state.steps for state in (*trajectory.states, *trajectory.branches)] == [32, 8, 8]
    assert [state.seed for state in trajectory.branches] == [43, 44]
    assert len({state.subset_fingerprint for state in trajectory.branches}) == 2
    assert all("eval_loss" in state.metrics for state in trajectory.branches)
    assert trajectory.num_states == 1 and trajectory.schedule == HALVES

    target = (first + second) / 2
    gate = Gate(lambda model: float((model.classifier[1].weight - target).norm()), margin=0.0)
    result = predict(trajectory, predictor="average", output_dir=tmp_path / "enhanced", gate=gate)
    assert result.gate.chosen == "branch_average"
    assert [candidate.name for candidate in result.gate.candidates][:4] == ["Θ0", "start", "branch-0", "branch-1"]
    for card in ((result.path / "README.md").read_text(), str(trajectory_card(trajectory))):
        assert "two branches from Θ0" in card and "nested subsets" not in card


def test_branches_from_the_start_train_as_long_as_state_0(tmp_path):
    spy = Spy()
    trajectory = record(tmp_path, FROM_START, "trajectory", spy)
    trajectory.verify()
    start, first, second = (trajectory.tensor(NAME, name) for name in ("start", "branch-0", "branch-1"))
    assert all(torch.equal(weight, start) for weight in spy.starts) and len(spy.starts) == 3
    assert not torch.equal(first, second)
    assert [state.num_examples for state in (*trajectory.states, *trajectory.branches)] == [64, 32, 32]
    assert [state.steps for state in (*trajectory.states, *trajectory.branches)] == [32, 16, 16]
    assert WeightTrajectory(trajectory.path).schedule == FROM_START
    assert "two branches from the start" in str(trajectory_card(trajectory))
    for options in ({"start": "current"}, {"start_weights": "none"}):
        with pytest.raises(ValueError, match="branch_from='start' needs the start"):
            induce_forgetting(make_trainer(tmp_path), FROM_START, tmp_path / "refused", **options)
    assert FROM_START.stage_length(2.0, 7) == (2.0, 4) and HALVES.stage_length(2.0, 7) == (1, -1)


@pytest.mark.parametrize(("stage", "schedule"), [(1, HALVES), (2, HALVES), (2, FROM_START)])
def test_interrupted_branches_resume_to_the_same_bytes(tmp_path, stage, schedule):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(StopAfter(stage))
    with pytest.raises(KeyboardInterrupt):
        induce_forgetting(trainer, schedule, tmp_path / "trajectory")
    before = WeightTrajectory(tmp_path / "trajectory")
    assert len(before.states) + len(before.branches) == stage
    again, whole = record(tmp_path, schedule), record(tmp_path, schedule, "whole")
    assert again.branches == whole.branches
    assert_same_states(again, whole)


def test_halves_are_complementary_stratified_and_equal():
    labels = np.arange(64) % 4
    first, second = HALVES.halves(64, labels)
    assert np.array_equal(np.sort([*first, *second]), np.arange(64))
    assert np.bincount(labels[first]).tolist() == np.bincount(labels[second]).tolist() == [8] * 4
    assert [len(half) for half in ForgettingSchedule(kind="complementary").halves(7)] == [3, 3]
    subsets = divide(make_images(), HALVES, 4)
    assert [(subset.num_examples, subset.fraction) for subset in subsets] == [(64, 1.0), (32, 0.5), (32, 0.5)]


def test_steps_of_the_tail():
    assert ForgettingSchedule(tail_states=1).tail_steps(10) == [5]
    assert ForgettingSchedule(tail_states=5).tail_steps(10) == [5, 6, 7, 8, 9]
    assert ForgettingSchedule(tail_states=3).tail_steps(100) == [50, 67, 83]
    assert ForgettingSchedule().tail_steps(0) == []


def test_what_cannot_be_recorded_is_refused(tmp_path):
    for options, match in (
        ({"kind": "halves"}, "kind must be 'nested' or 'complementary', got 'halves'"),
        ({"kind": "complementary", "num_states": 3}, "remove num_states=3"),
        ({"kind": "complementary", "group_by": "patient"}, "remove group_by='patient'"),
        ({"kind": "complementary", "branch_from": "state-1"}, "branch_from must be 'state-0' or 'start'"),
        ({"branch_from": "start"}, "branch_from='start' is for kind='complementary'"),
        ({"kind": "complementary", "branch_from": "start", "steps_per_stage": 3}, "remove steps_per_stage=3"),
        ({"tail_states": -1}, "tail_states must be an integer from 0"),
    ):
        with pytest.raises(ValueError, match=match):
            ForgettingSchedule(**options)
    with pytest.raises(ValueError, match=r"tail_states=20 needs at least 40 optimizer steps .* has 32"):
        record(tmp_path, ForgettingSchedule(num_states=2, tail_states=20))
    with pytest.raises(ValueError, match="half of 6 examples is smaller than one batch of 4"):
        HALVES.halves(6, [0] * 6, batch_size=4)
    trainer = make_trainer(tmp_path)
    trainer.add_callback(WeightTransitionCallback(tmp_path / "alone", HALVES))
    with pytest.raises(ValueError, match="record them with induce_forgetting"):
        trainer.train()
