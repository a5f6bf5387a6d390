"""The table and the warning at the end of a recording."""

import math
import re

import pytest
import torch
from conftest import make_trainer
from torch import nn

from know_hf import ForgettingSchedule, induce_forgetting
from know_hf.recording.chance import chance_warning


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"eval_loss": math.log(4)}, "1.386.*1.386"),
        ({"eval_loss": 0.94 * math.log(4)}, None),
        ({"eval_accuracy": 0.45}, "0.450.*0.250"),  # 4 classes of 4 rows: noise of 0.11
        ({"eval_accuracy": 0.5}, None),
        ({"eval_loss": 2.0, "eval_accuracy": 0.5}, None),
        ({"eval_loss": 1.0, "eval_accuracy": 0.25}, None),
        ({"eval_f1": 0.1}, None),
    ],
)
def test_guessing_gives_a_warning(tmp_path, metrics, words):
    text = chance_warning(make_trainer(tmp_path), metrics)
    assert text is None if words is None else re.search(words, text)


def test_only_classifiers_with_classes_are_judged(tmp_path):
    trainer, guessing = make_trainer(tmp_path), {"eval_loss": 9.0}
    for dataset in (
        None,
        torch.utils.data.TensorDataset(torch.zeros(9)),
        trainer.eval_dataset.remove_columns("labels"),
    ):
        trainer.eval_dataset = dataset
        assert chance_warning(trainer, guessing) is None
    trainer = make_trainer(tmp_path)
    trainer.model = nn.Linear(2, 2)
    assert chance_warning(trainer, guessing) is None


def test_a_loss_that_is_not_finite_is_no_guessing(tmp_path, caplog, monkeypatch):
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    monkeypatch.setattr(trainer, "evaluate", lambda: {"eval_loss": math.nan, "eval_accuracy": 0.25})
    induce_forgetting(trainer, ForgettingSchedule(num_states=2), tmp_path / "trajectory")
    assert "eval_loss of state 0 is not a finite number" in caplog.text and "at chance" not in caplog.text


@pytest.mark.parametrize("options", [{}, {"disable_tqdm": True}, {"logging_strategy": "no"}])
def test_a_recording_ends_with_the_metrics_of_every_state(tmp_path, capsys, caplog, options):
    options = {"disable_tqdm": False, "num_train_epochs": 1, "learning_rate": 1e-9, **options}
    induce_forgetting(make_trainer(tmp_path, **options), ForgettingSchedule(num_states=2), tmp_path / "trajectory")
    assert caplog.text.count("Θ0 is at chance") == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    is_shown = not options["disable_tqdm"] and "logging_strategy" not in options
    assert ([line[:2] for line in lines if line[:1] in (["state"], ["Θ0"], ["Θ1"])] == []) != is_shown
    assert (["state", "examples", "steps", "eval_loss"] in lines) == is_shown
