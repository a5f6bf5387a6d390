"""Cards of KNOWN weights."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from doubles.card_fields import assert_readable
from doubles.simulated_report import simulated_report
from huggingface_hub import ModelCard

from know_hf import KNOWNConfig
from know_hf.cards import known_card
from know_hf.cards.suite_tables import condensed
from know_hf.prediction import SHIPPED_KNOWN


@pytest.fixture
def results():
    return json.loads((SHIPPED_KNOWN / "results.json").read_text())


def text_of_known(results=None, **options):
    return str(known_card(KNOWNConfig.from_pretrained(SHIPPED_KNOWN), results, title="x", path="me/x", **options))


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
