"""Trials that train together: equal to trainings one after the other, up to rounding."""

import copy
import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_resnet
from doubles.task_fixtures import SIZES
from quadrants import quadrants
from torch.nn.functional import cross_entropy, one_hot
from transformers import BertConfig, BertForSequenceClassification, get_cosine_schedule_with_warmup

from know_hf.batch_norm import recalibrate_batch_norm
from know_hf.evaluation import FineTuning, LinearProbe, Split, batches, evaluate_classifier, fine_tune, with_new_head
from know_hf.evaluation.fine_tuning import head_parameters, inputs_of
from know_hf.evaluation.linear_probe import features
from know_hf.evaluation.suites.small_cnn import SmallCNN, SmallCNNConfig
from know_hf.evaluation.trials import (
    Stack,
    adam_heads,
    logistic_heads,
    ridge_heads,
    run_trials,
    stackable,
    with_features,
)

TINY = {**SIZES, "vocab_size": 20}


def make_cnn(batch_norm=False):
    torch.manual_seed(0)
    return SmallCNN(SmallCNNConfig(width=4, num_layers=2, num_labels=4, batch_norm=batch_norm))


def make_bert(dropout):
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(BertConfig(**TINY, **rates, initializer_range=0.2))


def images(seed):
    return Split(*(quadrants(count, 10 * seed + part, 0.3, 2) for part, count in enumerate((24, 20, 20))), 4)


def texts(seed):
    def part(count, number):
        generator = torch.Generator().manual_seed(10 * seed + number)
        mask = torch.arange(8) < torch.randint(3, 8, (count, 1), generator=generator)
        tokens = torch.randint(1, 20, (count, 8), generator=generator) * mask
        return {"input_ids": tokens, "attention_mask": mask.long(), "labels": (tokens[:, 0] > 9).long()}

    return Split(part(24, 0), part(20, 1), part(20, 2), 2)


MODELS = {
    "resnet": (make_resnet, images),
    "cnn": (make_cnn, images),
    "cnn-batch-norm": (lambda: make_cnn(batch_norm=True), images),
    "bert": (lambda: make_bert(0.0), texts),
    "bert-dropout": (lambda: make_bert(0.1), texts),
}


def losses(trials):
    return [[(trial.validation["loss"], trial.test["loss"]) for trial in of_run] for of_run in trials]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [None, 10])
def test_a_stack_trains_as_each_model_alone(name, batch_size):
    make, split = MODELS[name]
    protocol = FineTuning((1e-3, 1e-2), steps=5, head_steps=6, head_learning_rate=(1e-2, 1e-1), batch_size=batch_size)
    model = make()
    before = copy.deepcopy(model.state_dict())
    runs = [(model, split(0), 0), (model, split(1), 1)]
    alone, stacked = (protocol.trials_of(runs, evaluate_classifier, refinement=2, stacked=it) for it in (False, True))
    np.testing.assert_allclose(losses(stacked), losses(alone), rtol=1e-4)
    assert [[trial.learning_rate for trial in of_run] for of_run in stacked] == [
        [0.000562, 0.00178, 0.00562, 0.0178]
    ] * 2
    assert len({round(loss, 5) for of_run in losses(stacked) for loss, _ in of_run}) == 8
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    (single,) = protocol.trials_of(runs[1:], evaluate_classifier, refinement=2)
    np.testing.assert_allclose(losses([single]), losses(alone[1:]), rtol=1e-4)


def test_memory_divides_a_stack_and_changes_nothing(monkeypatch):
    protocol, sizes, init = FineTuning((1e-3, 1e-2, 1e-1), steps=2, head_steps=2), [], Stack.__init__
    runs = [(make_resnet(), images(0), 0)]
    together = protocol.trials_of(runs, evaluate_classifier, stacked=True)
    fit = stackable(with_new_head(make_resnet(), 4, 0), images(0).train)
    monkeypatch.setattr(run_trials, "STACK_BYTES", 2 * fit.nbytes)
    monkeypatch.setattr(Stack, "__init__", lambda self, *args: (sizes.append(len(args[1])), init(self, *args))[1])
    divided = protocol.trials_of(runs, evaluate_classifier, stacked=True)
    np.testing.assert_allclose(losses(divided), losses(together), rtol=1e-4)
    assert max(sizes) == 2


def test_trying_a_model_keeps_no_memory():
    model = make_resnet()
    parameters = [weakref.ref(parameter) for parameter in model.parameters()]
    stackable(model, images(0).train)
    del model
    gc.collect()
    assert not any(parameter() is not None for parameter in parameters)


class Branching(SmallCNN):
    """A forward that vmap cannot run."""

    def forward(self, pixel_values, labels=None):
        return super().forward(pixel_values if bool(self.classifier.weight.sum() > -1e9) else -pixel_values, labels)


def test_models_that_vmap_cannot_run_are_trained_alone():
    model = Branching(SmallCNNConfig(width=4, num_layers=2, num_labels=4))
    protocol = FineTuning((1e-3, 1e-2), steps=1, head_steps=2)
    assert stackable(copy.deepcopy(model), images(0).train) is None
    assert len(list(protocol.trials(model, images(0), 0, evaluate_classifier))) == 2
    with pytest.raises(ValueError, match="Branching cannot be trained in stacks"):
        replace(protocol, head_steps=0).trials_of([(model, images(0), 0)], evaluate_classifier, stacked=True)


@pytest.mark.parametrize("name", ["cnn", "bert"])
def test_a_head_on_cached_features_trains_as_in_the_whole_model(name):
    make, split = MODELS[name]
    whole, model, examples = make(), make(), split(0).train
    for module, data in ((whole, examples), with_features(model, examples)):
        head = [parameter for _, parameter in head_parameters(getattr(module, "model", module))]
        fine_tune(module, data, 1e-2, steps=10, seed=3, batch_size=10, parameters=head)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def test_the_body_runs_once_in_evaluation_mode(monkeypatch):
    model, calls = make_resnet(), []
    model.base_model.embedder.register_forward_hook(lambda module, *_: calls.append(module.training))
    protocol = FineTuning((1e-3,), steps=1, head_steps=30, head_learning_rate=(1e-3, 1e-2))
    monkeypatch.setattr("know_hf.evaluation.protocols.measure_trained", lambda trainings, *_: [({}, {})])
    monkeypatch.setattr("know_hf.evaluation.protocols.with_new_head", lambda model, *_: copy.deepcopy(model))
    list(protocol.trials(model, images(0), 0, evaluate_classifier))
    assert calls == [False, False]  # training and validation data


class Skipping(SmallCNN):
    """Its head reads more than the output of the body."""

    def forward(self, pixel_values, labels=None):
        output = super().forward(pixel_values)
        logits = output.logits + self.features[0](pixel_values).mean((2, 3))
        return type(output)(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)


def test_a_head_that_is_not_separable_is_trained_in_the_whole_model():
    model = Skipping(SmallCNNConfig(width=4, num_layers=2, num_labels=4))
    assert with_features(model, images(0).train)  # the first layer runs again
    model.features[0].register_forward_hook(lambda module, _, output: output + model.features[0].calls)
    model.features[0].calls = 0
    model.features.register_forward_pre_hook(lambda module, _: setattr(module[0], "calls", module[0].calls + 1))
    assert with_features(model, images(0).train) is None
    (trial,) = FineTuning((1e-3,), steps=1, head_steps=2).trials(model, images(0), 0, evaluate_classifier)
    assert 0 < trial.test["loss"] < 5


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_a_stack_evaluates_and_recalibrates_as_each_model(name):
    make, split = MODELS[name]
    models = [make(), make()]
    with torch.no_grad():
        models[1].base_model.requires_grad_(True)
        for parameter in models[1].parameters():
            parameter.mul_(0.7)
    sets = [split(seed).test for seed in (0, 1)]
    of_copy, sets = ([0, 1], sets) if name == "resnet" else ([0, 0], sets[:1])
    stack = Stack(make(), models)
    stack.recalibrate(sets, of_copy, 7)
    scores = stack.evaluate(sets, of_copy)
    for model, index, computed in zip(models, of_copy, scores, strict=True):
        recalibrate_batch_norm(model, batches(inputs_of(sets[index]), 7))
        assert computed == pytest.approx(evaluate_classifier(model, sets[index]), rel=1e-5)


def test_linear_heads_train_as_one_by_one():
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(2, 30, 5, generator=generator), torch.randint(0, 3, (2, 30), generator=generator)
    weights, biases = adam_heads(inputs, labels, 3, (1e-2, 1e-1), steps=20)
    for index in range(2):
        for number, rate in enumerate((1e-2, 1e-1)):
            layer = torch.nn.Linear(5, 3)
            torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
            optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
            schedule = get_cosine_schedule_with_warmup(optimizer, 0, 20)
            for _ in range(20):
                optimizer.zero_grad()
                cross_entropy(layer(inputs[index]), labels[index]).backward()
                optimizer.step()
                schedule.step()
            torch.testing.assert_close(weights[index, number], layer.weight.detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(biases[index, number], layer.bias.detach(), rtol=1e-4, atol=1e-5)


def test_ridge_and_logistic_heads_are_optima():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 40, 6, generator=generator).double()
    labels = torch.randint(0, 3, (1, 40), generator=generator)
    scale = float((inputs[0] - inputs[0].mean(0)).square().mean())

    def gradients(heads, loss, penalty):
        weight, bias = (tensor[0, 0].clone().requires_grad_() for tensor in heads)
        total = loss(inputs[0] @ weight.T + bias) + penalty * scale / 2 * weight.square().sum()
        return torch.autograd.grad(total, [weight, bias])

    ridge = gradients(
        ridge_heads(inputs, labels, 3, (0.1,)),
        lambda outputs: (outputs - one_hot(labels[0], 3)).square().sum() / 40 / 2,
        0.1,
    )
    logistic = gradients(
        logistic_heads(inputs, labels, 3, (0.1,)), lambda outputs: cross_entropy(outputs, labels[0]), 0.1
    )
    for gradient in ridge + logistic:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", ["ridge", "logistic"])
def test_probes_with_penalties_do_not_depend_on_the_size_of_the_features(solver):
    model, probe = make_resnet(), LinearProbe(solver=solver, penalties=(1e-3, 1e-1))
    trials = list(probe.trials(model, images(0), 0, evaluate_classifier))
    assert [(trial.learning_rate, trial.options) for trial in trials] == [(None, {"penalty": p}) for p in (1e-3, 1e-1)]
    assert trials[0].test["accuracy"] > 0.8
    inputs, labels = features(model, images(0).train)[None], images(0).train["labels"][None]
    solve = {"ridge": ridge_heads, "logistic": logistic_heads}[solver]
    weight, bias = solve(inputs, labels, 4, (1e-2,))
    smaller = solve(inputs / 10, labels, 4, (1e-2,))
    torch.testing.assert_close(smaller[0] / 10, weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(smaller[1], bias, rtol=1e-3, atol=1e-4)
    assert probe.to_dict()["penalties"] == (1e-3, 1e-1)
    assert "penalties" not in LinearProbe((1e-2,)).to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "svm", "penalties": (1.0,)}, "unknown solver 'svm'"),
        ({"solver": "ridge", "learning_rates": (0.1,)}, r"'ridge' takes penalties, not \(0.1,\)"),
        ({"penalties": (0.1,)}, "'adam' takes learning_rates"),
        ({"solver": "ridge"}, "distinct and at least one"),
    ],
)
def test_a_probe_takes_the_grid_of_its_solver(options, message):
    with pytest.raises(ValueError, match=message):
        LinearProbe(**options)


def test_head_and_body_have_rates_of_their_own():
    protocol = FineTuning((1e-3, 1e-2), steps=3, head_steps=2, head_rates=(1e-4, 1e-1))
    runs = [(make_resnet(), images(0), 0)]
    alone, stacked = (protocol.trials_of(runs, evaluate_classifier, stacked=stacked) for stacked in (False, True))
    np.testing.assert_allclose(losses(stacked), losses(alone), rtol=1e-4)
    pairs = [(trial.learning_rate, trial.head_learning_rate) for trial in alone[0]]
    assert pairs == [(1e-3, 1e-4), (1e-3, 1e-1), (1e-2, 1e-4), (1e-2, 1e-1)]
    assert "head_rates" in protocol.to_dict() and "head_rates" not in replace(protocol, head_rates=()).to_dict()
    model, still = make_resnet(), make_resnet()
    fine_tune(model, images(0).train, 1e-2, steps=2, seed=0, head_learning_rate=0.0)
    head = {name for name, _ in head_parameters(model)}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, still.get_parameter(name)) == (name in head)
    shared = replace(protocol, head_rates=()).trials_of(runs, evaluate_classifier)
    same = replace(protocol, learning_rates=(1e-2,), head_rates=(1e-2,)).trials_of(runs, evaluate_classifier)
    np.testing.assert_allclose(losses(same)[0][0], losses(shared)[0][1], rtol=1e-5)
