"""Markdown from untrusted values: every name is escaped, so that none changes the page."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias
from urllib.parse import quote

from markupsafe import Markup

Table: TypeAlias = Sequence[Sequence[object]]

_LONGEST_NAME = 120  # characters
_SPECIAL = re.compile(r"[^\w /.:-]|_")
_PLAIN_CODE = re.compile(r"[\w .,:;@/+=()\[\]{}*#%^?!'\"~…-]+")
# Syntax of Markdown, HTML and mathematics on the Hub. An underscore inside a word is none, nor is a bracket that
# starts no link, nor the sign of a number.
_SYNTAX = re.compile(r"[\\`*<>|~$&]|\](?=[(\[:])|(?<!\w)_|_(?!\w)|^[#>]|^[+=-](?![\d.])|^\d+(?=[.)](?:\s|$))")


def clean(value: object) -> str:
    """Return one line of text without invisible characters."""
    return " ".join(_printable(str(value), " ").split())


def markdown(value: object) -> Markup:
    """Escape a value as text of a paragraph or table cell. Markdown from this module passes unchanged."""
    if hasattr(value, "__html__"):
        return Markup(value)
    if value is None:
        raise ValueError("the template printed None; print what is unknown in words")
    return Markup(_SYNTAX.sub(lambda match: _entities(match[0]), clean(value)))


def code(value: object) -> Markup:
    """Format a name as inline code."""
    text = clean(value)
    if len(text) > _LONGEST_NAME:
        text = text[: _LONGEST_NAME - 1] + "…"
    if _PLAIN_CODE.fullmatch(text):
        return Markup(f"`{text}`")
    return Markup("<code>%s</code>") % Markup(_SPECIAL.sub(lambda match: _entities(match[0]), text) or " ")


def fenced(text: str, language: str) -> Markup:
    """Format text as a block of code."""
    text = "\n".join(_printable(line.expandtabs(), "") for line in text.strip("\n").split("\n"))
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return Markup(f"{fence}{language}\n{text}\n{fence}")


def python(value: object) -> Markup:
    """Return the Python literal of a value, with double quotes if possible."""
    if isinstance(value, Mapping):
        return Markup(f"{{{', '.join(f'{python(key)}: {python(item)}' for key, item in value.items())}}}")
    literal = repr(value)
    return Markup(f'"{literal[1:-1]}"' if literal[0] == "'" and '"' not in literal else literal)


def python_call(name: str, arguments: Mapping[str, Any]) -> Markup:
    """Return a Python call with keyword arguments."""
    return Markup(f"{name}({', '.join(f'{key}={python(value)}' for key, value in arguments.items())})")


def link(repo_id: str, kind: str = "model") -> Markup:
    """Return a link to a Hub repo. The id must be valid."""
    return Markup(f"[{repo_id}](https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo_id})")


def url(path: str) -> Markup:
    """Quote a relative path for a link."""
    return Markup(quote(clean(path)))


def table(rows: Table, numeric: Sequence[bool] = ()) -> Markup:
    """Format a table, the head first; `numeric` says which columns to align to the right."""
    lines = [Markup(f"| {' | '.join(map(markdown, row))} |") for row in rows]
    rule = " | ".join("---:" if is_number else "---" for is_number in numeric or [False] * len(rows[0]))
    return Markup("\n".join([lines[0], f"| {rule} |", *lines[1:]]))


def quantity(count: int, one: str, many: str = "") -> str:
    """Return a number with its noun: "1 draw", "2 draws"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def size(count: int) -> str:
    """Format a number of bytes."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def percent(share: float) -> str:
    """Format a share with two or three digits, and never a small one as `0.00%`."""
    if 0 < share < 1e-4:
        return "less than 0.01%"
    return f"{share:.{0 if share >= 0.1 or not share else 1 if share >= 0.01 else 2}%}"


def _printable(text: str, replacement: str) -> str:
    return "".join(character if character.isprintable() else replacement for character in text)


def _entities(text: str) -> str:
    return "".join(f"&#{ord(character)};" for character in text)
