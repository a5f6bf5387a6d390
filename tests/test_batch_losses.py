"""What a gate compares on a batch: loss, calibrated loss and error rate."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_images, make_resnet
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from know_hf.prediction.choosing.batch_losses import batch_losses, inverse_temperature


def batches_of(examples, size=5):
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def test_the_temperature_minimises_the_loss():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (500,), generator=generator)
    logits = torch.randn(500, 4, generator=generator)
    logits[torch.arange(500), labels] += 1.5
    expected = min(torch.linspace(0.2, 3, 2801).tolist(), key=lambda scale: cross_entropy(scale * logits, labels))
    for confidence in (1e-6, 1.0, 1e6):
        assert inverse_temperature(confidence * logits, labels) * confidence == pytest.approx(expected, rel=0.01)
    for excluded in (-1e4, -1e9, -torch.inf):  # as of padded choices
        padded = torch.cat([logits, torch.full((500, 2), excluded)], dim=1)
        padded[0, labels[0].item() - 1] = padded[0, labels[0] - 2] = padded[0, labels[0] - 3] = excluded
        assert inverse_temperature(padded, labels) == pytest.approx(expected, rel=0.01)
    assert cross_entropy(inverse_temperature(torch.zeros(500, 4), labels) * torch.zeros(500, 4), labels).isfinite()
    right = torch.nn.functional.one_hot(labels, 4).float()
    assert 5 < inverse_temperature(right, labels) < 10  # finite, though all predictions are right


def test_the_calibrated_loss_does_not_depend_on_the_confidence():
    batches = batches_of(make_images(50, seed=3))
    model = make_resnet().eval()
    values = {}
    for factor in (1.0, 20.0):
        with torch.no_grad():
            for parameter in model.classifier.parameters():
                parameter.mul_(factor)
            metric, values[factor] = batch_losses(model, batches)
        assert metric == "calibrated loss" and len(values[factor]) == 10
    assert values[1.0] == pytest.approx(values[20.0], rel=1e-4)
    with torch.no_grad():
        assert sum(values[20.0]) < sum(batch_losses(model, batches, "validation loss")[1])
        low_precision = batch_losses(model.to(torch.bfloat16), batches)
    assert low_precision[0] == "calibrated loss" and low_precision[1] == pytest.approx(values[20.0], abs=0.05)


def test_other_models_and_labels_are_compared_by_their_loss():
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tokens = torch.tensor([[1, 2, 3], [3, 2, 1]])
    scores = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=8, num_labels=1)).eval()
    language = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8)).eval()
    for model, labels in (
        (scores, torch.tensor([0.5, 1.0])),
        (scores, torch.tensor([1, 2])),
        (language, tokens),
    ):
        batch = {"input_ids": tokens, "labels": labels}
        with torch.no_grad():
            metric, values = batch_losses(model, [batch])
            expected = float(model(**batch).loss)
        assert (metric, values) == ("validation loss", [pytest.approx(expected)])
        for metric in ("calibrated loss", "accuracy"):
            with pytest.raises(ValueError, match=f"metric='{metric}'.*one class"):
                batch_losses(model, [batch], metric)


class Linear:
    """A classifier of three classes whose outputs are its inputs."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, **options):
        self.options = options

    def __call__(self, inputs, labels):
        return SimpleNamespace(loss=cross_entropy(inputs, labels, **self.options), logits=inputs)


def test_every_batch_decides_what_is_compared():
    inputs, labels = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    batches = [{"inputs": inputs[:1], "labels": labels[:1]}]  # of one class: weights of classes make no difference
    batches += [{"inputs": inputs[start : start + 13], "labels": labels[start : start + 13]} for start in (1, 14, 27)]
    model = Linear(weight=torch.tensor([1.0, 2.0, 3.0]))
    assert batch_losses(model, batches[:1])[0] == batch_losses(Linear(), batches)[0] == "calibrated loss"
    assert batch_losses(model, batches) == ("validation loss", [float(model(**batch).loss) for batch in batches])


def test_examples_without_a_label_do_not_count():
    inputs, labels = torch.eye(3).repeat(4, 1), torch.arange(12) % 3
    batches = [{"inputs": inputs, "labels": labels}, {"inputs": inputs, "labels": labels.where(labels > 0, -100)}]
    metric, (first, second) = batch_losses(Linear(), batches)
    assert metric == "calibrated loss" and first == pytest.approx(second)
    assert batch_losses(Linear(), batches, "accuracy")[1] == [0, 0]
