"""From a card's dataclass to Markdown: one Jinja environment in which no name that a stranger chose breaks the page.

What a template puts out is escaped as text unless a filter made Markdown of it, and a value that is missing or `None`
is an error: a card has no holes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..markdown import code, fenced, link, markdown, python, size, table, url

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(kw_only=True)
class Card(ABC):
    """What every card has.

    Args:
        title (`str`): Heading of the card.
        repo_id (`str`, *optional*): Where the files are or will be on the Hub; without it, examples name a folder.
        license (`dict[str, str]`, *optional*): `license`, and `license_name` and `license_link` where it is `other`.
    """

    template: ClassVar[str]

    title: str
    repo_id: str | None = None
    license: dict[str, Any] = field(default_factory=dict)

    @abstractmethod
    def data(self) -> ModelCardData:
        """The front matter."""

    def render(self) -> ModelCard:
        """The card; `str` of it is the content of README.md.

        Raises:
            `jinja2.UndefinedError` or `ValueError`: when a value is missing that the template needs.
        """
        return ModelCard(environment().get_template(self.template).render(card=self))


@cache
def environment() -> Environment:
    """The Jinja environment of all cards."""
    # autoescape makes macros give Markup, which `markdown` then leaves as it is
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=markdown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for made_filter in (code, fenced, link, python, size, table, url):
        made.filters[made_filter.__name__] = made_filter
    return made
