"""Renders model_cards/known-base.md from what was recorded when the shipped weights were trained.

python recipes/meta_train/card.py
"""

import argparse
from pathlib import Path


def main() -> None:
    import json

    from know_hf.cards import known_card
    from know_hf.prediction import SHIPPED_KNOWN

    results = json.loads((SHIPPED_KNOWN / "results.json").read_text())
    trained_on = json.loads((SHIPPED_KNOWN / "config.json").read_text())["trained_on"]
    card = known_card(results, trained_on, name="known-base", path="know_hf/weights/known-base")
    target = Path(__file__).parents[2] / "model_cards/known-base.md"
    target.write_text(str(card), encoding="utf-8")
    print(f"written to {target}")


def make_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


if __name__ == "__main__":
    make_parser().parse_args()
    main()
