"""Evidence in cards: comparisons, gates and how the checkpoint can be made again."""

import json
import re
from dataclasses import asdict

import pytest
from doubles.card_fields import COMPARISON, FIXED_CHECKPOINT, GATE, STATE_GATE, assert_readable

from know_hf import KNOWNConfig, KNOWNModel
from know_hf.cards import CheckpointCard, checkpoint_card
from know_hf.cards.evidence import recorded_comparison, recorded_gate
from know_hf.cards.suite_tables import tally
from know_hf.evaluation import compare_with_naive
from know_hf.prediction import SHIPPED_KNOWN
from know_hf.predictors import Shrink


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
    assert "The weights are those of Θ1, a recorded state, not a prediction" in text
    assert "| `Θ1` (these weights) | 0.4 | -0.1 | [-0.15, -0.05] | 0.001 |\n| `known` | not finite |  |  |  |" in text
    assert "KNOWN" not in text and "know-hf predict" not in text and "times the data" not in text
    assert "trajectory.load_model(1" in text and "predict_overflowed_weights" not in text
    assert ("recalibrate_batch_norm(model, batches)" in text) == card.recalibrated
    assert ("model.to(torch.bfloat16)" in text) == (card.dtype is not None)
    assert_readable(text)
    card.schedule = None
    assert 'WeightTrajectory("trajectory/")' in str(card.render())
