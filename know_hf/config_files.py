"""Reading YAML and JSON configuration files."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def check_keys(content: Mapping[str, Any], known: Sequence[str], source: str) -> None:
    """Raises `ValueError` that names the first key that is not known, and the known one nearest to it."""
    for name in content:
        if name not in known:
            raise ValueError(f"{source}: unknown key {name!r}; {nearest(str(name), known)}")


def nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"


def read_numbers(content: Any) -> Any:
    """What a YAML file holds, with numbers such as 1e-5 at any depth, which PyYAML leaves as strings."""
    if isinstance(content, Mapping):
        return {key: read_numbers(value) for key, value in content.items()}
    return [read_numbers(value) for value in content] if isinstance(content, list) else _scalar(content)


def _scalar(value: Any) -> Any:
    # YAML 1.1, which PyYAML reads, takes 1e-5 for a string: it wants 1.0e-5.
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
