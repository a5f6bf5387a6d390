"""From JSON that a stranger wrote to dataclasses: their annotations are the schema.

Nothing is converted, so that what was read is written again byte for byte, and nothing is guessed. Fields that a
dataclass doesn't have are passed over, so that a newer minor version can add some.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from reprlib import Repr
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ..checkpoint import parse_json

T = TypeVar("T")

MAX_STRING = 4096
# control characters, separators of lines, halves of surrogate pairs: they forge lines of cards and steer terminals
_NO_PLAIN_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

_short = Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxstring, _short.maxlong = 2, 2, 2, 60, 30
shorten = _short.repr  # unlike repr, neither as long nor as deep as what it is given


class SchemaError(ValueError):
    """JSON is damaged or does not hold what is expected; the message says what, where and which value."""


@dataclass(frozen=True)
class Rule:
    """What a value has to fulfil besides its type, as metadata of `Annotated`.

    Attributes:
        holds (`Callable[[Any], object]`): Whether a value of the type does.
        words (`str`): What was expected, for the message: `expected {words}`.
    """

    holds: Callable[[Any], object]
    words: str


def read_json(path: Path, max_bytes: int) -> Any:
    """The content of a JSON file that may be hostile.

    Args:
        path (`Path`): An existing file.
        max_bytes (`int`): Its largest size; of a larger file no more than that is read.

    Raises:
        `SchemaError`: when it is larger, not UTF-8, not JSON, nested too deeply, has a key twice, or holds NaN or
            Infinity, which are no JSON.
    """
    with path.open("rb") as handle:
        data = handle.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise SchemaError(f"it has more than {max_bytes / 1e6:.0f} MB")
    try:
        return parse_json(data)
    except ValueError as error:
        raise SchemaError(f"it is not JSON ({error})") from error


def build(kind: type[T], value: Any) -> T:
    """An object of a dataclass from the content of a JSON file.

    Args:
        kind (`type`): A dataclass. Its annotations may be `int`, `float`, `str`, `X | None`, `tuple[X, ...]`,
            `dict[str, X]`, other such dataclasses, and `Annotated[X, Rule(...)]` of these.
        value (`Any`): The content.

    Raises:
        `SchemaError`: when a field is missing, of another type (`true` is no number, `2.0` no whole one), not a finite
            number, no plain text, breaks a rule, or is refused by its dataclass.
    """
    return _build(kind, value, ())


def _build(kind: Any, value: Any, where: tuple[Any, ...]) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        built = _build(arguments[0], value, where)
        for rule in arguments[1:]:
            if not rule.holds(built):
                raise _unexpected(where, value, rule.words)
        return built
    if origin in (Union, UnionType):
        return None if value is None else _build(arguments[0], value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _unexpected(where, value, "a list")
        return tuple(_build(arguments[0], item, (*where, position)) for position, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _unexpected(where, value, "an object")
        for key in value:
            if not _is_text(key):
                raise SchemaError(f"{_place(where)} has the name {shorten(key)}, expected {_PLAIN[str][1]}")
        # the name of an entry goes into a tuple, to tell it from that of a field
        return {key: _build(arguments[1], item, (*where, (key,))) for key, item in value.items()}
    if is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    holds, words = _PLAIN[kind]
    if not holds(value):
        raise _unexpected(where, value, words)
    return value


def _build_dataclass(kind: Any, value: Any, where: tuple[Any, ...]) -> Any:
    if not isinstance(value, dict):
        raise _unexpected(where, value, "an object")
    arguments = {}
    for name, (hint, required) in _fields(kind).items():
        if name in value:
            arguments[name] = _build(hint, value[name], (*where, name))
        elif required:
            raise SchemaError(f"{_place(where) or 'it'} has no {name!r}")
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise SchemaError(f"{_place(where)}: {error}") from error


@cache
def _fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Type of every field, and whether it has no default."""
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: (hints[f.name], f.default is MISSING and f.default_factory is MISSING) for f in fields(kind)}


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**64


def _is_number(value: Any) -> bool:
    # NaN is not below anything; an int of a thousand digits compares but does not convert
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_STRING and not _NO_PLAIN_TEXT.search(value)


_PLAIN: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (_is_whole, "a whole number below 2**64"),
    float: (_is_number, "a finite number"),
    str: (_is_text, f"text of at most {MAX_STRING} characters without control characters"),
}


def _unexpected(where: tuple[Any, ...], value: Any, words: str) -> SchemaError:
    return SchemaError(f"{_place(where) or 'it'} is {shorten(value)}, expected {words}")


def _place(where: tuple[Any, ...]) -> str:
    """`states[0].metrics['eval_loss']` of ("states", 0, "metrics", ("eval_loss",))."""
    text = ""
    for part in where:
        if isinstance(part, tuple):
            text += f"[{shorten(part[0])}]"
        else:
            text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")
