"""From a card's dataclass to Markdown: one Jinja environment in which no name that a stranger chose breaks the page.

What a template puts out is escaped as text unless a filter made Markdown of it, and a value that is missing or `None`
is an error: a card has no holes.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeAlias
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

Table: TypeAlias = Sequence[Sequence[object]]

TEMPLATES = Path(__file__).parents[1] / "templates"

_LONGEST_NAME = 120  # characters; longer names are cut
_NO_LETTER = re.compile(r"[^\w /.:-]|_")
_PLAIN_CODE = re.compile(r"[\w .,:;@/+=()\[\]{}*#%^?!'\"~…-]+")
# What is Markdown, HTML or mathematics to the Hub. An underscore inside of a word is none of them, nor is a bracket
# without what would make it a link, nor the sign of a number.
_SYNTAX = re.compile(r"[\\`*<>|~$&]|\](?=[(\[:])|(?<!\w)_|_(?!\w)|^[#>]|^[+=-](?![\d.])|^\d+(?=[.)](?:\s|$))")


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


def clean(value: object) -> str:
    """Text of one line without characters that can't be seen or encoded."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def markdown(value: object) -> Markup:
    """A value as text of a Markdown paragraph or table cell; what is Markdown already stays as it is.

    Raises:
        `ValueError`: for `None`.
    """
    if hasattr(value, "__html__"):
        return Markup(value)
    if value is None:
        raise ValueError("a template put out a value that is None; it must say what is not known")
    return Markup(_SYNTAX.sub(lambda found: _entities(found[0]), clean(value)))


def code(value: object) -> Markup:
    """A name in the type of code, in a paragraph or table cell."""
    text = clean(value)
    if len(text) > _LONGEST_NAME:
        text = text[: _LONGEST_NAME - 1] + "…"
    if _PLAIN_CODE.fullmatch(text):
        return Markup(f"`{text}`")
    return Markup("<code>%s</code>") % Markup(_NO_LETTER.sub(lambda found: _entities(found[0]), text) or " ")


def fenced(text: str, language: str) -> Markup:
    """A block of code, whatever is in it."""
    text = text.strip("\n").encode("utf-8", "replace").decode()
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return Markup(f"{fence}{language}\n{text}\n{fence}")


def python(value: object) -> Markup:
    """A value as Python writes it, strings in double quotes where they can be."""
    if isinstance(value, Mapping):
        return Markup(f"{{{', '.join(f'{python(key)}: {python(item)}' for key, item in value.items())}}}")
    literal = repr(value)
    return Markup(f'"{literal[1:-1]}"' if literal[0] == "'" and '"' not in literal else literal)


def python_call(name: str, arguments: Mapping[str, Any]) -> Markup:
    """A call with keyword arguments as Python writes it."""
    return Markup(f"{name}({', '.join(f'{key}={python(value)}' for key, value in arguments.items())})")


def link(repo_id: str, kind: str = "model") -> Markup:
    """A link to a repo on the Hub; its id must be a valid one."""
    return Markup(f"[{repo_id}](https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo_id})")


def url(path: str) -> Markup:
    """A relative path as a link takes it."""
    return Markup(quote(clean(path)))


def table(rows: Table) -> Markup:
    """A table; the first row is its head."""
    lines = [Markup(f"| {' | '.join(map(markdown, row))} |") for row in rows]
    return Markup("\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]))


def size(count: int) -> str:
    """Bytes in words."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def _entities(text: str) -> str:
    return "".join(f"&#{ord(character)};" for character in text)
