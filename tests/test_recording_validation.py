"""What a recording refuses before or during the training, and its warnings."""

from types import SimpleNamespace

import pytest
import torch
from conftest import SCHEDULE, make_images, make_resnet, make_trainer
from doubles.small_trainers import BALANCED, StopAfter, assert_refused, assert_same_states, llama
from torch import nn
from torch.utils.data import Sampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetForImageClassification,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from know_hf import ForgettingSchedule, WeightTrajectory, WeightTransitionCallback, induce_forgetting
from know_hf.data.subsets import divide
from know_hf.recording.loaders import check_loader
from know_hf.recording.recorded_arguments import examples_per_step
from know_hf.recording.validation import check_reloadable, warn_about_warmup
from know_hf.trajectory import TrajectoryError

SHORT = ForgettingSchedule(num_states=2)
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda t: {"trainer": t.model}, TypeError, r"Trainer.*ResNetForImageClassification"),
        (lambda t: {"schedule": 0.5}, TypeError, r"ForgettingSchedule.*0\.5"),
        (lambda t: {"start": "here"}, ValueError, "here"),
        (lambda t: {"schedule": ForgettingSchedule(stratify_by="label")}, ValueError, "label"),
        (lambda t: setattr(t, "train_dataset", None), ValueError, "train_dataset"),
        (lambda t: setattr(t, "train_dataset", make_images().to_iterable_dataset()), ValueError, "stream"),
        (lambda t: setattr(t, "train_dataset", make_images(12)), ValueError, r"\[12, 6, 3\]"),
        (lambda t: setattr(t.args, "per_device_train_batch_size", 32), ValueError, "32"),
        (lambda t: setattr(t.args, "gradient_accumulation_steps", 8), ValueError, "32"),
        (lambda t: setattr(t.args, "enable_jit_checkpoint", True), ValueError, "enable_jit_checkpoint"),
        (lambda t: setattr(t.args, "bf16_full_eval", True), ValueError, "bf16_full_eval"),
        (lambda t: setattr(t.args, "fp16_full_eval", True), ValueError, "fp16_full_eval"),
        (lambda t: setattr(t.model, "_hf_peft_config_loaded", True), ValueError, "get_peft_model"),
        (lambda t: t.model.requires_grad_(False) and None, ValueError, "requires_grad"),
        (lambda t: t.model.register_buffer("wide", torch.ones(1).expand(4)), ValueError, r"'wide'.*clone"),
    ],
)
def test_bad_arguments_are_refused_before_training(tmp_path, change, error, match):
    trainer = make_trainer(tmp_path)
    options = {"trainer": trainer, "folder": tmp_path / "trajectory", **(change(trainer) or {})}
    assert_refused(error=error, match=match, **options)
    assert not (tmp_path / "trajectory").exists()


def test_the_callback_alone_refuses_the_same_arguments(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args.enable_jit_checkpoint = True
    trainer.add_callback(WeightTransitionCallback(tmp_path / "trajectory", BALANCED))
    with pytest.raises(ValueError, match="enable_jit_checkpoint"):
        trainer.train()


def test_folders_and_disks_that_cannot_be_used_are_refused(tmp_path, monkeypatch):
    make_resnet().save_pretrained(tmp_path / "model")
    (tmp_path / "file").touch()
    assert_refused(make_trainer(tmp_path), tmp_path / "model", FileExistsError, r"config\.json")
    assert_refused(make_trainer(tmp_path), tmp_path / "file/trajectory", OSError, "file/trajectory")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10_000))
    assert_refused(make_trainer(tmp_path), tmp_path / "trajectory", OSError, "free")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"learning_rate": 0.03}, r"learning_rate=0\.01.*0\.03"),
        ({"per_device_train_batch_size": 2}, r"examples_per_step=4.*2"),
        ({"num_train_epochs": 3}, r"num_train_epochs=2.*3"),
        ({"lr_scheduler_type": "cosine"}, r"lr_scheduler_type=linear.*cosine"),
    ],
)
def test_resuming_with_other_arguments_is_refused(tmp_path, recorded, change, match):
    assert_refused(make_trainer(tmp_path, **change), recorded, ValueError, rf"state 0 .*{match}", SCHEDULE)


def test_resuming_with_another_schedule_or_other_data_is_refused(tmp_path, recorded):
    with pytest.raises(ValueError, match=r"ratio=0\.5.*ratio=0\.6"):
        induce_forgetting(make_trainer(tmp_path), ForgettingSchedule(ratio=0.6), recorded)
    trainer = make_trainer(tmp_path)
    trainer.train_dataset = make_images(seed=1)
    fingerprint = WeightTrajectory(recorded).states[0].subset_fingerprint
    with pytest.raises(ValueError, match=f"state 0 .*64 .*{fingerprint}.*64"):
        induce_forgetting(trainer, SCHEDULE, recorded)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"num_train_epochs": 1, "weight_decay": 0}, {"num_train_epochs": 1.0, "weight_decay": 0.0}),
        ({"max_steps": 2, "num_train_epochs": 1}, {"max_steps": 2, "num_train_epochs": 5}),
        ({"optim": "sgd", "adam_beta2": 0.9}, {"optim": "sgd", "adam_beta2": 0.99}),
    ],
)
def test_arguments_without_effect_may_change(tmp_path, before, after):
    induce_forgetting(make_trainer(tmp_path, **before), SHORT, tmp_path / "trajectory")
    again = ForgettingSchedule(num_states=2, epochs_per_stage=1.0)
    assert induce_forgetting(make_trainer(tmp_path, **after), again, tmp_path / "trajectory").num_states == 2


def test_examples_per_step_count_all_processes(tmp_path):
    assert examples_per_step(make_trainer(tmp_path, gradient_accumulation_steps=3).args) == 12
    several = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=3, world_size=2)
    several.accelerator_config = SimpleNamespace(split_batches=False)
    assert examples_per_step(several) == 24
    several.accelerator_config.split_batches = True
    assert examples_per_step(several) == 12


@pytest.mark.parametrize(("size", "state", "kept"), [(64, 0, False), (32, 1, True)])
def test_a_diverged_training_names_the_tensor(tmp_path, caplog, size, state, kept):
    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, model, train_dataloader, **kwargs):
            if len(train_dataloader.dataset) == size and state.global_step == state.max_steps:
                model.classifier[1].bias.data[0] = float("nan")

    trainer = make_trainer(tmp_path)
    trainer.add_callback(Diverge())
    with pytest.raises(ValueError, match=rf"'classifier\.1\.bias' .*NaN.*state {state}") as raised:
        induce_forgetting(trainer, BALANCED, tmp_path / "trajectory")
    assert ("states are kept" in str(raised.value)) == WeightTrajectory.exists(tmp_path / "trajectory") == kept
    assert "(TrajectoryError)" in caplog.text and "NaN" not in caplog.text.split("Traceback")[0]


def baked_loader(trainer):
    everything = trainer.get_train_dataloader()
    trainer.get_train_dataloader = lambda: everything


def baked_stream(trainer):
    trainer.args.max_steps = 1
    trainer.train_dataset = make_images().to_iterable_dataset()
    baked_loader(trainer)


def baked_sampler(sampler):
    return lambda trainer: setattr(trainer, "_get_train_sampler", lambda dataset=None: sampler)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (baked_loader, r"64 examples .*32 .*train_dataset"),
        (baked_stream, r"same data .*0\.5 of the stream.*train_dataset"),
        (baked_sampler(SequentialSampler(range(64))), r"sampler .*index 32 of 32 .*train_dataset"),
        (baked_sampler(SubsetRandomSampler([63])), r"sampler .*index 63 of 32 .*train_dataset"),
    ],
)
def test_a_loader_that_ignores_the_subsets_is_refused_before_the_first_training(tmp_path, change, match):
    trainer = make_trainer(tmp_path)
    change(trainer)
    given = trainer.train_dataset
    schedule = ForgettingSchedule(num_states=2, steps_per_stage=1)
    assert_refused(trainer, tmp_path / "trajectory", ValueError, match, schedule)
    assert trainer.train_dataset is given


def test_samplers_that_follow_the_subsets_are_accepted(tmp_path):
    def endless(dataset):
        while True:
            yield from range(len(dataset))

    class Endless(Sampler):
        def __init__(self, dataset):
            self.dataset = dataset

        def __iter__(self):
            return endless(self.dataset)

    weighted = make_trainer(tmp_path)
    weighted._get_train_sampler = lambda data: WeightedRandomSampler([1.0] * len(data), 64)  # always of size 64
    check_loader(weighted, divide(weighted.train_dataset, SHORT))
    trainer = make_trainer(tmp_path)
    trainer._get_train_sampler = Endless
    check_loader(trainer, divide(trainer.train_dataset, SHORT))


def test_what_cannot_be_saved_surfaces_before_the_training(tmp_path):
    class Unsaved:
        def save_pretrained(self, folder):
            raise NotImplementedError("no vocabulary")

    trainer = make_trainer(tmp_path)
    trainer.processing_class = trainer.callback_handler.processing_class = Unsaved()
    assert_refused(trainer, tmp_path / "processor", NotImplementedError, "vocabulary")
    trainer.callback_handler.callbacks = [WeightTransitionCallback(tmp_path / "alone")]
    with pytest.raises(NotImplementedError, match="vocabulary"):
        trainer.train()

    trainer = llama(tmp_path)
    trainer.model.generation_config.temperature = 0.5  # without do_sample
    assert_refused(trainer, tmp_path / "generation", ValueError, "temperature", SHORT)
    trainer = llama(tmp_path)
    trainer.model.config._name_or_path = "one\nmodel"
    assert_refused(trainer, tmp_path / "name", ValueError, r"base_model is 'one\\nmodel'", SHORT)


def test_the_callback_alone_refuses_a_folder_it_cannot_write_before_the_training(tmp_path):
    (tmp_path / "file").touch()
    trainer = make_trainer(tmp_path)
    trainer.add_callback(WeightTransitionCallback(tmp_path / "file/trajectory"))
    with pytest.raises(OSError, match="file/trajectory"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_unlike_its_config_is_recorded_resumed_and_warned_about(tmp_path, caplog):
    def changed():
        model = make_resnet()
        model.classifier = nn.Sequential(model.classifier[0], nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        return model

    complete = induce_forgetting(make_trainer(tmp_path, changed()), BALANCED, tmp_path / "complete")
    assert "'classifier.1.bias'" in caplog.text and "load_into" in caplog.text
    for model_class in (None, type(make_resnet())):
        with pytest.raises(TrajectoryError, match=r"'classifier\.1\.bias'.*8.*4.*ResNet"):
            complete.load_model(1, model_class)
    trainer = make_trainer(tmp_path, changed())
    trainer.add_callback(StopAfter(1))
    with pytest.raises(KeyboardInterrupt):
        induce_forgetting(trainer, BALANCED, tmp_path / "resumed")
    trainer = make_trainer(tmp_path, changed())
    assert_same_states(induce_forgetting(trainer, BALANCED, tmp_path / "resumed"), complete)
    assert torch.equal(trainer.model.classifier[3].weight, complete.tensor("classifier.3.weight", 0))


def test_a_class_that_needs_more_than_its_config_is_recorded_and_resumed(tmp_path, caplog):
    class WeightedResNetForImageClassification(ResNetForImageClassification):
        def __init__(self, config, class_weights):
            super().__init__(config)
            self.class_weights = class_weights

    trainer = make_trainer(tmp_path, WeightedResNetForImageClassification(make_resnet().config, torch.ones(4)))
    assert induce_forgetting(trainer, SHORT, tmp_path / "trajectory").num_states == 2
    assert "WeightedResNetForImageClassification" in caplog.text and "load_into" in caplog.text
    assert induce_forgetting(trainer, SHORT, tmp_path / "trajectory").num_states == 2


def test_a_class_that_needs_more_than_its_config_and_has_fused_experts_is_refused(tmp_path):
    class Weighted(MixtralForCausalLM):
        def __init__(self, config, weights):
            super().__init__(config)

    model = Weighted(MixtralConfig(vocab_size=8, **SIZES, num_key_value_heads=1, num_local_experts=2), None)
    match = r"Weighted.*experts\.down_proj"
    assert_refused(make_trainer(tmp_path, model), tmp_path / "trajectory", ValueError, match)


def test_a_model_is_compared_with_its_config_without_random_numbers(caplog):
    model = make_resnet()
    set_seed(0)
    expected = torch.rand(())
    set_seed(0)
    check_reloadable(model)
    assert caplog.text == "" and torch.rand(()) == expected
    sizes = {"vocab_size": 8, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    check_reloadable(BartForSequenceClassification(BartConfig(**sizes, num_labels=2)))  # 2 is not saved, 3 is loaded
    assert "'classification_head.out_proj.bias'" in caplog.text


@pytest.mark.parametrize(
    ("max_steps", "arguments", "advice"),
    [
        (4, {"warmup_steps": 8, "lr_scheduler_type": "constant"}, None),
        (4, {"warmup_steps": 8, "lr_scheduler_type": "linear"}, "share"),
        (2, {"warmup_steps": 0.1}, None),
        (1, {"warmup_steps": 0.1}, "to 0"),
    ],
)
def test_a_warmup_as_long_as_the_stage_gives_a_warning(caplog, max_steps, arguments, advice):
    args = TrainingArguments(use_cpu=True)
    for name, value in arguments.items():
        setattr(args, name, value)  # strings, as scripts set them
    warn_about_warmup(args, SimpleNamespace(max_steps=max_steps))
    words = [] if advice is None else ["warmup_steps", f"{max_steps} steps", advice]
    assert bool(caplog.text) == bool(words) and all(word in caplog.text for word in words)


def test_stages_are_checked_for_warmup_and_early_end(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 6

    trainer = make_trainer(tmp_path, warmup_steps=8)
    trainer.add_callback(Stop())
    trajectory = induce_forgetting(trainer, BALANCED, tmp_path / "trajectory")
    assert [state.steps for state in trajectory.states] == [6, 6, 4]
    warmups = [record.message for record in caplog.records if "warmup_steps=8" in record.message]
    assert len(warmups) == 2 and "8 steps" in warmups[0] and "4 steps" in warmups[1]
    early = [record.message for record in caplog.records if " ended after " in record.message]
    assert len(early) == 2 and "state 0 ended after 6 of 32" in early[0] and "state 1 ended after 6 of 8" in early[1]
