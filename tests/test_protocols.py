import copy
from dataclasses import replace

import pytest
import torch
from conftest import make_resnet
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaForSequenceClassification,
)

from know_hf import predict_overflowed_weights
from know_hf.evaluation import (
    AVERAGE,
    NAIVE,
    ORACLE,
    RANDOM,
    Arm,
    ArmSources,
    AsTheyAre,
    FineTuning,
    LinearProbe,
    Split,
    accuracy,
    batches,
    compare_with_naive,
    evaluate_classifier,
    fine_tune,
    holm,
    known_arm,
    shrink_arm,
    with_new_head,
)
from know_hf.evaluation.linear_probe import features
from know_hf.known.modeling_known import KNOWNConfig, KNOWNModel
from know_hf.trajectory import WeightTrajectory


def make_examples(num_examples=48, seed=0):
    """Four classes, each a bright quadrant."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_examples) % 4
    pixels = torch.randn(num_examples, 1, 8, 8, generator=generator) * 0.3
    for image, label in zip(pixels, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 2
    return {"pixel_values": pixels, "labels": labels}


def make_bert():
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=2,
        attention_probs_dropout_prob=0.1,
    )
    torch.manual_seed(0)
    return BertForSequenceClassification(config)


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def sources(recorded, tmp_path_factory):
    known_config = KNOWNConfig()
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("known")
    KNOWNModel(known_config).save_pretrained(folder)
    return ArmSources(
        trajectory=WeightTrajectory(recorded),
        output_dir=tmp_path_factory.mktemp("arms"),
        batches=[{"pixel_values": make_examples(seed=5)["pixel_values"]}],
        fresh_model=lambda: make_resnet(seed=11),
        oracle_model=lambda: make_resnet(seed=12),
        known=folder,
    )


def test_accuracy_counts_every_example_once():
    examples = make_examples(10)
    model = make_resnet().train()
    with torch.no_grad():
        expected = (model.eval()(examples["pixel_values"]).logits.argmax(1) == examples["labels"]).float().mean()
    model.train()
    assert accuracy(model, examples, batch_size=3) == pytest.approx(float(expected))
    assert model.training


def test_batches_cover_the_examples_in_the_order_asked_for():
    examples = {"labels": torch.arange(5)}
    assert [b["labels"].tolist() for b in batches(examples, 2)] == [[0, 1], [2, 3], [4]]
    order = torch.tensor([4, 3, 2, 1, 0])
    assert [b["labels"].tolist() for b in batches(examples, 3, order)] == [[4, 3, 2], [1, 0]]


def test_a_new_head_depends_on_the_seed_only():
    first, second = make_resnet(0), make_resnet(1)
    before = copy.deepcopy(first)
    random_state = torch.get_rng_state()
    heads = [with_new_head(model, 7, seed=3).classifier.state_dict() for model in (first, second)]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert heads[0]["1.weight"].shape[0] == 7
    assert not torch.equal(heads[0]["1.weight"], with_new_head(first, 7, seed=4).classifier[1].weight)
    assert equal(with_new_head(first, 7, seed=3).resnet, before.resnet)
    assert equal(first, before)
    assert first.config.num_labels == 4


def test_a_new_head_has_a_task_of_its_own():
    model = make_resnet()
    model.config.problem_type = "multi_label_classification"
    examples = make_examples()
    assert with_new_head(model, 4, seed=0)(**examples).loss.ndim == 0
    assert model.config.problem_type == "multi_label_classification"


def test_a_head_that_is_tied_to_the_body_can_not_be_trained_alone():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    examples = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
    protocol, split = FineTuning((1e-3,), steps=1), Split(examples, examples, examples)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no head of its own to train .* give head_steps=0"):
        next(protocol.trials(model, split, 0, lambda model, examples: {"loss": 0.0}))


def test_a_model_without_a_head_is_an_error():
    with pytest.raises(ValueError, match="ResNetModel has no head to replace"):
        with_new_head(make_resnet().base_model, 3, seed=0)


def test_fine_tuning_learns_and_repeats():
    examples = make_examples()
    tuned = [make_resnet(), make_resnet()]
    for model in tuned:
        fine_tune(model, examples, learning_rate=1e-2, steps=25, seed=0, batch_size=16)
    assert accuracy(tuned[0], make_examples(40, seed=1)) > 0.9
    assert equal(*tuned)
    assert not tuned[0].training
    assert all(parameter.requires_grad for parameter in tuned[0].parameters())


def test_fine_tuning_uses_the_models_own_loss_and_inputs():
    tokens = torch.randint(0, 20, (16, 5), generator=torch.Generator().manual_seed(0))
    examples = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": (tokens[:, 0] > 9).long(),
    }
    model = make_bert()
    random_state = torch.get_rng_state()
    fine_tune(model, examples, learning_rate=1e-2, steps=30, seed=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert accuracy(model, examples) == 1.0


def test_few_shot_tries_every_rate_and_leaves_the_model_as_it_is():
    model, split = make_resnet(), Split(make_examples(), make_examples(40, seed=1), make_examples(40, seed=2), 4)
    before = copy.deepcopy(model)
    trials = list(FineTuning((1e-6, 1e-2, 2e-2), steps=15, head_steps=0).trials(model, split, 0, evaluate_classifier))
    assert equal(model, before)
    assert [trial.learning_rate for trial in trials] == [1e-6, 1e-2, 2e-2]
    assert trials[1].validation["accuracy"] > trials[0].validation["accuracy"]
    assert trials[1].test["accuracy"] > trials[0].test["accuracy"]


def test_the_head_is_trained_first_and_alone():
    model, examples = make_resnet(), make_examples()
    split = Split(examples, examples, examples, 4)
    warm, cold = (
        next(FineTuning((1e-9,), steps=1, head_steps=steps).trials(model, split, 0, evaluate_classifier))
        for steps in (60, 0)
    )
    assert warm.test["accuracy"] > cold.test["accuracy"] + 0.2


@pytest.mark.parametrize("rates", [(), (1e-3, 1e-3)])
def test_a_grid_without_rates_or_with_one_twice_is_an_error(rates):
    for options in ({"learning_rates": rates}, {"learning_rates": (1e-3,), "head_learning_rate": rates}):
        with pytest.raises(ValueError, match="learning_rates must be different and at least one"):
            FineTuning(**options)


def test_states_fresh_and_oracle_arms_are_recalibrated_and_else_as_they_are(sources):
    for arm, expected in (
        (NAIVE, sources.trajectory.load_model(0)),
        (Arm("Θ2", "state", "a later state", state=2), sources.trajectory.load_model(2)),
        (RANDOM, make_resnet(seed=11)),
        (ORACLE, make_resnet(seed=12)),
    ):
        model = arm.initial_model(sources)
        for name, parameter in expected.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), (arm.name, name)
        tracked = model.get_buffer("resnet.embedder.embedder.normalization.num_batches_tracked")
        assert int(tracked) == len(sources.batches)


def test_predicted_arms_are_the_prediction(sources, tmp_path):
    arm = known_arm(2, ratio=0.5)
    model = arm.initial_model(sources)
    expected = predict_overflowed_weights(
        sources.trajectory, sources.known, 2, output_dir=tmp_path / "x", recalibrate_with=sources.batches
    ).load_model()
    assert equal(model, expected)
    assert (sources.output_dir / "known-x4" / "model.safetensors").exists()

    shrunk = shrink_arm(0.5).initial_model(sources).classifier[1].weight
    torch.testing.assert_close(shrunk, sources.trajectory.tensor("classifier.1.weight") * 0.5)
    averaged = AVERAGE.initial_model(sources).classifier[1].weight
    torch.testing.assert_close(averaged, sources.trajectory.history("classifier.1.weight").mean(dim=0))


def test_arms_know_their_names_and_whether_they_compete():
    assert [known_arm(steps, 0.5).name for steps in (1, 2, 3)] == ["known-x2", "known-x4", "known-x8"]
    assert known_arm(1, 1 / 3).name == "known-x3"
    candidates = [arm.is_candidate for arm in (NAIVE, RANDOM, ORACLE, AVERAGE, shrink_arm(0.8), known_arm(1, 0.5))]
    assert candidates == [False, False, False, True, True, True]


def test_an_oracle_needs_its_model(sources):
    with pytest.raises(ValueError, match="arm 'oracle' is an oracle, but the sources have no oracle_model"):
        ORACLE.initial_model(replace(sources, oracle_model=None))


SCORES = {
    "naive": [0.50, 0.52, 0.48, 0.51],
    "random": [0.40, 0.43, 0.37, 0.41],
    "good": [0.55, 0.575, 0.53, 0.562],
    "same": [0.501, 0.519, 0.481, 0.509],
    "bad": [0.40, 0.42, 0.385, 0.41],
    "oracle": [0.60, 0.61, 0.58, 0.615],
}


def test_a_comparison_finds_the_better_arm_and_says_so():
    comparison = compare_with_naive(SCORES, ["good", "same", "bad"], "transfer")
    assert comparison.better == ("good",)
    assert comparison.worse == ("bad",)
    assert comparison.verdict().startswith("In transfer, good (+5.2 points, 95% interval [+4.")
    assert "is significantly better than naive (paired t-test over 4 seeds, Holm-corr" in comparison.verdict()
    assert comparison.validity().endswith("a gain could have shown.")
    data = comparison.to_dict()
    assert data["good"]["mean"] == pytest.approx(0.55425)
    assert data["good"]["per_seed"] == SCORES["good"]
    assert data["good"]["ci95"][0] < 0.55425 < data["good"]["ci95"][1]
    p_values = {name: data[name]["minus_naive"]["p"] for name in ("good", "same", "bad")}
    assert {name: data[name]["minus_naive"]["p_holm"] for name in p_values} == holm(p_values)
    assert data["oracle"]["minus_naive"]["p_holm"] is None
    assert "minus_naive" not in data["naive"]
    record = comparison.to_record()
    assert (record["what"], record["arms"]) == ("transfer", data)
    assert (record["verdict"], record["validity"]) == (comparison.verdict(), comparison.validity())


def test_a_comparison_without_a_better_arm_says_so():
    comparison = compare_with_naive({k: v for k, v in SCORES.items() if k != "good"}, ["same", "bad"], "transfer")
    assert comparison.verdict().startswith(
        "In transfer, none of same, bad is significantly better than naive; the best is same with +0.0 points"
    )
    assert "significantly worse: bad" in comparison.verdict()


def test_a_suite_that_can_show_nothing_says_so():
    scores = {**SCORES, "random": SCORES["naive"][::-1]}
    validity = compare_with_naive(scores, ["same"]).validity()
    assert "naive does not clearly beat random" in validity
    assert validity.endswith("this shows nothing.")


def test_the_table_has_a_line_an_arm_and_columns_in_line():
    lines = compare_with_naive(SCORES, ["good", "same", "bad"]).table({"rate": {"good": "1e-2"}}).splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(SCORES)
    assert lines[4].split()[-1] == "1e-2"
    assert "reference" in lines[3]
    assert len({line.index("]") for line in lines[2:]}) == 1


def test_a_comparison_needs_naive_and_the_candidates():
    with pytest.raises(ValueError, match="no scores of the arm 'naive'"):
        compare_with_naive({"good": [1.0, 2.0]}, ["good"])
    with pytest.raises(ValueError, match="no scores of the arm 'missing', only of naive"):
        compare_with_naive({"naive": [1.0, 2.0]}, ["missing"])


HEADS = {
    "bert": BertForSequenceClassification,  # dropout, linear
    "distilbert": DistilBertForSequenceClassification,  # linear, ReLU, dropout, linear
    "roberta": RobertaForSequenceClassification,  # takes all tokens, uses the first
}


@pytest.mark.parametrize("kind", HEADS)
def test_features_are_what_the_first_layer_of_the_head_is_given(kind):
    model_class = HEADS[kind]
    config = model_class.config_class(vocab_size=20, num_labels=2, pad_token_id=0, **TINY[kind])
    model = model_class(config).train()
    tokens = torch.randint(1, 20, (6, 5), generator=torch.Generator().manual_seed(0))
    found = features(model, {"input_ids": tokens, "labels": torch.zeros(6)}, batch_size=4)
    assert model.training
    model.eval()
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens)
    expected = hidden.pooler_output if kind == "bert" else hidden.last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected)


TINY = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
    "roberta": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
}


def test_a_model_without_a_head_or_with_one_for_every_token_has_no_probe():
    with pytest.raises(ValueError, match="ResNetModel has no head to read features from"):
        features(make_resnet().base_model, make_examples(4))
    tokens = BertForTokenClassification(BertConfig(vocab_size=20, **TINY["bert"]))
    with pytest.raises(ValueError, match=r"takes \(5, 16\) values an example, a linear probe needs one vector"):
        features(tokens, {"input_ids": torch.ones(2, 5, dtype=torch.long)})


def test_a_probe_learns_what_is_linear_in_the_features_and_changes_nothing():
    model, split = make_resnet(), Split(make_examples(), make_examples(40, seed=1), make_examples(40, seed=2), 4)
    before = copy.deepcopy(model)
    trials = list(LinearProbe((1e-5, 3e-2), steps=100).trials(model, split, 0, evaluate_classifier))
    assert equal(model, before)
    assert [trial.learning_rate for trial in trials] == [1e-5, 3e-2]
    assert trials[1].test["accuracy"] > 0.9 > trials[0].test["accuracy"] + 0.1
    assert trials[1].test["loss"] < trials[0].test["loss"]
    again = list(LinearProbe((3e-2,), steps=100).trials(model, split, 7, evaluate_classifier))
    assert again[0] == trials[1]  # nothing in it is random


def test_a_probe_says_which_labels_are_no_classes():
    examples = make_examples()
    off = {**examples, "labels": examples["labels"].float()}
    probe = LinearProbe((1e-2, 1e-1), steps=1)
    with pytest.raises(ValueError, match=r"labels in test of the split of 'linear-probe' are torch\.float32"):
        next(probe.trials(make_resnet(), Split(examples, examples, off), 0, evaluate_classifier))
    with pytest.raises(ValueError, match=r"train of the split of 'linear-probe' has the label 3, .* 3 classes, 0 to"):
        next(probe.trials(make_resnet(), Split(examples, examples, examples, 3), 0, evaluate_classifier))


def test_the_rate_of_the_head_is_chosen_on_validation_data():
    model, split = make_resnet(), Split(make_examples(), make_examples(40, seed=1), make_examples(40, seed=2), 4)
    options = {"steps": 1, "head_steps": 60}
    few, good = (
        next(FineTuning((1e-9,), head_learning_rate=rate, **options).trials(model, split, 0, evaluate_classifier))
        for rate in (1e-6, 1e-2)
    )
    both = FineTuning((1e-9,), head_learning_rate=[1e-6, 1e-2], **options)
    assert good.validation["accuracy"] > few.validation["accuracy"]
    assert next(both.trials(model, split, 0, evaluate_classifier)) == good


def test_the_weights_as_they_are_are_evaluated_and_nothing_else():
    model, split = make_resnet(), Split(make_examples(), make_examples(40, seed=1), make_examples(40, seed=2))
    (trial,) = AsTheyAre().trials(model, split, 0, evaluate_classifier, refinement=4)
    assert trial.learning_rate is None
    assert trial.validation["accuracy"] == accuracy(model, split.validation)
    with torch.no_grad():
        output = model.eval()(**split.test)
    assert trial.test["loss"] == pytest.approx(float(output.loss), rel=1e-5)


def test_texts_are_evaluated_in_order_of_length_and_score_the_same():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    model = BertForSequenceClassification(config)
    lengths = torch.tensor([9, 2, 7, 1, 5, 3])
    examples = {
        "input_ids": torch.randint(1, 30, (6, 12)),
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
