"""Optimizers and schedulers that a trainer did not create itself, and the weights that metrics belong to."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import make_trainer
from doubles.small_trainers import StopAfter, assert_refused, assert_same_states
from torch import nn
from torch.optim import SGD
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from know_hf import ForgettingSchedule, WeightTrajectory, WeightTransitionCallback, induce_forgetting

SCHEDULE = ForgettingSchedule(num_states=3)
OPTIMIZER = (SGD, {"lr": 0.1})


class Net(nn.Module):
    """A classifier with a head; `body.0` has a weight without weight decay."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3))
        self.head = nn.Linear(3, 2)

    def forward(self, x, labels):
        logits = self.head(self.body(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(TensorDataset):
    def __getitem__(self, index):
        return dict(zip(("x", "labels"), super().__getitem__(index), strict=True))


def make_rows(seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return Rows(torch.randn(32, 3, generator=generator), torch.arange(32) % 2)


def make(folder: Path, kind: type[Trainer] = Trainer, model: nn.Module | None = None, **options) -> Trainer:
    arguments = options.pop("arguments", {"optim": "adamw_torch", "num_train_epochs": 1, "weight_decay": 0.1})
    args = make_trainer(folder, **arguments).args
    return kind(model or Net(), args, train_dataset=make_rows(), **options)


class Averaged(SGD):
    """Trains fast weights and evaluates their average, as schedule-free optimizers do."""

    evaluates = False

    def step(self, closure=None):
        assert not self.evaluates
        super().step(closure)
        self.param_groups[0]["num_steps"] = self.param_groups[0].get("num_steps", 0) + 1
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["mean"] = state.get("mean", parameter.detach().clone()).lerp(parameter.detach(), 0.5)

    def _swap(self, evaluates: bool) -> None:
        for parameter in self.param_groups[0]["params"]:
            if self.evaluates != evaluates and "mean" in self.state[parameter]:
                other = self.state[parameter]["mean"]
                self.state[parameter]["mean"] = parameter.detach().clone()
                parameter.data.copy_(other)
        self.evaluates = evaluates

    def eval(self):
        self._swap(True)

    def train(self):
        self._swap(False)


class Wrapped(SGD):
    """An optimizer around another one."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, lr=0.1)
        self.optimizer = optimizer


class Cached(Trainer):
    def create_optimizer(self, *args, **kwargs):
        self.cached = getattr(self, "cached", None) or SGD(self.model.parameters(), lr=0.1)
        self.optimizer = self.cached
        return self.cached


class Decorated(Trainer):
    def create_optimizer(self, *args, **kwargs):
        return super().create_optimizer(*args, **kwargs)


class Layerwise(Trainer):
    def create_optimizer(self, *args, **kwargs):
        self.optimizer = LayerWiseDummyOptimizer({})
        return self.optimizer


class WithHead(Trainer):
    """A loss with weights."""

    def create_optimizer(self, *args, **kwargs):
        self.loss_head = nn.Linear(2, 2)
        self.optimizer = SGD([*self.model.parameters(), *self.loss_head.parameters()], lr=0.1)
        return self.optimizer


class OwnScheduler(Trainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, 0.5, 1000)
        return self.lr_scheduler


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, **{"lr": 0.01, "weight_decay": 0.1, **options})


def groups(model: Net):
    return [{"params": model.body.parameters(), "lr": 1e-3}, {"params": model.head.parameters()}]


@pytest.mark.parametrize(
    ("create", "kind"),
    [
        (lambda model: adamw(model.head.parameters()), Trainer),  # the Trainer's class and defaults
        (lambda model: adamw(groups(model)), Trainer),
        (lambda model: adamw(model.parameters()), Trainer),  # decays norm weights and biases too
        (lambda model: adamw(Net().parameters()), Trainer),
        (lambda model: Wrapped(SGD(model.parameters(), lr=0.1)), Trainer),
        (lambda model: SGD(model.parameters(), lr=0.1), Decorated),
    ],
)
def test_a_given_optimizer_is_refused(tmp_path, create, kind):
    model = Net()
    optimizer = create(model)
    trainer = make(tmp_path, kind, model, optimizers=(optimizer, None))
    match = f"{type(optimizer).__name__}.*optimizer_cls_and_kwargs"
    assert_refused(trainer, tmp_path / "states", ValueError, match, SCHEDULE)
    assert trainer.optimizer is optimizer


def test_a_given_optimizer_like_the_trainers_and_one_left_from_a_training_are_accepted(tmp_path):
    arguments = {"optim": "adamw_torch", "num_train_epochs": 1}
    expected = induce_forgetting(make(tmp_path, arguments=arguments), SCHEDULE, tmp_path / "expected")
    model = Net()
    given = adamw(model.parameters(), weight_decay=0.0)
    trainer = make(tmp_path, model=model, arguments=arguments, optimizers=(given, None))
    assert_same_states(induce_forgetting(trainer, SCHEDULE, tmp_path / "given"), expected)
    for kind in (Trainer, OwnScheduler):
        trainer = make(tmp_path, kind)
        trainer.train()
        trained = induce_forgetting(trainer, SCHEDULE, tmp_path / kind.__name__, start="current")
        assert [state.steps for state in trained.states] == [0, 4, 2]


@pytest.mark.parametrize("trained", [False, True])
def test_a_given_scheduler_is_refused(tmp_path, trained):
    model = Net()
    optimizer = adamw(model.parameters(), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    arguments = {"optim": "adamw_torch", "num_train_epochs": 1}
    trainer = make(tmp_path, model=model, arguments=arguments, optimizers=(optimizer, scheduler))
    if trained:
        trainer.train()
    assert_refused(trainer, tmp_path / "states", ValueError, r"ConstantLR.*scheduler.*lr_scheduler_type", SCHEDULE)


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (Cached, {}, "create_optimizer.*SGD"),
        (Layerwise, {}, "LayerWiseDummyOptimizer"),
        (
            Trainer,
            {"optimizer_cls_and_kwargs": (SGD, {"params": [], "lr": 0.1})},
            "optimizer_cls_and_kwargs.*'params'",
        ),
        (Trainer, {"arguments": {"optim": "galore_adamw_layerwise"}}, "optim=galore_adamw_layerwise"),
        (Trainer, {"arguments": {"optim": "lomo"}}, "optim=lomo"),
    ],
)
def test_an_optimizer_that_stages_could_not_replace_is_refused(tmp_path, kind, options, match):
    trainer = make(tmp_path, kind, **options)
    with pytest.raises(ValueError, match=match):
        induce_forgetting(trainer, SCHEDULE, tmp_path / "states")
    assert trainer.state.global_step == 0 and not WeightTrajectory.exists(tmp_path / "states")


def test_weights_outside_of_the_model_give_one_warning(tmp_path, caplog):
    induce_forgetting(make(tmp_path, WithHead), SCHEDULE, tmp_path / "states")
    [warning] = [record.message for record in caplog.records if "not in the model" in record.message]
    assert "optimizer" in warning and "2 parameters" in warning and "[2, 2]" in warning
    trainer = make(tmp_path, WithHead, callbacks=[WeightTransitionCallback(tmp_path / "alone")])
    trainer.train()
    assert caplog.text.count("not in the model") == 2


def test_the_recorded_weights_of_an_averaging_optimizer_are_the_evaluated_ones(tmp_path):
    def averaged(**options):
        return make(tmp_path, optimizer_cls_and_kwargs=(Averaged, OPTIMIZER[1]), eval_dataset=make_rows(1), **options)

    complete = induce_forgetting(averaged(), SCHEDULE, tmp_path / "complete")
    for state in complete.states:
        trainer = averaged()
        complete.load_into(trainer.model, state.index)
        assert trainer.evaluate()["eval_loss"] == state.metrics["eval_loss"]
    fast = make(tmp_path, optimizer_cls_and_kwargs=OPTIMIZER)
    fast.train()
    assert not torch.equal(fast.model.head.weight, complete.tensor("head.weight", 0))
    with pytest.raises(KeyboardInterrupt):
        induce_forgetting(averaged(callbacks=[StopAfter(1)]), SCHEDULE, tmp_path / "resumed")
    assert_same_states(induce_forgetting(averaged(), SCHEDULE, tmp_path / "resumed"), complete)

    trainer = averaged()
    trainer.train()
    current = induce_forgetting(trainer, SCHEDULE, tmp_path / "current", start="current")
    assert torch.equal(current.tensor("head.weight", 0), complete.tensor("head.weight", 0))
    assert current.states[0].metrics["eval_loss"] == complete.states[0].metrics["eval_loss"]

    callback = WeightTransitionCallback(tmp_path / "alone")
    averaged(callbacks=[callback]).train()
    assert torch.equal(callback.trajectory.tensor("head.weight", 0), complete.tensor("head.weight", 0))


def test_the_best_weights_are_recorded_whatever_the_mode_of_the_optimizer(tmp_path):
    class StoppedEarly(TrainerCallback):
        losses: ClassVar[list[float]] = []

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            self.losses.append(metrics["eval_loss"])

    steps = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    trainer = make(
        tmp_path / "out",
        arguments={**steps, "load_best_model_at_end": True, "num_train_epochs": 1},
        optimizer_cls_and_kwargs=(Averaged, OPTIMIZER[1]),
        eval_dataset=make_rows(1),
        callbacks=[StoppedEarly()],
    )
    trajectory = induce_forgetting(trainer, SCHEDULE, tmp_path / "states")
    assert trajectory.states[0].steps == 5  # evaluated after step 3
    assert trajectory.states[0].metrics["eval_loss"] == StoppedEarly.losses[0] == StoppedEarly.losses[1]


class HalvedAtEvaluation(Trainer):
    """Evaluates other weights than the trained ones."""

    def evaluate(self, *args, **kwargs):
        with torch.no_grad():
            self.model.head.weight.data *= 0.5
            results = super().evaluate(*args, **kwargs)
            self.model.head.weight.data *= 2
        return results


class HalvedAtEnd(TrainerCallback):
    def on_train_end(self, args, state, control, model, **kwargs):
        model.head.weight.data *= 0.5


def test_metrics_of_other_weights_are_not_recorded(tmp_path, caplog):
    trainer = make(tmp_path, HalvedAtEvaluation, eval_dataset=make_rows(1))
    trajectory = induce_forgetting(trainer, SCHEDULE, tmp_path / "evaluation")
    assert [state.metrics for state in trajectory.states] == [{}] * 3
    assert "state 2 used other weights" in caplog.text and "on_train_end" in caplog.text
    assert "weights changed" not in caplog.text
    caplog.clear()

    trainer = make(tmp_path, eval_dataset=make_rows(1), callbacks=[HalvedAtEnd()])
    ended = induce_forgetting(trainer, SCHEDULE, tmp_path / "end")
    assert torch.equal(ended.tensor("head.weight", 0), trajectory.tensor("head.weight", 0) * 0.5)
    assert all("eval_loss" in state.metrics for state in ended.states) and caplog.text == ""


def test_weights_that_change_between_stages_give_a_warning(tmp_path, caplog):
    class Halved(Trainer):
        def train(self, *args, **kwargs):
            result = super().train(*args, **kwargs)
            self.model.head.weight.data *= 0.5
            return result

    induce_forgetting(make(tmp_path, Halved), SCHEDULE, tmp_path / "states")
    assert caplog.text.count("weights changed") == 2


def test_a_reference_that_follows_the_training_gives_one_warning(tmp_path, caplog):
    class Following(Trainer):
        follows = True

        def training_step(self, *args, **kwargs):
            if self.follows:
                self.reference.load_state_dict(self.model.state_dict())
            return super().training_step(*args, **kwargs)

    for follows in (True, False):
        trainer = make(tmp_path, Following)
        trainer.reference, trainer.follows = Net(), follows
        induce_forgetting(trainer, SCHEDULE, tmp_path / str(follows))
        assert caplog.text.count("'reference.") == follows
        caplog.clear()
