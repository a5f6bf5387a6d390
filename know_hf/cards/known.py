"""The card of KNOWN weights: what they were trained on, and how well they run forgetting backwards."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from huggingface_hub import ModelCard, ModelCardData

from ..configuration_known import KNOWN_ROLES, KNOWNConfig
from .provenance import source
from .rendering import Card, Table


@dataclass(kw_only=True)
class KNOWNCard(Card):
    """All that is known of KNOWN weights; JSON values only.

    Args:
        path (`str`): Hub id or folder that the example loads from.
        num_states (`int`): Length S of a history.
        num_parameters (`int`): Of each of the three networks.
        trained_on (`dict`, *optional*): `config.trained_on`.
        results (`dict`, *optional*): Content of the `results.json` that `recipes/meta_train` writes.
        description (`str`, *optional*): Sentences on the data they were trained on.
        commands (`str`, *optional*): Shell commands that make them again.
        limits (`list[str]`): Sentences on what they are not for.
    """

    template: ClassVar[str] = "known.md"

    path: str
    num_states: int
    num_parameters: int
    trained_on: dict[str, Any] | None = None
    results: dict[str, Any] | None = None
    description: str | None = None
    commands: str | None = None
    limits: list[str] = field(default_factory=list)

    @property
    def is_on_hub(self) -> bool:
        return source(self.path)["on_hub"]

    @property
    def roles(self) -> list[str]:
        """The roles whose skill was measured."""
        return [] if self.results is None else list(self.results["held_out_skill"]["known"])

    @property
    def skill_table(self) -> Table:
        assert self.results is not None
        rows: list[Sequence[object]] = [["predictor", *self.roles]]
        for predictor, by_role in self.results["held_out_skill"].items():
            found = [by_role[role] for role in self.roles]
            cells = [f"{one['skill']:+.4f} ({one['trajectories_above_zero']}/{one['trajectories']})" for one in found]
            rows.append([predictor, *cells])
        return rows

    @property
    def coverage_table(self) -> Table:
        assert self.trained_on is not None
        head = ["role", "trajectories", "tensors", "transitions"]
        rows: list[Sequence[object]] = [[*head, "largest weight", "mean displacement", "largest displacement"]]
        for role in sorted(self.trained_on["roles"], key=KNOWN_ROLES.index):
            found = self.trained_on["roles"][role]
            counts = [f"{found[name]:,}" for name in head[1:]]
            moves = [f"{found[f'{which}_displacement']:.1e}" for which in ("mean", "largest")]
            rows.append([role, *counts, f"{found['largest_weight']:.2f}", *moves])
        return rows

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Names of the trajectories without their numbers, and how many there are of each."""
        assert self.results is not None
        names = (re.sub(r"[-_. ]*\d+$", "", name) or name for name in self.results["trained_on"])
        return sorted(Counter(names).items())

    def verdict(self, role: str) -> str:
        """Sentence on the skill for a role, against no change and against the best predictor without learning."""
        assert self.results is not None
        skill = self.results["held_out_skill"]
        value = skill["known"][role]["skill"]
        against_nothing = "better" if value > 0 else "worse" if value < 0 else "no better"
        sentence = f"{against_nothing} than no change by {abs(value):.1%} of its error"
        rivals = {predictor: by_role[role]["skill"] for predictor, by_role in skill.items() if predictor != "known"}
        if not rivals:
            return f"{sentence}."
        best = max(rivals, key=lambda predictor: rivals[predictor])
        against_best = "better than" if value > rivals[best] else "not better than"
        return f"{sentence}, and {against_best} the best predictor without learning ({best}, {rivals[best]:+.4f})."

    def data(self) -> ModelCardData:
        return ModelCardData(library_name="know_hf", tags=["know_hf", "weight-prediction"], **self.license)


def known_card(
    config: KNOWNConfig,
    results: Mapping[str, Any] | None = None,
    *,
    title: str,
    path: str,
    license: str | None = None,
    description: str | None = None,
    commands: str | None = None,
    limits: Sequence[str] = (),
) -> ModelCard:
    """Card of KNOWN weights. Asks no network and writes nothing; what isn't given is said not to be known.

    Args:
        config ([`KNOWNConfig`]): Of the weights.
        results (`Mapping`, *optional*): Content of the `results.json` that `recipes/meta_train` writes.
        title (`str`): Heading of the card.
        path (`str`): Hub id or folder that the example loads from.
        license (`str`, *optional*): License of the weights.
        description (`str`, *optional*): Sentences on the data they were trained on.
        commands (`str`, *optional*): Shell commands that make them again.
        limits (sequence of `str`, *optional*): Sentences on what they are not for.

    Returns:
        `ModelCard`: `str(card)` is the README.md, `card.data` its front matter.
    """
    return KNOWNCard(
        title=title,
        path=path,
        license={"license": license} if license else {},
        num_states=config.num_states,
        num_parameters=_num_parameters(config),
        trained_on=config.trained_on,
        results=None if results is None else dict(results),
        description=description,
        commands=commands,
        limits=list(limits),
    ).render()


def _num_parameters(config: KNOWNConfig) -> int:
    from ..modeling_known import KNOWNModel

    with torch.device("meta"):
        return KNOWNModel(config).num_parameters() // len(config.roles)
