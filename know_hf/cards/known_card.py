"""The card of KNOWN weights: what they were trained on, and how well they run forgetting backwards."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from huggingface_hub import ModelCard, ModelCardData

from ..known.configuration_known import KNOWN_ROLES, KNOWNConfig
from ..markdown import Table
from .base import Card
from .provenance import source
from .suite_tables import better_than_controls, protocols, side_by_side

_SPLITS = {
    "held_out_trajectory": "Other trajectories of the architectures and datasets that it was trained on",
    "held_out_architecture": "Architectures that it was not trained on",
    "held_out_dataset": "Datasets that it was not trained on",
    "held_out": "Held-out trajectories",
}


@dataclass(kw_only=True)
class KNOWNCard(Card):
    """All that is known of KNOWN weights; JSON values only.

    Args:
        path (`str`): Hub id or folder that the example loads from.
        num_states (`int`): Length S of a history.
        num_parameters (`int`): Of each of the three networks.
        trained_on (`dict`, *optional*): `config.trained_on`.
        results (`dict`, *optional*): Content of the `results.json` that `recipes/meta_train` writes.
        comparisons (`list[dict]`): Reports of comparisons in which they are an arm, condensed
            ([`~know_hf.cards.suite_tables.condensed`]).
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
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    description: str | None = None
    commands: str | None = None
    limits: list[str] = field(default_factory=list)

    @property
    def is_on_hub(self) -> bool:
        return source(self.path)["on_hub"]

    @property
    def train_skill(self) -> dict[str, float]:
        """Skill on what was trained on, of the roles that it has and of which something moves there."""
        assert self.results is not None
        by_role = self.results["train_skill"]
        return {role: found["skill"] for role, found in by_role.items() if found["skill"] is not None}

    @property
    def splits(self) -> list["HeldOutSplit"]:
        """What was held out, and how well it was predicted."""
        assert self.results is not None
        only = {"trajectories": self.results["held_out"], "skill": self.results["held_out_skill"]}
        recorded = self.results.get("splits") or {"held_out": only}
        return [HeldOutSplit(name, found["trajectories"], found["skill"]) for name, found in recorded.items()]

    @property
    def num_held_out(self) -> int:
        return sum(len(split.trajectories) for split in self.splits)

    @property
    def comparison_tables(self) -> list[Table]:
        """Arms by suites, one table a protocol."""
        return [side_by_side(self.comparisons, protocol) for protocol in protocols(self.comparisons)]

    @property
    def better_than_controls(self) -> list[str]:
        return better_than_controls(self.comparisons)

    @property
    def has_published(self) -> bool:
        """Whether weights that were given as `published` were compared too."""
        results = (result for report in self.comparisons for result in report["results"])
        return any(arm.startswith("published-step") for result in results for arm in result["arms"])

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
        """Kinds of the trajectories that were trained on, and how many there are of each."""
        assert self.results is not None
        return _groups(self.results["trained_on"])

    def data(self) -> ModelCardData:
        return ModelCardData(library_name="know_hf", tags=["know_hf", "weight-prediction"], **self.license)


@dataclass(frozen=True)
class HeldOutSplit:
    """One part of the trajectories that were held out.

    Args:
        name (`str`): As in `results.json`.
        trajectories (`list[str]`): Their names.
        skill (`dict`): From predictor to role to what was measured.
    """

    name: str
    trajectories: list[str]
    skill: Mapping[str, Mapping[str, Mapping[str, Any]]]

    @property
    def title(self) -> str:
        return _SPLITS.get(self.name, self.name)

    @property
    def roles(self) -> list[str]:
        return list(self.skill["known"])

    @property
    def groups(self) -> list[tuple[str, int]]:
        return _groups(self.trajectories)

    @property
    def table(self) -> Table:
        rows: list[Sequence[object]] = [["predictor", *self.roles]]
        for predictor, by_role in self.skill.items():
            found = [by_role[role] for role in self.roles]
            above = [f"({one['trajectories_above_zero']}/{one['trajectories']})" for one in found]
            rows.append([predictor, *(f"{_signed(one['skill'])} {of}" for one, of in zip(found, above, strict=True))])
        return rows

    def verdict(self, role: str) -> str:
        """Sentence on the skill for a role, against no change and against the best predictor without learning."""
        value = _number(self.skill["known"][role]["skill"])
        against_nothing = "better" if value > 0 else "worse" if value < 0 else "no better"
        sentence = f"{against_nothing} than no change by {abs(value):.1%} of its error"
        rivals = {
            predictor: _number(by_role[role]["skill"])
            for predictor, by_role in self.skill.items()
            if predictor not in ("known", "published")
        }
        if not rivals:
            return f"{sentence}."
        best = max(rivals, key=lambda predictor: rivals[predictor])
        against_best = "better than" if value > rivals[best] else "not better than"
        return f"{sentence}, and {against_best} the best predictor without learning ({best}, {rivals[best]:+.4f})."


def known_card(
    config: KNOWNConfig,
    results: Mapping[str, Any] | None = None,
    *,
    title: str,
    path: str,
    comparisons: Sequence[Mapping[str, Any]] = (),
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
        comparisons (sequence of `Mapping`, *optional*): Content of the `comparisons.json` that
            `recipes/compare/summary.py` writes.
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
        comparisons=[dict(report) for report in comparisons],
        description=description,
        commands=commands,
        limits=list(limits),
    ).render()


def _groups(names: Sequence[str]) -> list[tuple[str, int]]:
    """Names without their numbers, and how many there are of each."""
    return sorted(Counter(re.sub(r"[-_. ]*\d+$", "", name) or name for name in names).items())


def _number(skill: float | None) -> float:
    """A skill; minus infinity, where nothing moved and something was predicted, is no number in JSON."""
    return -math.inf if skill is None else skill


def _signed(skill: float | None) -> str:
    return "−∞" if skill is None else f"{skill:+.4f}"


def _num_parameters(config: KNOWNConfig) -> int:
    from ..known.modeling_known import KNOWNModel

    with torch.device("meta"):
        return KNOWNModel(config).num_parameters() // len(config.roles)
