"""Data that a comparison cannot use, and measures of its own."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_images
from quadrants import PROTOCOLS, compare_arms, source, target
from transformers import T5Config, T5ForConditionalGeneration

from know_hf.evaluation import ComparisonTask, FineTuning, Split, ZeroShot
from know_hf.evaluation.comparison import Measure
from know_hf.evaluation.measure import check_head


@pytest.fixture
def task(recorded):
    return ComparisonTask([recorded, recorded], target, source)


def with_labels(change, part="test", num_labels=4):
    """A `target` with other labels in one part."""

    def changed(seed, draw):
        split = target(seed, draw)
        examples = getattr(split, part)
        return replace(split, num_labels=num_labels, **{part: {**examples, "labels": change(examples["labels"])}})

    return changed


def with_part(part, content):
    return lambda seed, draw: replace(target(seed, draw), **{part: content})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda seed, draw: {"train": 1}, "target(0, 0) returned a dict"),
        (with_part("train", make_images(16)), "train of target(0, 0) is a Dataset"),
        (with_part("test", {}), "test of target(0, 0) has no examples"),
        (with_part("train", {"x": torch.ones(3, 1), "labels": torch.arange(2)}), "lengths, {'x': 3, 'labels': 2}"),
        (with_part("test", {"labels": [0, 1]}), "'labels' in test of target(0, 0) is a list"),
        (with_part("test", {"label": torch.tensor([0])}), "test of target(0, 0) has 'label'"),
        (with_labels(torch.Tensor.float), "labels in test of target(0, 0) are torch.float32"),
        (with_labels(lambda labels: labels + 1), "test of target(0, 0) has label 4, but the head has 4 classes"),
        (with_labels(lambda labels: labels - 1, "train"), "train of target(0, 0) has label -1"),
    ],
)
def test_invalid_data_is_an_error_before_the_work(task, tmp_path, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compare_arms(replace(task, target=given), tmp_path / "out", protocols=PROTOCOLS, arms=["naive"], draws=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("protocol", [FineTuning((1e-3, 1e-2), steps=1, head_steps=0), PROTOCOLS[1], ZeroShot()])
def test_labels_beyond_the_recorded_head_are_errors(task, tmp_path, protocol):
    beyond = with_labels(lambda labels: labels + 1, num_labels=None)
    task = replace(task, target=beyond) if not protocol.on_source else replace(task, source=lambda s: beyond(s, 0))
    with pytest.raises(ValueError, match=r"^test of .* has label 4, but the head has 4 classes"):
        compare_arms(task, tmp_path, protocols=[protocol], arms=["naive"])


def test_the_head_of_a_language_model_has_no_classes(task):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 1}
    model = T5ForConditionalGeneration(T5Config(vocab_size=8, **sizes, decoder_start_token_id=0))
    part = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "labels": torch.full((2, 3), 7)}
    check_head(task, model, Split(part, part, part), "source(0)")  # it has no logits without labels
    with pytest.raises(ValueError, match="input_ids"):
        model(part["input_ids"])


def test_own_measures_allow_labels_that_are_not_classes(task, tmp_path):
    def distance(model, examples):
        with torch.no_grad():
            logits = model(examples["pixel_values"]).logits[:, 0]
        return {"distance": float((logits - examples["labels"]).abs().mean())}

    parts = {name: {**part, "labels": part["labels"].float()} for name, part in list(vars(target(0, 0)).items())[:3]}
    own = {"evaluate": distance, "measures": (Measure("distance", higher_is_better=False),)}
    task = replace(task, target=lambda seed, draw: Split(**parts, num_labels=1), **own)
    protocol = FineTuning((1e-3, 1e-2), steps=1, head_steps=1)
    report = compare_arms(task, tmp_path / "out", protocols=[protocol], arms=["naive"], trials_per_rate=1)
    (draw,) = report.cells[0]["measured"]["few-shot"]
    best = draw["trials"][draw["chosen"]]
    assert best["validation"]["distance"] == min(trial["validation"]["distance"] for trial in draw["trials"])
    assert best["test"]["distance"] > 0 and "distance" in str(report)
    with pytest.raises(ValueError, match=r"'linear-probe' .*'distance'"):
        compare_arms(task, tmp_path / "probe", protocols=[PROTOCOLS[1]], arms=["naive"], draws=2)


def test_scores_and_seeds_may_be_numpy_numbers(task, tmp_path):
    def evaluate(model, examples):
        return {"accuracy": np.mean(np.float32([0.5, 1.0])), "loss": torch.tensor(1.0)}

    task = replace(task, evaluate=evaluate)
    protocols = (FineTuning((1e-3,), steps=1, head_steps=0), ZeroShot())
    report = compare_arms(task, tmp_path, protocols=protocols, arms=["naive"], seeds=np.arange(2), trials_per_rate=1)
    assert report.seeds == (0, 1)
    assert json.loads((tmp_path / "report.json").read_text())["results"][0]["arms"]["naive"]["mean"] == 0.75
