import copy
import math

import pytest
import torch
from conftest import make_resnet
from doubles.task_fixtures import SIZES
from quadrants import quadrants
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaForSequenceClassification,
)

from know_hf.evaluation import (
    FineTuning,
    LinearProbe,
    Split,
    ZeroShot,
    accuracy,
    batches,
    evaluate_classifier,
    fine_tune,
    with_new_head,
)
from know_hf.evaluation.comparison import ACCURACY, Measure
from know_hf.evaluation.linear_probe import features
from know_hf.evaluation.protocols import choose, first_of_each_class, refined

TINY = {**SIZES, "vocab_size": 20}


def make_examples(count=48, seed=0):
    return quadrants(count, seed, noise=0.3, signal=2)


def make_split(num_labels=4):
    return Split(make_examples(), make_examples(40, seed=1), make_examples(40, seed=2), num_labels)


def make_bert(num_labels=2):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_labels=num_labels, **TINY))


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


def test_zero_shot_evaluates_every_example_once():
    model, split = make_resnet().train(), make_split(num_labels=None)
    (trial,) = ZeroShot().trials(model, split, 0, evaluate_classifier, refinement=4)
    assert model.training and trial.learning_rate is None
    assert trial.validation["accuracy"] == accuracy(model, split.validation, batch_size=3)
    with torch.no_grad():
        output = model.eval()(**split.test)
    expected = {"accuracy": float((output.logits.argmax(1) == split.test["labels"]).float().mean())}
    assert trial.test == pytest.approx({**expected, "loss": float(output.loss)}, rel=1e-5)


def test_batches_cover_the_examples_in_the_given_order():
    examples = {"labels": torch.arange(5)}
    assert [b["labels"].tolist() for b in batches(examples, 2)] == [[0, 1], [2, 3], [4]]
    assert [b["labels"].tolist() for b in batches(examples, 3, torch.arange(4, -1, -1))] == [[4, 3, 2], [1, 0]]


def test_texts_are_evaluated_in_order_of_length():
    model, lengths = make_bert(num_labels=3), torch.tensor([9, 2, 7, 1, 5, 3])
    examples = {
        "input_ids": torch.randint(1, 20, (6, 12)),
        "attention_mask": (torch.arange(12) < lengths[:, None]).long(),
        "labels": torch.tensor([0, 1, 2, 0, 1, 2]),
    }
    widths = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    one_by_one = evaluate_classifier(model, examples, batch_size=1)
    assert widths == [1, 2, 3, 5, 7, 9]
    for size in (None, 2, 4):
        assert evaluate_classifier(model, examples, batch_size=size) == pytest.approx(one_by_one)
    assert widths[6:] == [9, 2, 5, 9, 5, 9]


def test_a_new_head_depends_on_the_seed_only():
    first, second = make_resnet(0), make_resnet(1)
    first.config.problem_type = "multi_label_classification"
    before, random_state = copy.deepcopy(first), torch.get_rng_state()
    heads = [with_new_head(model, 7, seed=3).classifier.state_dict() for model in (first, second)]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert heads[0]["1.weight"].shape[0] == 7
    assert not torch.equal(heads[0]["1.weight"], with_new_head(first, 7, seed=4).classifier[1].weight)
    assert equal(with_new_head(first, 7, seed=3).resnet, before.resnet) and equal(first, before)
    assert (first.config.num_labels, first.config.problem_type) == (4, "multi_label_classification")
    assert with_new_head(first, 4, seed=0)(**make_examples()).loss.ndim == 0


def test_models_without_a_head_of_their_own_are_errors():
    with pytest.raises(ValueError, match="ResNetModel has no head"):
        with_new_head(make_resnet().base_model, 3, seed=0)
    with pytest.raises(ValueError, match="ResNetModel has no head"):
        features(make_resnet().base_model, make_examples(4))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    examples = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
    protocol, split = FineTuning((1e-3,), steps=1), Split(examples, examples, examples)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no head .*head_steps=0"):
        next(protocol.trials(model, split, 0, lambda model, examples: {"loss": 0.0}))


def test_fine_tuning_learns_and_is_reproducible():
    models = [make_resnet(), make_resnet()]
    for model in models:
        fine_tune(model, make_examples(), learning_rate=1e-2, steps=25, seed=0, batch_size=16)
    assert accuracy(models[0], make_examples(40, seed=1)) > 0.9 and equal(*models)
    assert not models[0].training and all(parameter.requires_grad for parameter in models[0].parameters())


def test_fine_tuning_uses_the_loss_and_inputs_of_the_model():
    tokens = torch.randint(0, 20, (16, 5), generator=torch.Generator().manual_seed(0))
    labels = (tokens[:, 0] > 9).long()
    examples = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    model, random_state = make_bert(), torch.get_rng_state()
    fine_tune(model, examples, learning_rate=1e-2, steps=30, seed=0)
    assert torch.equal(torch.get_rng_state(), random_state) and accuracy(model, examples) == 1.0


def test_the_learning_rate_decays_to_zero(monkeypatch):
    rates = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *_: rates.append(self.param_groups[0]["lr"]))
    fine_tune(make_resnet(), make_examples(4), learning_rate=1e-2, steps=4, seed=0)
    half_cosine = [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert rates == pytest.approx([1e-2 * factor for factor in half_cosine], rel=1e-5)


def test_fine_tuning_evaluates_every_rate_and_does_not_change_the_model():
    model, split = make_resnet(), make_split()
    before = copy.deepcopy(model)
    trials = list(FineTuning((1e-6, 1e-2, 2e-2), steps=15, head_steps=0).trials(model, split, 0, evaluate_classifier))
    assert equal(model, before)
    assert [trial.learning_rate for trial in trials] == [1e-6, 1e-2, 2e-2]
    assert trials[1].validation["accuracy"] > trials[0].validation["accuracy"]
    assert trials[1].test["accuracy"] > trials[0].test["accuracy"]


def test_the_head_is_trained_first_with_the_best_rate_on_validation_data():
    def trial(head_steps=60, rate=1e-2):
        protocol = FineTuning((1e-9,), steps=1, head_steps=head_steps, head_learning_rate=rate)
        return next(protocol.trials(make_resnet(), make_split(), 0, evaluate_classifier))

    good, slow, untrained = trial(), trial(rate=1e-6), trial(head_steps=0)
    assert good.test["accuracy"] > untrained.test["accuracy"] + 0.2
    assert good.validation["accuracy"] > slow.validation["accuracy"]
    assert trial(rate=[1e-6, 1e-2]) == good


@pytest.mark.parametrize("rates", [(), (1e-3, 1e-3)])
def test_grids_must_have_distinct_rates(rates):
    for options in ({"learning_rates": rates}, {"learning_rates": (1e-3,), "head_learning_rate": rates}):
        with pytest.raises(ValueError, match="distinct"):
            FineTuning(**options)


HEADS = {
    BertForSequenceClassification: TINY,  # dropout, linear
    DistilBertForSequenceClassification: {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},  # linear, ReLU …
    RobertaForSequenceClassification: TINY,  # its head takes all tokens and uses the first
}


@pytest.mark.parametrize("model_class", HEADS)
def test_features_are_the_input_of_the_first_layer_of_the_head(model_class):
    options = {"vocab_size": 20, "num_labels": 2, "pad_token_id": 0, **HEADS[model_class]}
    model = model_class(model_class.config_class(**options)).train()
    tokens = torch.randint(1, 20, (6, 5), generator=torch.Generator().manual_seed(0))
    computed = features(model, {"input_ids": tokens, "labels": torch.zeros(6)}, batch_size=4)
    assert model.training
    model.eval()
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens)
    is_bert = model_class is BertForSequenceClassification
    torch.testing.assert_close(computed, hidden.pooler_output if is_bert else hidden.last_hidden_state[:, 0])


def test_a_head_for_each_token_has_no_probe():
    with pytest.raises(ValueError, match=r"\(5, 16\) values per example"):
        features(BertForTokenClassification(BertConfig(**TINY)), {"input_ids": torch.ones(2, 5, dtype=torch.long)})


def test_a_probe_learns_linear_classes_without_randomness_and_checks_their_number():
    model, split = make_resnet(), make_split()
    before = copy.deepcopy(model)
    trials = list(LinearProbe((1e-5, 3e-2), steps=100).trials(model, split, 0, evaluate_classifier))
    assert equal(model, before)
    assert [trial.learning_rate for trial in trials] == [1e-5, 3e-2]
    assert trials[1].test["accuracy"] > 0.9 > trials[0].test["accuracy"] + 0.1
    assert trials[1].test["loss"] < trials[0].test["loss"]
    again = list(LinearProbe((3e-2,), steps=100).trials(model, split, 7, evaluate_classifier))
    assert again[0] == trials[1]
    with pytest.raises(ValueError, match=r"train of .*'linear-probe' has label 3, .* 3 classes"):
        next(LinearProbe((1e-2,)).trials(model, make_split(3), 0, evaluate_classifier))


def test_rates_are_refined_evenly():
    assert refined((1e-3, 1e-2), 1) == [1e-3, 1e-2]
    assert refined((1e-3, 1e-2), 2) == [0.000562, 0.00178, 0.00562, 0.0178]
    assert refined((1e-3, 1e-2, 1e-1), 3)[1::3] == [1e-3, 1e-2, 1e-1]
    with pytest.raises(ValueError, match=r"0\.001.* cannot be refined"):
        refined((1e-3,), 2)


def test_trials_are_chosen_by_the_first_measure_then_the_next():
    loss = Measure("loss", higher_is_better=False)
    scores = [(0.5, 0.1), (0.8, 0.9), (0.8, 0.7), (None, None), (0.8, 0.7)]
    trials = [{"validation": {"accuracy": accuracy, "loss": value}} for accuracy, value in scores]
    assert choose(trials, (ACCURACY, loss)) == 2
    assert choose(trials, (loss, ACCURACY)) == 0


def test_the_first_examples_of_each_class_are_used():
    examples = {"labels": torch.tensor([1, 0, 1, 1, 0, 0]), "x": torch.arange(6)}
    assert first_of_each_class(examples, 2)["x"].tolist() == [0, 1, 2, 4]
    assert first_of_each_class(examples, None) is examples
    with pytest.raises(ValueError, match=r"class 0 has 3 .*labels_per_class=4"):
        first_of_each_class(examples, 4)
