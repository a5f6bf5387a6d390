"""Configuration from YAML files and command-line flags."""

import argparse
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from .terminal import shorten_words

T = TypeVar("T")
_LARGEST_YAML = 100_000
_MOST_NAMES = 50
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def check_keys(content: Mapping[str, Any], known: Sequence[str], source: str) -> None:
    """Raise a `ValueError` that names the first unknown key and the known key nearest to it."""
    for name in content:
        if name not in known:
            raise ValueError(f"{source}: unknown key {name!r:.200}; {nearest(str(name), known)}")


def check_types(content: Mapping[str, Any], cls: type, prefix: str = "") -> None:
    """Raise a `ValueError` that names the first value of the wrong type for its field of a dataclass."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    hints = get_type_hints(cls)
    config = ConfigDict(arbitrary_types_allowed=True, coerce_numbers_to_str=True)
    for name, value in content.items():
        kind = hints[name]
        try:
            valid = TypeAdapter(kind, config=None if is_dataclass(kind) else config).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{prefix}{name}={value!r:.60}: {error.errors()[0]['msg']}") from None
        if isinstance(value, str) and isinstance(valid, int | float) and not isinstance(valid, str):
            raise ValueError(f"{prefix}{name}={value!r:.60}: expected a number or a boolean, not text")


def nearest(name: str, known: Sequence[str]) -> str:
    """Return a hint: the known name closest to `name`, or all known names; of very many, the five nearest."""
    name = name[:200]  # the time of a match grows with the square of the length
    if near := get_close_matches(name, known, n=1):
        return f"did you mean {near[0]!r}?"
    if len(known) > _MOST_NAMES:
        return f"the nearest of {len(known)} keys are {', '.join(get_close_matches(name, known, n=5, cutoff=0))}"
    return f"valid keys: {', '.join(known)}"


def read_yaml(path: str | Path, hint: str) -> dict[str, Any]:
    """Read the mapping in a YAML file; `hint` says what to do if it holds none.

    Raises:
        `FileNotFoundError`, `IsADirectoryError`: when the path is not that of a file.
        `ValueError`: when the file is not UTF-8 or does not hold a mapping, and as [`parse_yaml`].
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a YAML file")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain a mapping of keys to values, got {content!r:.60}; {hint}")
    return content


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML.

    Raises:
        `ValueError`: for a syntax error, a key that appears twice in a mapping, a value that JSON lacks, such as a
            date, or more than 100,000 values, those of aliases included. The message names the source.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.load(text, _make_loader())
    except Exception as error:  # the constructors of yaml raise any kind of error for values such as `!!int x`
        reason = " ".join(f"{error or type(error).__name__}"[:500].split())
        raise ValueError(f"{source} is not valid YAML: {reason}") from error
    values, count = [content], 0
    while values:
        value, count = values.pop(), count + 1
        if count > _LARGEST_YAML:
            raise ValueError(f"{source} has more than {_LARGEST_YAML:,} values, those of aliases included; shorten it")
        if isinstance(value, dict):
            values.extend((*value, *value.values()))
        elif isinstance(value, list):
            values.extend(value)
        elif not isinstance(value, str | int | float | None):
            raise ValueError(f"{source} has the value {value!r:.60} of type {type(value).__name__}; quote it")
        elif isinstance(value, str) and not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError(f"{source} has the text {value!r:.60}, which is not Unicode")
    return content


@cache
def _make_loader() -> Any:
    import yaml

    class UniqueKeyLoader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if repeated := [key for key, count in Counter(keys).items() if count > 1]:
                raise yaml.MarkedYAMLError(problem=f"the key {repeated[0]!r:.60} appears twice in one mapping")
            return node

    return UniqueKeyLoader


def read_numbers(content: Any) -> Any:
    """Convert numbers such as `1e-5`, which YAML 1.1 reads as strings, at any depth."""
    if isinstance(content, Mapping):
        return {key: read_numbers(value) for key, value in content.items()}
    if isinstance(content, list):
        return [read_numbers(value) for value in content]
    return float(content) if isinstance(content, str) and _NUMBER.fullmatch(content) else content


def build(cls: type[T], content: Mapping[str, Any], source: str) -> T:
    """Build a dataclass, and those nested in it, from a mapping of field names to values.

    Strings are converted to the type of the field, as flags give them; `"none"` and `"null"` mean `None`. A key
    without a value keeps the default of its field. `source` says in errors where the values come from.

    Raises:
        `ValueError`: for an unknown or missing key, or a value of the wrong type.
    """
    from pydantic import TypeAdapter, ValidationError

    hints = get_type_hints(cls)
    check_keys(content, [field.name for field in fields(cls)], source)  # type: ignore[arg-type]
    values = {}
    for name, value in content.items():
        if isinstance(value, str) and value.lower() in ("none", "null"):
            value = None
        if nested := [kind for kind in _kinds(hints[name]) if is_dataclass(kind)]:
            if isinstance(value, Mapping):
                value = build(nested[0], value, f"{source}, {name}")  # type: ignore[arg-type]
        if value is not None or NoneType in _kinds(hints[name]):
            values[name] = value
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as invalid:
        error = invalid.errors()[0]
        if error["type"] == "value_error":  # from the checks of the dataclass
            raise ValueError(shorten_words(f"{source}: {error['ctx']['error']}")) from None
        if missing := [str(error["loc"][0]) for error in invalid.errors() if error["type"] == "missing"]:
            names = ", ".join(map(flag, missing))
            raise ValueError(f"{source}: missing {names}; pass them or set them in --config FILE") from None
        name = ".".join(map(str, error["loc"]))
        raise ValueError(f"{source}: {name}={error['input']!r:.200}: {error['msg']}") from None


def default_of(field: Field[Any]) -> Any:
    """Return the default of a field of a dataclass."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add a flag for every field of a dataclass; the help text is the `help` of the field's metadata.

    A field that holds a mapping or a dataclass takes `KEY=VALUE` pairs. [`build`] checks the types.
    """
    hints = get_type_hints(cls)
    for field in fields(cls):
        kinds = _kinds(hints[field.name])
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": field.metadata["help"].replace("%", "%%")}
        if _holds_pairs(kinds):
            options |= {"nargs": "*", "metavar": "KEY=VALUE"}
        elif bool in kinds:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = "N" if kinds & {int, float} else field.name.split("_")[-1].upper()
        if not any(field.default is silent for silent in (MISSING, None, False)):
            options["help"] += f" (default: {field.default:g})" if float in kinds else f" (default: {field.default})"
        parser.add_argument(flag(field.name), **options)


def read_flags(namespace: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Return the values of the given flags by field name; raise a `ValueError` for a pair other than `KEY=VALUE`."""
    values = {field.name: getattr(namespace, field.name) for field in fields(cls) if hasattr(namespace, field.name)}
    hints = get_type_hints(cls)
    return {
        name: _read_pairs(flag(name), value) if _holds_pairs(_kinds(hints[name])) else value
        for name, value in values.items()
    }


def _read_pairs(flag: str, pairs: Sequence[str]) -> dict[str, Any] | None:
    if [pair.lower() for pair in pairs] == ["none"]:
        return None
    content = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{flag} {pair}: expected KEY=VALUE")
        content[key] = read_numbers(parse_yaml(value, f"{flag} {pair}"))
    return content


def name_and_value(text: str) -> tuple[str, str]:
    """Split `NAME=VALUE`; the type of a flag."""
    name, _, value = text.partition("=")
    if not (name and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def flag(name: str) -> str:
    """Return the flag of an argument: `--output-dir` for `output_dir`."""
    return f"--{name.replace('_', '-')}"


def _kinds(hint: Any) -> set[Any]:
    """Types that a field accepts: the members of a union, generics without their arguments."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return {get_origin(member) or member for member in members}


def _holds_pairs(kinds: set[Any]) -> bool:
    return any(kind is dict or is_dataclass(kind) for kind in kinds)
