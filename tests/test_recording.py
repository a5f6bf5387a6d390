import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from conftest import NUM_EXAMPLES, SCHEDULE, make_images, make_resnet, make_trainer
from datasets import Dataset
from torch import nn
from torch.utils.data import TensorDataset
from transformers import (
    AutoModelForImageClassification,
    BartConfig,
    BartForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from know_hf import ForgettingSchedule, WeightTrajectory, WeightTransitionCallback, induce_forgetting
from know_hf.data.subsets import divide
from know_hf.recording.callback import num_examples_of
from know_hf.recording.validation import examples_per_step, warn_of_changes, warn_of_warmup
from know_hf.trajectory import TrajectoryError
from know_hf.trajectory.summary import displacement, inspect_trajectory

SHORT = ForgettingSchedule(num_states=3, stratify_by="labels")


class Spy(TrainerCallback):
    """Notes what each training started with, and can stop the one of a given number as a crash would."""

    def __init__(self, crash_at: int | None = None):
        self.starts = []
        self.crash_at = crash_at

    def on_train_begin(self, args, state, control, model, optimizer, train_dataloader, **kwargs):
        self.starts.append(
            {
                "examples": len(train_dataloader.dataset),
                "epochs": args.num_train_epochs,
                "optimizer": id(optimizer),
                "optimizer_steps": len(getattr(optimizer, "optimizer", optimizer).state),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "weights": model.classifier[1].weight.detach().clone(),
            }
        )

    def on_step_end(self, args, state, control, **kwargs):
        if self.crash_at == len(self.starts):
            raise KeyboardInterrupt


def all_states(trajectory):
    return [
        {name: trajectory.tensor(name, state) for name in trajectory.names} for state in range(trajectory.num_states)
    ]


def assert_same_states(first, second):
    for state, (ours, theirs) in enumerate(zip(all_states(first), all_states(second), strict=True)):
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), (state, name)


def test_each_stage_goes_on_from_the_last_with_a_fresh_optimizer(tmp_path):
    spy = Spy()
    trainer = make_trainer(tmp_path)
    trainer.add_callback(spy)
    trajectory = induce_forgetting(trainer, SCHEDULE, tmp_path / "trajectory")
    assert [start["examples"] for start in spy.starts] == SCHEDULE.sizes(NUM_EXAMPLES)
    assert [start["epochs"] for start in spy.starts] == [2, 1, 1, 1, 1]
    assert [start["optimizer_steps"] for start in spy.starts] == [0] * 5
    assert [start["learning_rate"] for start in spy.starts] == [0.01] * 5
    for state, start in enumerate(spy.starts[1:]):
        assert torch.equal(start["weights"], trajectory.tensor("classifier.1.weight", state))
    assert [state.steps for state in trajectory.states] == [32, 8, 4, 2, 1]


def test_the_first_state_is_what_plain_training_gives(tmp_path, trajectory):
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert torch.equal(trainer.model.classifier[1].weight, trajectory.tensor("classifier.1.weight", 0))


def test_every_state_is_evaluated(trajectory):
    for state in trajectory.states:
        assert set(state.metrics) == {"eval_loss"}
    assert len({state.metrics["eval_loss"] for state in trajectory.states}) == 5


def test_the_trainer_is_as_it_was_and_holds_the_first_state(tmp_path):
    trainer = make_trainer(tmp_path)
    names = ("args", "train_dataset", "eval_dataset", "optimizer", "lr_scheduler", "state", "model_init")
    before = {name: getattr(trainer, name) for name in names}
    arguments = trainer.args.to_dict()
    callbacks = list(trainer.callback_handler.callbacks)
    trajectory = induce_forgetting(trainer, SHORT, tmp_path / "trajectory")
    assert all(getattr(trainer, name) is value for name, value in before.items())
    assert trainer.args.to_dict() == arguments
    assert trainer.callback_handler.callbacks == callbacks
    assert torch.equal(trainer.model.classifier[1].weight, trajectory.tensor("classifier.1.weight", 0))


def test_an_interrupted_run_ends_in_the_same_weights_and_trains_no_state_twice(tmp_path, trajectory):
    folder = tmp_path / "trajectory"
    for crash_at, finished in ((1, 0), (3, 2), (2, 3)):
        trainer = make_trainer(tmp_path)
        trainer.add_callback(Spy(crash_at))
        train_dataset, args = trainer.train_dataset, trainer.args
        with pytest.raises(KeyboardInterrupt):
            induce_forgetting(trainer, SCHEDULE, folder)
        assert trainer.train_dataset is train_dataset
        assert trainer.args is args
        assert (WeightTrajectory(folder).num_states if WeightTrajectory.exists(folder) else 0) == finished
    spy = Spy()
    trainer = make_trainer(tmp_path)
    trainer.add_callback(spy)
    resumed = induce_forgetting(trainer, SCHEDULE, folder)
    assert [start["examples"] for start in spy.starts] == [8, 4]
    assert_same_states(resumed, trajectory)
    assert [s.metrics for s in resumed.states] == [s.metrics for s in trajectory.states]
    resumed.verify()


def test_a_finished_trajectory_is_not_trained_again(tmp_path, trajectory_copy):
    spy = Spy()
    trainer = make_trainer(tmp_path, make_resnet(seed=9))
    trainer.add_callback(spy)
    trajectory = induce_forgetting(trainer, SCHEDULE, trajectory_copy)
    assert spy.starts == []
    assert torch.equal(trainer.model.classifier[1].weight, trajectory.tensor("classifier.1.weight", 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.03}, "state 0 .* was trained with learning_rate 0.01, the trainer would with 0.03"),
        (
            {"per_device_train_batch_size": 2},
            r"state 0 .* with examples_per_step 4, the trainer would with 2 \(per device × accumulation × processes\)",
        ),
        ({"num_train_epochs": 3}, "state 0 .* with num_train_epochs 2, the trainer would with 3"),
        ({"lr_scheduler_type": "cosine"}, "state 0 .* with lr_scheduler_type linear, the trainer would with cosine"),
        ({"seed": 43}, "state 0 .* with seed 42, the trainer would with 43"),
    ],
)
def test_other_arguments_are_refused(tmp_path, trajectory_copy, change, message):
    with pytest.raises(ValueError, match=message):
        induce_forgetting(make_trainer(tmp_path, **change), SCHEDULE, trajectory_copy)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"num_train_epochs": 1, "weight_decay": 0}, {"num_train_epochs": 1.0, "weight_decay": 0.0}),
        ({"max_steps": 2, "num_train_epochs": 1}, {"max_steps": 2, "num_train_epochs": 5}),
        ({"optim": "sgd", "adam_beta2": 0.9}, {"optim": "sgd", "adam_beta2": 0.99}),
    ],
)
def test_arguments_that_decide_nothing_may_change(tmp_path, before, after):
    whole = ForgettingSchedule(num_states=2, epochs_per_stage=1)
    induce_forgetting(make_trainer(tmp_path, **before), whole, tmp_path / "trajectory")
    again = ForgettingSchedule(num_states=2, epochs_per_stage=1.0)
    assert induce_forgetting(make_trainer(tmp_path, **after), again, tmp_path / "trajectory").num_states == 2


def test_a_batch_that_is_split_over_the_processes_is_one_batch(tmp_path):
    args = make_trainer(tmp_path, gradient_accumulation_steps=3).args
    assert examples_per_step(args) == 12
    several = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=3, world_size=2)
    several.accelerator_config = SimpleNamespace(split_batches=False)
    assert examples_per_step(several) == 24
    several.accelerator_config.split_batches = True
    assert examples_per_step(several) == 12


def test_the_same_batch_in_other_parts_goes_on(tmp_path, trajectory_copy, caplog):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert induce_forgetting(trainer, SCHEDULE, trajectory_copy).num_states == 5
    assert "holds all 5 states already: nothing is trained" in caplog.text


def test_a_folder_that_holds_a_model_is_refused(tmp_path):
    make_resnet().save_pretrained(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(FileExistsError, match=r"holds a model, whose config\.json recording would replace"):
        induce_forgetting(make_trainer(tmp_path), SHORT, tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_what_was_left_of_a_first_state_does_not_stand_in_the_way(tmp_path, trajectory_copy):
    (trajectory_copy / "trajectory.json").unlink()  # stopped just before it was written
    assert (trajectory_copy / "config.json").exists()
    assert induce_forgetting(make_trainer(tmp_path), SHORT, trajectory_copy).num_states == 3


def test_a_model_that_its_config_does_not_describe_is_recorded_and_resumed(tmp_path, caplog):
    def changed():
        model = make_resnet()
        model.classifier = nn.Sequential(model.classifier[0], nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        return model

    whole = induce_forgetting(make_trainer(tmp_path, changed()), SHORT, tmp_path / "whole")
    assert "has not the same tensor 'classifier.1.bias': from_pretrained and load_model" in caplog.text
    for model_class in (None, type(make_resnet())):
        with pytest.raises(TrajectoryError, match=r"tensor 'classifier\.1\.bias' is .8,. in .* and .4,. in a ResNet"):
            whole.load_model(1, model_class)
    trainer = make_trainer(tmp_path, changed())
    trainer.add_callback(Spy(crash_at=2))
    with pytest.raises(KeyboardInterrupt):
        induce_forgetting(trainer, SHORT, tmp_path / "resumed")
    trainer = make_trainer(tmp_path, changed())
    assert_same_states(induce_forgetting(trainer, SHORT, tmp_path / "resumed"), whole)
    assert torch.equal(trainer.model.classifier[3].weight, whole.tensor("classifier.3.weight", 0))


def test_a_class_that_needs_more_than_its_config_is_recorded_and_resumed(tmp_path, caplog):
    class WeightedResNetForImageClassification(ResNetForImageClassification):
        def __init__(self, config, class_weights):
            super().__init__(config)
            self.class_weights = class_weights

    trainer = make_trainer(tmp_path, WeightedResNetForImageClassification(make_resnet().config, torch.ones(4)))
    assert induce_forgetting(trainer, SHORT, tmp_path / "trajectory").num_states == 3
    assert "no WeightedResNetForImageClassification can be made from its config alone (" in caplog.text
    assert induce_forgetting(trainer, SHORT, tmp_path / "trajectory").num_states == 3


def test_a_config_that_does_not_keep_what_it_was_made_with_is_warned_of(caplog):
    sizes = {"vocab_size": 8, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    warn_of_changes(BartForSequenceClassification(BartConfig(**sizes, num_labels=2)))  # 2 is not written, 3 is read
    assert "'classification_head.out_proj.bias': from_pretrained and load_model will load neither" in caplog.text


def test_a_class_that_needs_more_than_its_config_and_has_fused_experts_is_refused(tmp_path):
    class Weighted(MixtralForCausalLM):
        def __init__(self, config, weights):
            super().__init__(config)

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = MixtralConfig(vocab_size=8, **sizes, num_key_value_heads=1, num_local_experts=2)
    with pytest.raises(ValueError, match=r"no Weighted can be made .* such as 'model.layers.0.mlp.experts.down_proj'"):
        induce_forgetting(make_trainer(tmp_path, Weighted(config, None)), SHORT, tmp_path / "trajectory")
    assert not WeightTrajectory.exists(tmp_path / "trajectory")


def test_a_model_that_its_config_describes_is_not_warned_of(caplog):
    model = make_resnet()
    set_seed(0)
    expected = torch.rand(())
    set_seed(0)
    warn_of_changes(model)
    assert caplog.text == ""
    assert torch.rand(()) == expected  # no random numbers are used up


def test_a_warmup_longer_than_a_stage_is_warned_of(tmp_path, caplog):
    induce_forgetting(make_trainer(tmp_path, warmup_steps=8), SHORT, tmp_path / "trajectory")
    found = [record.message for record in caplog.records if "warmup_steps=8 is for every stage" in record.message]
    assert [message.split(" and this one has ")[1].split(" steps")[0] for message in found] == ["8", "4"]
    assert all(message.endswith("such as warmup_steps=0.1") for message in found)


def test_a_warmup_is_warned_of_only_where_there_is_one_and_a_shorter_one_only_where_it_helps(caplog):
    def warnings(max_steps, **arguments):
        caplog.clear()
        args = TrainingArguments(use_cpu=True)
        for name, value in arguments.items():
            setattr(args, name, value)  # as scripts do, without what TrainingArguments makes of it
        warn_of_warmup(args, SimpleNamespace(max_steps=max_steps))
        return caplog.text

    assert not warnings(4, warmup_steps=8, lr_scheduler_type="constant")
    assert warnings(4, warmup_steps=8, lr_scheduler_type="linear")
    assert not warnings(2, warmup_steps=0.1)
    assert "warmup_steps=0.1 is for every stage, and this one has 1 steps" in warnings(1, warmup_steps=0.1)
    assert warnings(1, warmup_steps=0.1).strip().endswith("give none")


def test_a_stage_that_ends_early_is_warned_of(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 6

    trainer = make_trainer(tmp_path)
    trainer.add_callback(Stop())
    trajectory = induce_forgetting(trainer, SHORT, tmp_path / "trajectory")
    assert [state.steps for state in trajectory.states] == [6, 6, 4]
    assert "the training of state 1 ended after 6 of 8 steps" in caplog.text
    assert "state 2 ended" not in caplog.text


def test_an_optimizer_that_the_trainer_makes_itself_goes_on_from_a_training(tmp_path):
    class OwnOptimizer(Trainer):
        def create_optimizer(self, *args, **kwargs):
            if self.optimizer is None:
                self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    template, spy = make_trainer(tmp_path), Spy()
    trainer = OwnOptimizer(template.model, template.args, train_dataset=template.train_dataset)
    trainer.train()
    trainer.add_callback(spy)
    induce_forgetting(trainer, SHORT, tmp_path / "trajectory", start="current")
    assert len({start["optimizer"] for start in spy.starts}) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda trainer: (trainer.model, SHORT), "trainer is a ResNetForImageClassification, no transformers.Trainer"),
        (lambda trainer: (trainer, 0.5), "schedule=0.5 is no ForgettingSchedule"),
    ],
)
def test_other_things_than_a_trainer_and_a_schedule_are_named(tmp_path, arguments, message):
    with pytest.raises(TypeError, match=message):
        induce_forgetting(*arguments(make_trainer(tmp_path)), tmp_path / "trajectory")


def test_start_current_takes_the_weights_as_they_are(tmp_path):
    spy = Spy()
    trainer = make_trainer(tmp_path)
    trainer.add_callback(spy)
    trajectory = induce_forgetting(trainer, SHORT, tmp_path / "trajectory", start="current")
    assert [start["examples"] for start in spy.starts] == [32, 16]
    assert [state.steps for state in trajectory.states] == [0, 8, 4]
    assert torch.equal(trajectory.tensor("classifier.1.weight", 0), make_resnet().classifier[1].weight)
    assert torch.equal(trainer.model.classifier[1].weight, make_resnet().classifier[1].weight)


def test_a_trainer_that_was_trained_before_goes_on(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    weight = trainer.model.classifier[1].weight.detach().clone()
    trajectory = induce_forgetting(trainer, SHORT, tmp_path / "trajectory", start="current")
    assert torch.equal(trajectory.tensor("classifier.1.weight", 0), weight)


def test_max_steps_is_for_the_first_state_only(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3)
    trajectory = induce_forgetting(trainer, SHORT, tmp_path / "trajectory")
    assert [state.steps for state in trajectory.states] == [3, 8, 4]


def test_another_schedule_is_refused(tmp_path, trajectory_copy):
    with pytest.raises(ValueError, match=r"ratio=0\.5.* not with ForgettingSchedule\(ratio=0\.6"):
        induce_forgetting(make_trainer(tmp_path), ForgettingSchedule(ratio=0.6), trajectory_copy)


def test_other_data_is_refused_and_both_fingerprints_shown(tmp_path, trajectory_copy):
    trainer = make_trainer(tmp_path)
    trainer.train_dataset = make_images(seed=1)
    fingerprint = WeightTrajectory(trajectory_copy).states[0].subset_fingerprint
    with pytest.raises(ValueError, match=f"other data: 64 examples with fingerprint {fingerprint}, now 64"):
        induce_forgetting(trainer, SCHEDULE, trajectory_copy)


def test_the_fingerprint_does_not_depend_on_transforms(tmp_path, trajectory_copy):
    trainer = make_trainer(tmp_path)
    trainer.train_dataset.set_transform(lambda batch: {key: torch.rand(()) for key in batch})
    assert induce_forgetting(trainer, SCHEDULE, trajectory_copy).num_states == 5


def test_an_optimizer_of_ones_own_is_refused(tmp_path):
    model = make_resnet()
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), use_cpu=True),
        train_dataset=make_images(),
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
    )
    with pytest.raises(ValueError, match=r"its own SGD.*optimizer_cls_and_kwargs"):
        induce_forgetting(trainer, SHORT, tmp_path / "trajectory")


def test_an_optimizer_that_is_given_to_a_trainer_that_makes_its_own_is_refused(tmp_path):
    class Decorated(Trainer):
        def create_optimizer(self, *args, **kwargs):
            return super().create_optimizer(*args, **kwargs)

    template = make_trainer(tmp_path)
    given = torch.optim.SGD(template.model.parameters(), lr=0.1)
    trainer = Decorated(template.model, template.args, train_dataset=template.train_dataset, optimizers=(given, None))
    with pytest.raises(ValueError, match=r"its own SGD.*optimizer_cls_and_kwargs"):
        induce_forgetting(trainer, SHORT, tmp_path / "trajectory")
    assert trainer.optimizer is given


def test_an_optimizer_class_is_made_afresh(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.1})
    spy = Spy()
    trainer.add_callback(spy)
    induce_forgetting(trainer, SHORT, tmp_path / "trajectory")
    assert [start["learning_rate"] for start in spy.starts] == [0.1] * 3


def test_a_training_that_diverges_names_the_tensor(tmp_path):
    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, model, train_dataloader, **kwargs):
            if len(train_dataloader.dataset) == 32 and state.global_step == state.max_steps:
                model.classifier[1].bias.data[0] = float("nan")

    trainer = make_trainer(tmp_path)
    trainer.add_callback(Diverge())
    with pytest.raises(ValueError, match=r"'classifier\.1\.bias' is not finite .* state 1.* The 1 states before it"):
        induce_forgetting(trainer, SHORT, tmp_path / "trajectory")
    assert WeightTrajectory(tmp_path / "trajectory").num_states == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: setattr(t, "train_dataset", None), "no train_dataset"),
        (
            lambda t: setattr(t, "train_dataset", make_images().to_iterable_dataset()),
            "IterableDataset is a stream",
        ),
        (lambda t: setattr(t, "train_dataset", make_images(12)), r"\[12, 6, 3\]; the last is smaller"),
        (lambda t: setattr(t.args, "per_device_train_batch_size", 32), r"smaller than one batch of 32"),
        (lambda t: setattr(t.args, "gradient_accumulation_steps", 8), r"smaller than one batch of 32"),
    ],
)
def test_bad_trainers_are_refused_before_training(tmp_path, change, message):
    trainer = make_trainer(tmp_path)
    change(trainer)
    with pytest.raises(ValueError, match=message):
        induce_forgetting(trainer, SHORT, tmp_path / "trajectory")
    assert not (tmp_path / "trajectory").exists()


def test_a_column_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no column 'label' to stratify by; it has \['pixel_values', 'labels'\]"):
        induce_forgetting(make_trainer(tmp_path), ForgettingSchedule(stratify_by="label"), tmp_path / "trajectory")


def test_start_is_checked(tmp_path):
    with pytest.raises(ValueError, match="start must be 'train' or 'current', got 'here'"):
        induce_forgetting(make_trainer(tmp_path), SHORT, tmp_path / "trajectory", start="here")


def test_an_adapter_inside_a_model_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match=r"has an adapter inside .*peft\.get_peft_model"):
        induce_forgetting(trainer, SHORT, tmp_path / "trajectory")


def test_a_disk_without_room_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10_000))
    spy = Spy()
    trainer = make_trainer(tmp_path)
    trainer.add_callback(spy)
    with pytest.raises(OSError, match=r"needs 0\.00 GB, its disk has 0\.00 GB free; make room"):
        induce_forgetting(trainer, SHORT, tmp_path / "trajectory")
    assert spy.starts == []


def test_states_can_be_stored_in_a_smaller_dtype(tmp_path, trajectory):
    stored = induce_forgetting(make_trainer(tmp_path), SCHEDULE, tmp_path / "trajectory", dtype=torch.bfloat16)
    for name in trajectory.names:
        expected = trajectory.tensor(name)
        if expected.is_floating_point():
            assert stored.dtype(name) == torch.bfloat16
        assert torch.equal(stored.tensor(name, 0), expected.to(stored.dtype(name)))
    assert stored.load_model(2).num_labels == 4


def test_frozen_weights_are_stored_once(tmp_path):
    model = make_resnet()
    model.resnet.requires_grad_(False)
    trajectory = induce_forgetting(make_trainer(tmp_path, model), SHORT, tmp_path / "trajectory")
    name = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
    assert trajectory.states[2].unchanged[name] == 0
    assert trajectory.is_unchanged(name)
    assert not trajectory.is_unchanged("classifier.1.weight")
    sizes = [sum(path.stat().st_size for path in trajectory.path.glob(f"state-{k}/*.safetensors")) for k in range(3)]
    assert sizes[1] == sizes[2] < sizes[0] / 3
    for state in range(3):
        assert torch.equal(trajectory.tensor(name, state), trajectory.tensor(name, 0))
        for loaded in (trajectory.load_model(state), AutoModelForImageClassification.from_pretrained(
            trajectory.path, subfolder=f"state-{state}"
        )):  # fmt: skip
            weights = loaded.state_dict()
            assert all(torch.equal(weights[key], trajectory.tensor(key, state)) for key in trajectory.names)
    trajectory.verify()


def test_the_forgetting_goes_to_the_logs(tmp_path):
    class Logs(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs, **kwargs):
            if "forgetting/state" in logs:
                self.seen.append((state.global_step, {key: value for key, value in logs.items() if key != "epoch"}))

    logs = Logs()
    trainer = make_trainer(tmp_path)
    trainer.add_callback(logs)
    trajectory = induce_forgetting(trainer, SHORT, tmp_path / "trajectory")
    assert [step for step, _ in logs.seen] == [32, 40, 44]
    for index, (_, values) in enumerate(logs.seen):
        state = trajectory.states[index]
        assert values["forgetting/state"] == index
        assert values["forgetting/num_examples"] == state.num_examples
        assert values["forgetting/eval_loss"] == state.metrics["eval_loss"]
        assert values["forgetting/displacement"] == pytest.approx(displacement(trajectory, index))
    assert logs.seen[0][1]["forgetting/displacement"] == 0 < logs.seen[2][1]["forgetting/displacement"]


def test_the_callback_alone_records_a_loop_of_ones_own(tmp_path):
    model, dataset = make_resnet(), make_images()
    callback = WeightTransitionCallback(tmp_path / "trajectory", SHORT)
    args = TrainingArguments(str(tmp_path), use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True, seed=5)
    for indices in SHORT.indices(len(dataset), dataset["labels"][:]):
        Trainer(model, args, train_dataset=dataset.select(indices), callbacks=[callback]).train()
    trajectory = WeightTrajectory(tmp_path / "trajectory")
    assert [(s.num_examples, s.steps, s.seed) for s in trajectory.states] == [(64, 24, 5), (32, 12, 5), (16, 6, 5)]
    assert torch.equal(trajectory.tensor("classifier.1.weight", 2), model.classifier[1].weight)
    with pytest.raises(ValueError, match=r"state 3 .* would be trained on 64 examples, but state 2 saw 16"):
        Trainer(model, args, train_dataset=dataset, callbacks=[callback]).train()


def test_the_callback_alone_records_a_stream_with_the_shares_of_the_schedule(tmp_path):
    schedule = ForgettingSchedule(num_states=2, steps_per_stage=1)
    callback = WeightTransitionCallback(tmp_path / "trajectory", schedule)
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True)
    model = make_resnet()
    for subset in divide(make_images().to_iterable_dataset(), schedule):
        Trainer(model, args, train_dataset=subset.dataset, callbacks=[callback]).train()
    assert [(s.num_examples, s.fraction) for s in callback.trajectory.states] == [(None, 1.0), (None, 0.5)]
    assert "0.5 of the stream" in str(inspect_trajectory(callback.trajectory))
    alone = WeightTransitionCallback(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"would be trained on a stream, .* give the callback the schedule"):
        Trainer(model, args, train_dataset=subset.dataset, callbacks=[alone]).train()


def test_the_part_of_a_stream_for_one_process_has_no_size():
    part = IterableDatasetShard(make_images().to_iterable_dataset(), batch_size=2, num_processes=2)
    assert num_examples_of({"train_dataloader": SimpleNamespace(dataset=part)}) is None


def test_a_training_that_ends_early_without_a_word_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args.enable_jit_checkpoint = True
    with pytest.raises(ValueError, match="enable_jit_checkpoint=True ends a training early on SIGTERM"):
        induce_forgetting(trainer, SHORT, tmp_path / "trajectory")
    trainer.add_callback(WeightTransitionCallback(tmp_path / "trajectory", SHORT))
    with pytest.raises(ValueError, match="enable_jit_checkpoint=True ends a training early on SIGTERM"):
        trainer.train()


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluations_that_round_the_weights_are_refused(tmp_path, name):
    trainer = make_trainer(tmp_path)
    setattr(trainer.args, name, True)
    with pytest.raises(ValueError, match=f"{name}=True rounds the model's own weights at every evaluation"):
        induce_forgetting(trainer, SHORT, tmp_path / "trajectory")


def test_a_loader_that_does_not_follow_the_subsets_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    everything = trainer.get_train_dataloader()
    trainer.get_train_dataloader = lambda: everything
    message = (
        "the trainer's loader has 64 examples for the subset of 32 examples, and had 64 .* read self.train_dataset"
    )
    with pytest.raises(ValueError, match=message):
        induce_forgetting(trainer, SHORT, tmp_path / "trajectory")
    assert WeightTrajectory(tmp_path / "trajectory").num_states == 1  # state 0 is whole
    del trainer.get_train_dataloader
    assert induce_forgetting(trainer, SHORT, tmp_path / "trajectory").num_states == 3


def test_a_stage_that_begins_again_with_a_smaller_batch_is_recorded(tmp_path):
    trainer, failed = make_trainer(tmp_path, auto_find_batch_size=True, dataloader_drop_last=True), []

    class Full(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if not failed:
                failed.append(state.train_batch_size)
                raise RuntimeError("CUDA out of memory.")

    trainer.add_callback(Full())
    assert induce_forgetting(trainer, SHORT, tmp_path / "trajectory").num_states == 3
    assert failed == [4]


def test_a_torch_dataset_and_a_plain_module(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x, labels):
            logits = self.linear(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Rows(TensorDataset):
        def __getitem__(self, index):
            x, labels = super().__getitem__(index)
            return {"x": x, "labels": labels}

    data = Rows(torch.randn(64, 3), torch.arange(64) % 2)
    args = TrainingArguments(str(tmp_path), use_cpu=True, dataloader_pin_memory=False, save_strategy="no")
    trainer = Trainer(Net(), args, train_dataset=data)
    trajectory = induce_forgetting(trainer, SHORT, tmp_path / "trajectory")
    assert trajectory.names == ["linear.bias", "linear.weight"]
    assert [state.num_examples for state in trajectory.states] == [64, 32, 16]
    assert torch.equal(trainer.model.linear.weight, trajectory.tensor("linear.weight", 0))


def test_the_processor_is_kept_with_the_trajectory(tmp_path):
    from transformers import ViTImageProcessorPil

    trainer = make_trainer(tmp_path)
    trainer.processing_class = trainer.callback_handler.processing_class = ViTImageProcessorPil(
        size={"height": 8, "width": 8}
    )
    trajectory = induce_forgetting(trainer, SHORT, tmp_path / "trajectory")
    assert {path.name for path in trajectory.model_files} == {"config.json", "preprocessor_config.json"}
    assert not list(trajectory.path.glob("state-*/preprocessor_config.json"))


def test_a_dataset_of_strings_can_be_stratified(tmp_path):
    dataset = make_images()
    dataset = Dataset.from_dict({**dataset.with_format(None)[:], "kind": ["even", "odd"] * 32}).with_format("torch")
    trainer = make_trainer(tmp_path)
    trainer.train_dataset = dataset
    schedule = ForgettingSchedule(num_states=2, stratify_by="kind")
    assert induce_forgetting(trainer, schedule, tmp_path / "trajectory").num_states == 2
    shutil.rmtree(tmp_path / "trajectory")


def test_a_metric_that_is_not_finite_is_left_out(tmp_path, monkeypatch, caplog):
    trainer = make_trainer(tmp_path / "out", num_train_epochs=1)
    found = {
        "eval_loss": float("nan"),
        "eval_f1": [0.1, 0.2],
        "eval_best": None,
        "eval_note": "1",
        "eval_accuracy": 0.5,
    }
    monkeypatch.setattr(trainer, "evaluate", lambda: found)
    trajectory = induce_forgetting(trainer, ForgettingSchedule(num_states=2), tmp_path / "t")
    assert [state.metrics for state in trajectory.states] == [{"eval_accuracy": 0.5}] * 2
