"""Cards with fixed numbers are equal to the files in tests/cards. `python tests/test_cards.py` writes these files."""

import ast
import json
import re
import shlex
from dataclasses import asdict
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_resnet
from doubles.simulated_report import simulated_report
from huggingface_hub import ModelCard, ModelCardData
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import know_hf
from know_hf import ForgettingSchedule, KNOWNConfig, KNOWNModel, WeightTrajectory, predict_overflowed_weights
from know_hf.cards import CheckpointCard, TrajectoryCard, checkpoint_card, known_card, trajectory_card
from know_hf.cards.base import environment, source
from know_hf.cards.evidence import recorded_comparison, recorded_gate
from know_hf.cards.suite_tables import condensed, tally
from know_hf.cli import make_parser
from know_hf.evaluation import compare_with_naive
from know_hf.markdown import code, fenced, markdown, python
from know_hf.plotting import forgetting_picture
from know_hf.prediction import SHIPPED_KNOWN
from know_hf.predictors import Shrink
from know_hf.trajectory.summary import inspect_trajectory

GOLDEN = Path(__file__).parent / "cards"


def estimate(mean, margin, **more):
    return {"mean": mean, "ci95": [mean - margin, mean + margin], **more}


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
    "states": [
        {"index": k, "num_examples": 64 >> k, "size": "", "steps": 32 >> k, "metrics": {"eval_loss": loss}, "bytes": 9}
        for k, loss in enumerate([0.25, 0.5, 0.75])
    ],
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


TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}


def tiny_bert():
    return BertForSequenceClassification(BertConfig(**TINY))


def tiny_llama():
    return LlamaForCausalLM(LlamaConfig(**TINY))


def full_card():
    full = CheckpointCard(
        **FIXED_CHECKPOINT
        | {
            "title": "Enhanced checkpoint of resnet-18",
            "repo_id": "me/resnet-know",
            "license": {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
            "base_model": source("microsoft/resnet-18", "c6ad2a1"),
            "datasets": [source("ylecun/mnist", "77f3279"), source("uoft-cs/cifar10")],
            "trajectory": source("me/resnet-trajectory", "3f2b"),
            "norm": "predict",
            "recalibrated": True,
            "warnings": ["fc: 2.00% of the weights lie outside the training data of KNOWN"],
            "picture": "forgetting.png",
            "gate": recorded_gate(GATE),
        }
    )
    full.compare(COMPARISON, "known-x4")
    return full


def golden_cards():
    roles = [
        {"role": "conv", "tensors": 5, "parameters": 5000, "moved": [0.0, 0.125, 0.25]},
        {"role": "copied", "tensors": 18, "parameters": 150, "moved": None},
    ]
    about = {"title": "Forgetting trajectory", "repo_id": "me/trajectory", "license": {"license": "mit"}}
    return {
        "checkpoint.md": CheckpointCard(**FIXED_CHECKPOINT).render(),
        "checkpoint_full.md": full_card().render(),
        "trajectory.md": TrajectoryCard(**FIXED | about, roles=roles, stored_once=0, bytes=123456).render(),
        "known.md": known_card(KNOWNConfig(hidden_size=8), title="mine", path="me/known"),
    }


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


@pytest.fixture
def results():
    return json.loads((SHIPPED_KNOWN / "results.json").read_text())


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


def text_of_known(results=None, **options):
    return str(known_card(KNOWNConfig.from_pretrained(SHIPPED_KNOWN), results, title="x", path="me/x", **options))


@pytest.mark.parametrize("name", list(golden_cards()))
def test_golden_card(name):
    text = str(golden_cards()[name])
    assert text.splitlines() == (GOLDEN / name).read_text(encoding="utf-8").splitlines()
    assert_readable(text)


def test_card_of_a_real_prediction(opened, prediction, shipped, card):
    rendered = checkpoint_card(opened, prediction, shipped, 2)
    assert_readable(str(rendered))
    tags = ["know_hf", "weight-prediction"]
    assert rendered.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": tags,
    }
    assert card.has_batch_norm and not card.recalibrated and card.warnings == prediction.warnings
    assert [row["role"] for row in card.roles] == ["bias", "conv", "copied", "fc", "norm"]
    conv = prediction.report["conv"]
    assert (card.roles[1]["mean_residual"], card.roles[1]["predicted"]) == (conv.mean_residual, conv.predicted)
    assert [state["num_examples"] for state in card.states] == [64, 32, 16, 8, 4]
    assert card.known["shipped"] and re.fullmatch("[0-9a-f]{64}", card.known["sha256"])
    assert card.predicted_with.keys() == card.recorded_with.keys()


def test_card_of_a_real_trajectory(opened):
    summary = inspect_trajectory(opened)
    rendered = trajectory_card(opened, summary, repo_id="me/trajectory", license="mit")
    assert_readable(str(rendered))
    tags = ["know_hf", "weight-trajectory"]
    assert rendered.data.to_dict() == {"library_name": "know_hf", "license": "mit", "tags": tags}
    conv = next(row for row in TrajectoryCard.of(opened, summary).roles if row["role"] == "conv")
    assert conv == {"role": "conv", "tensors": 5, "parameters": 5000, "moved": summary.displacement["conv"]}


def test_card_of_the_shipped_weights_is_up_to_date(monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(root / "recipes/meta_train")
    path = root / "model_cards/known-base.md"
    text = path.read_text(encoding="utf-8")
    assert text == import_module("card").render(), "run `python recipes/meta_train/card.py` to update the card"
    assert_readable(text)
    data = ModelCard.load(path).data
    assert (data.library_name, data.license, data.tags) == ("know_hf", "apache-2.0", ["know_hf", "weight-prediction"])


def test_known_card_shows_the_skill(results):
    text = text_of_known(results)
    assert set(results["splits"]) == {"held_out_trajectory", "held_out_architecture", "held_out_dataset"}
    for split in results["splits"].values():
        for predictor, by_role in split["skill"].items():
            cells = [
                f"{one['skill']:+.4f} ({one['trajectories_above_zero']}/{one['trajectories']})"
                for one in by_role.values()
            ]
            assert f"| {predictor} | {' | '.join(cells)} |" in text
        assert not set(results["trained_on"]) & set(split["trajectories"])
    skill = results["splits"]["held_out_dataset"]["skill"]
    skill["known"]["bias"]["skill"] = -0.25
    rivals = skill.keys() - {"known"}
    for rival in rivals:
        skill[rival]["bias"]["skill"] = 0.1 if rival == "linear" else None
    worse = "- **bias**: increases the no-change error by 25.0%"
    assert f"{worse}, and is not better than the best" in text_of_known(results)
    for rival in rivals:
        del skill[rival]
    assert f"{worse}.\n" in text_of_known(results)


def test_known_card_shows_the_training(results):
    assert "\n4000 steps of Adam, 2048 transitions of each role per step, " in text_of_known(results)
    results["train_skill"]["fc"]["skill"] = None  # nothing moved
    del results["train_skill"]["bias"]
    text = text_of_known(results | {"steps_done": 1500, "best_step": 1000})
    assert "\n1500 steps of Adam of at most 4000, 2048 transitions" in text
    assert "at step 4000, seed 0;" in text and "step 1000, the best on the validation trajectories.\n" in text
    conv = results["train_skill"]["conv"]["skill"]
    assert f"72 training trajectories: {conv:+.4f} (conv).\n" in text
    assert "training trajectories:" not in text_of_known(results | {"train_skill": {}})


def test_known_card_shows_comparisons():
    assert "Not evaluated" in text_of_known()
    reports = [condensed(simulated_report(name)) for name in ("one", "two")]
    text = text_of_known(comparisons=reports)
    assert "| few-shot | one | two |" in text and "| source (zero-shot) | one | two |" in text
    cells = [f"{100 * report['results'][0]['arms']['shrink']['minus_naive']['mean']:+.1f} " for report in reports]
    assert re.search(rf"\| shrink \| {re.escape(cells[0])}\[.*\] \| {re.escape(cells[1])}\[", text)
    assert "- `two`: Simulated. 10 trajectories, 1 downstream draw each; 2 minutes" in text
    assert "weights: known-1 in few-shot of one, " in text
    assert "published" not in text.partition("## Retrodiction")[0]


def test_card_shows_the_comparisons_of_the_shipped_weights(opened, prediction, shipped, card, tmp_path):
    suites = tally(json.loads((SHIPPED_KNOWN / "comparisons.json").read_text()), "few-shot", "known-step-2")
    assert sum(map(len, suites.values())) >= 2
    assert card.elsewhere == {"what": "few-shot", **suites}
    assert CheckpointCard.of(opened, prediction, shipped, 9).elsewhere is None, "no suite has nine steps"
    shipped.save_pretrained(tmp_path)
    other = KNOWNModel.from_pretrained(tmp_path)
    assert CheckpointCard.of(opened, prediction, other, 2).elsewhere is None, "those are other weights"


@pytest.mark.parametrize(
    ("mean", "p", "words"),
    [
        (0.02, 0.01, "are significantly better than"),
        (-0.02, 0.01, "are significantly worse than"),
        (0.02, 0.2, "do not differ significantly from"),
    ],
)
def test_verdict_of_a_comparison(card, mean, p, words):
    comparison = json.loads(json.dumps(COMPARISON))
    comparison["arms"]["known-x4"]["minus_naive"] |= {"mean": mean, "p_holm": p}
    card.compare(comparison, "known-x4")
    assert f"**These weights {words} the unchanged weights (Θ0) in few-shot transfer: {100 * mean:+.1f} points" in str(
        card.render()
    )


def test_comparison_object(opened, prediction, shipped):
    scores = {"naive": [0.6, 0.62, 0.61], "known-x4": [0.7, 0.71, 0.73], "random": [0.3, 0.2, 0.25]}
    comparison = compare_with_naive(scores, ["known-x4"], "linear probing")
    card = checkpoint_card(opened, prediction, shipped, 2, comparisons=[comparison], arm="known-x4")
    assert "These weights are significantly better" in card.text and ": +10.3 points" in card.text
    assert comparison.verdict() in card.text and comparison.validity() in card.text
    assert "| `known-x4` (these weights) | 71.3 [67.5, 75.1] | +10.3 [" in card.text
    assert card.data.eval_results[0].metric_value == 0.7133
    assert_readable(str(card))


def test_comparison_without_these_weights_gives_no_result(card):
    card.compare(COMPARISON, "known-x2")
    assert "(these weights)" not in str(card.render()) and "unknown" in card.verdict
    assert card.data().eval_results is None
    card.compare(COMPARISON, "naive")
    assert "baseline (naive)" in card.verdict


def test_incomplete_evidence_raises():
    arms = {name: arm for name, arm in COMPARISON["arms"].items() if name != "naive"}
    with pytest.raises(ValueError, match="naive"):
        recorded_comparison({**COMPARISON, "arms": arms}, "known-x4")
    with pytest.raises(ValueError, match="lacks what"):
        recorded_comparison({"arms": {}}, None)
    with pytest.raises(ValueError, match="lacks sentence"):
        recorded_gate({key: value for key, value in GATE.items() if key != "sentence"})
    with pytest.raises(ValueError, match="sentence=True"):
        recorded_gate({**GATE, "sentence": True})
    with pytest.raises(ValueError, match="'x'"):
        recorded_gate({**GATE, "chosen": "x"})


def test_card_can_be_stored_and_completed(opened, prediction, shipped):
    about = {"datasets": {"ylecun/mnist": None}, "repo_id": "me/x"}
    stored = json.dumps(asdict(CheckpointCard.of(opened, prediction, shipped, 2, **about)))
    restored = CheckpointCard(**json.loads(stored))
    restored.compare(COMPARISON, "known-x4")
    direct = checkpoint_card(opened, prediction, shipped, 2, comparisons=[COMPARISON], arm="known-x4", **about)
    assert str(restored.render()) == str(direct)


@pytest.mark.parametrize(
    ("predictor", "options", "call", "command"),
    [
        ("average", None, 'predictor="average", steps=1', "--predictor average --output-dir"),
        (
            "shrink",
            {"factor": 0.9},
            'predictor_options={"factor": 0.9}',
            """--predictor-options '{"factor": 0.9}' --""",
        ),
        (Shrink(factor=0.9), None, "predictor=Shrink(factor=0.9), steps=1", None),
    ],
)
def test_other_predictors(opened, prediction, predictor, options, call, command):
    card = checkpoint_card(opened, prediction, predictor, 1, predictor_options=options)
    assert call in card.text
    assert command is None or command in card.text
    assert ("know-hf predict" in card.text) == (command is not None)
    assert "KNOWN" not in card.text and "times the data" not in card.text
    is_average = predictor == "average"
    assert ("the average of the states" in card.text) == is_average
    assert ("predicted these weights" in card.text) == ("| steps | 1" in card.text) == (not is_average)
    assert_readable(str(card))


def test_other_known_weights(opened, prediction, tmp_path):
    KNOWNModel(KNOWNConfig()).save_pretrained(tmp_path / "private/my-known")
    known = KNOWNModel.from_pretrained(tmp_path / "private/my-known")
    text = str(checkpoint_card(opened, prediction, known, 1))
    assert re.search(r"KNOWN, `my-known` \(a local folder\), SHA-256 `[0-9a-f]{16}…` \|", text)
    assert "--known my-known" in text and 'predict_overflowed_weights(trajectory, "my-known"' in text
    assert "training data of the KNOWN weights is unknown" in text and str(tmp_path) not in text
    known.config._name_or_path = "me/known"
    text = str(checkpoint_card(opened, prediction, known, 1, known_revision="abc"))
    assert "KNOWN, [me/known](https://huggingface.co/me/known) (revision `abc`) |" in text
    assert 'known = KNOWNModel.from_pretrained("me/known", revision="abc")\n' in text
    assert_readable(text)


@pytest.mark.parametrize("changes", [{}, {"recalibrated": True, "dtype": "bfloat16", "adapter_type": "LORA"}])
def test_chosen_state_is_no_prediction(changes):
    card = CheckpointCard(**FIXED_CHECKPOINT | changes, gate=recorded_gate(STATE_GATE))
    text = str(card.render())
    assert "a recorded state, not a prediction" in text
    assert "| `Θ1` (these weights) | 0.4 | -0.1 | [-0.15, -0.05] | 0.001 |\n| `known` | not finite |  |  |  |" in text
    assert "KNOWN" not in text and "know-hf predict" not in text and "times the data" not in text
    assert "trajectory.load_model(1" in text and "predict_overflowed_weights" not in text
    assert ("recalibrate_batch_norm(model, batches)" in text) == card.recalibrated
    assert ("model.to(torch.bfloat16)" in text) == (card.dtype is not None)
    assert_readable(text)
    card.schedule = None
    assert 'WeightTrajectory("trajectory/")' in str(card.render())


def test_license_is_inherited_from_the_base_model(opened, prediction, tmp_path, monkeypatch):
    def card_of(base_model, **about):
        return checkpoint_card(opened, prediction, "average", 1, base_model=str(base_model), **about)

    folder, snapshot = tmp_path / "secret/base", tmp_path / "models--me--base/snapshots/1234"
    for path in (folder, snapshot):
        path.mkdir(parents=True)
        (path / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Base\n")
    card = card_of(folder)
    assert card.data.license == "mit" and card.data.base_model is None and "secret" not in str(card)
    assert "fine-tuned from `base` (a local folder), first" in card.text
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")
    card = card_of(folder)
    assert card.data.license is None and "license of the base model could not" in card.text
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert card_of("me/base", base_revision="1234").data.license == "mit"
    license = {"license": "other", "license_name": "mine", "license_link": "LICENSE"}
    card = card_of("me/base", base_card=ModelCardData(**license, language="en"))
    assert card.data.to_dict().items() >= license.items() and "en" not in card.data.to_dict()


@pytest.mark.parametrize(
    ("name", "shown", "on_hub"),
    [
        *((name, name, True) for name in ("bert-base-uncased", "me/model")),
        *((name, name.rpartition("/")[2], False) for name in ("me/folder", "/home/me/model", "./model", "a/b/c")),
        ("a" * 5000, "a" * 5000, False),
    ],
)
def test_source(name, shown, on_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me/folder").mkdir(parents=True)
    assert source(name, "v") == {"name": shown, "on_hub": on_hub, "revision": "v"}


@pytest.mark.parametrize(
    ("make_model", "line"),
    [
        (tiny_bert, "model = AutoModelForSequenceClassification.from_pretrained"),
        (tiny_llama, "model = AutoModelForCausalLM.from_pretrained"),
        (lambda: torch.nn.Linear(3, 2), 'load_file("enhanced/model.safetensors")'),
    ],
    ids=["bert", "llama", "module"],
)
def test_loading_code_runs(record_states, tmp_path, shipped, make_model, line):
    trajectory = record_states(make_model())
    result = predict_overflowed_weights(trajectory, steps=1, output_dir=tmp_path / "enhanced")
    card = checkpoint_card(trajectory, result, shipped, 1)
    assert line in card.text and "BatchNorm" not in card.text
    assert "| schedule | not recorded; 5 states |" in card.text
    assert "The states were not evaluated" in card.text
    assert_readable(str(card))
    assert_readable(str(trajectory_card(trajectory)))
    if "AutoModel" in line:
        namespace = {}
        exec(blocks(str(card), "python")[0].replace('"enhanced/"', repr(str(tmp_path / "enhanced"))), namespace)
        assert type(namespace["model"]) is type(make_model())


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"load_with": None}, "model = ResNetForImageClassification.from_pretrained("),
        ({"load_with": None, "architecture": None, "repo_id": "me/x"}, 'hf_hub_download("me/x", "model.safetensors")'),
        ({"norm": "predict", "dtype": "bfloat16"}, 'steps=2, norm="predict", dtype=torch.bfloat16, output_dir='),
        ({"norm": "predict", "dtype": "bfloat16"}, "--steps 2 --norm predict --dtype bfloat16 --output-dir"),
    ],
)
def test_code_of_fixed_fields(changes, line):
    text = str(CheckpointCard(**FIXED_CHECKPOINT | changes).render())
    assert line in text
    assert_readable(text)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_card_of_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    tiny_bert().save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    trajectory = WeightTrajectory.create(tmp_path / "trajectory")
    for state in range(5):
        trajectory.record(adapted, num_examples=64 >> state, steps=1)
        with torch.no_grad():
            adapted.base_model.model.classifier.modules_to_save["default"].weight += 0.01
    result = predict_overflowed_weights(trajectory, steps=1, predictor="average", output_dir=tmp_path / "enhanced")

    local = checkpoint_card(trajectory, result, "average", 1)
    assert local.data.library_name == "peft" and "lora" in local.data.tags and local.data.base_model is None
    assert "# base_model: the model that the adapter was trained on\nmodel = PeftModel.from_pretrained(" in local.text
    card = checkpoint_card(trajectory, result, "average", 1, base_model="google-bert/bert-base-uncased")
    assert card.data.base_model_relation == "adapter" and card.data.pipeline_tag == "text-classification"
    assert 'AutoModelForSequenceClassification.from_pretrained("google-bert/bert-base-uncased")' in card.text
    assert "adapter (LORA)" in card.text
    opened = trajectory_card(trajectory)
    assert "trajectory.load_model(4, base_model=base_model)" in opened.text
    for each in (local, card, opened):
        assert_readable(str(each))


def test_card_shows_the_arguments_of_the_recording(trajectory_copy, prediction, shipped):
    record = {"task": "image-classification", "model": "microsoft/resnet-18", "dataset": "ylecun/mnist"}
    record |= {"output_dir": "/home/me/out", "model_revision": "v1", "dataset_revision": "v2", "epochs": 2.0}
    (trajectory_copy.parent / "record.json").write_text(json.dumps(record))
    card = checkpoint_card(WeightTrajectory(trajectory_copy), prediction, shipped, 2, base_model="microsoft/resnet-18")
    assert card.data.base_model == "microsoft/resnet-18" and card.data.datasets == ["ylecun/mnist"]
    assert "(revision `v1`)" in card.text and "(revision `v2`)" in card.text
    assert "/home/me" not in str(card)
    (block,) = blocks(str(card), "yaml")
    assert yaml.safe_load(block) == {k: v for k, v in record.items() if k != "output_dir"}
    assert "know-hf record --output-dir recording --config record.yaml\n" in card.text
    assert "know-hf predict recording/trajectory --steps 2" in card.text
    assert "induce_forgetting" not in card.text
    assert_readable(str(card))

    (trajectory_copy.parent / "record.json").write_text('{"of": "something else"}')
    assert checkpoint_card(WeightTrajectory(trajectory_copy), prediction, shipped, 2).data.datasets is None


def test_unknown_keys_and_invalid_ids_raise(opened):
    with pytest.raises(ValueError, match=r"'dataset'.*'datasets'"):
        trajectory_card(opened, dataset={"ylecun/mnist": None})
    with pytest.raises(ValueError, match="me/x/y"):
        trajectory_card(opened, repo_id="me/x/y")


def test_states(card):
    card.warnings = []
    card.states[0] |= {"num_examples": None, "size": "the entire stream", "steps": 0}
    for loss, forgot_nothing in ((0.5, False), (2.0, True)):
        card.states[0]["metrics"]["eval_loss"], card.states[-1]["metrics"]["eval_loss"] = loss, 1.0
        assert ("did not forget" in str(card.render())) == forgot_nothing
    text = str(card.render())
    assert "| Θ0 | the entire stream | 0 |" in text
    assert "15 optimizer steps on the smaller subsets. Θ0 is a given checkpoint" in text
    assert_readable(text)


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_do_not_change_a_card(name):
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark").enable("table").enable("strikethrough")

    def structure(text):
        tokens = parser.parse(ModelCard(text).text)
        inline = [child for token in tokens if token.type == "inline" for child in token.children]
        html = {token.content for token in inline if token.type == "html_inline"}
        assert html <= {"<code>", "</code>"}
        links = [token.attrs["href"] for token in inline if token.type == "link_open"]
        assert all(re.fullmatch(r"[\w.%/~-]+", token.attrs["src"]) for token in inline if token.type == "image")
        marks = [token.type for token in inline if token.type in ("strong_open", "em_open", "s_open", "hardbreak")]
        assert not any("$$" in token.content.replace("\\$", "") for token in inline if token.type != "text")
        return [(token.type, token.tag, token.level) for token in tokens], links, marks

    def render(name):
        arms = {**COMPARISON["arms"], name: COMPARISON["arms"]["oracle"]}
        hostile = {"title": name, "base_model": source(f"{name}/./", name), "datasets": [source(f"{name}/./", name)]}
        hostile |= {"license": {"license": name}, "recorded_with": {name: name}, "picture": name}
        hostile |= {"adapter_type": name, "architecture": name, "schedule": {**FIXED["schedule"], "key_column": name}}
        hostile["states"] = [{**state, "metrics": {name: 1.0}} for state in FIXED["states"]]
        card = CheckpointCard(
            **FIXED_CHECKPOINT
            | hostile
            | {
                "predictor": {"name": name, "module": None, "options": {"x": name}, "known": None},
                "record_arguments": {"task": name, "model": name},
                "warnings": [name],
                "gate": {"metric": name, "scores": {name: 1.0}, "chosen": name, "sentence": name},
            }
        )
        comparison = {"what": name, "arms": arms, "verdict": name, "validity": name, "dataset": name}
        card.compare(comparison, name)
        opened = TrajectoryCard(**FIXED | hostile, roles=[], stored_once=0, bytes=0)
        about = {"title": name, "path": f"{name}/./", "description": name, "limits": [name], "commands": name}
        return str(card.render()), str(opened.render()), str(known_card(KNOWNConfig(), **about))

    for hostile, harmless in zip(render(name), render("x"), strict=True):
        hostile.encode("utf-8")
        assert str(ModelCard(hostile)) == hostile
        assert ModelCard(hostile).data.to_dict().keys() == ModelCard(harmless).data.to_dict().keys()
        assert structure(hostile) == structure(harmless)


@pytest.mark.parametrize("name", ["", *HOSTILE], ids=range(len(HOSTILE) + 1))
def test_code_of_any_name(name):
    namespace = {}
    exec(f"value = {python(name)}", namespace)
    assert namespace["value"] == name
    block = fenced(f"x\n{name}", "text")
    fence = re.match("`{3,}", block)[0]
    assert sum(line.lstrip().startswith(fence) for line in block.splitlines()) == 2


def test_values_in_markdown():
    text = "p = 0.05, [-1.8, +2.3] (eval_accuracy): Θ0 × 2 – 5% of 'a'"
    assert markdown(text) == text and code("model.layers.0.weight") == "`model.layers.0.weight`"
    assert markdown(code("a")) == "`a`" and markdown("-1.5") == "-1.5" and markdown("- a") == "&#45; a"
    with pytest.raises(ValueError, match="None"):
        environment().from_string("{{ x }}").render(x=None)
    with pytest.raises(Exception, match="'y' is undefined"):
        environment().from_string("{{ y }}").render(x=None)


def test_forgetting_picture(opened, record_states):
    pytest.importorskip("matplotlib")
    assert forgetting_picture(opened).axes[0].get_ylabel() == "loss on the evaluation split"
    assert forgetting_picture(record_states(make_resnet())) is None


if __name__ == "__main__":
    for golden_name, golden_card in golden_cards().items():
        golden_card.save(GOLDEN / golden_name)
