"""The text of training arguments in `trajectory.json`, and what a resumed recording compares."""

import enum
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from know_hf.data.subsets import Subset
from know_hf.recording.recorded_arguments import argument_text, recorded_arguments, trainer_arguments
from know_hf.recording.resuming import check_same_recording
from know_hf.trajectory import StateRecord

SGD = (torch.optim.SGD, {"lr": 0.5})


def make(optimizer: Any = None, of_trainer: Any = None, **changes: Any) -> tuple[TrainingArguments, dict[str, Any]]:
    """Arguments of a stage, changed without the checks of their constructor, and those of the trainer."""
    args = TrainingArguments("out", use_cpu=True)
    for name, value in changes.items():
        setattr(args, name, value)
    return args, {"optimizer_cls_and_kwargs": optimizer, **(of_trainer or {})}


def resume(training: dict[str, str], args: TrainingArguments, of_trainer: Any, **state: Any) -> None:
    record = StateRecord(0, 8, 1, (), seed=42, subset_fingerprint="a", training=training, **state)
    trajectory: Any = SimpleNamespace(trained=(record,), path="states")
    check_same_recording(trajectory, [Subset(None, 8, 1.0, "a")], [args], of_trainer)


def test_the_usual_arguments_and_what_differs_from_its_default_are_recorded(tmp_path):
    args = TrainingArguments(
        str(tmp_path), data_seed=3, lr_scheduler_kwargs={"min_lr": 1e-4}, hub_token="hf_x", bf16=True, use_cpu=True
    )
    usual = {"learning_rate": "5e-05", "lr_scheduler_type": "linear", "warmup_steps": "0", "num_train_epochs": "3.0"}
    usual |= {"optim": argument_text(args.optim), "weight_decay": "0.0", "max_grad_norm": "1.0", "max_steps": "-1"}
    usual |= {"adam_beta1": "0.9", "adam_beta2": "0.999", "adam_epsilon": "1e-08"}
    usual |= {"label_smoothing_factor": "0.0", "neftune_noise_alpha": "None", "examples_per_step": "8"}
    assert recorded_arguments(args, {"optimizer_cls_and_kwargs": SGD}) == {
        "class": "TrainingArguments",
        **usual,
        "data_seed": "3",
        "lr_scheduler_kwargs": '{"min_lr": 0.0001}',
        "mixed_precision": "bf16",
        "optimizer_cls_and_kwargs": '["torch.optim.sgd.SGD", {"lr": 0.5}]',
    }


@dataclass
class Options:
    alpha: float = 1.0
    layers: list[int] = field(default_factory=list)


class Kind(enum.Enum):
    FIRST = "first"


def function():
    pass


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        ({}, "None"),
        (Options(), "None"),
        (True, "True"),
        (1e-8, "1e-08"),
        (Kind.FIRST, "first"),
        ({"b": 1, "a": (Kind.FIRST, {2, 1}), "hub_token": "hf_x"}, '{"a": ["first", ["1", "2"]], "b": 1}'),
        (Options(layers=[2]), '{"layers": [2]}'),
        ("/home/someone/ds.json", "ds.json"),
        (Path("/home/someone/ds.json"), "ds.json"),
        ({"template": "~/chat.jinja", "model": "org/model"}, '{"model": "org/model", "template": "chat.jinja"}'),
        (torch.bfloat16, "torch.bfloat16"),
        (torch.optim.SGD, "torch.optim.sgd.SGD"),
        (function, f"{__name__}.function"),
        (partial(function, 1), f'["{__name__}.function", [1], {{}}]'),
        (object(), "builtins.object"),
        ("line\nbreak", "sha256 697affca60d5d0dc"),
    ],
)  # fmt: skip
def test_texts_are_the_same_on_every_machine(value, text):
    assert argument_text(value) == text


def test_what_the_trainer_has_besides_its_arguments_is_compared(tmp_path):
    class Own(Trainer):
        lr = 0.1

        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD([{"params": list(self.model.parameters()), "lr": self.lr}])
            return self.optimizer

    def build(kind: type[Trainer] = Trainer, **options: Any) -> tuple[TrainingArguments, dict[str, Any]]:
        args = TrainingArguments(str(tmp_path), use_cpu=True)
        return args, trainer_arguments(kind(torch.nn.Linear(2, 2), args, **options))

    args, plain = build()
    recorded = recorded_arguments(args, plain)
    assert recorded["data_collator"].endswith("default_data_collator")
    assert (recorded["trained_tensors"], "create_optimizer" in recorded) == ("2", False)
    resume(recorded, *build())
    resume(recorded_arguments(args), *build())  # of a callback that does not know the trainer
    for options, name in [
        ({"data_collator": function}, "data_collator"),
        ({"compute_loss_func": function}, "compute_loss_func"),
        ({"kind": Own}, "create_optimizer"),
    ]:
        with pytest.raises(ValueError, match=f"{name}=.*has "):
            resume(recorded, *build(**options))
    with pytest.raises(ValueError, match=r"trained_tensors=2.*has 1"):
        resume(recorded, args, {**plain, "trained_tensors": 1})
    recorded = recorded_arguments(*build(Own))
    resume(recorded, *build(Own))
    Own.lr = 0.2
    with pytest.raises(ValueError, match=r"create_optimizer=.*0\.1.*0\.2"):
        resume(recorded, *build(Own))


BEST = {"load_best_model_at_end": True, "save_steps": 5}


@pytest.mark.parametrize(
    ("before", "after", "match"),
    [
        ({"optimizer": SGD}, {"optimizer": (torch.optim.SGD, {"lr": 0.1})}, r"SGD.*0\.5.*0\.1"),
        ({"optimizer": SGD}, {}, "optimizer_cls_and_kwargs=.*SGD.*has None"),
        ({"lr_scheduler_kwargs": {"min_lr": 0.1}}, {"lr_scheduler_kwargs": {"min_lr": 0.2}}, "lr_scheduler_kwargs"),
        ({"data_seed": 1}, {"data_seed": 2}, "data_seed=1.*has 2"),
        ({"data_seed": 1}, {}, "data_seed=1.*has None"),
        ({}, {"data_seed": 1}, "data_seed=None.*has 1"),
        ({}, {"seed": 1}, "seed=42.*has 1"),
        ({}, {"mixed_precision": "bf16"}, "mixed_precision=no.*bf16"),
        ({}, {"optim_args": "foreach=True"}, "optim_args=None.*foreach=True"),
        ({}, {"dataloader_drop_last": True}, "dataloader_drop_last=False.*True"),
        ({}, {"train_sampling_strategy": "sequential"}, "train_sampling_strategy=random.*sequential"),
        ({}, {"accelerator_config": AcceleratorConfig(even_batches=False)}, "accelerator_config=None.*even_batches"),
        ({}, {"deepspeed": {"optimizer": {"type": "Lamb"}, "zero_optimization": {}}}, "deepspeed=None.*Lamb"),
        ({"eval_strategy": "epoch"}, {}, "eval_strategy=epoch.*no"),  # an evaluation draws random numbers
        (BEST, {**BEST, "save_steps": 6}, "save_steps=5.*6"),
    ],
)
def test_what_can_change_the_weights_is_compared(before, after, match):
    recorded = recorded_arguments(*make(**before))
    resume(recorded, *make(**before))
    with pytest.raises(ValueError, match=f"state 0 .*{match}"):
        resume(recorded, *make(**after))


def test_an_argument_that_the_new_class_does_not_have_is_compared():
    recorded = {**recorded_arguments(*make()), "packing": "True"}
    with pytest.raises(ValueError, match=r"packing=True.*TrainingArguments"):
        resume(recorded, *make())


@pytest.mark.parametrize(
    "change",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"logging_steps": 1, "report_to": ["wandb"], "run_name": "b", "disable_tqdm": True},
        {"output_dir": "other", "save_steps": 7, "save_strategy": "epoch", "push_to_hub": True, "hub_token": "hf_x"},
        {"dataloader_num_workers": 2, "use_cpu": False, "gradient_checkpointing": True, "ddp_timeout": 1},
        {"per_device_eval_batch_size": 1, "eval_steps": 3, "deepspeed": {"zero_optimization": {"stage": 2}}},
        {"accelerator_config": AcceleratorConfig(), "lr_scheduler_kwargs": {}},
    ],
)
def test_what_cannot_change_the_weights_may_change(change):
    resume(recorded_arguments(*make()), *make(**change))
    resume(recorded_arguments(*make(**change)), *make())


def test_records_of_earlier_versions_are_compared_by_what_they_name():
    recorded = recorded_arguments(*make(data_seed=1))
    old = {name: text for name, text in recorded.items() if name not in ("class", "data_seed")}
    resume(old, *make(data_seed=2, optimizer=SGD))
    with pytest.raises(ValueError, match=r"learning_rate=5e-05.*0\.5"):
        resume(old, *make(learning_rate=0.5))
