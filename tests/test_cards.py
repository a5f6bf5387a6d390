import json
from pathlib import Path

from huggingface_hub import ModelCard

from know_hf.cards import known_card
from know_hf.prediction import SHIPPED_KNOWN

CARD = Path(__file__).parent.parent / "model_cards/known-base.md"


def rendered():
    results = json.loads((SHIPPED_KNOWN / "results.json").read_text())
    trained_on = json.loads((SHIPPED_KNOWN / "config.json").read_text())["trained_on"]
    return known_card(results, trained_on, name="known-base", path="know_hf/weights/known-base"), results


def test_the_card_of_the_shipped_weights_is_up_to_date():
    card, _ = rendered()
    assert CARD.read_text(encoding="utf-8") == str(card), (
        "run `python recipes/meta_train/card.py` to render model_cards/known-base.md again"
    )


def test_the_card_says_what_was_measured():
    card, results = rendered()
    skill = results["held_out_skill"]
    rows = [line.split("|")[1:-1] for line in card.content.splitlines() if line.startswith("| ")]
    for predictor, by_role in skill.items():
        row = next(row for row in rows if row[0].strip() == predictor)
        for cell, role in zip(row[1:], ("conv", "fc", "bias"), strict=True):
            assert cell.split()[0] == f"{by_role[role]['skill']:+.4f}"
    assert len(results["trained_on"]) >= 30
    assert not set(results["trained_on"]) & set(results["held_out"])


def test_the_verdict_tells_a_loss_as_a_loss():
    _, results = rendered()
    trained_on = json.loads((SHIPPED_KNOWN / "config.json").read_text())["trained_on"]
    results["held_out_skill"]["known"]["bias"]["skill"] = -0.25
    results["held_out_skill"]["linear"]["bias"]["skill"] = 0.1
    text = str(known_card(results, trained_on, "x", "me/x"))
    assert "- **bias**: worse than no change by 25.0% of its error, and not better than the best" in text
    assert "(linear, +0.1000)" in text


def test_the_front_matter_is_what_the_hub_reads():
    data = ModelCard.load(CARD).data
    assert data.library_name == "know_hf"
    assert data.license == "apache-2.0"
    assert "know_hf" in data.tags
