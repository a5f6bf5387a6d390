"""Renders model_cards/known-base.md from what was recorded when the shipped weights were trained.

python recipes/meta_train/card.py
"""

import argparse
from pathlib import Path

DESCRIPTION = (
    "Trained by this project from scratch, on trajectories of its own: 7 states each, of small nets (a plain CNN with"
    " and without BatchNorm, a ResNet with BatchNorm and a ViT) on MNIST and Fashion-MNIST. Ratio, learning rate and"
    " batch size were drawn with a fixed seed as published (ratio in [0.3, 0.9], learning rate in [1e-5, 4e-3], batch"
    " size from 32). The held-out trajectories were named before anything was recorded, and nothing was chosen on"
    " them."
)
COMMANDS = r"""
python recipes/collect/collect.py --output-dir known_data --workers 2
python recipes/meta_train/meta_train.py --config recipes/meta_train/known_base.yaml \
    --trajectories known_data --output_dir known-base
"""
LIMITS = (
    "Small nets on small grey images; no text, no LoRA, no pretrained model among them. Parameters of normalisation"
    " layers were not learned from.",
)


def main() -> None:
    target = Path(__file__).parents[2] / "model_cards/known-base.md"
    target.write_text(render(), encoding="utf-8")
    print(f"written to {target}")


def render() -> str:
    """The card's text."""
    import json

    from know_hf import KNOWNConfig
    from know_hf.cards import known_card
    from know_hf.prediction import SHIPPED_KNOWN

    card = known_card(
        KNOWNConfig.from_pretrained(SHIPPED_KNOWN),
        json.loads((SHIPPED_KNOWN / "results.json").read_text(encoding="utf-8")),
        title="known-base",
        path="know_hf/weights/known-base",
        license="apache-2.0",
        description=DESCRIPTION,
        commands=COMMANDS,
        limits=LIMITS,
    )
    return str(card)


def make_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


if __name__ == "__main__":
    make_parser().parse_args()
    main()
