"""Base of all cards: the dataclass, the Jinja environment, and where models and datasets come from."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, TypedDict

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id, yaml_dump
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..local_paths import public_name
from ..markdown import code, fenced, link, markdown, python, quantity, size, table, url

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(kw_only=True)
class Card(ABC):
    """A card, rendered from `template`."""

    template: ClassVar[str]

    title: str
    repo_id: str | None = None  # Hub repo of the files; without it, examples load from a folder
    license: dict[str, Any] = field(default_factory=dict)  # with license_name and license_link if it is other

    @abstractmethod
    def data(self) -> ModelCardData:
        """Return the front matter."""

    def render(self) -> ModelCard:
        """Render the card; `str` of it is the content of README.md."""
        return ModelCard(environment().get_template(self.template).render(card=self))


class Source(TypedDict):
    """A model or dataset: Hub id or name of a local folder, and revision."""

    name: str
    on_hub: bool
    revision: str | None


def source(name: str, revision: str | None = None) -> Source:
    """Return where a model or dataset comes from. Of a local folder, only the last part of the path is kept."""
    try:
        validate_repo_id(name)
        on_hub = not Path(name).exists()
    except HFValidationError:
        on_hub = False
    return {"name": name if on_hub else Path(name).name or name, "on_hub": on_hub, "revision": revision}


def shown_folder(path: Path) -> str:
    """Return a folder for code in a card: below the working directory, or only the last part of its path."""
    return f"{public_name(str(path)).removeprefix('.../')}/"


@cache
def environment() -> Environment:
    """Return the Jinja environment of all cards: it escapes every value and rejects missing ones."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,  # so that macros return Markup, which `markdown` does not escape again
        finalize=markdown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {f.__name__: f for f in (code, fenced, link, python, quantity, size, table, url)}
    environment.filters["yaml"] = partial(yaml_dump, sort_keys=False)
    return environment
