"""Fields of cards with fixed numbers, and what every card must satisfy."""

import ast
import re
import shlex
from importlib import import_module
from itertools import pairwise

import pytest
from huggingface_hub import ModelCard

import know_hf
from know_hf import ForgettingSchedule, KNOWNModel, WeightTrajectory, predict_overflowed_weights
from know_hf.cards import CheckpointCard
from know_hf.cli import make_parser
from know_hf.prediction import SHIPPED_KNOWN


def estimate(mean, margin, **more):
    return {"mean": mean, "ci95": [mean - margin, mean + margin], **more}


def snapshot(name, num_examples, steps, **metrics):
    numbers = {"num_examples": num_examples, "size": "–", "steps": steps, "bytes": 9}
    return {"name": name, **numbers, "metrics": metrics}


COMPARISON = {
    "what": "few-shot transfer",
    "arms": {
        "naive": estimate(0.63, 0.0225, per_seed=[0.62, 0.64]),
        "known-x4": estimate(0.634, 0.02, minus_naive=estimate(0.005, 0.018, p=0.55, p_holm=1.0)),
        "oracle": estimate(0.666, 0.028, minus_naive=estimate(0.036, 0.0245, p=0.006, p_holm=None)),
    },
    "verdict": "Few-shot transfer: no arm is significantly better than the unchanged weights (naive).",
    "validity": "Few-shot transfer: oracle beats naive. The positive control passed.",
}
GATE = {
    "metric": "accuracy",
    "scores": {"Θ0": 0.81, "known, 2 steps": 0.84},
    "chosen": "known, 2 steps",
    "sentence": "The gate chose known, 2 steps: 0.840 against 0.810 of Θ0.",
}
UNTESTED = {"difference": None, "low": None, "high": None, "p_value": None}
STATE_GATE = {
    "metric": "validation loss",
    "scores": {"Θ0": 0.5, "Θ1": 0.4},
    "chosen": "Θ1",
    "sentence": "The gate chose Θ1.",
    "rule": "The rule.",
    "level": 0.05,
    "candidates": [
        {"name": "Θ0", "loss": 0.5, **UNTESTED},
        {"name": "Θ1", "loss": 0.4, "difference": -0.1, "low": -0.15, "high": -0.05, "p_value": 0.001},
        {"name": "known", "loss": None, **UNTESTED},
    ],
    "recipe": {"predictor": None, "predictor_options": None, "steps": 0, "recalibrated": False, "state": 1},
}
FIXED = {
    "title": "Enhanced checkpoint of ResNetForImageClassification",
    "base_model": None,
    "datasets": [],
    "schedule": ForgettingSchedule(num_states=3, stratify_by="labels").to_dict(),
    "states": [snapshot(f"Θ{k}", 64 >> k, 32 >> k, eval_loss=loss) for k, loss in enumerate([0.25, 0.5, 0.75])],
    "others": [snapshot(name, None, steps) for name, steps in (("start", 0), ("tail 0", 24))],
    "architecture": "ResNetForImageClassification",
    "load_with": "AutoModelForImageClassification",
    "pipeline_tag": "image-classification",
    "adapter_type": None,
    "recorded_with": {"know_hf": "0.1.0", "torch": "2.9.0"},
}
FIGURES = {"mean_residual": 0.001, "largest_residual": 0.02, "mean_ratio": 0.05, "predicted": 100}
FIGURES |= {"shrink_share": 0.5, "shrink_factor": 0.97, "extrapolation_share": 0.25, "extrapolation_factor": -0.5}
KNOWN = {"name": "known-base", "on_hub": False, "revision": None, "shipped": True, "sha256": "ab" * 32}
FIXED_CHECKPOINT = {
    **FIXED,
    "trajectory": None,
    "steps": 2,
    "predictor": {"name": "known", "module": None, "options": {}, "known": {**KNOWN, "trajectories": 72}},
    "norm": "keep",
    "dtype": None,
    "recalibrated": False,
    "has_batch_norm": True,
    "roles": [
        {"role": "conv", "tensors": 5, "parameters": 5000, "unchanged": 1, **FIGURES},
        {"role": "copied", "tensors": 18, "parameters": 150, "unchanged": 0, **FIGURES, "predicted": 0},
    ],
    "warnings": [],
    "predicted_with": {"know_hf": "0.2.0", "torch": "2.13.0"},
    "elsewhere": {"what": "few-shot", "better": [], "worse": ["a"], "neither": ["b", "c"], "unclear": ["d"]},
}
# names of models, metrics, files and arms that try to break the page
HOSTILE = (
    "a | b",
    "x\n---\nlicense: evil",
    "`` ` ``` x",
    "</code><script>alert(1)</script>",
    "[click](http://evil) ![i](http://evil)",
    "*b* _i_ ~~s~~ $$x$$ \\| &lt;",
    "# heading\n# heading",
    "{{ 7 * 7 }} {% raw %}",
    "\ud800\u202e\x00 \u2028x",
    "'\"; rm -rf ~; $(x)",
    "m" * 1000,
)


def assert_readable(text):
    """Assert that a card parses, has no missing values, and that its code and commands are valid."""
    text.encode("utf-8")
    assert str(ModelCard(text)) == text
    assert ModelCard(text).data.to_dict() == ModelCard(str(ModelCard(text))).data.to_dict()
    body = re.sub(r"^(`{3,}).*?^\1$", "code", ModelCard(text).text, flags=re.MULTILINE | re.DOTALL)
    for word in ("None", "Undefined", "nan", "Markup", "{{", "{%", "()"):
        assert word not in body
    assert not re.search(r"\n{3,}| {2,}(?!\|)|[^|] [,.;:] ", body), "blank lines, spaces"
    lines = body.splitlines()
    assert not any(
        a.startswith("#") and (not b.strip() or b.startswith("#")) for a, b in pairwise(filter(None, lines))
    )
    for block in blocks(text, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                names = know_hf.__all__ if node.module == "know_hf" else dir(import_module(node.module))
                assert {name.name for name in node.names} <= set(names)
    for block in blocks(text, "bash"):
        for command in re.findall(r"know-hf ([^\n]*)", block):
            make_parser().parse_args(shlex.split(command, comments=True))


def blocks(text, language):
    return [match[1] for match in re.findall(rf"^(`{{3,}}){language}\n(.*?)^\1$", text, re.MULTILINE | re.DOTALL)]


@pytest.fixture(scope="module")
def opened(recorded):
    return WeightTrajectory(recorded)


@pytest.fixture(scope="module")
def shipped():
    return KNOWNModel.from_pretrained(SHIPPED_KNOWN)


@pytest.fixture(scope="module")
def prediction(opened, tmp_path_factory):
    return predict_overflowed_weights(opened, steps=2, output_dir=tmp_path_factory.mktemp("enhanced") / "checkpoint")


@pytest.fixture
def card(opened, prediction, shipped):
    """Fields of the card of a real prediction."""
    return CheckpointCard.of(opened, prediction, shipped, 2)
