"""Renders model_cards/known-base.md from what was recorded when the shipped weights were trained.

python recipes/meta_train/card.py
"""

import argparse
from pathlib import Path

DESCRIPTION = (
    "Trained by this project from scratch, on trajectories of its own, 7 states each: small convolutional nets,"
    " ResNets, MobileNet-like nets and ViTs on Fashion-MNIST, small BERT, DistilBERT and Llama classifiers from"
    " scratch on IMDB, and a pretrained MiniLM fine-tuned on IMDB, by LoRA and whole. Ratio, learning rate, optimizer,"
    " batch size, augmentation and lengths were drawn with a fixed seed (recipes/collect/known_base.yaml)."
    " Architectures, datasets and trajectories that are held out were named before anything was recorded, and nothing"
    " was chosen on them. The row of the published weights is of those that came with the paper, read from their"
    " files (`--published_weights FOLDER`)."
)
COMMANDS = r"""
python recipes/collect/collect.py --output-dir known_data --workers 2
python recipes/meta_train/meta_train.py --config recipes/meta_train/known_base.yaml \
    --trajectories known_data --cache_dir known_samples --output_dir known-base
"""
LIMITS = (
    "Its skill is near zero: the next less forgotten state is predicted hardly better than by no change at all, and"
    " biases of other architectures and datasets worse. Of a fine-tuned MiniLM it made the source task worse (above,"
    " the suite `reviews`).",
    "Small nets on small grey images and short texts, and one pretrained encoder of 23M parameters; nothing larger."
    " Parameters of normalisation layers were not learned from.",
    "The l1 objective counts distances in units of the weights: trajectories that move little, such as those of"
    " LoRA and of pretrained models, had little say.",
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
