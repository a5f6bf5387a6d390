"""`induce_forgetting` and the callback: stages, resuming, logs, and the trainer afterwards."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from conftest import NUM_EXAMPLES, SCHEDULE, make_images, make_resnet, make_trainer
from datasets import Dataset
from doubles.small_trainers import BALANCED, StopAfter, assert_same_states
from transformers import Trainer, TrainerCallback, ViTImageProcessorPil, default_data_collator

from know_hf import ForgettingSchedule, WeightTransitionCallback, induce_forgetting
from know_hf.data.subsets import divide
from know_hf.recording.loaders import num_examples
from know_hf.trajectory.summary import displacement, inspect_trajectory

WEIGHT = "classifier.1.weight"


class Spy(TrainerCallback):
    """Notes what each training starts with, and the values that are logged for each state."""

    def __init__(self):
        self.starts, self.logs = [], []

    def on_train_begin(self, args, state, control, model, optimizer, train_dataloader, **kwargs):
        start = {
            "examples": len(train_dataloader.dataset),
            "epochs": args.num_train_epochs,
            "optimizer_steps": len(getattr(optimizer, "optimizer", optimizer).state),
            "learning_rate": optimizer.param_groups[0]["lr"],
            "weights": model.classifier[1].weight.detach().clone(),
        }
        self.starts.append(SimpleNamespace(**start))

    def on_log(self, args, state, control, logs, **kwargs):
        if "forgetting/state" in logs:
            self.logs.append((state.global_step, logs))


def spied(trainer):
    spy = Spy()
    trainer.add_callback(spy)
    return spy


def test_stages_logs_and_the_trainer_afterwards(tmp_path):
    trainer = make_trainer(tmp_path)
    spy = spied(trainer)
    names = ("args", "train_dataset", "eval_dataset", "optimizer", "lr_scheduler", "state", "model_init")
    before, arguments = {name: getattr(trainer, name) for name in names}, trainer.args.to_dict()
    callbacks = list(trainer.callback_handler.callbacks)
    trajectory = induce_forgetting(trainer, SCHEDULE, tmp_path / "trajectory")

    assert [start.examples for start in spy.starts] == SCHEDULE.sizes(NUM_EXAMPLES)
    assert [start.epochs for start in spy.starts] == [2, 1, 1, 1, 1]
    assert [start.optimizer_steps for start in spy.starts] == [0] * 5
    assert [start.learning_rate for start in spy.starts] == [0.01] * 5
    for state, start in enumerate(spy.starts[1:]):
        assert torch.equal(start.weights, trajectory.tensor(WEIGHT, state))
    assert [state.steps for state in trajectory.states] == [32, 8, 4, 2, 1]
    assert len({state.metrics["eval_loss"] for state in trajectory.states}) == 5

    assert [step for step, _ in spy.logs] == [32, 40, 44, 46, 47]
    for index, (_, values) in enumerate(spy.logs):
        state = trajectory.states[index]
        expected = {"state": index, "num_examples": state.num_examples, **state.metrics}
        assert {name: values[f"forgetting/{name}"] for name in expected} == expected
        assert values["forgetting/displacement"] == pytest.approx(displacement(trajectory, index))

    assert all(getattr(trainer, name) is value for name, value in before.items())
    assert trainer.args.to_dict() == arguments and trainer.callback_handler.callbacks == callbacks
    assert torch.equal(trainer.model.classifier[1].weight, trajectory.tensor(WEIGHT, 0))
    plain = make_trainer(tmp_path)
    plain.train()
    assert torch.equal(plain.model.classifier[1].weight, trajectory.tensor(WEIGHT, 0))


def test_a_finished_trajectory_is_not_trained_again(tmp_path, trajectory_copy, caplog):
    trainer = make_trainer(tmp_path, make_resnet(seed=9), per_device_train_batch_size=2, gradient_accumulation_steps=2)
    spy = spied(trainer)
    trainer.train_dataset.set_transform(lambda batch: {key: torch.rand(()) for key in batch})  # no part of the data
    trajectory = induce_forgetting(trainer, SCHEDULE, trajectory_copy)
    assert spy.starts == [] and "nothing is trained" in caplog.text
    assert torch.equal(trainer.model.classifier[1].weight, trajectory.tensor(WEIGHT, 0))


def test_a_collator_with_its_own_seed_draws_the_same_numbers_after_resuming(tmp_path):
    class Masked:
        seed, generator = 0, None

        def __call__(self, rows):
            self.generator = self.generator or torch.Generator().manual_seed(self.seed)
            batch = default_data_collator(rows)
            noise = torch.rand(batch["pixel_values"].shape, generator=self.generator)
            return {**batch, "pixel_values": batch["pixel_values"] * noise}

    def trainer(**options):
        trainer = make_trainer(tmp_path, num_train_epochs=1, **options)
        trainer.data_collator = Masked()
        return trainer

    interrupted = trainer()
    interrupted.add_callback(StopAfter(1))
    with pytest.raises(KeyboardInterrupt):
        induce_forgetting(interrupted, BALANCED, tmp_path / "resumed")
    resumed = induce_forgetting(trainer(), BALANCED, tmp_path / "resumed")
    complete = induce_forgetting(trainer(), BALANCED, tmp_path / "complete")
    assert_same_states(resumed, complete)
    assert [state.metrics for state in resumed.states] == [state.metrics for state in complete.states]


def test_start_current_uses_the_weights_of_the_model(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()  # leaves an optimizer behind
    weight = trainer.model.classifier[1].weight.detach().clone()
    spy = spied(trainer)
    trajectory = induce_forgetting(trainer, BALANCED, tmp_path / "trajectory", start="current")
    assert [start.examples for start in spy.starts] == [32, 16]
    assert [state.steps for state in trajectory.states] == [0, 8, 4]
    assert torch.equal(trajectory.tensor(WEIGHT, 0), weight)
    assert torch.equal(trainer.model.classifier[1].weight, weight)
    again = induce_forgetting(trainer, BALANCED, tmp_path / "trajectory", start="current")
    assert_same_states(again, trajectory)


def test_max_steps_applies_to_state_0_and_the_optimizer_to_every_stage(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.1})
    spy = spied(trainer)
    trajectory = induce_forgetting(trainer, BALANCED, tmp_path / "trajectory")
    assert [state.steps for state in trajectory.states] == [3, 8, 4]
    assert [start.learning_rate for start in spy.starts] == [0.1] * 3


def test_an_optimizer_created_by_a_subclass_is_created_again(tmp_path):
    class OwnOptimizer(Trainer):
        def create_optimizer(self, *args, **kwargs):
            if self.optimizer is None:
                self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
            return self.optimizer

    template = make_trainer(tmp_path)
    trainer = OwnOptimizer(template.model, template.args, train_dataset=template.train_dataset)
    trainer.train()
    spy = spied(trainer)
    induce_forgetting(trainer, BALANCED, tmp_path / "trajectory", start="current")
    assert [start.optimizer_steps for start in spy.starts] == [0, 0]


def test_states_can_be_stored_in_a_smaller_dtype(tmp_path, trajectory):
    schedule = ForgettingSchedule(num_states=2, stratify_by="labels")
    stored = induce_forgetting(make_trainer(tmp_path), schedule, tmp_path / "trajectory", dtype=torch.bfloat16)
    for name in trajectory.names:
        expected = trajectory.tensor(name)
        assert stored.dtype(name) == (torch.bfloat16 if expected.is_floating_point() else expected.dtype)
        assert torch.equal(stored.tensor(name, 0), expected.to(stored.dtype(name)))
    assert stored.load_model(1).num_labels == 4


def test_processor_finite_metrics_and_classes_of_strings(tmp_path, monkeypatch, caplog):
    trainer = make_trainer(tmp_path / "out", num_train_epochs=1)
    columns = {**make_images().with_format(None)[:], "kind": ["even", "odd"] * 32}
    trainer.train_dataset = Dataset.from_dict(columns).with_format("torch")
    results = {"eval_loss": float("nan"), "eval_f1": [0.1], "eval_best": None, "eval_note": "1", "eval_accuracy": 0.5}
    results |= {"val_f1": 0.25, "epoch": 1.0, "val_runtime": 0.1, "init_mem_cpu_alloc_delta": 8}
    monkeypatch.setattr(trainer, "evaluate", lambda: results)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    trainer.processing_class = trainer.callback_handler.processing_class = processor
    schedule = ForgettingSchedule(num_states=2, stratify_by="kind")
    trajectory = induce_forgetting(trainer, schedule, tmp_path / "trajectory")
    assert [state.metrics for state in trajectory.states] == [{"eval_accuracy": 0.5, "val_f1": 0.25}] * 2
    assert "eval_loss of state 0" in caplog.text
    assert {path.name for path in trajectory.model_files} == {"config.json", "preprocessor_config.json"}
    assert not list(trajectory.path.glob("state-*/preprocessor_config.json"))


def test_the_callback_alone_records_a_stream_with_the_shares_of_the_schedule(tmp_path):
    schedule = ForgettingSchedule(num_states=2, steps_per_stage=1)
    callback = WeightTransitionCallback(tmp_path / "trajectory", schedule)
    args, model = make_trainer(tmp_path, max_steps=1).args, make_resnet()
    stream = make_images().to_iterable_dataset()
    for subset in divide(stream, schedule):
        Trainer(model, args, train_dataset=subset.dataset, callbacks=[callback]).train()
    assert [(s.num_examples, s.fraction) for s in callback.trajectory.states] == [(None, 1.0), (None, 0.5)]
    assert "0.5 of the stream" in str(inspect_trajectory(callback.trajectory))
    alone = WeightTransitionCallback(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"stream.*schedule"):
        Trainer(model, args, train_dataset=subset.dataset, callbacks=[alone]).train()
    shard = IterableDatasetShard(stream, batch_size=2, num_processes=2)
    assert num_examples(SimpleNamespace(dataset=shard)) is None
