"""Values as Markdown text, escaped so that no name breaks the page."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias
from urllib.parse import quote

from markupsafe import Markup

Table: TypeAlias = Sequence[Sequence[object]]


_LONGEST_NAME = 120  # characters; longer names are cut


_NO_LETTER = re.compile(r"[^\w /.:-]|_")


_PLAIN_CODE = re.compile(r"[\w .,:;@/+=()\[\]{}*#%^?!'\"~…-]+")


# What is Markdown, HTML or mathematics to the Hub. An underscore inside of a word is none of them, nor is a bracket
# without what would make it a link, nor the sign of a number.
_SYNTAX = re.compile(r"[\\`*<>|~$&]|\](?=[(\[:])|(?<!\w)_|_(?!\w)|^[#>]|^[+=-](?![\d.])|^\d+(?=[.)](?:\s|$))")


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
