"""Cards are compared whole with the patterns in tests/cards: expected text in which `<n>` stands for a number, `<v>`
for a version, `<sha>` for hexadecimal digits and `<suites>` for names of suites."""

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
from conftest import make_resnet
from doubles.simulated_report import simulated_report
from huggingface_hub import ModelCard, ModelCardData
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import know_hf
from know_hf import KNOWNConfig, KNOWNModel, WeightTrajectory, predict_overflowed_weights
from know_hf.cards import CheckpointCard, TrajectoryCard, checkpoint_card, known_card, trajectory_card
from know_hf.cards.base import environment
from know_hf.cards.provenance import source
from know_hf.cards.suite_tables import condensed, tally
from know_hf.cli import make_parser
from know_hf.markdown import code, fenced, markdown, python
from know_hf.plotting import forgetting_picture
from know_hf.prediction import SHIPPED_KNOWN
from know_hf.predictors import Shrink
from know_hf.trajectory.summary import inspect_trajectory

PATTERNS = Path(__file__).parent / "cards"
PLACEHOLDERS = {
    "<n>": r"[+-]?\d[\d,]*(\.\d+)?(e[+-]\d+)?",
    "<v>": r"\d[\w.+]*",
    "<sha>": "[0-9a-f]+",
    "<suites>": r"[\w:, -]+",
}
COMPARISON = {
    "what": "few-shot transfer",
    "arms": {
        "naive": {"mean": 0.63, "ci95": [0.607, 0.652], "per_seed": [0.62, 0.64]},
        "known-x4": {
            "mean": 0.634,
            "ci95": [0.614, 0.655],
            "per_seed": [0.63, 0.638],
            "minus_naive": {"mean": 0.005, "ci95": [-0.013, 0.023], "p": 0.55, "p_holm": 1.0},
        },
        "oracle": {
            "mean": 0.666,
            "ci95": [0.638, 0.694],
            "per_seed": [0.66, 0.672],
            "minus_naive": {"mean": 0.036, "ci95": [0.012, 0.061], "p": 0.006, "p_holm": None},
        },
    },
    "verdict": "In few-shot transfer, none of known-x4 is significantly better than naive.",
    "validity": "In few-shot transfer, oracle beats naive: a gain could have shown.",
}
GATE = {
    "metric": "accuracy",
    "scores": {"Θ0": 0.81, "known, 2 steps": 0.84},
    "chosen": "known, 2 steps",
    "sentence": "The gate kept known, 2 steps: 0.840 against 0.810 of Θ0.",
}
# What a stranger may call a model, a metric, a file or an arm.
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


@pytest.fixture
def prediction(trajectory, tmp_path):
    return predict_overflowed_weights(trajectory, steps=2, output_dir=tmp_path / "enhanced")


@pytest.fixture
def shipped():
    return KNOWNModel.from_pretrained(SHIPPED_KNOWN)


def check(card, name):
    """The card is the pattern, and its front matter survives being written and read."""
    path = PATTERNS / name
    pattern = re.escape(path.read_text(encoding="utf-8").rstrip("\n"))
    for placeholder, expression in PLACEHOLDERS.items():
        pattern = pattern.replace(re.escape(placeholder), expression)
    for expected, found in zip(pattern.split("\\\n"), str(card).rstrip("\n").split("\n"), strict=False):
        assert re.fullmatch(expected, found), f"{path.name} has\n{expected}\nthe card\n{found}"
    assert re.fullmatch(pattern, str(card).rstrip("\n"))
    check_readable(str(card))


def check_readable(text):
    """What holds for every card: it parses, shows no holes, and its code is code."""
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
                module = import_module(node.module)
                names = know_hf.__all__ if node.module == "know_hf" else dir(module)
                assert {name.name for name in node.names} <= set(names)
    for block in blocks(text, "bash"):
        for command in re.findall(r"know-hf ([^\n]*)", block):
            make_parser().parse_args(shlex.split(command, comments=True))


def blocks(text, language):
    return [found[1] for found in re.findall(rf"^(`{{3,}}){language}\n(.*?)^\1$", text, re.MULTILINE | re.DOTALL)]


def test_the_card_of_a_checkpoint_of_which_little_is_known(trajectory, prediction, shipped):
    card = checkpoint_card(trajectory, prediction, shipped, 2)
    check(card, "checkpoint.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["know_hf", "weight-prediction"],
    }


def test_the_card_of_a_checkpoint_of_which_all_is_known(trajectory, tmp_path, shipped, batches_of_images):
    result = predict_overflowed_weights(
        trajectory, steps=2, norm="predict", recalibrate_with=batches_of_images, output_dir=tmp_path / "enhanced"
    )
    result.warnings[:] = ["fc: 2.00% of the weights lie outside of what KNOWN was trained on"]
    card = checkpoint_card(
        trajectory,
        result,
        shipped,
        2,
        norm="predict",
        recalibrated=True,
        comparisons=[COMPARISON],
        arm="known-x4",
        gate=GATE,
        repo_id="me/resnet-know",
        base_model="microsoft/resnet-18",
        base_revision="c6ad2a1",
        base_card=ModelCardData(license="other", license_name="mine", license_link="LICENSE", language="en"),
        datasets={"ylecun/mnist": "77f3279", "uoft-cs/cifar10": None},
        trajectory_id="me/resnet-trajectory",
        trajectory_revision="3f2b",
        picture="forgetting.png",
    )
    check(card, "checkpoint_full.md")
    assert card.data.to_dict() == {
        "base_model": "microsoft/resnet-18",
        "base_model_relation": "finetune",
        "datasets": ["ylecun/mnist", "uoft-cs/cifar10"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "mine",
        "license_link": "LICENSE",
        "pipeline_tag": "image-classification",
        "tags": ["know_hf", "weight-prediction"],
        "model-index": [
            {
                "name": "me/resnet-know",
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": "few-shot transfer", "type": "few-shot-transfer"},
                        "metrics": [{"type": "accuracy", "value": 0.634, "name": "Accuracy, mean over 2 seeds"}],
                    },
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": "the data that the gate chose by", "type": "validation"},
                        "metrics": [{"type": "accuracy", "value": 0.84, "name": "accuracy"}],
                    },
                ],
            }
        ],
    }


def test_the_card_of_a_trajectory(trajectory):
    card = trajectory_card(trajectory, inspect_trajectory(trajectory), repo_id="me/trajectory", license="mit")
    check(card, "trajectory.md")
    assert card.data.to_dict() == {
        "library_name": "know_hf",
        "license": "mit",
        "tags": ["know_hf", "weight-trajectory"],
    }


def test_the_card_of_known_weights_of_which_nothing_is_known():
    check(known_card(KNOWNConfig(hidden_size=8), title="mine", path="me/known"), "known.md")


def test_the_card_of_the_shipped_weights_is_up_to_date(card_recipe):
    path = card_recipe.ROOT / "model_cards/known-base.md"
    assert path.read_text(encoding="utf-8") == card_recipe.render(), (
        "run `python recipes/meta_train/card.py` to render model_cards/known-base.md again"
    )
    check_readable(path.read_text(encoding="utf-8"))
    data = ModelCard.load(path).data
    assert (data.library_name, data.license, data.tags) == ("know_hf", "apache-2.0", ["know_hf", "weight-prediction"])


def test_the_known_card_says_what_was_measured(results):
    text = str(known_card(KNOWNConfig.from_pretrained(SHIPPED_KNOWN), results, title="x", path="me/x"))
    assert set(results["splits"]) == {"held_out_trajectory", "held_out_architecture", "held_out_dataset"}
    for split in results["splits"].values():
        for predictor, by_role in split["skill"].items():
            cells = [
                f"{one['skill']:+.4f} ({one['trajectories_above_zero']}/{one['trajectories']})"
                for one in by_role.values()
            ]
            assert f"| {predictor} | {' | '.join(cells)} |" in text
        assert not set(results["trained_on"]) & set(split["trajectories"])
    assert "MNIST" not in text, "what these weights were trained on is for the caller to say"


def test_the_known_card_says_when_the_training_ended_early(results):
    def text():
        return str(known_card(KNOWNConfig.from_pretrained(SHIPPED_KNOWN), results, title="x", path="me/x"))

    assert "\n4000 steps of Adam, 2048 transitions of each role a step, " in text()
    results |= {"steps_done": 1500, "best_step": 1000}
    assert "\n1500 steps of Adam, of 4000 at most, 2048 transitions of each role a step, " in text()
    assert "with a cosine to zero at step 4000, seed 0;" in text()
    assert "The weights are those of step 1000, the best on the validation trajectories.\n" in text()


def test_the_known_card_of_weights_that_were_not_trained_on_all_roles(results):
    results["train_skill"]["fc"]["skill"] = None  # nothing moved
    del results["train_skill"]["bias"]
    conv = results["train_skill"]["conv"]["skill"]
    text = str(known_card(KNOWNConfig.from_pretrained(SHIPPED_KNOWN), results, title="x", path="me/x"))
    assert f"it was trained on, its skill is {conv:+.4f} (conv).\n\nA skill above 0 says" in text
    results["train_skill"] = {}
    text = str(known_card(KNOWNConfig.from_pretrained(SHIPPED_KNOWN), results, title="x", path="me/x"))
    assert "its skill is" not in text.partition("## Does it help")[0]


def test_the_known_card_says_what_was_compared():
    config = KNOWNConfig.from_pretrained(SHIPPED_KNOWN)
    assert "Not known: no comparison was given" in str(known_card(config, title="x", path="me/x"))
    reports = [condensed(simulated_report(name)) for name in ("one", "two")]
    text = str(known_card(config, title="x", path="me/x", comparisons=reports))
    assert "| few-shot | one | two |" in text and "| source (zero-shot) | one | two |" in text
    cells = [f"{100 * report['results'][0]['arms']['shrink']['minus_naive']['mean']:+.1f} " for report in reports]
    assert re.search(rf"\| shrink \| {re.escape(cells[0])}\[.*\] \| {re.escape(cells[1])}\[", text)
    assert "- `two`: Simulated. 10 trajectories, 1 downstream draw of each; 2 minutes of one process." in text
    assert "for the number of methods): known-1 in few-shot of one, " in text
    assert "published" not in text.partition("## What it was")[0]


def test_the_card_says_what_the_shipped_weights_did_elsewhere(trajectory, prediction, shipped, tmp_path):
    card = CheckpointCard.of(trajectory, prediction, shipped, 2)
    found = tally(json.loads((SHIPPED_KNOWN / "comparisons.json").read_text()), "few-shot", "known-step-2")
    assert sum(map(len, found.values())) >= 2
    assert card.elsewhere == {"what": "few-shot", **found}
    text = str(card.render())
    assert f"No difference shown: {', '.join(found['neither']) or 'in none'}." in text
    assert f"twice the data did not clearly help either: {', '.join(found['unclear'])}.\n\n" in text
    assert CheckpointCard.of(trajectory, prediction, shipped, 9).elsewhere is None, "no suite has nine steps"
    shipped.save_pretrained(tmp_path)
    other = KNOWNModel.from_pretrained(tmp_path)
    assert CheckpointCard.of(trajectory, prediction, other, 2).elsewhere is None, "those are other weights"


def test_the_known_card_tells_a_loss_as_a_loss(results):
    skill = results["splits"]["held_out_dataset"]["skill"]
    skill["known"]["bias"]["skill"] = -0.25
    for rival in skill.keys() - {"known"}:
        skill[rival]["bias"]["skill"] = None
    skill["linear"]["bias"]["skill"] = 0.1
    text = str(known_card(KNOWNConfig.from_pretrained(SHIPPED_KNOWN), results, title="x", path="me/x"))
    assert "- **bias**: worse than no change by 25.0% of its error, and not better than the best" in text
    assert "(linear, +0.1000)" in text


@pytest.mark.parametrize(
    ("mean", "p", "found"),
    [(0.02, 0.01, "better than Θ0"), (-0.02, 0.01, "worse than Θ0"), (0.02, 0.2, "not shown to differ from Θ0")],
)
def test_the_card_says_whether_it_helped(trajectory, prediction, shipped, mean, p, found):
    comparison = json.loads(json.dumps(COMPARISON))
    comparison["arms"]["known-x4"]["minus_naive"] |= {"mean": mean, "p_holm": p}
    text = str(checkpoint_card(trajectory, prediction, shipped, 2, comparisons=[comparison], arm="known-x4"))
    assert f"**In few-shot transfer, these weights (arm known-x4) are {found}: {100 * mean:+.1f} points" in text
    assert "No comparison was run" not in text


def test_a_comparison_as_it_is_run_can_be_given(trajectory, prediction, shipped):
    pytest.importorskip("scipy")
    from know_hf.evaluation import compare_with_naive

    scores = {"naive": [0.6, 0.62, 0.61], "known-x4": [0.7, 0.71, 0.73], "random": [0.3, 0.2, 0.25]}
    comparison = compare_with_naive(scores, ["known-x4"], "linear probing")
    card = checkpoint_card(trajectory, prediction, shipped, 2, comparisons=[comparison], arm="known-x4")
    assert "these weights (arm known-x4) are better than Θ0: +10.3 points" in card.text
    assert comparison.verdict() in card.text and comparison.validity() in card.text
    assert "| `known-x4` (these weights) | 71.3 | [67.5, 75.1] | +10.3 |" in card.text
    assert card.data.eval_results[0].metric_value == 0.7133
    check_readable(str(card))


def test_of_a_comparison_without_these_weights_no_result_is_claimed(trajectory, prediction, shipped):
    card = checkpoint_card(trajectory, prediction, shipped, 1, comparisons=[COMPARISON], arm="known-x2")
    assert "(these weights)" not in card.text and "**In few-shot transfer" not in card.text
    assert card.data.eval_results is None


def test_a_comparison_that_can_not_be_shown_is_refused(trajectory, prediction, shipped):
    with pytest.raises(ValueError, match="no arms"):
        checkpoint_card(trajectory, prediction, shipped, 1, comparisons=[{"what": "x"}])
    with pytest.raises(ValueError, match="no arm naive, only oracle"):
        arms = {"oracle": COMPARISON["arms"]["oracle"]}
        checkpoint_card(trajectory, prediction, shipped, 1, comparisons=[{"what": "x", "arms": arms}])
    with pytest.raises(ValueError, match="chose 'x', which is not among"):
        checkpoint_card(trajectory, prediction, shipped, 1, gate={**GATE, "chosen": "x"})


def test_a_card_can_be_kept_and_filled_later(trajectory, prediction, shipped):
    card = CheckpointCard.of(trajectory, prediction, shipped, 2, datasets={"ylecun/mnist": None}, repo_id="me/x")
    kept = CheckpointCard(**json.loads(json.dumps(asdict(card))))
    assert kept == card
    assert "No comparison was run" in str(kept.render())
    kept.compare(COMPARISON, "known-x4")
    assert str(kept.render()) == str(
        checkpoint_card(
            trajectory,
            prediction,
            shipped,
            2,
            datasets={"ylecun/mnist": None},
            repo_id="me/x",
            comparisons=[COMPARISON],
            arm="known-x4",
        )
    )


@pytest.mark.parametrize(
    ("predictor", "options", "call", "command"),
    [
        ("average", None, 'predictor="average", steps=1', "--predictor average --output-dir"),
        (
            "shrink",
            {"factor": 0.9},
            'predictor="shrink", predictor_options={"factor": 0.9}',
            """--predictor shrink --predictor-options '{"factor": 0.9}' --output-dir""",
        ),
        (Shrink(factor=0.9), None, "predictor=Shrink(factor=0.9), steps=1", None),
    ],
)
def test_another_predictor_is_named_with_its_options(trajectory, prediction, predictor, options, call, command):
    card = checkpoint_card(trajectory, prediction, predictor, 1, predictor_options=options)
    assert call in card.text
    assert command is None or command in card.text
    assert ("know-hf predict" in card.text) == (command is not None)
    assert "KNOWN" not in card.text and "times the data" not in card.text
    check_readable(str(card))


def test_known_weights_of_ones_own_are_told_by_their_name_and_hash(trajectory, prediction, tmp_path):
    KNOWNModel(KNOWNConfig()).save_pretrained(tmp_path / "private/my-known")
    known = KNOWNModel.from_pretrained(tmp_path / "private/my-known")
    text = str(checkpoint_card(trajectory, prediction, known, 1))
    assert re.search(r"KNOWN, `my-known` \(a local folder\), SHA-256 `[0-9a-f]{16}…` \|", text)
    assert "--known my-known" in text and 'predict_overflowed_weights(trajectory, "my-known"' in text
    assert "The KNOWN weights do not say what they were trained on." in text
    assert str(tmp_path) not in text


def test_known_weights_of_the_hub_are_told_with_their_revision(trajectory, prediction, shipped):
    shipped.config._name_or_path = "me/known"
    text = str(checkpoint_card(trajectory, prediction, shipped, 1, known_revision="abc"))
    assert "KNOWN, [me/known](https://huggingface.co/me/known) (revision `abc`), meta-trained on" in text
    assert 'known = KNOWNModel.from_pretrained("me/known", revision="abc")\n' in text
    check_readable(text)


def test_the_folder_of_a_local_base_model_is_not_told_and_its_license_is_inherited(trajectory, prediction, tmp_path):
    folder = tmp_path / "secret/base"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Base\n")
    card = checkpoint_card(trajectory, prediction, "average", 1, base_model=str(folder))
    assert card.data.license == "mit" and card.data.base_model is None and "secret" not in str(card)
    assert "fine-tuned from `base` (a local folder), changed" in card.text
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")
    card = checkpoint_card(trajectory, prediction, "average", 1, base_model=str(folder))
    assert card.data.license is None and "The license of the base model was not known" in card.text


def test_the_license_is_inherited_from_the_cache(trajectory, prediction, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--me--base/snapshots/1234"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Base\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    card = checkpoint_card(trajectory, prediction, "average", 1, base_model="me/base", base_revision="1234")
    assert card.data.license == "cc-by-4.0"


@pytest.mark.parametrize(
    ("name", "told", "on_hub"),
    [
        ("bert-base-uncased", "bert-base-uncased", True),
        ("me/model", "me/model", True),
        ("/home/me/model", "model", False),
        ("./model", "model", False),
        ("a/b/c", "c", False),
        ("a" * 5000, "a" * 5000, False),
    ],
)
def test_what_can_be_on_the_hub(name, told, on_hub):
    assert source(name, "v") == {"name": told, "on_hub": on_hub, "revision": "v"}


def test_a_folder_of_the_name_of_a_repo_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "me/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert source("me/model") == {"name": "model", "on_hub": False, "revision": None}


@pytest.mark.parametrize(
    ("make_model", "line"),
    [
        (
            lambda: BertForSequenceClassification(
                BertConfig(
                    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=16
                )
            ),
            "model = AutoModelForSequenceClassification.from_pretrained",
        ),
        (
            lambda: LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=16
                )
            ),
            "model = AutoModelForCausalLM.from_pretrained",
        ),
        (lambda: torch.nn.Linear(3, 2), 'load_file("enhanced/model.safetensors")'),
    ],
    ids=["bert", "llama", "module"],
)
def test_the_card_loads_any_model(record_states, tmp_path, make_model, line):
    trajectory = record_states(make_model())
    result = predict_overflowed_weights(trajectory, steps=1, output_dir=tmp_path / "enhanced")
    card = checkpoint_card(trajectory, result, KNOWNModel.from_pretrained(SHIPPED_KNOWN), 1)
    assert line in card.text and "BatchNorm" not in card.text
    assert "| schedule | not recorded; 5 states |" in card.text
    assert "The states were not evaluated" in card.text
    check_readable(str(card))
    check_readable(str(trajectory_card(trajectory)))
    if "AutoModel" in line:
        namespace = {}
        exec(blocks(str(card), "python")[0].replace('"enhanced/"', repr(str(tmp_path / "enhanced"))), namespace)
        assert type(namespace["model"]) is type(make_model())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_the_card_of_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    model = BertForSequenceClassification(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=16)
    )
    model.save_pretrained(tmp_path / "base")
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
    assert "They are the weights of an adapter (LORA)." in card.text
    opened = trajectory_card(trajectory)
    assert "trajectory.load_model(4, base_model=base_model)" in opened.text
    for each in (local, card, opened):
        check_readable(str(each))


def test_what_know_hf_record_was_told_is_in_the_card(trajectory_copy, prediction, shipped):
    told = {"task": "image-classification", "model": "microsoft/resnet-18", "dataset": "ylecun/mnist"}
    record = {**told, "output_dir": "/home/me/out", "model_revision": "v1", "dataset_revision": "v2", "epochs": 2.0}
    (trajectory_copy.parent / "record.json").write_text(json.dumps(record))
    card = checkpoint_card(WeightTrajectory(trajectory_copy), prediction, shipped, 2, base_model="microsoft/resnet-18")
    assert card.data.base_model == "microsoft/resnet-18" and card.data.datasets == ["ylecun/mnist"]
    assert "(revision `v1`)" in card.text and "(revision `v2`)" in card.text
    assert "/home/me" not in str(card)
    yaml = pytest.importorskip("yaml")
    (block,) = blocks(str(card), "yaml")
    assert yaml.safe_load(block) == {k: v for k, v in record.items() if k != "output_dir"}
    assert "know-hf record --output-dir recording --config record.yaml\n" in card.text
    assert "know-hf predict recording/trajectory --steps 2" in card.text
    assert "induce_forgetting" not in card.text
    check_readable(str(card))

    (trajectory_copy.parent / "record.json").write_text('{"of": "something else"}')
    assert checkpoint_card(WeightTrajectory(trajectory_copy), prediction, shipped, 2).data.datasets is None


def test_what_a_card_does_not_know_is_refused(trajectory):
    with pytest.raises(ValueError, match="unknown key 'dataset'; did you mean 'datasets'"):
        trajectory_card(trajectory, dataset={"ylecun/mnist": None})
    with pytest.raises(ValueError, match="me/x/y"):
        trajectory_card(trajectory, repo_id="me/x/y")


def test_a_stream_has_no_number_of_examples(trajectory, prediction, shipped):
    card = CheckpointCard.of(trajectory, prediction, shipped, 1)
    card.states[0] |= {"num_examples": None, "size": "the whole stream"}
    assert "| Θ0 | the whole stream | 32 |" in str(card.render())


def test_a_state_that_was_taken_as_it_was_has_no_training_to_count(trajectory, prediction, shipped):
    card = CheckpointCard.of(trajectory, prediction, shipped, 1)
    card.states[0]["steps"] = 0
    text = str(card.render())
    assert "The recording took 15 optimizer steps on the smaller subsets. Θ0 was taken as it was;" in text


def test_the_card_says_when_nothing_was_forgotten(trajectory, prediction, shipped):
    card = CheckpointCard.of(trajectory, prediction, shipped, 1)
    for loss, told in ((0.5, False), (2.0, True)):
        card.states[0]["metrics"]["eval_loss"], card.states[-1]["metrics"]["eval_loss"] = loss, 1.0
        assert ("trained the model on rather than making it forget" in str(card.render())) == told


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_breaks_a_card(trajectory, prediction, shipped, name):
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
        comparison = {"what": name, "arms": arms, "verdict": name, "validity": name, "dataset": name}
        about = {"title": name, "base_model": f"{name}/./", "datasets": {f"{name}/./": name}, "license": name}
        card = CheckpointCard.of(trajectory, prediction, "average", 1, **about)
        card.compare(comparison, name)
        card.gate = {"metric": name, "scores": {name: 1.0}, "chosen": name, "sentence": name}
        card.warnings = [name]
        card.base_model["revision"] = name
        card.schedule["stratify_by"] = name
        card.predictor |= {"name": name, "options": {"x": name}}
        card.recorded_with = {name: name}
        card.record_arguments = {"task": name, "model": name}
        card.adapter_type = card.architecture = name
        card.picture = name
        for state in card.states:
            state["metrics"] = {name: 1.0}
        opened = TrajectoryCard.of(trajectory, **about)
        opened.schedule["key_column"] = name
        known = known_card(
            KNOWNConfig(), title=name, path=f"{name}/./", description=name, limits=[name], commands=name
        )
        return str(card.render()), str(opened.render()), str(known)

    for hostile, harmless in zip(render(name), render("x"), strict=True):
        hostile.encode("utf-8")
        assert str(ModelCard(hostile)) == hostile
        assert ModelCard(hostile).data.to_dict().keys() == ModelCard(harmless).data.to_dict().keys()
        assert structure(hostile) == structure(harmless)


@pytest.mark.parametrize("name", ["", *HOSTILE], ids=range(len(HOSTILE) + 1))
def test_code_of_any_name_is_code(name):
    namespace = {}
    exec(f"value = {python(name)}", namespace)
    assert namespace["value"] == name
    block = fenced(f"x\n{name}", "text")
    fence = re.match("`{3,}", block)[0]
    assert sum(line.lstrip().startswith(fence) for line in block.splitlines()) == 2


def test_ordinary_text_is_left_as_it_is():
    text = "p = 0.05, [-1.8, +2.3] (eval_accuracy): Θ0 × 2 – 5% of 'a'"
    assert markdown(text) == text
    assert code("model.layers.0.weight") == "`model.layers.0.weight`"
    assert markdown(code("a")) == "`a`"
    assert markdown("-1.5") == "-1.5" and markdown("- a") == "&#45; a"


def test_a_hole_in_a_card_is_an_error():
    with pytest.raises(ValueError, match="None"):
        environment().from_string("{{ x }}").render(x=None)
    with pytest.raises(Exception, match="'y' is undefined"):
        environment().from_string("{{ y }}").render(x=None)


def test_the_picture_is_of_the_metric_that_all_states_have(trajectory, record_states):
    pytest.importorskip("matplotlib")
    assert forgetting_picture(trajectory).axes[0].get_ylabel() == "loss on the evaluation split"
    assert forgetting_picture(record_states(make_resnet())) is None


@pytest.fixture
def batches_of_images():
    return [{"pixel_values": torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))}]


@pytest.fixture
def results():
    return json.loads((SHIPPED_KNOWN / "results.json").read_text())


@pytest.fixture
def card_recipe(monkeypatch):
    root = Path(__file__).parent.parent
    monkeypatch.syspath_prepend(root / "recipes/meta_train")
    recipe = import_module("card")
    recipe.ROOT = root
    return recipe
