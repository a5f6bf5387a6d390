"""Model cards, rendered from recorded results by the Jinja templates of the package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TEMPLATES = Path(__file__).parent / "templates"


def known_card(results: Mapping[str, Any], trained_on: Mapping[str, Any], name: str, path: str) -> ModelCard:
    """Card of KNOWN weights.

    Args:
        results (`Mapping`): Content of the `results.json` that `recipes/meta_train` writes.
        trained_on (`Mapping`): `config.trained_on` of the weights.
        name (`str`): Title of the card.
        path (`str`): Hub id or folder that the example loads from.

    Returns:
        `ModelCard`: `str(card)` is the README.md.
    """
    skill = results["held_out_skill"]

    def verdict(role: str) -> str:
        value = skill["known"][role]["skill"]
        rivals = {predictor: by_role[role]["skill"] for predictor, by_role in skill.items() if predictor != "known"}
        best = max(rivals, key=lambda predictor: rivals[predictor])
        against_nothing = "better" if value > 0 else "worse" if value < 0 else "no better"
        against_best = "better than" if value > rivals[best] else "not better than"
        return (
            f"{against_nothing} than no change by {abs(value):.1%} of its error, and {against_best} the best predictor"
            f" without learning ({best}, {rivals[best]:+.4f})."
        )

    return ModelCard.from_template(
        ModelCardData(library_name="know_hf", license="apache-2.0", tags=["know_hf", "weight-prediction"]),
        template_path=str(TEMPLATES / "known.md"),
        name=name,
        path=path,
        roles=list(skill["known"]),
        verdict=verdict,
        covered=trained_on["roles"],
        **results,
    )
