"""Render model_cards/known-base.md from the results stored with the shipped weights.

python recipes/meta_train/card.py
"""

import argparse
from pathlib import Path

DESCRIPTION = (
    "Trained from scratch by this project on its own trajectories of 7 states: small convolutional nets, ResNets,"
    " MobileNet-like nets and ViTs on Fashion-MNIST; small BERT, DistilBERT and Llama classifiers on IMDB;"
    " a pretrained MiniLM fine-tuned on IMDB, with LoRA and with all weights. Ratio, learning rate, optimizer, batch"
    " size, augmentation and lengths were drawn with a fixed seed (recipes/collect/known_base.yaml). The held-out"
    " architectures, datasets and trajectories were fixed before any recording and not used for any choice. The row"
    " published is measured with the weights published with the paper (--published-weights FOLDER)."
)
COMMANDS = r"""
python recipes/collect/collect.py --output-dir known_data --workers 2
python recipes/meta_train/meta_train.py --config recipes/meta_train/known_base.yaml \
    --trajectories known_data --cache-dir known_samples --output-dir known-base
"""
LIMITS = (
    "The skill is near zero: predictions of the next less forgotten state are hardly better than no change, and worse"
    " for biases of other architectures and datasets. Predictions for a fine-tuned MiniLM were worse on the source"
    " task (suite reviews above).",
    "The training data covers small nets on small grey images and short texts, and one pretrained encoder with 23M"
    " parameters. It covers no larger models and no parameters of normalisation layers.",
    "The l1 objective measures distances in units of the weights: trajectories with small displacements, such as those"
    " of LoRA and of pretrained models, had little influence.",
)


def main() -> None:
    target = Path(__file__).parents[2] / "model_cards/known-base.md"
    target.write_text(render(), encoding="utf-8")
    print(f"Wrote {target}")


def render() -> str:
    """Return the text of the card."""
    import json

    from know_hf import KNOWNConfig
    from know_hf.cards import known_card
    from know_hf.cards.suite_tables import COMPARISONS_NAME
    from know_hf.prediction import SHIPPED_KNOWN

    card = known_card(
        KNOWNConfig.from_pretrained(SHIPPED_KNOWN),
        json.loads((SHIPPED_KNOWN / "results.json").read_text(encoding="utf-8")),
        title="known-base",
        path="know_hf/known/weights/known-base",
        comparisons=json.loads((SHIPPED_KNOWN / COMPARISONS_NAME).read_text(encoding="utf-8")),
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
