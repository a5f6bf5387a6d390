"""Card of KNOWN weights."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from huggingface_hub import ModelCard, ModelCardData

from ..known import KNOWNConfig, KNOWNModel
from ..markdown import Table
from .base import Card, source
from .suite_tables import better_than_controls, protocols, side_by_side

_SPLIT_TITLES = {
    "held_out_trajectory": "New trajectories of architectures and datasets in the training data",
    "held_out_architecture": "Architectures that are not in the training data",
    "held_out_dataset": "Datasets that are not in the training data",
    "held_out": "Held-out trajectories",
}


@dataclass(kw_only=True)
class KNOWNCard(Card):
    """Card of KNOWN weights, JSON values only. The other fields are those of [`known_card`]."""

    template: ClassVar[str] = "known.md"

    path: str
    variant: str  # config.variant
    num_states: int  # length S of a history
    num_parameters: int  # size of the network, or of each of the three
    trained_on: dict[str, Any] | None = None  # config.trained_on
    results: dict[str, Any] | None = None
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    description: str | None = None
    commands: str | None = None
    limits: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """The first sentence of the card."""
        if not self.comparisons:
            return "Not evaluated: it is unknown whether predictions with these weights help."
        if methods := better_than_controls(self.comparisons):
            return f"Better than every trivial control, such as shrinking the weights: {', '.join(methods)}."
        return "Not shown to help: no prediction beats every trivial control in any suite."

    @property
    def is_on_hub(self) -> bool:
        return source(self.path)["on_hub"]

    @property
    def train_skill(self) -> dict[str, float]:
        """Skill on the training data by role, without roles that nothing was measured for."""
        assert self.results is not None
        by_role = self.results["train_skill"]
        return {role: values["skill"] for role, values in by_role.items() if values["skill"] is not None}

    @property
    def splits(self) -> list["HeldOutSplit"]:
        """The held-out data with the skill on it."""
        assert self.results is not None
        only = {"trajectories": self.results["held_out"], "skill": self.results["held_out_skill"]}
        splits = self.results.get("splits") or {"held_out": only}
        return [HeldOutSplit(name, split["trajectories"], split["skill"]) for name, split in splits.items()]

    @property
    def comparison_tables(self) -> list[Table]:
        """Arms by suites, one table per protocol."""
        return [side_by_side(self.comparisons, protocol) for protocol in protocols(self.comparisons)]

    @property
    def has_published(self) -> bool:
        """Whether the weights published with the paper were compared as well."""
        arms = (arm for report in self.comparisons for result in report["results"] for arm in result["arms"])
        return any(arm.startswith("published-step") for arm in arms)

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Kinds of training trajectories with their numbers."""
        assert self.results is not None
        return _groups(self.results["trained_on"])

    def data(self) -> ModelCardData:
        return ModelCardData(library_name="know_hf", tags=["know_hf", "weight-prediction"], **self.license)


@dataclass(frozen=True)
class HeldOutSplit:
    """One part of the held-out trajectories, with the skill by predictor and role."""

    name: str
    trajectories: list[str]
    skill: Mapping[str, Mapping[str, Mapping[str, Any]]]

    @property
    def num_trajectories(self) -> int:
        return len(self.trajectories)

    @property
    def title(self) -> str:
        return _SPLIT_TITLES.get(self.name, self.name)

    @property
    def roles(self) -> list[str]:
        return list(self.skill["known"])

    @property
    def groups(self) -> list[tuple[str, int]]:
        return _groups(self.trajectories)

    @property
    def table(self) -> Table:
        rows = [["predictor", *self.roles]]
        for predictor, by_role in self.skill.items():
            row = [predictor]
            for value in (by_role[role] for role in self.roles):
                skill = "−∞" if value["skill"] is None else f"{value['skill']:+.4f}"
                row.append(f"{skill} ({value['trajectories_above_zero']}/{value['trajectories']})")
            rows.append(row)
        return rows

    def verdict(self, role: str) -> str:
        """Compare the skill for a role with no change and with the best predictor that learns nothing."""
        # a skill of null is minus infinity: something was predicted where nothing moved
        skills = {
            predictor: -math.inf if by_role[role]["skill"] is None else by_role[role]["skill"]
            for predictor, by_role in self.skill.items()
            if predictor != "published"
        }
        skill = skills.pop("known")
        size = f"{abs(skill):.1%}"
        verb = "reduces" if skill > 0 else "increases"
        text = "equals no change" if size == "0.0%" else f"{verb} the no-change error by {size}"
        if not skills:
            return f"{text}."
        best = max(skills, key=skills.__getitem__)
        comparative = "is better" if skill > skills[best] else "is not better"
        return f"{text}, and {comparative} than the best predictor without learning ({best}, {skills[best]:+.4f})."


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
    """Create the card of KNOWN weights, without network access. The card names what is unknown.

    `results` is the content of the `results.json` from `recipes/meta_train`, and `comparisons` are those of the
    `comparisons.json` from `recipes/compare/summary.py`. The example loads from `path`, a Hub id or folder.
    `description` has sentences on the training data, `commands` the shell commands that reproduce the weights, and
    `limits` sentences on what the weights are not for.

    Returns:
        `ModelCard`: `str(card)` is the README.md, `card.data` its front matter.
    """
    with torch.device("meta"):
        num_parameters = KNOWNModel(config).num_parameters() // max(len(config.roles), 1)
    return KNOWNCard(
        title=title,
        path=path,
        license={"license": license} if license else {},
        variant=config.variant,
        num_states=config.num_states,
        num_parameters=num_parameters,
        trained_on=config.trained_on,
        results=None if results is None else dict(results),
        comparisons=[dict(report) for report in comparisons],
        description=description,
        commands=commands,
        limits=list(limits),
    ).render()


def _groups(names: Sequence[str]) -> list[tuple[str, int]]:
    """Count names that differ only in a trailing number."""
    return sorted(Counter(re.sub(r"[-_. ]*\d+$", "", name) or name for name in names).items())
